"""The unit of copies within the KV cache. This file imports no torch: the scheduler reads it."""

COPY_UNIT = 64  # tokens whose K/V are copied together from one KV block to another
