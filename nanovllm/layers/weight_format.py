"""How the weights of linear layers are packed, as a checkpoint says or an option asks for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightFormat:
    """The packing of a model's linear weights; see `PackedWeight`.

    A module of a checkpoint that is packed so has, instead of `x.weight`, the tensors `x.numbers`,
    `x.scales`, and if the format has them, `x.zeros` and `x.order`. Their shapes are those of the
    whole module [N, K], in the layout of `PackedWeight`:

        x.numbers  uint8 [N, K / 2] with 4 bits, [N, K] with 8
        x.scales   [N, K / group_size], of any floating dtype
        x.zeros    uint8 [N, K / group_size]
        x.order    int32 [K]

    Some modules keep the model's dtype: those that the checkpoint has otherwise, and those whose
    slices on this rank cannot stay packed. The model then asks for `x.weight`, in any floating
    dtype.

    Attributes:
        bits: 4 or 8.
        group_size: columns that share a scale, a multiple of 32; -1: all columns of a row do.
        has_zeros: whether each group has a zero of its own.
        has_order: whether the columns are in an order of their own.
        is_on_load: whether the checkpoint has `x.weight` everywhere, which is rounded as it is
            loaded; see layers/packed_weights.py.
    """

    bits: int
    group_size: int
    has_zeros: bool = False
    has_order: bool = False
    is_on_load: bool = False
