"""Windows, soft caps and sinks on the GPU against `torch_ops`, as in `test_kernels.py`."""

import dataclasses
import math
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from test_kernels import (
    DEVICE,
    DTYPES,
    EDGE_LENS,
    LENS_K,
    LENS_Q,
    NO_SLOTS,
    OPS,
    assert_as_exact_as_torch,
    decode_args,
    ints,
    prefill_args,
    randn,
    upcast,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanovllm.kernels import torch_ops
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.triton.prefill_attention import prefill_attention
from nanovllm.kernels.types import (
    FP8_DTYPE,
    FP8_MIN_CAPABILITY,
    DecodeMetadata,
    KVCache,
    PrefillMetadata,
)

# (query heads, KV heads, head_dim)
HEADS = ((64, 8, 64), (16, 8, 128), (8, 1, 256), (6, 2, 80))
# (window, soft cap, whether there are sinks): around tiles and blocks; alone and together.
EXTRAS = (
    (1, None, False),
    (64, None, False),
    (128, None, True),
    (129, 2.0, False),
    (256, 2.0, True),
    (300, None, False),
    (100_000, 2.0, True),
    (None, 2.0, False),
    (None, None, True),
)
LENS = [n for n in EDGE_LENS if n > 0] + [3000, 4001]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN, so an element that is left out or read too early shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def extras_of(case, num_heads: int, dtype: torch.dtype) -> dict:
    """Sinks from one of no weight to one of all."""
    window, softcap, has_sinks = case
    some = [-math.inf, -1e30, -2.0, 0.5, 4.0, 1e30]
    sinks = torch.tensor([some[head % 6] for head in range(num_heads)], device=DEVICE)
    if dtype == torch.float16:
        sinks = sinks.clamp(-6e4, 6e4)
    return {"window": window, "softcap": softcap, "sinks": sinks.to(dtype) if has_sinks else None}


def forget(args: tuple, window: int | None) -> None:
    """Make NaN of every block of which no query sees a token; the tables name them still."""
    _, cache, metadata, _ = args
    if isinstance(metadata, PrefillMetadata):
        lens_k, lens_q = metadata.cu_seqlens_k.diff(), metadata.cu_seqlens_q.diff()
    else:
        lens_k, lens_q = metadata.context_lens, (metadata.context_lens > 0).int()
    if window is None:
        return
    block_size = cache.key.shape[1]
    num_dead = ((lens_k - lens_q + 1 - window).clamp(min=0) // block_size).unsqueeze(1)
    tables = metadata.block_tables
    dead = tables[torch.arange(tables.shape[1], device=DEVICE) < num_dead].long()
    for part in cache[:2]:
        if part.dtype == FP8_DTYPE:
            part.view(torch.uint8)[dead] = 0x7F  # NaN
        else:
            part[dead] = torch.nan
    for scales in cache[2:]:
        if scales is not None:
            scales[dead] = torch.nan


def in_fp8(args: tuple) -> tuple:
    query, cache, metadata, scale = args
    parts, all_scales = [], []
    for part in cache[:2]:
        quantized, scales = torch_ops.quantize(part.float().flatten(0, 1))
        parts.append(quantized.view(part.shape))
        all_scales.append(scales.view(part.shape[:3]).transpose(1, 2).contiguous())
    return query, KVCache(*parts, *all_scales), metadata, scale


def check(kernel, args: tuple, extras: dict) -> None:
    got, low = kernel(*args, **extras), torch_ops.attend(*args, **extras)
    query, cache, *rest = args
    exact_args = query.float(), cache, *rest
    if cache.key_scales is None:
        exact_args = upcast(args)
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch_ops.attend(*exact_args, **extras)
    assert got.isfinite().all()
    if isinstance(args[2], DecodeMetadata):
        is_live = args[2].context_lens > 0
        got, low, exact = got[is_live], low[is_live], exact[is_live]
    assert_as_exact_as_torch(got, low, exact)


@pytest.mark.parametrize("window", [None, 24])
def test_torch_on_cuda_is_torch_on_the_cpu_for_masks_of_any_length(window):
    """SDPA with a mask gave other numbers for 257 keys, and read beyond the mask for others."""
    lens_k = [1, 3, 17, 60, 200, 257, 258, 300, 520]
    lens_q = [1, 2, 17, 60, 199, 257, 100, 299, 520]
    ends = [torch.tensor([0, *lens]).cumsum(0, dtype=torch.int32) for lens in (lens_q, lens_k)]
    tables = torch.arange(27, dtype=torch.int32).view(9, 3)
    cache = KVCache(*torch.randn(2, 27, 256, 4, 16))
    query = torch.randn(max(sum(lens_q), 9), 8, 16)
    no_slots = torch.empty(0, dtype=torch.int64)
    prefill = PrefillMetadata(no_slots, tables, *ends, max(lens_q), max(lens_k))
    decode = DecodeMetadata(no_slots, tables, torch.tensor(lens_k, dtype=torch.int32))
    for metadata, x in ((prefill, query[: sum(lens_q)]), (decode, query[:9])):
        fields = {f.name: getattr(metadata, f.name) for f in dataclasses.fields(metadata)}
        on_device = type(metadata)(
            **{n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in fields.items()}
        )
        expected = torch_ops.attend(x, cache, metadata, 0.25, window=window)
        moved = KVCache(*(part.to(DEVICE) for part in cache[:2]))
        got = torch_ops.attend(x.to(DEVICE), moved, on_device, 0.25, window=window)
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)


needs_fp8 = pytest.mark.skipif(
    torch.cuda.get_device_capability(DEVICE) < FP8_MIN_CAPABILITY, reason="no fp8 conversions"
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", EXTRAS)
def test_prefill(case, heads, dtype):
    args = prefill_args(LENS_Q, LENS_K, 256, heads, dtype)
    forget(args, case[0])
    check(OPS.attend, args, extras_of(case, heads[0], dtype))


@pytest.mark.parametrize("block_size", (16, 64))
@pytest.mark.parametrize("case", EXTRAS)
@pytest.mark.parametrize("use_tensor_descriptors", (True, False))
def test_both_walks_of_prefill_over_small_blocks(case, block_size, use_tensor_descriptors):
    if use_tensor_descriptors and torch.cuda.get_device_capability(DEVICE) < (9, 0):
        pytest.skip("bulk tensor copies need compute capability 9.0")

    def kernel(*args, **extras):
        return prefill_attention(*args, **extras, use_tensor_descriptors=use_tensor_descriptors)

    for heads in HEADS[:2]:
        args = prefill_args(LENS_Q, LENS_K, block_size, heads, torch.bfloat16)
        forget(args, case[0])
        check(kernel, args, extras_of(case, heads[0], torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", EXTRAS)
@pytest.mark.parametrize("block_size", (16, 256))
def test_decode(case, heads, dtype, block_size):
    """With a plan of its own, with that of other layers, and without one; an empty row too."""
    args = decode_args([*LENS, 0], block_size, heads, dtype)
    forget(args, case[0])
    query, cache, metadata, scale = args
    extras = extras_of(case, heads[0], dtype)
    tables, lens = metadata.block_tables, metadata.context_lens
    for plan in (
        OPS.plan_decode(cache, tables, lens, None, case[0]),
        OPS.plan_decode(cache, tables, lens, None, 77),
        None,
    ):
        check(OPS.attend, (query, cache, replace(metadata, plan=plan), scale), extras)


@pytest.mark.parametrize("batch_size", (1, 33, 256))
@pytest.mark.parametrize("case", EXTRAS)
def test_decode_of_ragged_batches(case, batch_size):
    lens = torch.randint(1, 3000, (batch_size,)).tolist()
    args = decode_args(lens, 256, (16, 8, 128), torch.bfloat16)
    forget(args, case[0])
    check(OPS.attend, args, extras_of(case, 16, torch.bfloat16))


@needs_fp8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", EXTRAS)
def test_fp8_cache(case, heads, dtype):
    for args in (
        in_fp8(prefill_args(LENS_Q, LENS_K, 256, heads, dtype)),
        in_fp8(decode_args([*LENS, 0], 256, heads, dtype)),
    ):
        forget(args, case[0])
        check(OPS.attend, args, extras_of(case, heads[0], dtype))


@pytest.mark.parametrize("has_common_tokens", (False, True))
def test_one_graph_serves_layers_of_all_kinds(has_common_tokens):
    """One plan and layers with several windows, captured once; replayed with other lengths."""
    torch.use_deterministic_algorithms(False)  # no fills between the kernels, as in the engine
    batch_size, width, block_size = 48, 8, 256
    num_blocks = batch_size * width
    sinks = randn(16)
    layers = (
        {},
        {"window": 128, "sinks": sinks},
        {"softcap": 5.0, "sinks": sinks},
        {"window": 700},
        {"window": 128, "softcap": 5.0},
    )
    caches = [
        KVCache(*randn(2, num_blocks, block_size, 8, 128, dtype=torch.bfloat16)) for _ in layers
    ]
    query = randn(batch_size, 16, 128, dtype=torch.bfloat16)
    tables = torch.zeros(batch_size, width, dtype=torch.int32, device=DEVICE)
    lens, num_common = torch.zeros_like(tables[:, 0]), ints([0])

    def step() -> list[torch.Tensor]:
        common = num_common if has_common_tokens else None
        plan = OPS.plan_decode(caches[0], tables, lens, common)
        metadata = DecodeMetadata(NO_SLOTS, tables, lens, plan)
        results, x = [], query
        for cache, extras in zip(caches, layers, strict=True):
            # Each layer's queries depend on the layer before.
            x = OPS.attend(x, cache, metadata, 0.1, **extras) + query
            results.append(x)
        return results

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(20):
        num_shared = int(torch.randint(0, 5, ())) if has_common_tokens else 0
        num_live = int(torch.randint(1, batch_size + 1, ()))
        new_lens = torch.randint(num_shared * block_size + 1, width * block_size + 1, (batch_size,))
        new_lens[num_live:] = 0
        lens.copy_(new_lens)
        tables.copy_(torch.randperm(num_blocks, device=DEVICE).view(batch_size, width))
        tables[:, :num_shared] = tables[:1, :num_shared].clone()
        # A row's own part may begin within a block that all rows share.
        num_common.fill_(num_shared and num_shared * block_size - int(torch.randint(0, 9, ())))
        graph.replay()
        eager = step()
        is_live = lens > 0
        x = query
        for got, again, cache, extras in zip(captured, eager, caches, layers, strict=True):
            assert got.isfinite().all() and torch.equal(got[is_live], again[is_live])
            metadata = DecodeMetadata(NO_SLOTS, tables, lens)
            expected = torch_ops.attend(x, cache, metadata, 0.1, **extras) + query
            torch.testing.assert_close(got[is_live], expected[is_live], rtol=2e-2, atol=2e-2)
            x = got


def test_flash_attn_agrees():
    pytest.importorskip("flash_attn", reason="flash_attn is not installed", exc_type=ImportError)
    flash = select_ops("flash-attn", DEVICE, torch.bfloat16, 128, compile_torch_ops=False)
    assert flash.attention_extras <= {"window", "softcap"}
    for window, softcap in ((128, None), (None, 2.0), (300, 2.0)):
        extras = {"window": window, "softcap": softcap}
        extras = {name: extras[name] for name in flash.attention_extras}
        for args in (
            decode_args(LENS, 256, HEADS[1], torch.bfloat16),
            prefill_args(LENS_Q, LENS_K, 256, HEADS[1], torch.bfloat16),
        ):
            got, expected = flash.attend(*args, **extras), OPS.attend(*args, **extras)
            torch.testing.assert_close(got, expected, rtol=1.6e-2, atol=1e-2)
