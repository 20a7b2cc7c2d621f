"""The fp8 KV cache on the GPU: store, prefill and decode kernels, and the engine with it.

A kernel's error, against the torch op in float32 over the same quantised cache, may be at most 1.5
times that of the torch op in the inputs' own dtype, plus a rounding of the largest result.
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB_SIZE, save_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanovllm import LLM, ArgumentError, SamplingParams
from nanovllm.kernels import select, torch_ops
from nanovllm.kernels.device import device_limits
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.types import (
    FP8_DTYPE,
    FP8_MIN_CAPABILITY,
    DecodeMetadata,
    KVCache,
    PrefillMetadata,
)

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if torch.cuda.get_device_capability() < FP8_MIN_CAPABILITY:
    pytest.skip("the GPU does not convert fp8", allow_module_level=True)

from nanovllm.kernels.triton.prefill_attention import prefill_attention

DEVICE = torch.device("cuda", torch.cuda.current_device())
OPS = select_ops("triton", DEVICE, torch.bfloat16, 128, False, FP8_DTYPE)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = 1e-6
NO_SLOTS = torch.empty(0, dtype=torch.int64)  # attention only reads the cache
# (query heads, KV heads, head_dim)
HEADS = ((16, 8, 128), (4, 4, 64), (6, 2, 80))
# Whole prompts, cached prefixes, single new tokens; around pages and tiles of queries.
LENS_Q = [1, 15, 17, 255, 256, 257, 128, 1, 1, 100, 700]
LENS_K = [1, 15, 17, 255, 256, 257, 384, 2, 700, 613, 700]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def ints(values, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def check_error(got: torch.Tensor, torch_result: torch.Tensor, exact: torch.Tensor) -> None:
    assert got.dtype == torch_result.dtype and got.shape == exact.shape
    assert got.isfinite().all()
    error = (got.float() - exact).abs().max().item()
    torch_error = (torch_result.float() - exact).abs().max().item()
    ulps = 8 if got.dtype == torch.float32 else 0.5
    floor = ulps * torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert error <= 1.5 * torch_error + floor, f"{error=:.3g} {torch_error=:.3g} {floor=:.3g}"


# Store


def restored(caches: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[2, num_blocks, block_size, Hkv, D] float32 of a quantised cache."""
    return caches.float() * scales.transpose(2, 3).unsqueeze(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("with_norm", (True, False))
def test_qk_norm_rope_store(dtype, heads, with_norm):
    num_heads, num_kv_heads, head_dim = heads
    angles = torch.outer(torch.arange(4096), 1e6 ** -(torch.arange(0, head_dim, 2) / head_dim))
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(DEVICE)
    weights = randn(2, head_dim, dtype=dtype) if with_norm else (None, None)
    for num_tokens in (1, 7, 512):
        qkv = randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
        qkv *= torch.logspace(-3, 2, num_tokens, device=DEVICE).to(dtype).unsqueeze(1)
        qkv[0] = 0
        positions = torch.randint(0, 4096, (num_tokens,), device=DEVICE, dtype=torch.int32)
        slots = torch.randperm(64 * 16, device=DEVICE)[:num_tokens]
        slots[num_tokens // 2] = -1
        args = qkv, *weights, EPS, cos_sin, positions
        exact = torch.zeros(2, 64, 16, num_kv_heads, head_dim, device=DEVICE)
        in_float32 = (None if x is None else x.float() for x in (qkv, *weights))
        torch_ops.qk_norm_rope_store(*in_float32, *args[3:], KVCache(*exact), slots)
        results = []
        for ops in (OPS, torch_ops):
            caches = torch.zeros(exact.shape, device=DEVICE, dtype=FP8_DTYPE)
            scales = torch.zeros(2, 64, num_kv_heads, 16, device=DEVICE)
            query = ops.qk_norm_rope_store(*args, KVCache(*caches, *scales), slots)
            results.append((query, caches, scales))
        (query, caches, scales), (_, torch_caches, torch_scales) = results
        plain = torch.zeros(exact.shape, device=DEVICE, dtype=dtype)
        assert torch.equal(query, OPS.qk_norm_rope_store(*args, KVCache(*plain), slots))
        # V is only quantised: as torch does it, but for ties that may round to the other neighbour.
        assert torch.equal(scales[1], torch_scales[1])
        values, torch_values = caches[1].float(), torch_caches[1].float()
        step = torch.maximum(values.abs(), torch_values.abs()) / 8  # 3 bits of mantissa
        assert ((values - torch_values).abs() <= step.clamp(min=2**-9)).all()
        assert (values == torch_values).float().mean() > 0.99
        # K differs by the rounding of its norm and rotation. A scale belongs to one token: large
        # tokens' errors must not hide those of small ones.
        assert torch.equal(scales[0] == 0, torch_scales[0] == 0)
        got, torch_keys = restored(caches, scales)[0], restored(torch_caches, torch_scales)[0]
        largest = exact[0].abs().amax(-1, keepdim=True).clamp(min=1e-30)
        keys = (x / largest for x in (got, torch_keys, exact[0]))
        check_error(*keys)
        # Half a step of the top binade is 16 / 448; the rest is rounding before.
        assert ((got - exact[0]).abs() <= largest * 0.06).all()


# Attention


def paged_inputs(
    lens: list[int],
    block_size: int,
    heads: tuple[int, int, int],
    magnitude: float = 1.0,
) -> tuple[KVCache, torch.Tensor]:
    """A cache with NaN outside the sequences' slots, and shuffled block tables."""
    _, num_kv_heads, head_dim = heads
    width = -(-max(lens) // block_size) + 1
    num_blocks = width * len(lens)
    tables = torch.randperm(num_blocks, device=DEVICE).view(len(lens), width).int()
    position = torch.arange(width * block_size, device=DEVICE)
    slots = tables[:, position // block_size].long() * block_size + position % block_size
    slots = slots[position < ints(lens).unsqueeze(1)]
    quantised = []
    for size in (1.0, magnitude):
        heads_of_tokens = randn(len(slots), num_kv_heads, head_dim) * size
        # Magnitudes that differ by token and head show a scale of a wrong one.
        heads_of_tokens *= torch.rand(len(slots), num_kv_heads, 1, device=DEVICE) + 0.1
        values, values_scales = torch_ops.quantize(heads_of_tokens)
        shape = (num_blocks * block_size, num_kv_heads)
        cache = torch.full((*shape, head_dim), torch.nan, device=DEVICE).to(FP8_DTYPE)
        scales = torch.full(shape, torch.nan, device=DEVICE)
        cache.view(torch.uint8)[slots] = values.view(torch.uint8)
        scales[slots] = values_scales
        quantised.append(
            (
                cache.view(num_blocks, block_size, num_kv_heads, head_dim),
                scales.view(num_blocks, block_size, -1).transpose(1, 2).contiguous(),
            )
        )
    (keys, key_scales), (values, value_scales) = quantised
    return KVCache(keys, values, key_scales, value_scales), tables


def check_attention(kernel, query: torch.Tensor, *args) -> None:
    got, low = kernel(query, *args), torch_ops.attend(query, *args)
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch_ops.attend(query.float(), *args)
    check_error(got, low, exact)


def prefill_args(lens_q, lens_k, block_size, heads, dtype, magnitude=1.0) -> tuple:
    cache, tables = paged_inputs(lens_k, block_size, heads, magnitude)
    query = randn(sum(lens_q), heads[0], heads[2], dtype=dtype)
    cu_q, cu_k = (ints([0, *n]).cumsum(0, dtype=torch.int32) for n in (lens_q, lens_k))
    metadata = PrefillMetadata(NO_SLOTS, tables, cu_q, cu_k, max(lens_q), max(lens_k))
    return query, cache, metadata, heads[2] ** -0.5


def decode_args(lens, block_size, heads, dtype, magnitude=1.0) -> tuple:
    cache, tables = paged_inputs(lens, block_size, heads, magnitude)
    query = randn(len(lens), heads[0], heads[2], dtype=dtype)
    return query, cache, DecodeMetadata(NO_SLOTS, tables, ints(lens)), heads[2] ** -0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("magnitude", (1e-4, 1.0, 1e3))
def test_prefill_attention(dtype, heads, magnitude):
    """Small and large values too: a half-precision p must not leave its range."""
    args = prefill_args(LENS_Q, LENS_K, 256, heads, dtype, magnitude)
    check_attention(OPS.attend, *args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("magnitude", (1e-4, 1.0, 1e3))
def test_decode_attention(dtype, heads, magnitude):
    args = decode_args(LENS_K, 256, heads, dtype, magnitude)
    check_attention(OPS.attend, *args)


@pytest.mark.parametrize(
    ("block_size", "heads", "lens"),
    (
        (16, (16, 8, 128), LENS_K),
        (256, (16, 1, 256), LENS_K),
        (256, (16, 8, 128), [1 + 37 * seq % 50 for seq in range(512)]),
        (256, (16, 8, 128), [32768]),
    ),
    ids=("small pages", "one KV head of 256", "512 sequences", "a long one"),
)
def test_attention_of_other_shapes(block_size, heads, lens):
    lens_q = [min(n, 700) for n in lens]
    args = prefill_args(lens_q, lens, block_size, heads, torch.bfloat16)
    check_attention(OPS.attend, *args)
    args = decode_args(lens, block_size, heads, torch.bfloat16)
    check_attention(OPS.attend, *args)


@pytest.mark.parametrize("config", ((128, 128, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3)))
def test_prefill_attention_in_other_tiles(config):
    def kernel(*args):
        return prefill_attention(*args, config=config)

    args = prefill_args(LENS_Q, LENS_K, 256, HEADS[0], torch.bfloat16)
    check_attention(kernel, *args)


# Engine

MAX_TOKENS = 16


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    lengths = (1, 2, 15, 16, 17, 31, 64, 255, 256, 257, 300, 511, 512, 513, 600)
    own = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]
    shared = own[-1]
    return [*own, shared[:512], shared[:520], shared, [*shared, 5]]


def run(model_dir, prompts, **kwargs) -> list[list[int]]:
    settings = {
        "kv_cache_dtype": "fp8",
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "num_kvcache_blocks": 256,
    }
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    with LLM(str(model_dir), **(settings | kwargs)) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        manager = llm.scheduler.block_manager
        assert manager.num_free_blocks == len(manager.blocks)
    return [output["token_ids"] for output in outputs]


@pytest.fixture(scope="module")
def completions(model_dir, prompts) -> list[list[int]]:
    return run(model_dir, prompts)


def share_of_equals(a: list[list[int]], b: list[list[int]]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def test_graphs_equal_eager_steps(model_dir, prompts, completions):
    assert run(model_dir, prompts, enforce_eager=True) == completions


@pytest.mark.parametrize(
    "settings",
    (
        {"enable_prefix_caching": False},
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 200},
        {"num_kvcache_blocks": 9, "watermark": 0},
        {"async_scheduling": False},
        {"attention_backend": "torch"},
        {"device": "cpu"},
    ),
    ids=("no prefix cache", "chunks", "preemption", "no overlap", "torch", "cpu"),
)
def test_switches_and_backends_agree(model_dir, prompts, completions, settings):
    """Another order of summation may tip an element to the next fp8 number, so not all need to."""
    assert share_of_equals(run(model_dir, prompts, **settings), completions) >= 0.9


@pytest.mark.two_gpus
def test_two_ranks_agree(model_dir, prompts, completions):
    assert share_of_equals(run(model_dir, prompts, tensor_parallel_size=2), completions) >= 0.9


def test_the_same_share_of_the_gpu_holds_more_blocks(tmp_path):
    model_dir = save_model(tmp_path / "wide", head_dim=128)
    num_blocks = {}
    for kv_cache_dtype in ("auto", "fp8"):
        with LLM(
            str(model_dir),
            dtype="bfloat16",
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=1024,
            max_num_seqs=32,
            gpu_memory_utilization=0.3,
        ) as llm:
            num_blocks[kv_cache_dtype] = llm.config.num_kvcache_blocks
    assert num_blocks["fp8"] / num_blocks["auto"] == pytest.approx(256 / 132, rel=0.03)


def test_an_older_gpu_is_refused_before_anything_is_allocated(model_dir, monkeypatch):
    allocated = torch.cuda.memory_allocated()
    limits = replace(device_limits(torch.device("cuda", 0)), capability=(8, 6))
    monkeypatch.setattr(select, "device_limits", lambda device: limits)
    with pytest.raises(ArgumentError, match=r"capability 8\.9 or higher, but cuda:0 has 8\.6"):
        LLM(str(model_dir), kv_cache_dtype="fp8")
    assert torch.cuda.memory_allocated() == allocated
