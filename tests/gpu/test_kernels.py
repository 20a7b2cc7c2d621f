"""Every kernel on the GPU against `torch_ops`.

The reference is the torch op in float32 on the same inputs. A kernel's error may be at most 1.5
times the error of the torch op in the inputs' own dtype, plus a rounding of the largest result.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanovllm.kernels import row_state, torch_ops
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.types import DecodeMetadata, KVCache, PrefillMetadata

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from nanovllm.kernels.triton import prefill_attention as triton_prefill_attention

DEVICE = torch.device("cuda", torch.cuda.current_device())
OPS = select_ops("triton", DEVICE, torch.bfloat16, 128, compile_torch_ops=False)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = 1e-6
# (query heads, KV heads, head_dim)
HEADS = ((16, 8, 128), (4, 4, 64), (6, 2, 80))
EDGE_LENS = [1, 15, 0, 16, 17, 255, 256, 257, 0, 1000]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def ints(values, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def assert_as_exact_as_torch(
    got: torch.Tensor, torch_result: torch.Tensor, exact: torch.Tensor
) -> None:
    assert got.dtype == torch_result.dtype and got.shape == exact.shape
    assert got.isfinite().all()
    error = (got.float() - exact).abs().max().item()
    torch_error = (torch_result.float() - exact).abs().max().item()
    ulps = 8 if got.dtype == torch.float32 else 0.5
    floor = ulps * torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert error <= 1.5 * torch_error + floor, f"{error=:.3g} {torch_error=:.3g} {floor=:.3g}"


def upcast(args: tuple) -> tuple:
    def upcast_one(arg):
        if isinstance(arg, KVCache):
            return KVCache(*upcast(arg))
        is_float = isinstance(arg, torch.Tensor) and arg.is_floating_point()
        return arg.float() if is_float else arg

    return tuple(map(upcast_one, args))


# Norms, activation, rotary embedding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (128, 1000, 1024, 5120))
def test_norms(dtype, width):
    for num_rows in (0, 1, 7, 512, 1500):
        x, residual = randn(2, num_rows, width, dtype=dtype)
        args = x, randn(width, dtype=dtype), EPS
        got, low = OPS.rms_norm(*args), torch_ops.rms_norm(*args)
        if num_rows == 0:
            assert got.shape == (0, width)
            continue
        assert_as_exact_as_torch(got, low, torch_ops.rms_norm(*upcast(args)))
        args = x, residual, *args[1:]
        low, exact = torch_ops.add_rms_norm(*args), torch_ops.add_rms_norm(*upcast(args))
        got = OPS.add_rms_norm(*args)
        assert torch.equal(got[1], low[1])
        assert_as_exact_as_torch(got[0], low[0], exact[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (100, 3072))
def test_silu_and_mul(dtype, width):
    for num_rows in (1, 7, 512):
        gate_up = randn(num_rows, 2 * width, dtype=dtype)
        got, low = OPS.silu_and_mul(gate_up), torch_ops.silu_and_mul(gate_up)
        assert_as_exact_as_torch(got, low, torch_ops.silu_and_mul(gate_up.float()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("with_norm", (True, False))
def test_qk_norm_rope_store(dtype, heads, with_norm):
    num_heads, num_kv_heads, head_dim = heads
    angles = torch.outer(torch.arange(4096), 1e6 ** -(torch.arange(0, head_dim, 2) / head_dim))
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(DEVICE)
    weights = randn(2, head_dim, dtype=dtype) if with_norm else (None, None)
    for num_tokens in (1, 7, 512, 1500):
        qkv = randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
        positions = torch.randint(0, 4096, (num_tokens,), device=DEVICE, dtype=torch.int32)
        slots = torch.randperm(100 * 16, device=DEVICE)[:num_tokens]
        slots[num_tokens // 2] = -1
        caches = [
            KVCache(*torch.zeros(2, 100, 16, num_kv_heads, head_dim, device=DEVICE, dtype=kind))
            for kind in (dtype, dtype, torch.float32)
        ]
        args = qkv, *weights, EPS, cos_sin, positions
        got = OPS.qk_norm_rope_store(*args, caches[0], slots)
        low = torch_ops.qk_norm_rope_store(*args, caches[1], slots)
        exact = torch_ops.qk_norm_rope_store(*upcast(args), caches[2], slots)
        assert_as_exact_as_torch(got, low, exact)
        assert_as_exact_as_torch(caches[0].key, caches[1].key, caches[2].key)
        assert torch.equal(caches[0].value, caches[1].value)


# Attention


NO_SLOTS = torch.empty(0, dtype=torch.int64)  # attention only reads the cache


def paged_inputs(
    lens: list[int], block_size: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> tuple[KVCache, torch.Tensor]:
    """A cache of NaN (values: large numbers) outside the sequences' slots; block tables."""
    _, num_kv_heads, head_dim = heads
    width = -(-max(lens) // block_size) + 1
    num_blocks = width * len(lens)
    caches = torch.full(
        (2, num_blocks, block_size, num_kv_heads, head_dim), torch.nan, device=DEVICE, dtype=dtype
    )
    caches[1] = 1e4  # values in a cache are finite
    tables = torch.randperm(num_blocks, device=DEVICE).view(len(lens), width).int()
    position = torch.arange(width * block_size, device=DEVICE)
    slots = tables[:, position // block_size].long() * block_size + position % block_size
    slots = slots[position < ints(lens).unsqueeze(1)]
    caches.flatten(1, 2)[:, slots] = randn(2, len(slots), num_kv_heads, head_dim, dtype=dtype)
    return KVCache(*caches), tables


def check_attention(kernel, args: tuple) -> None:
    got, low = kernel(*args), torch_ops.attend(*args)
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch_ops.attend(*upcast(args))
    assert_as_exact_as_torch(got, low, exact)


def decode_args(lens: list[int], block_size: int, heads: tuple[int, int, int], dtype: torch.dtype):
    cache, tables = paged_inputs(lens, block_size, heads, dtype)
    query = randn(len(lens), heads[0], heads[2], dtype=dtype)
    return query, cache, DecodeMetadata(NO_SLOTS, tables, ints(lens)), heads[2] ** -0.5


def prefill_args(
    lens_q: list[int],
    lens_k: list[int],
    block_size: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
):
    cache, tables = paged_inputs(lens_k, block_size, heads, dtype)
    query = randn(sum(lens_q), heads[0], heads[2], dtype=dtype)
    cu_q, cu_k = (ints([0, *n]).cumsum(0, dtype=torch.int32) for n in (lens_q, lens_k))
    metadata = PrefillMetadata(NO_SLOTS, tables, cu_q, cu_k, max(lens_q), max(lens_k))
    return query, cache, metadata, heads[2] ** -0.5


# Whole prompts, cached prefixes, single new tokens; around pages and tiles of queries.
LENS_Q = [1, 15, 17, 255, 256, 257, 128, 1, 1, 100, 700]
LENS_K = [1, 15, 17, 255, 256, 257, 384, 2, 700, 613, 700]
# Few new tokens for the most part.
SHORT_LENS_Q = [1, 15, 17, 64, 65, 30, 129, 1, 30]
SHORT_LENS_K = [1, 15, 17, 64, 65, 1030, 384, 700, 286]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_prefill_attention(dtype, heads):
    args = prefill_args(LENS_Q, LENS_K, 256, heads, dtype)
    check_attention(OPS.attend, args)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("use_tensor_descriptors", (True, False))
def test_prefill_attention_by_bulk_copies_and_by_pointers(heads, use_tensor_descriptors):
    if use_tensor_descriptors and torch.cuda.get_device_capability(DEVICE) < (9, 0):
        pytest.skip("bulk tensor copies need compute capability 9.0")

    def kernel(*args):
        return triton_prefill_attention.prefill_attention(
            *args, use_tensor_descriptors=use_tensor_descriptors
        )

    args = prefill_args(LENS_Q, LENS_K, 256, heads, torch.bfloat16)
    check_attention(kernel, args)


@pytest.mark.parametrize(
    ("block_size", "heads", "lens"),
    (
        (16, (16, 8, 128), LENS_K),
        (256, (16, 1, 256), LENS_K),
        (256, (16, 8, 128), [1 + 37 * seq % 50 for seq in range(512)]),
    ),
    ids=("small pages", "one KV head of 256", "512 prompts"),
)
def test_prefill_attention_other_shapes(block_size, heads, lens):
    args = prefill_args(lens, lens, block_size, heads, torch.bfloat16)
    check_attention(OPS.attend, args)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("heads", ((16, 8, 128), (4, 4, 64), (24, 2, 128)))
@pytest.mark.parametrize("lens", ((LENS_Q, LENS_K), (SHORT_LENS_Q, SHORT_LENS_K)))
def test_prefill_attention_in_three_roles(lens, heads, dtype, monkeypatch):
    """The kernel with a copying warp computes what the other one does, each time the same.

    A lost or early barrier would show as a difference in one of the repetitions.
    """
    if torch.cuda.get_device_capability(DEVICE)[0] != 9:
        pytest.skip("needs compute capability 9.0")
    args = prefill_args(*lens, 256, heads, dtype)
    expected = triton_prefill_attention.prefill_attention(*args, use_tensor_descriptors=True)
    hopper_prefill = triton_prefill_attention.hopper_prefill
    calls = []

    def counted(*args):
        calls.append(args)
        return kernel(*args)

    kernel = hopper_prefill.hopper_prefill
    monkeypatch.setattr(hopper_prefill, "hopper_prefill", counted)
    results = [OPS.attend(*args) for _ in range(50)]
    assert len(calls) == 50
    assert all(torch.equal(result, results[0]) for result in results)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(results[0], expected, rtol=2 * eps, atol=eps)
    # As in a CUDA graph, whose numbers are only bounds of those of a step.
    query, cache, metadata, scale = args
    ends_q, ends_k, tables = metadata.cu_seqlens_q, metadata.cu_seqlens_k, metadata.block_tables
    padded = replace(
        metadata,
        cu_seqlens_q=torch.cat([ends_q, ends_q[-1:].expand(5)]),
        cu_seqlens_k=torch.cat([ends_k, ends_k[-1:].expand(5)]),
        block_tables=torch.cat([tables, 0 * tables[:5]]),
        max_seqlen_q=sum(LENS_Q),
        bounds=ints([len(LENS_Q), max(LENS_Q), max(LENS_K)]),
    )
    assert torch.equal(OPS.attend(query, cache, padded, scale), results[0])


def test_flash_attn_agrees():
    pytest.importorskip("flash_attn", reason="flash_attn is not installed", exc_type=ImportError)
    flash = select_ops("flash-attn", DEVICE, torch.bfloat16, 128, compile_torch_ops=False)
    lens = [n for n in EDGE_LENS if n > 0]
    for args in (
        decode_args(lens, 256, HEADS[0], torch.bfloat16),
        prefill_args(LENS_Q, LENS_K, 256, HEADS[0], torch.bfloat16),
    ):
        torch.testing.assert_close(flash.attend(*args), OPS.attend(*args), rtol=1.6e-2, atol=1e-2)


def test_cache_beyond_int32_elements():
    """The last pages of a cache of more than 2^31 elements: slots and pages need int64 offsets."""
    num_heads, num_kv_heads, head_dim = 16, 8, 128
    block_size = 256
    num_blocks = 2**31 // (block_size * num_kv_heads * head_dim) + 3
    needed = 2 * 2 * num_blocks * block_size * num_kv_heads * head_dim
    if torch.cuda.mem_get_info()[0] < needed + 2**30:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    shape = (2, num_blocks, block_size, num_kv_heads, head_dim)
    large = torch.zeros(shape, device=DEVICE, dtype=torch.bfloat16)
    small = torch.zeros((2, 2, *shape[2:]), device=DEVICE, dtype=torch.bfloat16)
    num_tokens = 300
    position = torch.arange(num_tokens, device=DEVICE)
    qkv = randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=torch.bfloat16)
    results = []
    for caches, pages in ((large, [num_blocks - 1, num_blocks - 2]), (small, [1, 0])):
        cache, table = KVCache(*caches), ints([pages])
        slots = table[0].long()[position // block_size] * block_size + position % block_size
        query = OPS.qk_norm_rope_store(
            qkv,
            None,
            None,
            EPS,
            torch.full((512, head_dim), 0.5, device=DEVICE),
            position.int(),
            cache,
            slots,
        )
        cu = ints([0, num_tokens])
        metadata = PrefillMetadata(slots, table, cu, cu, num_tokens, num_tokens)
        prefill = OPS.attend(query, cache, metadata, head_dim**-0.5)
        metadata = DecodeMetadata(slots, table, ints([num_tokens]))
        decode = OPS.attend(query[-1:], cache, metadata, head_dim**-0.5)
        results.append((prefill, decode, caches.flatten(1, 2)[:, slots]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


# Sampling


def sample_args(batch_size: int, vocab_size: int, dtype: torch.dtype):
    words = torch.randint(-(2**31), 2**31, (batch_size, 2), device=DEVICE).int()
    positions = torch.randint(0, 40_000, (batch_size,), device=DEVICE, dtype=torch.int32)
    temperatures = torch.rand(batch_size, device=DEVICE) * 2
    temperatures[::7] = 0
    return randn(batch_size, vocab_size, dtype=dtype) * 3, temperatures, words, positions


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_draws_what_torch_draws(dtype):
    disagreements = total = 0
    for batch_size, vocab_size in ((1, 151936), (256, 151936), (4000, 3001)):
        args = *sample_args(batch_size, vocab_size, dtype), 0, vocab_size - 100
        scores, ids = OPS.sample(*args)
        expected_scores, expected_ids = torch_ops.sample(*args)
        torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-4)
        assert ids.max() < vocab_size - 100
        greedy = args[1] == 0
        assert torch.equal(ids[greedy], expected_ids[greedy])
        disagreements += (ids != expected_ids).sum().item()
        total += batch_size
    assert disagreements <= 0.001 * total


def test_sample_shards_merge_to_the_whole():
    args = sample_args(64, 3 * 1000, torch.bfloat16)
    scores, ids = OPS.sample(*args, 0, 1900)
    shards = [
        OPS.sample(args[0][:, begin : begin + 1000], *args[1:], begin, 1900)
        for begin in (0, 1000, 2000)
    ]
    shard_scores, shard_ids = (torch.stack(parts) for parts in zip(*shards, strict=True))
    assert (shard_scores[2] == -torch.inf).all() and (shard_ids[2] == 1899).all()
    best = shard_scores.argmax(0, keepdim=True)
    assert torch.equal(shard_ids.gather(0, best)[0], ids)
    assert torch.equal(shard_scores.gather(0, best)[0], scores)


@pytest.mark.parametrize(
    ("temperature", "odds"),
    ((1.0, (0.5, 0.3, 0.15, 0.05)), (0.5, (0.6849, 0.2466, 0.0616, 0.0068))),
)
def test_draws_follow_the_softmax(temperature, odds):
    draws = 20_000
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], device=DEVICE).log().repeat(draws, 1)
    words = torch.zeros(draws, 2, dtype=torch.int32, device=DEVICE)
    words[:, 0] = torch.arange(draws)
    temperatures = torch.full((draws,), temperature, device=DEVICE)
    _, ids = OPS.sample(logits, temperatures, words, torch.zeros_like(words[:, 0]), 0, 4)
    shares = ids.bincount(minlength=4) / draws
    torch.testing.assert_close(shares.cpu(), torch.tensor(odds), rtol=0, atol=0.017)


@pytest.mark.parametrize("temperature", (0.3, 1.0))
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_follow_the_softmax_over_many_groups(dtype, temperature):
    """Chi-square over 1,003 tokens; the rare ones are one cell."""
    draws = 20_000
    row = (randn(1003) * 2).to(dtype)
    words = torch.zeros(draws, 2, dtype=torch.int32, device=DEVICE)
    words[:, 1] = torch.arange(draws)
    temperatures = torch.full((draws,), temperature, device=DEVICE)
    logits = row.expand(draws, -1).contiguous()
    _, ids = OPS.sample(logits, temperatures, words, torch.zeros_like(words[:, 0]), 0, 1003)
    expected = (row.double() / temperature).softmax(0) * draws
    counts, rare = ids.bincount(minlength=1003).double(), expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
    expected = torch.cat([expected[~rare], expected[rare].sum().view(1)])
    chi_square = ((counts - expected).square() / expected).sum().item()
    assert abs(chi_square - (len(counts) - 1)) < 5 * (2 * len(counts)) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_thresholds", (False, True))
def test_logits_that_are_no_numbers_leave_their_groups_in_the_race(dtype, has_thresholds):
    """NaN, -inf and +inf among others, as torch's operations have them."""
    logits, temperatures, words, positions = sample_args(70, 9000, dtype)
    logits[torch.rand(70, 9000, device=DEVICE) < 0.3] = torch.nan
    logits[:, ::5] = -torch.inf
    logits[:10, 4321] = torch.inf
    logits[10:20, :8000] = torch.nan
    temperatures[20:30] = -1
    thresholds = torch.randn(70, device=DEVICE) if has_thresholds else None
    args = logits, temperatures, words, positions, 0, 8990, thresholds
    scores, ids = OPS.sample(*args)
    expected_scores, expected_ids = torch_ops.sample(*args)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-4)
    is_sampled = temperatures >= 0
    assert (ids != expected_ids)[is_sampled].sum() <= 1
    assert (ids[:10] == 4321).all() and (scores[:10] == torch.inf).all()
    assert not logits.gather(1, ids.long().unsqueeze(1))[is_sampled].isnan().any()


