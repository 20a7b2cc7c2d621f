"""The paged KV cache's bookkeeping: who holds which block, and which full blocks can be shared.

A block is held (ref_count > 0) or free. A free block keeps its content, and its entry in the prefix
cache, until it is taken for something else; free blocks are taken oldest first.
"""

from collections import OrderedDict
from collections.abc import Iterable
from itertools import count

import xxhash

from nanovllm.engine.packed_tokens import pack_tokens
from nanovllm.engine.sequence import Sequence

ROOT = 0  # the prefix id of "no block before", unless the sequence has another one


class Block:
    """One block of the cache.

    While the block is in the prefix cache, `prefix_id` names the exact token prefix that ends with
    it and `parent_prefix_id` the one that ends before it: two blocks have equal prefix ids if and
    only if their whole prefixes are equal, whatever the hash says.
    """

    __slots__ = ("block_id", "hash", "parent_prefix_id", "prefix_id", "ref_count", "tokens")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.hash: int | None = None
        self.tokens = b""  # of `pack_tokens`
        self.prefix_id = ROOT
        self.parent_prefix_id = ROOT


class BlockManager:
    """Gives blocks to sequences, with sharing of equal prefixes.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens per block, any number >= 1.
        enable_prefix_caching: find and keep equal prefixes; off: nothing is hashed.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        # Insertion order is the order of reuse; removal from the middle is O(1).
        self.free_block_ids: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        # Several blocks may hold equal content; each is listed under the hash.
        self.hash_to_block_ids: dict[int, list[int]] = {}
        self._new_prefix_id = count(ROOT + 1)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds, cached ones included."""
        return len(self.free_block_ids)

    @staticmethod
    def compute_hash(tokens: bytes, prefix: int | None = None) -> int:
        """xxh64 over the parent's hash (8 bytes, little endian; absent for None) and int64 ids."""
        digest = xxhash.xxh64()
        if prefix is not None:
            digest.update(prefix.to_bytes(8, "little"))
        digest.update(tokens)
        return digest.intdigest()

    def begin_step(self, running: Iterable[Sequence]) -> None:
        """Called before a step is scheduled. All blocks are held until their sequence ends."""

    def match_prefix(self, seq: Sequence) -> list[int]:
        """Ids of the cached blocks that hold the leading full blocks of `seq`; changes nothing."""
        matched: list[int] = []
        if not self.enable_prefix_caching:
            return matched
        prefix_id = seq.features.prefix_root
        for index in range(seq.num_tokens // self.block_size):
            block = self._find(*self._block_key(seq, index), prefix_id)
            if block is None:
                break
            matched.append(block.block_id)
            prefix_id = block.prefix_id
        return matched

    def can_allocate(self, seq: Sequence, matched: list[int], num_reserved: int = 0) -> bool:
        """Whether all tokens of `seq` fit, with `num_reserved` blocks left free afterwards."""
        num_new = self.num_blocks_for(seq.num_tokens) - len(matched)
        num_matched_free = sum(self.blocks[block_id].ref_count == 0 for block_id in matched)
        return self.num_free_blocks - num_matched_free - num_new >= num_reserved

    def allocate(self, seq: Sequence, matched: list[int]) -> None:
        """Give `seq` its matched blocks and new ones for the rest of its tokens."""
        assert not seq.block_table
        # Matched blocks leave the free list first, so that none of them is taken as a new one.
        for block_id in matched:
            self._hold(self.blocks[block_id])
        seq.block_table.extend(matched)
        seq.num_hashed_blocks = len(matched)
        self.append_blocks(seq, self.num_blocks_for(seq.num_tokens))

    def may_append(self, seq: Sequence) -> None:
        """Add the block that the next decode step of `seq` writes to, if it is not held yet."""
        self.append_blocks(seq, self.num_blocks_for(seq.num_tokens_with_pending))

    def append_blocks(self, seq: Sequence, num_blocks: int) -> None:
        """Extend the block table of `seq` to `num_blocks`; never shortens it."""
        while len(seq.block_table) < num_blocks:
            block = self.blocks[next(iter(self.free_block_ids))]
            self._forget(block)
            self._hold(block)
            seq.block_table.append(block.block_id)

    def deallocate(self, seq: Sequence) -> None:
        """Release the blocks of `seq`, the deepest first: tails are reused before prefixes."""
        for block_id in reversed(seq.block_table):
            self._release(self.blocks[block_id])
        seq.block_table.clear()
        seq.num_hashed_blocks = 0

    def reset_prefix_cache(self) -> bool:
        """Forget what the blocks hold; False, and no change, if one of them is in use."""
        if self.num_free_blocks < len(self.blocks):
            return False
        for block in self.blocks:
            self._forget(block)
        return True

    def cache_blocks(self, seq: Sequence, num_computed_tokens: int) -> None:
        """Enter the full blocks among the first `num_computed_tokens` tokens in the prefix cache.

        These tokens must be confirmed, and their K/V written by steps launched already.
        """
        if not self.enable_prefix_caching:
            return
        for index in range(seq.num_hashed_blocks, num_computed_tokens // self.block_size):
            parent = self._prefix_before(seq, seq.block_table, index)
            block = self.blocks[seq.block_table[index]]
            block_hash, tokens = self._block_key(seq, index)
            twin = self._find(block_hash, tokens, parent)
            block.prefix_id = twin.prefix_id if twin else next(self._new_prefix_id)
            block.parent_prefix_id = parent
            block.hash, block.tokens = block_hash, tokens
            self.hash_to_block_ids.setdefault(block_hash, []).append(block.block_id)
            seq.num_hashed_blocks = index + 1

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def _block_key(self, seq: Sequence, index: int) -> tuple[int, bytes]:
        keys, root = seq.block_keys, seq.features.prefix_root or None
        while (depth := len(keys)) <= index:
            start = depth * self.block_size
            tokens = pack_tokens(seq.token_ids[start : start + self.block_size])
            keys.append((self.compute_hash(tokens, keys[-1][0] if keys else root), tokens))
        return keys[index]

    def _prefix_before(self, seq: Sequence, table: list[int], index: int) -> int:
        """The prefix id that ends before block `index` of `table`; those before are cached."""
        return self.blocks[table[index - 1]].prefix_id if index else seq.features.prefix_root

    def _find(self, block_hash: int, tokens: bytes, parent_prefix_id: int) -> Block | None:
        for block_id in self.hash_to_block_ids.get(block_hash, ()):
            block = self.blocks[block_id]
            if block.parent_prefix_id == parent_prefix_id and block.tokens == tokens:
                return block
        return None

    def _hold(self, block: Block) -> None:
        if block.ref_count == 0:
            del self.free_block_ids[block.block_id]
        block.ref_count += 1

    def _release(self, block: Block) -> None:
        assert block.ref_count > 0
        block.ref_count -= 1
        if block.ref_count == 0:
            self.free_block_ids[block.block_id] = None

    def _forget(self, block: Block) -> None:
        if block.hash is None:
            return
        block_ids = self.hash_to_block_ids[block.hash]
        block_ids.remove(block.block_id)
        if not block_ids:
            del self.hash_to_block_ids[block.hash]
        block.hash, block.tokens, block.prefix_id = None, b"", ROOT
