"""Chooses the backend; triton and flash-attn are imported only if they are selected."""

import os

import torch
from torch import Tensor

from nanovllm.errors import ArgumentError
from nanovllm.kernels.cpu_ops import CpuOps
from nanovllm.kernels.device import device_limits
from nanovllm.kernels.ops import Ops
from nanovllm.kernels.torch_ops import TorchOps
from nanovllm.kernels.types import FP8_DTYPE, FP8_MIN_CAPABILITY

BACKENDS = ("torch", "triton", "flash-attn")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLASH_ATTN_DTYPES = (torch.float16, torch.bfloat16)
MAX_TRITON_HEAD_DIM = 256
TRITON_MIN_CAPABILITY = (8, 0)  # of the GPUs that Triton supports


def select_ops(
    attention_backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    compile_torch_ops: bool,
    kv_cache_dtype: torch.dtype | None = None,
    capability: tuple[int, int] | None = None,
) -> Ops:
    """The operations of the backend "auto", "torch", "triton" or "flash-attn" for a model.

    "auto" is "triton" on CUDA where triton can be imported and knows the GPU, otherwise "torch".
    `compile_torch_ops` sends the elementwise operations of "torch" through torch.compile on CUDA.
    `kv_cache_dtype` is `dtype` (None) or FP8_DTYPE. `capability` is that of the GPU, None: of
    `device`; a dry run on the device "meta" gives that of a GPU which need not be there. Raises
    ValueError for a backend that is unknown, not installed, or unable to run this device, dtype,
    head_dim or kv_cache_dtype.
    """
    if capability is None:
        capability = _capability(device)
    is_gpu = device.type == "cuda" or capability is not None
    backend = attention_backend
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"attention_backend is {backend!r}; choose one of {', '.join(('auto', *BACKENDS))}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; the kernels compute in {', '.join(map(str, DTYPES))}")
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; rotary embeddings need an even number")
    is_fp8 = kv_cache_dtype == FP8_DTYPE
    if is_fp8 and backend == "flash-attn":
        raise ValueError(
            "kv_cache_dtype is 'fp8', which attention_backend 'flash-attn' cannot read; choose "
            "'triton' or 'torch'"
        )
    is_old = capability is not None and capability < TRITON_MIN_CAPABILITY
    if backend == "torch" or (backend == "auto" and (not is_gpu or is_old)):
        if device.type == "cpu":
            return CpuOps()
        # torch.compile would ask Triton for its kernels as well.
        return TorchOps(compile_torch_ops and device.type == "cuda" and not is_old)

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not is_gpu and not (backend == "triton" and interpreted):
        raise ValueError(
            f"attention_backend is {backend!r}, which needs a CUDA device, but the device is "
            f"{str(device)!r}; choose 'auto' or 'torch'"
        )
    if capability is not None and is_old:
        raise ValueError(
            f"attention_backend is {backend!r}, which needs a GPU of compute capability "
            f"{_dotted(TRITON_MIN_CAPABILITY)} or higher, but {device} has "
            f"{_dotted(capability)}; choose 'auto' or 'torch'"
        )
    if is_fp8 and capability is not None and capability < FP8_MIN_CAPABILITY:
        raise ValueError(
            f"kv_cache_dtype is 'fp8', which attention_backend {backend!r} offers on GPUs of "
            f"compute capability {_dotted(FP8_MIN_CAPABILITY)} or higher, but {device} has "
            f"{_dotted(capability)}; choose kv_cache_dtype 'auto' or attention_backend 'torch'"
        )
    try:
        from nanovllm.kernels.triton.ops import TritonOps
    except (ImportError, OSError) as error:
        if backend == "auto":
            return TorchOps(compile_torch_ops)
        raise ValueError(
            f"attention_backend is {backend!r}, but triton cannot be imported ({error}); "
            "choose 'auto' or 'torch'"
        ) from error
    if head_dim > MAX_TRITON_HEAD_DIM:
        if backend == "auto":
            return TorchOps(compile_torch_ops)
        raise ValueError(
            f"head_dim is {head_dim}; attention_backend {backend!r} supports at most "
            f"{MAX_TRITON_HEAD_DIM}, choose 'torch'"
        )
    if backend != "flash-attn":
        return TritonOps(_has_fp8_products(capability, dtype))

    if dtype not in FLASH_ATTN_DTYPES:
        raise ValueError(
            f"dtype is {dtype}; attention_backend 'flash-attn' computes in "
            f"{', '.join(map(str, FLASH_ATTN_DTYPES))} only, choose 'triton' or 'torch'"
        )
    if head_dim % 8:
        raise ValueError(
            f"head_dim is {head_dim}; attention_backend 'flash-attn' needs a multiple of 8, "
            "choose 'triton' or 'torch'"
        )
    try:
        from nanovllm.kernels.flash_attention import FlashAttentionOps
    except (ImportError, OSError) as error:  # OSError: a shared object built for another torch
        raise ValueError(
            f"attention_backend is 'flash-attn', but flash_attn cannot be imported ({error}); "
            "choose 'triton' or 'torch'"
        ) from error
    return FlashAttentionOps(_has_fp8_products(capability, dtype))


def check_attention_extras(
    ops: Ops, window: int | None, softcap: float | None, sinks: Tensor | None
) -> None:
    """ArgumentError naming those of a layer's extras (`Ops.attend`) that `ops` does not offer."""
    extras = {"window": window, "softcap": softcap, "sinks": sinks}
    given = {name for name, value in extras.items() if value is not None}
    if missing := given - ops.attention_extras:
        raise ArgumentError(
            f"the model's attention has {' and '.join(sorted(missing))}, which this "
            "attention_backend does not offer; choose 'auto', 'triton' or 'torch'"
        )


def _capability(device: torch.device) -> tuple[int, int] | None:
    """A GPU's compute capability; None for another device, or where there is no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return device_limits(device).capability


def _has_fp8_products(capability: tuple[int, int] | None, dtype: torch.dtype) -> bool:
    return capability is not None and capability[0] == 9 and dtype != torch.float32


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