def test_nan_logits_give_a_valid_id():
    logits = torch.full((2, 5000), torch.nan, device=DEVICE)
    logits[1, 4321] = -5.0
    _, _, words, positions = sample_args(2, 1, torch.float32)
    for temperature in (0.0, 1.0):
        temperatures = torch.full((2,), temperature, device=DEVICE)
        _, ids = OPS.sample(logits, temperatures, words, positions, 0, 4900)
        assert 0 <= ids[0] < 4900 and ids[1] == 4321


# Row table and CUDA graphs


def row_table(lens: list[int], width: int) -> torch.Tensor:
    """Rows with random words and distinct pages, and the padding row."""
    table = torch.zeros(len(lens) + 1, row_state.BLOCK_TABLE + width, device=DEVICE).int()
    table[:-1, row_state.LAST_TOKEN] = torch.arange(len(lens), device=DEVICE)
    table[:-1, row_state.LENGTH] = ints(lens)
    table[:-1, row_state.TEMPERATURE] = torch.rand(len(lens), device=DEVICE).view(torch.int32)
    table[:-1, row_state.SEED : row_state.SEED + 2] = ints([[7, -9]])
    pages = torch.randperm(len(lens) * width, device=DEVICE).view(len(lens), width)
    table[:-1, row_state.BLOCK_TABLE :] = pages.int()
    return table


