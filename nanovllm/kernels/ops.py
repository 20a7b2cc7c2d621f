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

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest number of FP8_DTYPE
FP8_MIN_AMAX = 2.0**-100  # a head whose elements are all below is stored as zeros
FP8_MIN_CAPABILITY = (8, 9)  # of a GPU that converts FP8_DTYPE
FP8_BLOCK = 128  # rows and columns of a weight's block that has a scale of its own


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


class PartialSums(NamedTuple):
    """A product [T, N] in parts that the op which reads it adds up, and then rounds to `dtype`."""

    parts: torch.Tensor  # float32 [P, T, N]
    dtype: torch.dtype


Product = torch.Tensor | PartialSums


@dataclass(frozen=True)
class Ops:
    """One backend's operations.

    T tokens, S sequences, B rows, D head_dim, Hq query and Hkv KV heads, V logits.
    K/V caches are ``[num_blocks, block_size, Hkv, D]``; slot = block_id * block_size + offset.

    Their dtype is the model's, or FP8_DTYPE with key_scales and value_scales, float32
    ``[num_blocks, Hkv, block_size]``: an element is its fp8 number times the scale of its token and
    head, which is the head's largest magnitude / FP8_MAX (1 below FP8_MIN_AMAX). Without fp8 both
    scales are None, their default.
    """

    # (x [T, H], weight [H], eps) -> [T, H]
    rms_norm: Callable[..., torch.Tensor]
    # (x: Product [T, H], residual [T, H], weight [H], eps) -> (norm(x + residual), x + residual);
    # the residual's memory may be reused for the second result.
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    # (gate_up: Product [T, 2I]) -> silu(gate) * up [T, I]
    silu_and_mul: Callable[..., torch.Tensor]
    # (x [T, K], weight [N, K], bias [N] | None) -> x weight^T + bias [T, N]: a tensor, or partial
    # sums, which the ops that take a Product add up.
    linear: Callable[..., Product]
    # (x [T, K], weight [N, K] FP8_DTYPE, scales float32, bias [N] | None) -> Product [T, N], as
    # `linear`. A weight is its number times its scale: that of its row, scales [N], or that of its
    # FP8_BLOCK x FP8_BLOCK block, scales [ceil(N / FP8_BLOCK), ceil(K / FP8_BLOCK)]. x may be
    # quantised: each row with scales for rows, each FP8_BLOCK elements of a row with blocks.
    fp8_linear: Callable[..., Product]
    # (x [T, H], router_logits: Product [T, E], gate_up_weight [E * 2I, H], down_weight [E * H, I],
    #  num_experts_per_tok: int, norm_topk_prob: bool, gate_up_scales, down_scales)
    #  -> Product [T, H]:
    # each token's most probable experts, down(silu(gate(x)) * up(x)) each (gate's rows come first),
    # times their probabilities, summed; with norm_topk_prob these add up to 1. The weights are the
    # model's dtype, or both FP8_DTYPE with scales as in `fp8_linear` (None, the default: no scales)
    # where those of blocks are an expert's, or its gate's or up's, alone; then x, and what goes
    # into down, may be quantised as well.
    experts: Callable[..., Product]
    # (qkv: Product [T, (Hq + 2 Hkv) * D], q_norm_weight [D] | None, k_norm_weight [D] | None, eps,
    #  cos_sin [max_position, D] float32 (cos half, sin half), positions [T] int32,
    #  key_cache, value_cache, slot_mapping [T] int64, key_scales, value_scales)
    #  -> query [T, Hq, D]:
    # per-head RMS norm and rotation of q and k, and K/V into their slots (slot -1 is not written;
    # a value that is not finite may be stored as 0).
    qk_norm_rope_store: Callable[..., torch.Tensor]
    # (query [T, Hq, D], key_cache, value_cache, block_tables [S, W] int32, cu_seqlens_q [S + 1]
    #  int32, cu_seqlens_k [S + 1] int32, max_seqlen_q: int, max_seqlen_k: int, scale,
    #  key_scales, value_scales) -> [T, Hq, D]:
    # causal attention over the paged cache; a sequence's queries are its last positions.
    prefill_attention: Callable[..., torch.Tensor]
    # (key_cache of any layer, block_tables [B, W] int32, context_lens [B] int32,
    #  num_common_blocks [1] int32 | None) -> what `decode_attention` takes as its plan:
    # how the work of a step is divided, made once for all layers. With num_common_blocks, the
    # tables of all rows that are not empty begin with so many equal, full blocks, fewer than any of
    # these rows has; they are read once for the batch. (Prefixes shared by some rows only are not.)
    plan_decode: Callable[..., Any]
    # (query [B, Hq, D], key_cache, value_cache, block_tables [B, W] int32, context_lens [B] int32,
    #  scale, key_scales, value_scales, plan) -> [B, Hq, D];
    # a row of length 0 gives finite values that nobody reads. Without a plan (None, the default)
    # one is made.
    decode_attention: Callable[..., torch.Tensor]
    # (logits [B, V], temperatures [B] float32, seeds [B, 2] int32, positions [B] int32,
    #  first_token_id: int, vocab_size: int, thresholds [B] float32 | None)
    #  -> (scores [B] float32, token_ids [B] int32):
    # the winner of the Gumbel race among token ids [first_token_id, first_token_id + V) below
    # vocab_size; temperature 0 is the plain argmax (lowest id wins a tie). With thresholds (default
    # None), tokens whose logit is less never win. A row with temperature < 0 is skipped: its logits
    # are not read, it scores -inf and its token is any valid one.
    sample: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    # (logits [B, V], temperatures [B] float32, top_k [B] int32, top_p [B] float32,
    #  min_p [B] float32, vocab_size: int) -> thresholds [B] float32:
    # the tokens that survive min_p, top_k and then top_p are those whose logit is >= the row's
    # threshold. Of p = softmax(logits / temperature), min_p keeps p >= min_p * max(p); top_k keeps
    # the k largest, and whatever equals the last of them; top_p the largest p whose sum reaches
    # top_p of what min_p and top_k left, and whatever equals the last of them. Off are min_p 0,
    # top_k <= 0 or >= V, top_p 1, and all three at temperature <= 0; the threshold is then -inf.
    # Columns from vocab_size on are padding; -inf logits have probability 0, a NaN never counts.
    filter_thresholds: Callable[..., torch.Tensor]
    # (row_table, rows [B] int32, block_size: int) -> DecodeInputs
    gather_decode_inputs: Callable[..., DecodeInputs]
    # (row_table, rows [B] int32, token_ids [B] int32, positions [B] int32) -> None:
    # LAST_TOKEN = token, LENGTH = position + 2; the padding row (the last) is left as it is.
    write_back: Callable[..., None]
    # Whether products with fp8 weights have kernels of their own, for K and N that are multiples of
    # 16; else weights are better kept in the model's dtype.
    has_fp8_products: bool
    # Whether decode steps can be captured in a CUDA graph: no shape depends on device values.
    supports_cuda_graphs: bool
    # Whether `plan_decode` makes use of num_common_blocks.
    reads_common_blocks_once: bool


