"""Shapes of a dry run's results, without what torch imports to work them out.

torch computes on "meta" in Python for many operations, and imports its compiler and sympy for that:
a second or more of each start.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

META = torch.device("meta")
TAKE_KEYWORDS = torch.mm, F.embedding, torch.repeat_interleave, Tensor.clamp  # of those with rules


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _empty((*x.shape[:-1], weight.shape[0]), x.dtype)


def _matmul(x: Tensor, y: Tensor, *, out: Tensor | None = None) -> Tensor:
    return _empty((x.shape[0], y.shape[1]), x.dtype) if out is None else out


def _embedding(ids: Tensor, weight: Tensor, **options: object) -> Tensor:
    return _empty((*ids.shape, weight.shape[1]), weight.dtype)


def _index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return _empty((*x.shape[:dim], len(index), *x.shape[dim + 1 :]), x.dtype)


def _gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return _empty(index.shape, x.dtype)


def _diff(x: Tensor) -> Tensor:
    return _empty((len(x) - 1,), x.dtype)


def _repeat_interleave(x: Tensor, repeats: Tensor, *, output_size: int) -> Tensor:
    return _empty((output_size,), x.dtype)


def _like(x: Tensor, *others: object, **options: object) -> Tensor:
    return _empty(x.shape, x.dtype)


def _broadcast(x: Tensor, y: Tensor | float) -> Sequence[int]:
    return np.broadcast_shapes(x.shape, y.shape) if isinstance(y, Tensor) else x.shape


def _arithmetic(x: Tensor, y: Tensor | float) -> Tensor:
    return _empty(_broadcast(x, y), torch.result_type(x, y))


def _comparison(x: Tensor, y: Tensor | float) -> Tensor:
    return _empty(_broadcast(x, y), torch.bool)


def _where(condition: Tensor, x: Tensor, y: Tensor | float) -> Tensor:
    return _empty(np.broadcast_shapes(condition.shape, _broadcast(x, y)), torch.result_type(x, y))


ARITHMETIC = "add __add__ sub __sub__ mul __mul__ __floordiv__ __mod__ remainder __and__"
RULES: dict[object, Callable[..., Tensor]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.mm: _matmul,
    torch.where: _where,
    torch.empty_like: _like,
    torch.repeat_interleave: _repeat_interleave,
    Tensor.diff: _diff,
    Tensor.clamp: _like,
    Tensor.index_select: _index_select,
    Tensor.gather: _gather,
    Tensor.masked_fill: _like,
    **{getattr(Tensor, name): _arithmetic for name in ARITHMETIC.split()},
    **{getattr(Tensor, name): _comparison for name in ("ge", "lt", "__eq__")},
}


class ShapesAlone(TorchFunctionMode):
    """While it is entered, the commonest operations on "meta" give tensors of the right shape."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """`func`, by its rule where there is one."""
        rule = RULES.get(func)
        first = args[0] if args else None
        has_others = bool(kwargs) and func not in TAKE_KEYWORDS
        if rule is None or has_others or not isinstance(first, Tensor) or not first.is_meta:
            return func(*args, **kwargs or {})
        return rule(*args, **kwargs or {})
