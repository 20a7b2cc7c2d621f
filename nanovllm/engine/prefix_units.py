"""Prefixes that end within a block: a new block gets a copy of what it has in common with another.

Blocks are shared whole. A prompt that goes on like a cached block, but not to its end, has to write
other tokens behind, so it gets a block of its own. The leading units of COPY_UNIT tokens that are
equal are copied into it and not computed. Every layer copies after it has stored the K/V of the
step's tokens and before its attention reads. So the other block may be one that the same step
computes: of prompts that come together the first one computes what all have in common.
"""

from collections.abc import Iterable

from nanovllm.engine.block_manager import Block, BlockManager
from nanovllm.engine.sequence import Sequence

# The prefix id before a block, and the tokens that it begins with: a number of units.
Beginning = tuple[int, tuple[int, ...]]


class UnitBlockManager(BlockManager):
    """A `BlockManager` that also finds blocks which begin like the next block of a prompt.

    These are the blocks in the prefix cache, and those of running sequences that are not full yet.

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
        self._block_ids: dict[Beginning, dict[int, None]] = {}  # as ordered sets
        self._beginnings: dict[int, list[Beginning]] = {}  # of each block, the shortest first
        # Of the step that is scheduled: what it copies from, and the units, from target to source.
        self._sources: set[int] = set()
        self._copies: dict[int, int] = {}

    def begin_step(self, running: Iterable[Sequence]) -> None:
        """See `BlockManager.begin_step`. Who takes a block from here on writes after the copies."""
        self._sources.clear()
        self._copies.clear()

    def can_allocate(self, seq: Sequence, matched: list[int], num_reserved: int = 0) -> bool:
        """See `BlockManager.can_allocate`; what the step copies from is not taken."""
        sources = (self._sources & self.free_block_ids.keys()).difference(matched)
        return super().can_allocate(seq, matched, num_reserved + len(sources))

    def allocate(self, seq: Sequence, matched: list[int]) -> None:
        """As `BlockManager.allocate`; says what is copied into the block after the matched ones."""
        seq.copies, seq.num_copied_tokens = [], 0
        source, num_units = self._find_source(seq, matched)
        if source is None:
            super().allocate(seq, matched)
            return
        if source.ref_count == 0:
            self.free_block_ids.move_to_end(source.block_id)  # the last one to be taken
        self._sources.add(source.block_id)
        super().allocate(seq, matched)
        per_block = self.block_size // self.unit
        first = seq.block_table[len(matched)] * per_block
        for index in range(num_units):
            unit = source.block_id * per_block + index
            # All copies of a step are made at once: none may read what another writes.
            self._copies[first + index] = unit = self._copies.get(unit, unit)
            seq.copies.append((first + index, unit))
        seq.num_copied_tokens = num_units * self.unit

    def _find_source(self, seq: Sequence, matched: list[int]) -> tuple[Block | None, int]:
        """The block with most in common behind the matched ones, and how many units these are."""
        if not self.enable_prefix_caching or not seq.may_read_prefix_cache:
            return None, 0
        start = len(matched) * self.block_size
        # The last token is computed in any case, as its logits are needed.
        most = min(self.block_size - self.unit, seq.num_tokens - 1 - start) // self.unit
        prefix_id = self.blocks[matched[-1]].prefix_id if matched else seq.features.prefix_root
        for num_units in range(most, 0, -1):
            tokens = tuple(seq.token_ids[start : start + num_units * self.unit])
            block_ids = self._block_ids.get((prefix_id, tokens))
            if block_ids is None:
                continue
            # A free block that is copied from is one less for the sequence.
            has_room = self.can_allocate(seq, matched, 1)
            blocks = map(self.blocks.__getitem__, block_ids)
            source = next((block for block in blocks if has_room or block.ref_count), None)
            return source, num_units
        return None, 0

    def cache_blocks(self, seq: Sequence, num_computed_tokens: int) -> None:
        """See `BlockManager.cache_blocks`; the last block need not be full."""
        first = seq.num_hashed_blocks
        super().cache_blocks(seq, num_computed_tokens)
        if not self.enable_prefix_caching:
            return
        for index in range(first, self.num_blocks_for(num_computed_tokens)):
            parent = self.blocks[seq.block_table[index - 1]] if index else None
            prefix_id = parent.prefix_id if parent else seq.features.prefix_root
            beginnings = self._beginnings.setdefault(seq.block_table[index], [])
            start = index * self.block_size
            num_tokens = min(self.block_size - self.unit, num_computed_tokens - start)
            for num_units in range(len(beginnings) + 1, num_tokens // self.unit + 1):
                tokens = tuple(seq.token_ids[start : start + num_units * self.unit])
                beginnings.append((prefix_id, tokens))
                self._block_ids.setdefault(beginnings[-1], {})[seq.block_table[index]] = None

    def _release(self, block: Block) -> None:
        super()._release(block)
        if block.ref_count == 0 and block.hash is None:
            self._forget_beginnings(block)

    def _forget(self, block: Block) -> None:
        self._forget_beginnings(block)
        super()._forget(block)

    def _forget_beginnings(self, block: Block) -> None:
        for beginning in self._beginnings.pop(block.block_id, ()):
            block_ids = self._block_ids[beginning]
            del block_ids[block.block_id]
            if not block_ids:
                del self._block_ids[beginning]