def _no_plan(*args: object) -> None:
    """`plan_decode` of the backends that divide the work themselves."""


def _torch_ops(compile_elementwise: bool) -> Ops:
    from nanovllm.kernels import torch_ops

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=True) if compile_elementwise else function

    return Ops(
        rms_norm=compiled(torch_ops.rms_norm),
        add_rms_norm=compiled(torch_ops.add_rms_norm),
        silu_and_mul=compiled(torch_ops.silu_and_mul),
        linear=torch_ops.linear,
        fp8_linear=torch_ops.fp8_linear,
        experts=torch_ops.experts,
        has_fp8_products=False,
        qk_norm_rope_store=partial(
            torch_ops.qk_norm_rope_store, pure_part=compiled(torch_ops.qk_norm_rope)
        ),
        prefill_attention=torch_ops.prefill_attention,
        plan_decode=_no_plan,
        decode_attention=torch_ops.decode_attention,
        sample=partial(torch_ops.sample, scores_part=compiled(torch_ops.race_scores)),
        filter_thresholds=torch_ops.filter_thresholds,
        gather_decode_inputs=torch_ops.gather_decode_inputs,
        write_back=torch_ops.write_back,
        supports_cuda_graphs=False,
        reads_common_blocks_once=False,
    )


def _triton_ops(has_fp8_products: bool) -> Ops:
    from nanovllm.kernels.triton.activation import silu_and_mul
    from nanovllm.kernels.triton.decode_attention import decode_attention, plan_decode
    from nanovllm.kernels.triton.filters import filter_thresholds
    from nanovllm.kernels.triton.fp8_linear import fp8_linear
    from nanovllm.kernels.triton.linear import linear
    from nanovllm.kernels.triton.moe import experts
    from nanovllm.kernels.triton.norm import add_rms_norm, rms_norm
    from nanovllm.kernels.triton.prefill_attention import prefill_attention
    from nanovllm.kernels.triton.rope import qk_norm_rope_store
    from nanovllm.kernels.triton.row_state import gather_decode_inputs, write_back
    from nanovllm.kernels.triton.sampling import sample

    return Ops(
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        silu_and_mul=silu_and_mul,
        linear=linear,
        fp8_linear=fp8_linear,
        experts=experts,
        has_fp8_products=has_fp8_products,
        qk_norm_rope_store=qk_norm_rope_store,
        prefill_attention=prefill_attention,
        plan_decode=plan_decode,
        decode_attention=decode_attention,
        sample=sample,
        filter_thresholds=filter_thresholds,
        gather_decode_inputs=gather_decode_inputs,
        write_back=write_back,
        supports_cuda_graphs=True,
        reads_common_blocks_once=True,
    )


