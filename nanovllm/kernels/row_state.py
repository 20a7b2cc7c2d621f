"""Columns of the row table: one int32 row on the device for each running sequence.

The table is ``[max_num_seqs + 1, BLOCK_TABLE + blocks per sequence]`` int32, with as many columns
more for each further cache group: see `Config.cache_windows`. Its last row is the padding row: its
length stays 0 and every padded slot of a CUDA graph's batch points at it.
"""

LAST_TOKEN = 0  # the newest token, whose K/V is not yet in the cache
LENGTH = 1  # tokens of the sequence, LAST_TOKEN included; 0 in the padding row
TEMPERATURE = 2  # float32 bits; SKIPPED: `Ops.sample` leaves the row alone
SEED = 3  # two words: low, high
ADAPTER = 5  # 1 + the slot of its LoRA adapter; 0: none
BLOCK_TABLE = 6  # block ids from here to the end of the row, group after group

SKIPPED = -1.0
