"""Block management of models with sliding windows: one block table for each cache group.

All attention layers with equal windows are a cache group: `Config.cache_windows`. A group has a
pool of blocks of its own, and each sequence has a block table for each group. Entry i of every
table stands for the tokens [i * block_size, (i + 1) * block_size).

The first group has the largest window, or none: it decides what fits, as without windows. The
others follow it. Each block that they hold stands for a held block of the first group, with the
same tokens. So they need no tokens, hashes and prefix ids of their own, and never run out.

A query at position p sees the keys in (p - window, p]. A block before that is given back at once,
and what stays behind in the table is stale: nothing reads it any more.
"""

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Items

from nanovllm.config import Config
from nanovllm.engine.block_manager import Block, BlockManager
from nanovllm.engine.prefix_units import UnitBlockManager
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels import row_state
from nanovllm.kernels.cache_units import COPY_UNIT, MIN_COPIED_TOKENS

NO_BLOCK = 0  # in a table where no block was ever held: any valid id, as nothing reads it


def first_visible_block(position: int, window: int, block_size: int) -> int:
    """Index of the first block of which a query at `position` sees a token."""
    return max(0, position - window + 1) // block_size


def max_window_blocks(config: Config, window: int) -> int:
    """The most blocks of a group with `window` that all sequences together hold at any time.

    Let b be the block size. A step that computes the tokens [s, e) of a sequence, t = e - s of
    them, needs the blocks from (s - window + 1) // b to (e - 1) // b. Since floor(x + d) - floor(x)
    <= ceil(d), these are at most ceil((window - 1) / b) + 1 + ceil((t - 1) / b). A sequence that is
    not in the step holds no more than with t = 1. All t of a prefill step add up to
    max_num_batched_tokens at most, so the last terms of max_num_seqs sequences add up to
    max_num_batched_tokens // b + max_num_seqs at most.
    """
    block_size = config.kvcache_block_size
    per_seq = -(-(window - 1) // block_size) + 2
    return config.max_num_seqs * per_seq + config.max_num_batched_tokens // block_size


def num_group_blocks(config: Config, num_blocks: int) -> list[int]:
    """Blocks of each group's pool, if the first has `num_blocks`.

    No other group ever holds more blocks than the first one does, see `WindowPool`.
    """
    windows = [window for window in config.cache_windows[1:] if window is not None]
    return [num_blocks, *(min(num_blocks, max_window_blocks(config, w)) for w in windows)]


def most_blocks(config: Config, per_block: Items[int], num_bytes: int) -> int:
    """The most blocks of the first group with which all groups' pools fit in `num_bytes`.

    per_block: bytes of one block of each group.
    """
    windows = [window for window in config.cache_windows[1:] if window is not None]
    # Pools that grow with the first one, up to their bounds: the smallest bound first.
    growing = sorted(
        zip((max_window_blocks(config, w) for w in windows), per_block[1:], strict=True)
    )
    bytes_of_all = sum(per_block)
    for bound, bytes_of_one in growing:
        if num_bytes // bytes_of_all <= bound:
            break
        num_bytes -= bound * bytes_of_one
        bytes_of_all -= bytes_of_one
    return num_bytes // bytes_of_all


def new_block_manager(config: Config) -> BlockManager:
    """The block manager for the model's cache groups, with nothing in its pools."""
    num_blocks, windows = config.num_kvcache_blocks, config.cache_windows
    assert num_blocks is not None
    args = num_blocks, config.kvcache_block_size, config.enable_prefix_caching
    if windows == (None,):
        block_size = config.kvcache_block_size
        has_units = block_size % COPY_UNIT == 0 and block_size > MIN_COPIED_TOKENS
        return UnitBlockManager(*args, COPY_UNIT) if has_units else BlockManager(*args)
    sizes = num_group_blocks(config, num_blocks)[1:]
    pools = [
        WindowPool(size, window)
        for size, window in zip(sizes, windows[1:], strict=True)
        if window is not None
    ]
    return WindowedBlockManager(*args, window=windows[0], pools=pools)


class WindowPool:
    """The blocks of one group behind the first.

    A block belongs to one block of the first group, its leader, from the time it is taken for new
    tokens until either of the two is taken for other ones. Both hold the same tokens meanwhile,
    entry i of some tables. A sequence that holds the block holds the leader as well. So as many
    blocks are held here as leaders there, or fewer.

    Args:
        num_blocks: blocks in the pool.
        window: the group's.

    Attributes:
        free_block_ids: those that nobody holds, in the order in which they are taken.
        block_ids: this group's blocks by their leaders.
    """

    def __init__(self, num_blocks: int, window: int) -> None:
        self.window = window
        self.free_block_ids: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.block_ids: dict[int, int] = {}
        self.leaders: list[int | None] = [None] * num_blocks
        self.ref_counts = [0] * num_blocks

    def take(self, leader: int) -> int:
        """A block for new tokens, which are written to block `leader` of the first group too."""
        assert self.free_block_ids, "more blocks are held than `num_group_blocks` proves possible"
        assert leader not in self.block_ids
        block_id = next(iter(self.free_block_ids))
        self._part(block_id)
        self.leaders[block_id] = leader
        self.block_ids[leader] = block_id
        self.hold(block_id)
        return block_id

    def hold(self, block_id: int) -> None:
        """Keep a block for one sequence more."""
        if self.ref_counts[block_id] == 0:
            del self.free_block_ids[block_id]
        self.ref_counts[block_id] += 1

    def release(self, block_id: int) -> None:
        """Let go of a block for one sequence; it keeps its content until it is taken."""
        assert self.ref_counts[block_id] > 0
        self.ref_counts[block_id] -= 1
        if self.ref_counts[block_id] == 0:
            self.free_block_ids[block_id] = None

    def forget(self, leader: int) -> None:
        """Block `leader` of the first group, which nobody holds, is taken for other tokens."""
        block_id = self.block_ids.get(leader)
        if block_id is not None:
            self._part(block_id)
            self.free_block_ids.move_to_end(block_id, last=False)  # KeyError: somebody holds it

    def _part(self, block_id: int) -> None:
        leader = self.leaders[block_id]
        if leader is not None:
            del self.block_ids[leader]
            self.leaders[block_id] = None


class WindowedBlockManager(BlockManager):
    """`BlockManager` of the first cache group, which takes the other groups along.

    If all layers have windows, the first group has one too. Its blocks are then given back as well,
    but a prompt is only admitted where all of it fits, and only a prefix that is cached from its
    first token on is found.

    Args:
        num_blocks: blocks of the first group.
        block_size: tokens per block.
        enable_prefix_caching: see `BlockManager`.
        window: of the first group; None: it sees everything.
        pools: of the other groups.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool,
        window: int | None,
        pools: list[WindowPool],
    ) -> None:
        super().__init__(num_blocks, block_size, enable_prefix_caching)
        self.window = window
        self.pools = pools
        # Of each group's table, the leading entries that are not held (any more), and the position
        # of the first query that lets go of another.
        self.num_released: dict[Sequence, list[int]] = {}
        self._next_release: dict[Sequence, int] = {}

    def begin_step(self, running: Iterable[Sequence]) -> None:
        """Give back what no query from here on sees.

        The step in flight may still read these blocks. Whoever gets them writes in a later step,
        which the stream orders behind it.
        """
        for seq in running:
            if seq.num_computed_tokens >= self._next_release[seq]:
                self._release_behind(seq, seq.num_computed_tokens)

    def _release_behind(self, seq: Sequence, position: int) -> None:
        """Give back the blocks of `seq` that a query at `position` does not see."""
        released = self.num_released[seq]
        next_releases = []
        if self.window is not None:
            first = first_visible_block(position, self.window, self.block_size)
            if self.enable_prefix_caching:  # the next block to cache needs its parent's prefix id
                first = min(first, max(0, seq.num_hashed_blocks - 1))
            for block_id in seq.block_table[released[0] : first]:
                self._release(self.blocks[block_id])
            released[0] = max(released[0], first)
            next_releases.append((released[0] + 1) * self.block_size + self.window - 1)
        for group, pool in enumerate(self.pools, 1):
            first = first_visible_block(position, pool.window, self.block_size)
            for block_id in seq.further_tables[group - 1][released[group] : first]:
                pool.release(block_id)
            released[group] = max(released[group], first)
            next_releases.append((released[group] + 1) * self.block_size + pool.window - 1)
        self._next_release[seq] = min(next_releases)

    def match_prefix(self, seq: Sequence) -> list[int]:
        """As `BlockManager.match_prefix`, cut to where no group lacks what the next token sees."""
        matched = super().match_prefix(seq)
        num_usable, num_found = len(matched), -1
        while num_usable != num_found:
            num_found = num_usable
            for pool in self.pools:
                num_usable = self._num_usable(pool, matched[:num_usable], seq.num_tokens)
        return matched[:num_usable]

    def _num_usable(self, pool: WindowPool, matched: list[int], num_tokens: int) -> int:
        """The most leading blocks after which the pool has all that the next query sees."""
        num_usable = len(matched)
        while num_usable > 0:
            first = self._first_to_share(pool, num_usable, num_tokens)
            visible = range(first, num_usable)
            missing = next((i for i in visible if matched[i] not in pool.block_ids), None)
            if missing is None:
                break
            num_usable = missing  # any more, and the next query sees the missing one
        return num_usable

    def _first_to_share(self, pool: WindowPool, num_matched: int, num_tokens: int) -> int:
        """Index of the first block that is needed after `num_matched` cached ones."""
        # A full hit still computes its last token.
        position = min(num_matched * self.block_size, num_tokens - 1)
        return first_visible_block(position, pool.window, self.block_size)

    def allocate(self, seq: Sequence, matched: list[int]) -> None:
        """As `BlockManager.allocate`; other groups get blocks for new tokens chunk by chunk."""
        super().allocate(seq, matched)
        firsts = [self._first_to_share(pool, len(matched), seq.num_tokens) for pool in self.pools]
        tables = []
        for pool, first in zip(self.pools, firsts, strict=True):
            shared = [pool.block_ids[leader] for leader in matched[first:]]
            for block_id in shared:
                pool.hold(block_id)
            tables.append([NO_BLOCK] * first + shared)
        seq.further_tables = tables
        self.num_released[seq], self._next_release[seq] = [0, *firsts], 0

    def may_append(self, seq: Sequence) -> None:
        """See `BlockManager.may_append`."""
        super().may_append(seq)
        self._follow(seq, len(seq.block_table))

    def cache_blocks(self, seq: Sequence, num_computed_tokens: int) -> None:
        """See `BlockManager.cache_blocks`; before it, a chunk's tokens get blocks in all groups."""
        self._follow(seq, self.num_blocks_for(num_computed_tokens))
        super().cache_blocks(seq, num_computed_tokens)

    def _follow(self, seq: Sequence, num_blocks: int) -> None:
        """Extend the other groups' tables to `num_blocks` blocks, like the first group's."""
        for pool, table in zip(self.pools, seq.further_tables, strict=True):
            for leader in seq.block_table[len(table) : num_blocks]:
                table.append(pool.take(leader))

    def deallocate(self, seq: Sequence) -> None:
        """See `BlockManager.deallocate`."""
        del self._next_release[seq]
        num_released, *further = self.num_released.pop(seq)
        for pool, table, first in zip(self.pools, seq.further_tables, further, strict=True):
            for block_id in reversed(table[first:]):
                pool.release(block_id)
        seq.further_tables = []
        del seq.block_table[:num_released]
        super().deallocate(seq)

    def _find(self, block_hash: int, tokens: bytes, parent_prefix_id: int) -> Block | None:
        """As in `BlockManager`; of equal blocks one that as few groups as possible lack."""
        found = (self.blocks[block_id] for block_id in self.hash_to_block_ids.get(block_hash, ()))
        equal = (
            block
            for block in found
            if block.parent_prefix_id == parent_prefix_id and block.tokens == tokens
        )
        return min(equal, key=self._num_lacking, default=None)

    def _num_lacking(self, block: Block) -> int:
        """How many groups have taken their block for other tokens."""
        return sum(block.block_id not in pool.block_ids for pool in self.pools)

    def _forget(self, block: Block) -> None:
        for pool in self.pools:
            pool.forget(block.block_id)
        super()._forget(block)


class SentTables:
    """How much of the other groups' tables the device knows, of each row of the row table."""

    def __init__(self) -> None:
        self._num_sent: dict[tuple[int, int], int] = {}  # by row and group

    def new_entries(self, seq: Sequence, row_width: int, is_new: bool) -> list[tuple[int, int]]:
        """(flat index, block id) of what was not sent yet.

        Args:
            seq: a running sequence.
            row_width: int32 words of a row in the row table.
            is_new: nothing of this sequence was sent.
        """
        assert seq.row is not None
        num_columns = (row_width - row_state.BLOCK_TABLE) // (1 + len(seq.further_tables))
        entries: list[tuple[int, int]] = []
        for group, table in enumerate(seq.further_tables, 1):
            num_sent = 0 if is_new else self._num_sent[seq.row, group]
            column = row_state.BLOCK_TABLE + group * num_columns + num_sent
            entries += enumerate(table[num_sent:], seq.row * row_width + column)
            self._num_sent[seq.row, group] = len(table)
        return entries