def select_ops(
    attention_backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    compile_torch_ops: bool,
    kv_cache_dtype: torch.dtype | None = None,
) -> Ops:
    """The operations of the backend "auto", "torch", "triton" or "flash-attn" for a model.

    "auto" is "triton" on CUDA where triton can be imported, otherwise "torch". `compile_torch_ops`
    sends the elementwise operations of "torch" through torch.compile on CUDA. `kv_cache_dtype` is
    `dtype` (None) or FP8_DTYPE. Raises ValueError for a backend that is unknown, not installed, or
    unable to run this device, dtype, head_dim or kv_cache_dtype.
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
    is_fp8 = kv_cache_dtype == FP8_DTYPE
    if is_fp8 and backend == "flash-attn":
        raise ValueError(
            "kv_cache_dtype is 'fp8', which attention_backend 'flash-attn' cannot read; choose "
            "'triton' or 'torch'"
        )
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return _torch_ops(compile_torch_ops and device.type == "cuda")

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (backend == "triton" and interpreted):
        raise ValueError(
            f"attention_backend is {backend!r}, which needs a CUDA device, but the device is "
            f"{str(device)!r}; choose 'auto' or 'torch'"
        )
    if is_fp8 and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < FP8_MIN_CAPABILITY:
            raise ValueError(
                f"kv_cache_dtype is 'fp8', which attention_backend {backend!r} offers on GPUs of "
                f"compute capability {_version(FP8_MIN_CAPABILITY)} or higher, but {device} has "
                f"{_version(capability)}; choose kv_cache_dtype 'auto' or attention_backend 'torch'"
            )
    try:
        ops = _triton_ops(_has_fp8_products(device, dtype))
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
        plan_decode=_no_plan,
        decode_attention=flash_attention.decode_attention,
        reads_common_blocks_once=False,
    )


def _has_fp8_products(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda" or dtype == torch.float32 or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
