"""The operations that the configured backend gives a model."""

import torch

from nanovllm.config import Config
from nanovllm.errors import ArgumentError
from nanovllm.kernels.ops import Ops
from nanovllm.kernels.select import MAX_TRITON_HEAD_DIM, select_ops


def choose_ops(
    config: Config, device: torch.device, capability: tuple[int, int] | None = None
) -> Ops:
    """The operations of the configured backend; ArgumentError if it cannot run here.

    capability: as of `select_ops`.
    """
    uses_transformers = config.model_config.uses_transformers
    head_dim = config.model_config.head_dim
    if uses_transformers:  # attention that the kernels do not take goes without them
        head_dim = min(head_dim, MAX_TRITON_HEAD_DIM)
    try:
        return select_ops(
            config.attention_backend,
            device,
            config.resolve_dtype(),
            head_dim,
            compile_torch_ops=not (config.enforce_eager or uses_transformers),
            kv_cache_dtype=config.resolve_kv_cache_dtype(),
            capability=capability,
        )
    except ValueError as error:
        raise ArgumentError(str(error)) from error
