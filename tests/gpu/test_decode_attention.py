"""Decode attention on the GPU: plans, splits, common prefixes and fp8, against `torch_ops`.

The reference is the torch op in float64 on the same inputs. A kernel's error may be at most 1.5
times the error of the torch op in the inputs' own dtype, plus a rounding of the largest result.
"""

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from new_tokens import new_tokens
from test_engine_gpu import greedy, random_prompts, small_engine, token_ids
from tiny_models import reference_greedy, save_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanovllm.engine import common_prefix
from nanovllm.engine.step_plan import PlanBuilder
from nanovllm.kernels import row_state, torch_ops
from nanovllm.kernels.attention_steps import AttentionInSteps
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.types import FP8_DTYPE, FP8_MIN_CAPABILITY, DecodeMetadata, KVCache

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from nanovllm.kernels.triton import common_prefix as triton_common_prefix
from nanovllm.kernels.triton import hopper_decode as hopper
from nanovllm.kernels.triton import hopper_fused_decode, launch
from nanovllm.kernels.triton.decode_attention import decode_attention, plan_decode
from nanovllm.kernels.triton.fused_decode import MAX_ROWS, fuses

DEVICE = torch.device("cuda", torch.cuda.current_device())
OPS = select_ops("triton", DEVICE, torch.bfloat16, 128, compile_torch_ops=False)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_SIZE = 256
NO_SLOTS = torch.empty(0, dtype=torch.int64)  # attention only reads the cache
# (query heads, KV heads, head_dim)
HEADS = ((16, 8, 128), (4, 4, 64), (6, 2, 80), (64, 8, 128))
needs_fp8 = pytest.mark.skipif(
    torch.cuda.get_device_capability(DEVICE) < FP8_MIN_CAPABILITY, reason="no fp8 conversions"
)
needs_hopper = pytest.mark.skipif(
    torch.cuda.get_device_capability(DEVICE)[0] != 9, reason="a kernel for Hopper"
)
EDGE_LENS = (1, 15, 0, 16, 17, 255, 256, 257, 0, 1000, 4000)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so an element that is left out or read too early shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1000, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def ragged_lens(batch_size: int, longest: int = 2000) -> list[int]:
    return torch.randint(1, longest + 1, (batch_size,)).tolist()


