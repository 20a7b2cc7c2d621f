"""Prefixes that end within a block: a new block gets a copy of what it has in common with another.

Blocks are shared whole. A prompt that goes on like a cached block, but not to its end, has to write
other tokens behind, so it gets a block of its own. The leading units of COPY_UNIT tokens that are
equal are copied into it and not computed. Every layer copies after it has stored the K/V of the
step's tokens and before its attention reads. So the other block may be one that the same step
computes: of prompts that come together the first one computes what all have in common.

The last block of a sequence that has ended is seldom full. A conversation goes on behind all of its
tokens, and copies them. A prompt that leaves it before its end does not: the same prompt, given
again, is computed as before.
"""

import sys
from bisect import bisect_left, bisect_right, insort
from collections.abc import Hashable, Iterable

import numpy as np

from nanovllm.engine.block_manager import Block, BlockManager
from nanovllm.engine.packed_tokens import TOKEN_BYTES, count_equal, pack_tokens
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels.cache_units import MIN_COPIED_TOKENS


class Beginnings:
    """The tokens of blocks, those of each key sorted; a key tells at least what is before them.

    So those with most in common with other tokens are beside their place. They are sorted when
    somebody looks at them: most are never looked at.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Hashable, bytes]] = {}  # of each block
        self._sorted: dict[Hashable, list[tuple[bytes, int]]] = {}
        self._unsorted: dict[Hashable, set[int]] = {}  # further blocks

    def of_key(self, key: Hashable) -> list[tuple[bytes, int]]:
        """Tokens and ids of the blocks with this key, sorted; not to be changed."""
        for block_id in self._unsorted.pop(key, ()):
            insort(self._sorted.setdefault(key, []), (self._entries[block_id][1], block_id))
        return self._sorted.get(key, [])

    def set(self, block_id: int, key: Hashable, tokens: bytes) -> None:
        """Enter a block, or other tokens of it."""
        self.pop(block_id)
        self._entries[block_id] = key, tokens
        self._unsorted.setdefault(key, set()).add(block_id)

    def pop(self, block_id: int) -> None:
        """Forget a block, if it was entered."""
        if block_id not in self._entries:
            return
        key, tokens = self._entries.pop(block_id)
        unsorted = self._unsorted.get(key, set())
        if block_id in unsorted:
            unsorted.remove(block_id)
            if not unsorted:
                del self._unsorted[key]
        else:
            entries = self._sorted[key]
            del entries[bisect_left(entries, (tokens, block_id))]
            if not entries:
                del self._sorted[key]

    def longest_in(self, key: Hashable, tokens: bytes, least: int) -> tuple[int, bytes] | None:
        """The block with most tokens, `least` bytes of them or more, with which `tokens` begin."""
        entries = self.of_key(key)
        while len(tokens) >= least:
            # What `tokens` begin with is before them. Others between end their common tokens.
            place = bisect_right(entries, (tokens, sys.maxsize))
            if not place:
                return None
            found, block_id = entries[place - 1]
            num_equal = count_equal(tokens, found) * TOKEN_BYTES
            if num_equal == len(found):
                return (block_id, found) if num_equal >= least else None
            tokens = tokens[:num_equal]
        return None


class UnitBlockManager(BlockManager):
    """A `BlockManager` that also finds blocks which begin like the next block of a prompt.

    These are the blocks in the prefix cache, and those that are not full: of running sequences, and
    of ended ones until somebody takes the block.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens per block, a multiple of `unit`.
        enable_prefix_caching: as of `BlockManager`.
        unit: tokens that are copied together.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool, unit: int
    ) -> None:
        super().__init__(num_blocks, block_size, enable_prefix_caching)
        self.unit = unit
        # Of cached blocks and of running sequences' last ones, by the prefix id before them.
        self._beginnings = Beginnings()
        # Last blocks of ended sequences. Their keys also tell the first tokens: prompts that begin
        # otherwise have nothing to do with them.
        self._ends = Beginnings()
        # Of the step that is scheduled: free blocks that it copies from, and by block that it
        # copies into, the units' sources one after another: (first unit, number of units).
        self._free_sources: set[int] = set()
        self._sources: dict[int, list[tuple[int, int]]] = {}

    def begin_step(self, running: Iterable[Sequence]) -> None:
        """See `BlockManager.begin_step`. Who takes a block from here on writes after the copies."""
        self._free_sources.clear()
        self._sources.clear()

    def can_allocate(self, seq: Sequence, matched: list[int], num_reserved: int = 0) -> bool:
        """See `BlockManager.can_allocate`; what the step copies from is not taken."""
        num_sources = len(self._free_sources.difference(matched)) if self._free_sources else 0
        return super().can_allocate(seq, matched, num_reserved + num_sources)

    def allocate(self, seq: Sequence, matched: list[int]) -> None:
        """As `BlockManager.allocate`; says what is copied into the block after the matched ones."""
        source, seq.copied_tokens = self._find_source(seq, matched)
        if source is not None and source.ref_count == 0:
            self.free_block_ids.move_to_end(source.block_id)  # the last one to be taken
            self._free_sources.add(source.block_id)
        super().allocate(seq, matched)
        seq.copies, seq.num_copied_tokens = [], len(seq.copied_tokens) // TOKEN_BYTES
        if source is None:
            return
        per_block = self.block_size // self.unit
        block_id, num_done = seq.block_table[len(matched)], 0
        # All copies of a step are made at once: none may read what another writes.
        runs = [*self._sources.get(source.block_id, ())]
        num_resolved = sum(number for _, number in runs)
        runs.append((source.block_id * per_block + num_resolved, per_block))
        self._sources[block_id] = own_runs = []
        for first, most in runs:
            if number := min(most, seq.num_copied_tokens // self.unit - num_done):
                seq.copies.append((block_id * per_block + num_done, first, number))
                own_runs.append((first, number))
                num_done += number

    def _find_source(self, seq: Sequence, matched: list[int]) -> tuple[Block | None, bytes]:
        """The block with most in common behind the matched ones, and the tokens of these units."""
        if not self.enable_prefix_caching or not seq.may_read_prefix_cache:
            return None, b""
        index, keys = len(matched), seq.block_keys
        prefix_id = self._prefix_before(seq, matched, index)
        start = index * self.block_size
        following = self._beginnings.of_key(prefix_id)
        end_key = self._end_key(prefix_id, seq, start)
        if not following and not self._ends.of_key(end_key):
            return None, b""
        tokens = keys[index][1] if index < len(keys) else pack_tokens(seq.token_ids[start:])
        unit_bytes = self.unit * TOKEN_BYTES
        # The last token is computed in any case, as its logits are needed.
        most = min(self.block_size - self.unit, seq.num_tokens - 1 - start)
        before_last = tokens[: (seq.num_tokens - 1 - start) * TOKEN_BYTES]
        tokens = tokens[: most // self.unit * unit_bytes]
        source, copied = None, b""
        more = -(-MIN_COPIED_TOKENS // self.unit) * unit_bytes
        place = bisect_left(following, (tokens,))
        for others, block_id in following[max(0, place - 1) : place + 1]:
            if len(tokens) < more or tokens[:more] != others[:more]:
                continue
            block = self.blocks[block_id]
            # A free block that is copied from is one less for the sequence.
            if block.ref_count or self.can_allocate(seq, matched, 1):
                num_units = count_equal(tokens, others, self.unit)
                source, copied = block, tokens[: num_units * unit_bytes]
                more = len(copied) + unit_bytes
        end = self._ends.longest_in(end_key, before_last, more)
        if end is not None and self.can_allocate(seq, matched, 1):
            block_id, others = end
            source = self.blocks[block_id]
            copied = tokens[: len(others) // unit_bytes * unit_bytes]
        return source, copied

    def deallocate(self, seq: Sequence) -> None:
        """See `BlockManager.deallocate`; the last block may be copied from until it is taken."""
        # The newest token has no K/V yet.
        num_known = min(max(seq.num_tokens - 1, seq.num_prompt_tokens), seq.num_computed_tokens)
        index, num_last = divmod(num_known, self.block_size)
        is_findable = self.enable_prefix_caching and index == seq.num_hashed_blocks
        if not is_findable or num_last < MIN_COPIED_TOKENS:
            super().deallocate(seq)
            return
        block_id, start = seq.block_table[index], num_known - num_last
        key = self._end_key(self._prefix_before(seq, seq.block_table, index), seq, start)
        super().deallocate(seq)
        self._ends.set(block_id, key, pack_tokens(seq.token_ids[start:num_known]))

    def _end_key(self, prefix_id: int, seq: Sequence, start: int) -> Hashable:
        return prefix_id, *seq.token_ids[start : start + MIN_COPIED_TOKENS]

    def cache_blocks(self, seq: Sequence, num_computed_tokens: int) -> None:
        """See `BlockManager.cache_blocks`; the last block need not be full."""
        first = seq.num_hashed_blocks
        super().cache_blocks(seq, num_computed_tokens)
        if not self.enable_prefix_caching:
            return
        for index in range(first, self.num_blocks_for(num_computed_tokens)):
            block = self.blocks[seq.block_table[index]]
            prefix_id = self._prefix_before(seq, seq.block_table, index)
            start = index * self.block_size
            tokens = block.tokens or pack_tokens(seq.token_ids[start:num_computed_tokens])
            self._beginnings.set(block.block_id, prefix_id, tokens)

    def _hold(self, block: Block) -> None:
        super()._hold(block)
        self._free_sources.discard(block.block_id)

    def _release(self, block: Block) -> None:
        super()._release(block)
        if block.ref_count == 0 and block.hash is None:
            self._beginnings.pop(block.block_id)

    def _forget(self, block: Block) -> None:
        self._beginnings.pop(block.block_id)
        self._ends.pop(block.block_id)
        super()._forget(block)


def copied_units(copies: list[tuple[int, int, int]]) -> np.ndarray:
    """`Sequence.copies` as the [C, 2] int32 pairs of units that `PrefillMetadata` has."""
    runs = np.array(copies, dtype=np.int32).reshape(-1, 3)
    lengths = runs[:, 2]
    within = np.arange(lengths.sum(), dtype=np.int32)
    within -= np.repeat(np.cumsum(lengths, dtype=np.int32) - lengths, lengths)
    return np.repeat(runs[:, :2], lengths, axis=0) + within[:, None]
