"""The operations a model needs from a backend, and the one place that chooses the backend.

Every field of `Ops` has one signature that all backends share. `torch_ops` runs on any device and
is the oracle of the kernel tests. Nothing here imports the rest of the library, nor a backend
before it is selected.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

BACKENDS = ("torch", "triton", "flash-attn")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLASH_ATTN_DTYPES = (torch.float16, torch.bfloat16)
MAX_TRITON_HEAD_DIM = 256


class DecodeInputs(NamedTuple):
    """What one decode step reads from the row table, for a batch of B rows of W blocks.

    A padded slot has token 0, position 0, slot -1, length 0, temperature 0.
    """

    input_ids: torch.Tensor  # [B] int32
    positions: torch.Tensor  # [B] int32, index of the input token in its sequence
    slot_mapping: torch.Tensor  # [B] int64, cache slot of the input token's K/V; -1: none
    context_lens: torch.Tensor  # [B] int32, tokens to attend to, the input token included
    block_tables: torch.Tensor  # [B, W] int32
    temperatures: torch.Tensor  # [B] float32
    seeds: torch.Tensor  # [B, 2] int32


@dataclass(frozen=True)
class Ops:
    """One backend's operations.

    T tokens, S sequences, B rows, D head_dim, Hq query and Hkv KV heads, V logits.
    K/V caches are ``[num_blocks, block_size, Hkv, D]``; slot = block_id * block_size + offset.
    """

    # (x [T, H], weight [H], eps) -> [T, H]
    rms_norm: Callable[..., torch.Tensor]
    # (x [T, H], residual [T, H], weight [H], eps) -> (norm(x + residual), x + residual);
    # the residual's memory may be reused for the second result.
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    # (gate_up [T, 2I]) -> silu(gate) * up [T, I]
    silu_and_mul: Callable[..., torch.Tensor]
    # (qkv [T, (Hq + 2 Hkv) * D], q_norm_weight [D] | None, k_norm_weight [D] | None, eps,
    #  cos_sin [max_position, D] float32 (cos half, sin half), positions [T] int32,
    #  key_cache, value_cache, slot_mapping [T] int64) -> query [T, Hq, D]:
    # per-head RMS norm and rotation of q and k, and K/V into their slots (slot -1 is not written).
    qk_norm_rope_store: Callable[..., torch.Tensor]
    # (query [T, Hq, D], key_cache, value_cache, block_tables [S, W] int32, cu_seqlens_q [S + 1]
    #  int32, cu_seqlens_k [S + 1] int32, max_seqlen_q: int, max_seqlen_k: int, scale)
    #  -> [T, Hq, D]:
    # causal attention over the paged cache; a sequence's queries are its last positions.
    prefill_attention: Callable[..., torch.Tensor]
    # (query [B, Hq, D], key_cache, value_cache, block_tables [B, W] int32, context_lens [B] int32,
    #  scale) -> [B, Hq, D]; a row of length 0 gives finite values that nobody reads.
    decode_attention: Callable[..., torch.Tensor]
    # (logits [B, V], temperatures [B] float32, seeds [B, 2] int32, positions [B] int32,
    #  first_token_id: int, vocab_size: int) -> (scores [B] float32, token_ids [B] int32):
    # the winner of the Gumbel race among token ids [first_token_id, first_token_id + V) below
    # vocab_size; temperature 0 is the plain argmax (lowest id wins a tie).
    sample: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    # (row_table, rows [B] int32, block_size: int) -> DecodeInputs
    gather_decode_inputs: Callable[..., DecodeInputs]
    # (row_table, rows [B] int32, token_ids [B] int32, positions [B] int32) -> None:
    # LAST_TOKEN = token, LENGTH = position + 2; the padding row (the last) is left as it is.
    write_back: Callable[..., None]
    # Whether decode steps can be captured in a CUDA graph: no shape depends on device values.
    supports_cuda_graphs: bool


def _torch_ops(compile_elementwise: bool) -> Ops:
    from nanovllm.kernels import torch_ops

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=True) if compile_elementwise else function

    return Ops(
        rms_norm=compiled(torch_ops.rms_norm),
        add_rms_norm=compiled(torch_ops.add_rms_norm),
        silu_and_mul=compiled(torch_ops.silu_and_mul),
        qk_norm_rope_store=partial(
            torch_ops.qk_norm_rope_store, pure_part=compiled(torch_ops.qk_norm_rope)
        ),
        prefill_attention=torch_ops.prefill_attention,
        decode_attention=torch_ops.decode_attention,
        sample=partial(torch_ops.sample, scores_part=compiled(torch_ops.race_scores)),
        gather_decode_inputs=torch_ops.gather_decode_inputs,
        write_back=torch_ops.write_back,
        supports_cuda_graphs=False,
    )


def _triton_ops() -> Ops:
    from nanovllm.kernels.triton_activation import silu_and_mul
    from nanovllm.kernels.triton_decode_attention import decode_attention
    from nanovllm.kernels.triton_norm import add_rms_norm, rms_norm
    from nanovllm.kernels.triton_prefill_attention import prefill_attention
    from nanovllm.kernels.triton_rope import qk_norm_rope_store
    from nanovllm.kernels.triton_row_state import gather_decode_inputs, write_back
    from nanovllm.kernels.triton_sampling import sample

    return Ops(
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        silu_and_mul=silu_and_mul,
        qk_norm_rope_store=qk_norm_rope_store,
        prefill_attention=prefill_attention,
        decode_attention=decode_attention,
        sample=sample,
        gather_decode_inputs=gather_decode_inputs,
        write_back=write_back,
        supports_cuda_graphs=True,
    )


def select_ops(
    attention_backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    compile_torch_ops: bool,
) -> Ops:
    """The operations of the backend "auto", "torch", "triton" or "flash-attn" for a model.

    "auto" is "triton" on CUDA where triton can be imported, otherwise "torch". `compile_torch_ops`
    sends the elementwise operations of "torch" through torch.compile on CUDA. Raises ValueError for
    a backend that is unknown, not installed, or unable to run this device, dtype or head_dim.
    """
    backend = attention_backend
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"attention_backend is {backend!r}; choose one of {', '.join(('auto', *BACKENDS))}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; the kernels compute in {', '.join(map(str, DTYPES))}")
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; rotary embeddings need an even number")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return _torch_ops(compile_torch_ops and device.type == "cuda")

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (backend == "triton" and interpreted):
        raise ValueError(
            f"attention_backend is {backend!r}, which needs a CUDA device, but the device is "
            f"{str(device)!r}; choose 'auto' or 'torch'"
        )
    try:
        ops = _triton_ops()
    except (ImportError, OSError) as error:
        if backend == "auto":
            return _torch_ops(compile_torch_ops)
        raise ValueError(
            f"attention_backend is {backend!r}, but triton cannot be imported ({error}); "
            "choose 'auto' or 'torch'"
        ) from error
    if head_dim > MAX_TRITON_HEAD_DIM:
        if backend == "auto":
            return _torch_ops(compile_torch_ops)
        raise ValueError(
            f"head_dim is {head_dim}; attention_backend {backend!r} supports at most "
            f"{MAX_TRITON_HEAD_DIM}, choose 'torch'"
        )
    if backend != "flash-attn":
        return ops

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
        from nanovllm.kernels import flash_attention
    except (ImportError, OSError) as error:  # OSError: a shared object built for another torch
        raise ValueError(
            f"attention_backend is 'flash-attn', but flash_attn cannot be imported ({error}); "
            "choose 'triton' or 'torch'"
        ) from error
    return replace(
        ops,
        prefill_attention=flash_attention.prefill_attention,
        decode_attention=flash_attention.decode_attention,
    )
