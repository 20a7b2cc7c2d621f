"""What every layer is built with, passed down explicitly instead of kept in globals."""

from dataclasses import dataclass

import torch

from nanovllm.kernels.ops import Ops
from nanovllm.layers.tensor_parallel import TensorParallel


@dataclass(frozen=True)
class ModelContext:
    """The backend's operations, this rank's place, and where and how parameters are stored.

    Positions reach `max_model_len`, or where that is None, all that the model is meant for.
    """

    ops: Ops
    tp: TensorParallel
    dtype: torch.dtype
    device: torch.device
    max_model_len: int | None = None
