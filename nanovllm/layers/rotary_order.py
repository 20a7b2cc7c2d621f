"""Heads whose rotated pairs lie elsewhere than those of `layers.rotary`: in which order to load.

A rotation may leave the last features of a head as they are ("partial"), or pair neighbours
("interleaved"). q and k meet in dot products only, which do not change if both have their features
in another order. So the rows of their projections are loaded in an order in which pair i is
(i, i + head_dim / 2), the pairs that are not rotated last.
"""

from dataclasses import replace

from nanovllm.layers.context import ModelContext
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rope_scaling import RopeParameters, num_rotated_features


def rotary_order(
    head_dim: int, rope_parameters: RopeParameters | None, interleaved: bool = False
) -> tuple[int, ...]:
    """The checkpoint's features of a head in the order of `cos_sin_table`; () if it is the same.

    Args:
        head_dim: features of a head, even.
        rope_parameters: as in `cos_sin_table`.
        interleaved: whether pair i of the checkpoint is (2i, 2i + 1). Else it is (i, i + d / 2), d
            being the features that are rotated.
    """
    num_rotated = 0 if rope_parameters is None else num_rotated_features(head_dim, rope_parameters)
    if interleaved:
        first, second = range(0, num_rotated, 2), range(1, num_rotated, 2)
    else:
        first, second = range(num_rotated // 2), range(num_rotated // 2, num_rotated)
    middle = (num_rotated + head_dim) // 2
    order = (*first, *range(num_rotated, middle), *second, *range(middle, head_dim))
    return () if order == tuple(range(head_dim)) else order


class HeadNorm(RMSNorm):
    """RMS norm of query or key heads whose features are loaded in `order`; empty: the checkpoint's.

    offset: see `RMSNorm`.
    """

    def __init__(
        self,
        head_dim: int,
        eps: float,
        context: ModelContext,
        order: tuple[int, ...],
        offset: float | None = None,
    ) -> None:
        super().__init__(head_dim, eps, context, offset)
        shards = self.weight.shards
        self.weight.shards = {name: replace(shards[name], head_order=order) for name in shards}
