"""A plugin of pytest, `-p fast_interpreter`: Triton's interpreter without what it does for nothing.

No result differs.
"""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.language import core  # noqa: F401 (patched, as one of this module's languages)
from triton.runtime import interpreter

_scalar_dtype = cache(interpreter._get_np_dtype)


def _numpy_dtype(dtype: tl.dtype) -> np.dtype:
    """Without a new table of all dtypes for each value."""
    scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _scalar_dtype(scalar)


interpreter._get_np_dtype = _numpy_dtype
# The language is replaced once, not again for each function that a kernel calls.
interpreter._patch_lang(_numpy_dtype)
interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
# Overflows are computed in any case, and reported in debug mode alone.
builder = interpreter.interpreter_builder
builder.options = replace(builder.options, sanitize_overflow=False)
