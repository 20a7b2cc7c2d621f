"""When a decode step reads the blocks that all its sequences share once for all of them."""

# Fewer cost more than they save: reading the common blocks apart takes a kernel in every layer.
MIN_SPARED_BLOCK_READS = 32


def num_common_blocks(block_tables: list[list[int]]) -> int:
    """How many leading blocks a decode step of these tables is to read once."""
    num_common = count_common_blocks(block_tables)
    num_spared = (len(block_tables) - 1) * num_common
    return num_common if num_spared >= MIN_SPARED_BLOCK_READS else 0


def count_common_blocks(block_tables: list[list[int]]) -> int:
    """How many leading blocks all tables share."""
    # What the smallest and the largest have in common, all in between have too.
    lowest, highest = min(block_tables), max(block_tables)
    num_common = 0
    for block_id, other in zip(lowest, highest, strict=False):
        if block_id != other:
            break
        num_common += 1
    return num_common
