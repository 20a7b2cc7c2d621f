"""The context of layers: passed down explicitly instead of kept in globals."""

from dataclasses import dataclass
from typing import Literal

import torch

from nanovllm.kernels.ops import Ops
from nanovllm.layers.weight_format import WeightFormat
from nanovllm.parallel.tensor_parallel import TensorParallel


@dataclass(frozen=True)
class ModelContext:
    """The backend's operations, this rank's place, and where and how parameters are stored.

    Positions reach `max_model_len`, or where that is None, all that the model is meant for. With
    `fp8_scales` the weights of linear layers are fp8: see layers/fp8_weights.py. With
    `weight_format` they are packed: see layers/packed_weights.py. `kv_cache_dtype` is `dtype`
    (None) or FP8_DTYPE.
    """

    ops: Ops
    tp: TensorParallel
    dtype: torch.dtype
    device: torch.device
    max_model_len: int | None = None
    fp8_scales: Literal["rows", "blocks", "channels"] | None = None
    kv_cache_dtype: torch.dtype | None = None
    weight_format: WeightFormat | None = None