def test_row_table():
    lens = [1, 16, 17, 4800, 33]
    table = row_table(lens, 300)
    rows = ints([3, 5, 0, 2, 1, 5])
    expected = torch_ops.gather_decode_inputs(table, rows, 16)
    inputs = OPS.gather_decode_inputs(table, rows, 16)
    for name, got in inputs._asdict().items():
        want = getattr(expected, name)
        assert got.dtype == want.dtype and torch.equal(got, want), name
    token_ids = torch.arange(100, 106, dtype=torch.int32, device=DEVICE)
    expected_table = table.clone()
    temperatures = torch.tensor([0.0, 1.0, -1.0, 0.5, -1.0, -1.0], device=DEVICE)
    for given in (None, temperatures):
        torch_ops.write_back(expected_table, rows, token_ids, inputs.positions, given)
        OPS.write_back(table, rows, token_ids, inputs.positions, given)
        assert torch.equal(table, expected_table)
        token_ids = token_ids + 50


def test_one_graph_serves_every_length():
    """gather, store, attend, sample and write back, captured once and replayed as contexts grow."""
    num_heads, num_kv_heads, head_dim = 16, 8, 128
    block_size, width = 256, 4
    start = row_table([1, 60, 255, 256, 900], width)
    rows = ints([4, 2, 0, 1, 3, 5])
    caches = randn(2, 5 * width, block_size, num_kv_heads, head_dim, dtype=torch.bfloat16)
    vectors = randn(100, (num_heads + 2 * num_kv_heads) * head_dim, dtype=torch.bfloat16)
    head = randn(num_heads * head_dim, 100, dtype=torch.bfloat16)
    cos_sin = randn(width * block_size, head_dim).clamp(-1, 1)

    def step(ops, table, cache):
        inputs = ops.gather_decode_inputs(table, rows, block_size)
        query = ops.qk_norm_rope_store(
            vectors[inputs.input_ids],
            None,
            None,
            EPS,
            cos_sin,
            inputs.positions,
            cache,
            inputs.slot_mapping,
        )
        metadata = DecodeMetadata(inputs.slot_mapping, inputs.block_tables, inputs.context_lens)
        attended = ops.attend(query, cache, metadata, 0.1)
        logits = attended.flatten(1) @ head
        _, token_ids = ops.sample(logits, inputs.temperatures, inputs.seeds, inputs.positions, 0, 9)
        ops.write_back(table, rows, token_ids, inputs.positions)
        return attended

    table, graph_caches = start.clone(), caches.clone()
    step(OPS, table, KVCache(*graph_caches))  # compiles
    table.copy_(start)
    graph_caches.copy_(caches)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(OPS, table, KVCache(*graph_caches))
    eager_table, eager_caches = start.clone(), caches.clone()
    for _ in range(40):
        graph.replay()
        attended = step(OPS, eager_table, KVCache(*eager_caches))
        assert torch.equal(captured, attended)
        assert torch.equal(table, eager_table)
    assert (table[:-1, row_state.LENGTH] - start[:-1, row_state.LENGTH] == 40).all()
    assert (table[-1] == 0).all() and torch.equal(graph_caches, eager_caches)
    inputs = OPS.gather_decode_inputs(table, rows, block_size)
    metadata = DecodeMetadata(inputs.slot_mapping, inputs.block_tables, inputs.context_lens)
    check_attention(OPS.attend, (captured, KVCache(*graph_caches), metadata, 0.1))