def decode_args(
    lens: list[int],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    num_common: int = 0,
    block_size: int = BLOCK_SIZE,
) -> tuple:
    """Arguments of `attend`; NaN outside the sequences' own slots, shuffled tables.

    The rows begin with `num_common` equal tokens: whole blocks are shared, of the next one each row
    has a copy.
    """
    num_heads, num_kv_heads, head_dim = heads
    width = -(-max(lens) // block_size) + 1
    num_blocks = width * len(lens)
    caches = torch.full(
        (2, num_blocks, block_size, num_kv_heads, head_dim), torch.nan, device=DEVICE, dtype=dtype
    )
    tables = torch.randperm(num_blocks, device=DEVICE).view(len(lens), width).int()
    num_blocks, num_copied = divmod(num_common, block_size)
    tables[:, :num_blocks] = tables[:1, :num_blocks].clone()
    position = torch.arange(width * block_size, device=DEVICE)
    slots = tables[:, position // block_size].long() * block_size + position % block_size
    slots = slots[position < ints(lens).unsqueeze(1)]
    caches.flatten(1, 2)[:, slots] = randn(2, len(slots), num_kv_heads, head_dim, dtype=dtype)
    copied = tables[: sum(length > 0 for length in lens), num_blocks].long()
    caches[:, copied, :num_copied] = caches[:, copied[:1], :num_copied].clone()
    query = randn(len(lens), num_heads, head_dim, dtype=dtype)
    metadata = DecodeMetadata(NO_SLOTS, tables, ints(lens))
    return query, KVCache(*caches), metadata, head_dim**-0.5


def exact_result(args: tuple) -> torch.Tensor:
    """In float64, some rows at a time."""
    query, cache, metadata, scale = args
    tables = metadata.block_tables
    used, indices = tables.unique(return_inverse=True)  # only the blocks in use are upcast
    key, value = (part[used].double() for part in cache[:2])
    if cache.key_scales is not None:
        key, value = (
            part * scales[used].double().transpose(1, 2).unsqueeze(-1)
            for part, scales in ((key, cache.key_scales), (value, cache.value_scales))
        )
    metadata = replace(metadata, block_tables=indices.int().view_as(tables))
    with sdpa_kernel(SDPBackend.MATH):
        return torch_ops.attend(query.double(), KVCache(key, value), metadata, scale)


def plan_of(args: tuple, num_common_tokens: torch.Tensor | None = None, **tunables: int):
    _, cache, metadata, _ = args
    return plan_decode(
        cache, metadata.block_tables, metadata.context_lens, num_common_tokens, **tunables
    )


def attend(args: tuple, plan=None, **tunables: int) -> torch.Tensor:
    query, cache, metadata, scale = args
    return decode_attention(query, cache, replace(metadata, plan=plan), scale, **tunables)


def check(got: torch.Tensor, args: tuple) -> None:
    exact, torch_result = exact_result(args), torch_ops.attend(*args)
    assert got.dtype == torch_result.dtype and got.shape == exact.shape
    assert got.isfinite().all()
    is_live = args[2].context_lens > 0
    error = (got.double() - exact)[is_live].abs().max().item()
    torch_error = (torch_result.double() - exact)[is_live].abs().max().item()
    ulps = 16 if got.dtype == torch.float32 else 0.5
    floor = ulps * torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert error <= 1.5 * torch_error + floor, f"{error=:.3g} {torch_error=:.3g} {floor=:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_edge_lengths(dtype, heads):
    args = decode_args(list(EDGE_LENS), heads, dtype)
    got = attend(args)
    check(got, args)
    assert (got[args[2].context_lens == 0] == 0).all()


@pytest.mark.parametrize("batch_size", (1, 2, 7, 32, 33, 128, 512))
def test_ragged_batches(batch_size):
    for longest in (300, 4000 if batch_size <= 128 else 1000):
        args = decode_args(ragged_lens(batch_size, longest), HEADS[0], torch.bfloat16)
        check(attend(args), args)


@pytest.mark.parametrize(
    ("block_size", "heads", "lens"),
    (
        (16, (16, 8, 128), EDGE_LENS),
        (256, (16, 1, 256), EDGE_LENS),
        (256, (16, 8, 128), (32_768, 1, 20_000)),
        (256, (2, 1, 64), tuple(range(1, 2400, 2))),
    ),
    ids=("small pages", "one KV head of 256", "long contexts", "1,200 rows"),
)
def test_other_shapes(block_size, heads, lens):
    args = decode_args(list(lens), heads, torch.bfloat16, block_size=block_size)
    check(attend(args), args)


@pytest.mark.parametrize("programs_per_sm", (1, 4, 64))
@pytest.mark.parametrize(("tile", "num_warps"), ((16, 2), (32, 2), (64, 4), (128, 4)))
def test_every_division_of_the_work(programs_per_sm, tile, num_warps):
    lens = [*EDGE_LENS, *ragged_lens(20)]
    args = decode_args(lens, HEADS[0], torch.bfloat16)
    plan = plan_of(args, tile=tile, programs_per_sm=programs_per_sm, min_split=64)
    results = [attend(args, plan, num_warps=num_warps) for _ in range(20)]
    check(results[0], args)
    assert all(torch.equal(results[0], result) for result in results), "a race"


COMMON = (
    ([257, 300], 256),
    ([700, 513, 2000, 514, 0, 0, 0], 512),
    ([700, 584, 2000, 577, 0, 0, 0], 576),
    ([4000] * 33, 15 * 256 + 1),
    ([1020 + row % 70 for row in range(256)], 1000),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("lens", "num_common"), COMMON)
def test_common_tokens(dtype, heads, lens, num_common):
    args = decode_args(lens, heads, dtype, num_common)
    plan = plan_of(args, ints([num_common]))
    results = [attend(args, plan) for _ in range(10)]
    check(results[0], args)
    copied = args[2].block_tables[1:, num_common // BLOCK_SIZE].long()
    for memory in args[1][:2]:  # only the first row's copies are read
        memory[copied, : num_common % BLOCK_SIZE] = torch.nan
    results.append(attend(args, plan))
    assert all(torch.equal(results[0], result) for result in results), "a race"


@pytest.mark.parametrize("block_m", (64, 128))
@pytest.mark.parametrize("programs_per_sm", (1, 4))
def test_common_prefix_in_other_tiles(block_m, programs_per_sm, monkeypatch):
    monkeypatch.setattr(triton_common_prefix, "BLOCK_M", block_m)
    monkeypatch.setattr(triton_common_prefix, "NUM_WARPS", block_m // 16)
    monkeypatch.setattr(triton_common_prefix, "PROGRAMS_PER_SM", programs_per_sm)
    lens, num_common = COMMON[-1]
    args = decode_args(lens, HEADS[0], torch.bfloat16, num_common)
    plan = plan_of(args, ints([num_common]))
    check(attend(args, plan), args)


@needs_fp8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("num_common", (0, 512, 300))
def test_fp8_cache(dtype, heads, num_common):
    lens = [700, 513, 2000, 514, 0, 1025] if num_common else list(EDGE_LENS)
    query, cache, metadata, scale = decode_args(
        lens, heads, dtype, num_common // BLOCK_SIZE * BLOCK_SIZE
    )
    shape = cache.key.shape[0], heads[1], BLOCK_SIZE
    scales = torch.rand(2, *shape, device=DEVICE) * 10 ** torch.linspace(-5, 1, BLOCK_SIZE).cuda()
    cache = KVCache(cache.key.to(FP8_DTYPE), cache.value.to(FP8_DTYPE), *scales)
    args = query, cache, metadata, scale
    check(attend(args, plan_of(args, ints([num_common]) if num_common else None)), args)


# Hopper's own kernel


def on_hopper(args: tuple, **tunables: int) -> torch.Tensor:
    plan = plan_of(args, **tunables)
    with mock.patch.object(hopper, "hopper_decode", wraps=hopper.hopper_decode) as kernel:
        result = attend(args, plan)
    kernel.assert_called_once()
    return result


def in_fp8(args: tuple) -> tuple:
    """The same with a cache in fp8, whose scales differ from token to token."""
    query, cache, metadata, scale = args
    shape = 2, cache.key.shape[0], cache.key.shape[2], cache.key.shape[1]
    scales = torch.rand(shape, device=DEVICE) * 10 ** torch.linspace(-5, 1, shape[-1]).cuda()
    cache = KVCache(cache.key.to(FP8_DTYPE), cache.value.to(FP8_DTYPE), *scales)
    return query, cache, metadata, scale


@needs_hopper
@pytest.mark.parametrize("heads", ((16, 8, 128), (32, 4, 128), (20, 4, 128), (4, 4, 128)))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, FP8_DTYPE))
def test_hopper_kernel(dtype, heads):
    is_fp8 = dtype == FP8_DTYPE
    for lens in (3 * list(EDGE_LENS), ragged_lens(128), [850] * 40, [4000] + 32 * [0]):
        args = decode_args(lens, heads, torch.bfloat16 if is_fp8 else dtype)
        args = in_fp8(args) if is_fp8 else args
        for tunables in ({}, {"programs_per_sm": 64, "min_split": 64}):
            results = [on_hopper(args, **tunables) for _ in range(5)]
            check(results[0], args)
            assert (results[0][args[2].context_lens == 0] == 0).all()
            assert all(torch.equal(results[0], result) for result in results), "a race"


@needs_hopper
@pytest.mark.parametrize("batch_size", (1, 7, 32, 512))
def test_hopper_kernel_with_an_fp8_cache_of_other_batches(batch_size):
    lens = ragged_lens(batch_size, 300 if batch_size > 100 else 2000)
    args = in_fp8(decode_args(lens, (16, 8, 128), torch.bfloat16))
    check(on_hopper(args), args)


@pytest.mark.parametrize("is_fp8", (False, pytest.param(True, marks=needs_fp8)))
@pytest.mark.parametrize("has_common_tokens", (False, True))
def test_one_graph_serves_every_step(has_common_tokens, is_fp8):
    """A plan and three layers, captured once; replayed with other lengths, tables and prefixes."""
    torch.use_deterministic_algorithms(False)  # no fills between the kernels, as in the engine
    batch_size, width, num_layers = 48, 8, 3
    num_blocks = batch_size * width
    caches = [KVCache(*randn(2, num_blocks, BLOCK_SIZE, 8, 128)) for _ in range(num_layers)]
    if is_fp8:
        scales = torch.rand(2, num_blocks, 8, BLOCK_SIZE, device=DEVICE)
        caches = [KVCache(*(x.to(FP8_DTYPE) for x in cache[:2]), *scales) for cache in caches]
    query = randn(batch_size, 16, 128)
    tables = torch.zeros(batch_size, width, dtype=torch.int32, device=DEVICE)
    lens, num_common = torch.zeros_like(tables[:, 0]), ints([0])

    def step() -> list[torch.Tensor]:
        plan = plan_decode(caches[0], tables, lens, num_common if has_common_tokens else None)
        metadata = DecodeMetadata(NO_SLOTS, tables, lens, plan)
        results, x = [], query
        for cache in caches:
            # Each layer's queries depend on the layer before.
            x = decode_attention(x, cache, metadata, 0.1) + query
            results.append(x)
        return results

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(30):
        num_shared = int(torch.randint(0, 5, ())) if has_common_tokens else 0
        num_live = int(torch.randint(1, batch_size + 1, ()))
        new_lens = torch.randint(num_shared * BLOCK_SIZE + 1, width * BLOCK_SIZE + 1, (batch_size,))
        new_lens[num_live:] = 0
        lens.copy_(new_lens)
        tables.copy_(torch.randperm(num_blocks, device=DEVICE).view(batch_size, width))
        tables[:, :num_shared] = tables[:1, :num_shared].clone()
        # A row's own part may begin within a block that all rows share.
        num_common.fill_(num_shared and num_shared * BLOCK_SIZE - int(torch.randint(0, 99, ())))
        graph.replay()
        eager = step()
        is_live = lens > 0
        for a, b in zip(captured, eager, strict=True):
            assert torch.equal(a[is_live], b[is_live])
        args = captured[-2], caches[-1], DecodeMetadata(NO_SLOTS, tables, lens), 0.1
        expected = exact_result(args) + query
        assert captured[-1].isfinite().all()
        torch.testing.assert_close(
            captured[-1][is_live].double(), expected[is_live], rtol=1.6e-2, atol=1.6e-2
        )


# The engine


def test_engine_reads_a_common_prefix_once_with_the_same_tokens(tmp_path, monkeypatch):
    model_dir = save_model(tmp_path / "tiny")
    prefix = random_prompts([540], seed=4)[0]
    own = random_prompts(range(1, 41), seed=5)
    prompts = [[*prefix, *tail] for tail in own]
    limits = [8 + i % 17 for i in range(len(prompts))]  # the batch shrinks, through several sizes
    params = [greedy(limit) for limit in limits]
    longest = reference_greedy(model_dir, prompts, max(limits))
    reference = [tokens[:limit] for tokens, limit in zip(longest, limits, strict=True)]
    plans = []
    build = PlanBuilder.build

    def recording_build(self, seqs, is_prefill):
        plans.append(build(self, seqs, is_prefill))
        return plans[-1]

    monkeypatch.setattr(PlanBuilder, "build", recording_build)
    for min_spared in (common_prefix.MIN_SPARED_TOKENS, 1, 10**9):
        monkeypatch.setattr(common_prefix, "MIN_SPARED_TOKENS", min_spared)
        for settings in ({}, {"async_scheduling": False}, {"enforce_eager": True}):
            plans.clear()
            with small_engine(model_dir, max_num_seqs=48, **settings) as llm:
                for _ in range(2):  # first each graph's capture, then its replays
                    outputs = llm.generate(prompts, params, use_tqdm=False)
                    assert token_ids(outputs) == reference
                graphs = llm.model_runner.graphs
                sizes = {size for size, has_common in graphs.graphs if has_common} if graphs else ()
            has_common = any(plan.num_common_tokens == 536 for plan in plans)
            assert has_common == (min_spared < 10**9)
            if "enforce_eager" not in settings:
                assert (len(sizes) > 1) == has_common


NEW_TOKENS = (
    # heads, parts of the QKV product, extras of attention
    ((16, 8, 128), 2, {}),
    ((16, 8, 128), 1, {"window": 300}),
    ((28, 4, 64), 3, {"softcap": 20.0}),
    ((4, 4, 256), 1, {"window": 64}),
    ((7, 1, 128), 2, {"sinks": 7}),
)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize(("heads", "num_parts", "extras"), NEW_TOKENS)
@pytest.mark.parametrize("lens", ([640], [1, 17, 0, 256, 257, 1100, 32], [384] * MAX_ROWS))
def test_heads_are_made_in_decode_attention(heads, num_parts, extras, dtype, lens):
    """Bit for bit as by the two kernels, K/V included: no result depends on the batch's size."""
    sizes = {"block_size": BLOCK_SIZE, "num_parts": num_parts}
    inputs, cache, metadata, scale = new_tokens(lens, heads, dtype, DEVICE, **sizes)
    if "sinks" in extras:
        extras = {"sinks": randn(extras["sinks"], dtype=dtype)}
    live, window = metadata.context_lens > 0, extras.get("window")
    caches = [KVCache(*(x.clone() for x in cache[:2])) for _ in range(3)]
    plan = plan_decode(cache, metadata.block_tables, metadata.context_lens, None, window)
    planned = replace(metadata, plan=plan)
    assert fuses(inputs, cache, planned, window)
    in_steps = AttentionInSteps.attention(OPS, inputs, caches[0], planned, scale, **extras)
    expected = torch_ops.TorchOps().attention(inputs, caches[1], metadata, scale, **extras)
    for _ in range(5):
        fused = OPS.attention(inputs, caches[2], planned, scale, **extras)
        assert torch.equal(fused[live], in_steps[live]) and (fused[~live] == 0).all()
        for ours, other in zip(caches[0][:2], caches[2][:2], strict=True):
            assert torch.equal(ours.nan_to_num(), other.nan_to_num())
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(fused[live], expected[live], rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not launch.is_hopper(DEVICE), reason="the kernel is Hopper's")
@pytest.mark.parametrize(("num_rows", "longest"), ((33, 2000), (130, 600)))
@pytest.mark.parametrize(
    ("heads", "dtype"),
    (
        ((16, 8, 128), torch.bfloat16),
        ((32, 8, 128), torch.bfloat16),
        ((16, 8, 128), torch.float16),
        ((14, 2, 64), torch.float16),
    ),
)
def test_heads_of_many_rows_are_made_in_decode_attention(heads, dtype, num_rows, longest):
    """With splits that are merged, and tiles of both kinds."""
    lens = [0, 1, 31, 32, 33, 63, 64, 65, 255, 256, 257, longest]
    lens += ragged_lens(num_rows - len(lens), longest)
    inputs, cache, metadata, scale = new_tokens(lens, heads, dtype, DEVICE, block_size=BLOCK_SIZE)
    live = metadata.context_lens > 0
    caches = [KVCache(*(x.clone() for x in cache[:2])) for _ in range(2)]
    plan = plan_decode(cache, metadata.block_tables, metadata.context_lens)
    planned = replace(metadata, plan=plan)
    assert hopper_fused_decode.takes(inputs, cache, planned, None)
    expected = torch_ops.TorchOps().attention(inputs, caches[0], metadata, scale)
    in_steps = AttentionInSteps.attention(OPS, inputs, caches[0], planned, scale)
    results = [OPS.attention(inputs, caches[1], planned, scale) for _ in range(5)]
    assert all(torch.equal(results[0], result) for result in results), "a race"
    assert (results[0][~live] == 0).all()
    for ours, other in zip(caches[1][:2], caches[0][:2], strict=True):
        assert torch.equal(ours.nan_to_num(), other.nan_to_num())
    tolerance = 8 * torch.finfo(dtype).eps
    for other in (expected, in_steps):
        torch.testing.assert_close(results[0][live], other[live], rtol=tolerance, atol=tolerance)


@needs_hopper
@pytest.mark.parametrize(("tile", "num_parts"), (((64, 2, 3), 1), ((32, 2, 3), 2), ((32, 4, 6), 3)))
@pytest.mark.parametrize(
    ("heads", "dtype"),
    (((16, 8, 128), torch.bfloat16), ((32, 4, 128), torch.bfloat16), ((14, 2, 64), torch.float16)),
)
def test_heads_of_few_rows_are_made_by_that_kernel(heads, dtype, tile, num_parts, monkeypatch):
    """In parts of QKV, with splits that are merged together, and programs that have none."""
    constants = {"MIN_ROWS": 1, "MAX_PARTS": 3, "MAX_GROUP": 8, "MERGE_ELEMENTS": 2048}
    constants |= {"IDLE_WAIT": False, "SLOTS_FIRST": True}
    for name, value in constants.items():
        monkeypatch.setattr(hopper_fused_decode, name, value)
    tile = hopper_fused_decode.DecodeTile(*tile)
    for lens in ([1, 0, 31, 32, 33, 64, 65, 127, 128, 129, 255, 256, 257, 2000], [384] * 8, [640]):
        sizes = {"block_size": BLOCK_SIZE, "num_parts": num_parts}
        inputs, cache, metadata, scale = new_tokens(lens, heads, dtype, DEVICE, **sizes)
        live = metadata.context_lens > 0
        caches = [KVCache(*(x.clone() for x in cache[:2])) for _ in range(2)]
        sizes = {"tile": tile.tokens, "programs_per_sm": 3, "min_split": 128}
        plan = plan_decode(cache, metadata.block_tables, metadata.context_lens, **sizes)
        planned = replace(metadata, plan=plan)
        assert hopper_fused_decode.takes(inputs, cache, planned, None)
        in_steps = AttentionInSteps.attention(OPS, inputs, caches[0], planned, scale)
        results = [
            hopper_fused_decode.hopper_fused_decode(inputs, caches[1], planned, scale, tile=tile)
            for _ in range(5)
        ]
        assert all(torch.equal(results[0], result) for result in results), "a race"
        assert (results[0][~live] == 0).all()
        for ours, other in zip(caches[1][:2], caches[0][:2], strict=True):
            assert torch.equal(ours.nan_to_num(), other.nan_to_num())
        near = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(results[0][live], in_steps[live], rtol=near, atol=near)


@pytest.mark.parametrize("rows", (8, 48))
def test_steps_that_follow_each_other_see_all_earlier_tokens(rows):
    """Keys and values are read before the kernel ahead has ended; the same with no overlap."""
    heads, num_steps = (16, 8, 128), 40
    lens = [250 + 5 * row for row in range(rows)]
    inputs, cache, metadata, scale = new_tokens(
        [length + num_steps for length in lens], heads, torch.bfloat16, DEVICE, block_size=256
    )
    table = torch.zeros(rows + 1, row_state.BLOCK_TABLE + metadata.block_tables.shape[1])
    table = table.int().to(DEVICE)
    table[:rows, row_state.BLOCK_TABLE :] = metadata.block_tables
    weight = randn(32 * 128, 16 * 128).div_(45)
    hidden = randn(rows, 16 * 128)

    def run() -> torch.Tensor:
        table[:rows, row_state.LENGTH] = ints(lens)
        own = KVCache(*(x.nan_to_num(0).clone() for x in cache[:2]))

        def step() -> torch.Tensor:
            state = OPS.gather_decode_inputs(table, torch.arange(rows, device=DEVICE).int(), 256)
            plan = OPS.plan_decode(own, state.block_tables, state.context_lens)
            planned = DecodeMetadata(
                state.slot_mapping, state.block_tables, state.context_lens, plan
            )
            x = hidden
            for _ in range(4):
                qkv = OPS.linear(x, weight)
                heads = inputs._replace(qkv=qkv, positions=state.positions)
                x = OPS.attention(heads, own, planned, scale).flatten(1)
            OPS.write_back(
                table, torch.arange(rows, device=DEVICE).int(), state.input_ids, state.positions
            )
            return x

        step()
        table[:rows, row_state.LENGTH] = ints(lens)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        results = []
        for _ in range(num_steps):
            graph.replay()
            results.append(out.clone())
        return torch.stack(results)

    overlapped = run()
    with mock.patch.object(launch, "OVERLAP_LAUNCHES", False):
        assert torch.equal(overlapped, run())
    assert len({tuple(x[0, :8].tolist()) for x in overlapped}) > num_steps // 2
