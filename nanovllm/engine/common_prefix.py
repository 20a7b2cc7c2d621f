"""Which tokens a decode step reads once for all its sequences: those that all begin with."""

from collections.abc import Sequence as Items

from nanovllm.engine.packed_tokens import count_equal, pack_tokens
from nanovllm.engine.sequence import Sequence

# Fewer cost more than they save: reading the common tokens apart takes a kernel in every layer.
MIN_SPARED_TOKENS = 8192


def num_common_tokens(seqs: list[Sequence], block_size: int) -> int:
    """How many leading tokens a decode step of these sequences is to read once.

    Their K/V are read from the first sequence's blocks. They are fewer than any sequence has, as
    each computes its newest token itself.
    """
    num_common = count_common([seq.block_table for seq in seqs]) * block_size
    num_common += _count_copied(seqs, num_common)
    num_spared = (len(seqs) - 1) * num_common
    return num_common if num_spared >= MIN_SPARED_TOKENS else 0


def count_common(lists: Items[list[int]]) -> int:
    """How many leading elements all lists share."""
    # What the smallest and the largest have in common, all in between have too.
    lowest, highest = min(lists), max(lists)
    num_common = 0
    for element, other in zip(lowest, highest, strict=False):
        if element != other:
            break
        num_common += 1
    return num_common


def _count_copied(seqs: list[Sequence], start: int) -> int:
    """How many equal tokens follow the common blocks, which end at `start`.

    Each sequence has a block of its own there. As everything before is equal, equal tokens have
    equal K/V, be they copied (`prefix_units`) or computed. Without copies it is not worth a look.
    """
    most = max(seq.num_copied_tokens for seq in seqs)
    if most == 0 or len({seq.features.prefix_root for seq in seqs}) > 1:
        return 0
    following = [
        seq.copied_tokens
        if seq.copied_tokens and seq.num_shared_tokens == start
        else pack_tokens(seq.token_ids[start : start + most])
        for seq in seqs
    ]
    num_equal = count_equal(min(following), max(following))
    return min(num_equal, min(seq.num_computed_tokens for seq in seqs) - 1 - start)