def test_compiled_torch_ops_agree():
    ops = select_ops("torch", DEVICE, torch.float32, 64, compile_torch_ops=True)
    x, residual = randn(2, 5, 64)
    weight = randn(64)
    torch.testing.assert_close(
        ops.rms_norm(x, weight, EPS), torch_ops.rms_norm(x, weight, EPS), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        ops.add_rms_norm(x, residual, weight, EPS),
        torch_ops.add_rms_norm(x, residual, weight, EPS),
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(ops.silu_and_mul(x), torch_ops.silu_and_mul(x))
    args = *sample_args(64, 3001, torch.float32), 0, 3001
    assert torch.equal(ops.sample(*args)[1], torch_ops.sample(*args)[1])
    caches = torch.zeros(4, 2, 16, 2, 64, device=DEVICE)
    args = randn(5, 8 * 64), weight, weight, EPS, randn(99, 64), ints([0, 1, 2, 50, 98])
    slots = ints([3, -1, 31, 0, 7], torch.int64)
    torch.testing.assert_close(
        ops.qk_norm_rope_store(*args, KVCache(*caches[:2]), slots),
        torch_ops.qk_norm_rope_store(*args, KVCache(*caches[2:]), slots),
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(caches[:2], caches[2:], rtol=1e-5, atol=1e-5)
