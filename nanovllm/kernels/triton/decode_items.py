"""Columns of the items of a `DecodePlan`, one for each split of a row."""

import triton.language as tl

ROW = tl.constexpr(0)
BEGIN = tl.constexpr(1)  # first token of the split
END = tl.constexpr(2)  # and the one after its last
FIRST_ITEM = tl.constexpr(3)  # item of the row's first split; the others follow it
NUM_SPLITS = tl.constexpr(4)  # of the row; 0: no split, the program has nothing to do
ITEM_SIZE = tl.constexpr(5)
