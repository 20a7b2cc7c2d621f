"""The sizes of copies within the KV cache. This file imports no torch: the scheduler reads it."""

COPY_UNIT = 8  # tokens whose K/V are copied together from one KV block to another
# Fewer are computed: copies take a kernel in every layer, and many prompts begin with some token.
MIN_COPIED_TOKENS = 16
