"""A plugin of pytest, `-p fast_interpreter`: Triton's interpreter without what it does for nothing.

No result differs.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.language import core  # patched, as one of this module's languages
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


# Shapes are few: what is made of each is kept.
@cache
def _sizes(shape: tuple[int, ...]) -> tuple[core.tuple, int]:
    return core.tuple(list(shape)), core.validate_block_shape(shape)


@cache
def _constant_sizes(shape: tuple[int, ...]) -> tuple[core.tuple, core.constexpr]:
    return core.tuple([core.constexpr(s) for s in shape]), core.constexpr(math.prod(shape))


def _make_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Iterable) -> None:
    plain = tuple([s.value if isinstance(s, core.constexpr) else s for s in shape])
    if not plain:
        raise TypeError("0d block_type is forbidden")
    self.element_ty = element_ty
    self.shape, self.numel = _sizes(plain)
    self.name = f"<{plain}, {element_ty}>"


def _make_tensor(self: tl.tensor, handle: object, type: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _constant_sizes(tuple(type.shape) if type.is_block() else ())


tl.block_type.__init__ = _make_block_type
tl.tensor.__init__ = _make_tensor
