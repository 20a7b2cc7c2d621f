"""Top-k, top-p and min-p on the GPU against `torch_ops`, which sorts."""

import pytest
import torch

from nanovllm.kernels import torch_ops
from nanovllm.kernels.select import select_ops

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from nanovllm.kernels.triton import filters as triton_filters

DEVICE = torch.device("cuda", torch.cuda.current_device())
OPS = select_ops("triton", DEVICE, torch.bfloat16, 128, compile_torch_ops=False)
DTYPES = (torch.bfloat16, torch.float32)
VOCAB, PADDING = 151_936, 64
KINDS = ("even", "peaked", "outliers", "masked", "ties")
# top_k, top_p, min_p
FILTERS = (
    (20, 0.95, 0.0),
    (50, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 1.0, 0.05),
    (0, 0.99, 0.0),
    (1, 1.0, 0.0),
    (VOCAB - 1, 1.0, 0.0),
    (0, 0.01, 0.0),
    (0, 1.0, 0.0),
    (1000, 0.5, 0.01),
    (50_000, 1.0, 0.0),
    (50_000, 0.9, 0.0),
    (0, 0.6, 0.02),
)
# Case 43: what a filter leaves of .5, .3, .15, .05.
ODDS = (
    ((0, 1.0, 0.0), (0.5, 0.3, 0.15, 0.05)),
    ((0, 0.75, 0.0), (0.625, 0.375, 0.0, 0.0)),
    ((2, 1.0, 0.0), (0.625, 0.375, 0.0, 0.0)),
    ((0, 1.0, 0.25), (0.5263, 0.3158, 0.1579, 0.0)),
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_logits(batch_size: int, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Rows [B, VOCAB + PADDING] whose padding is larger than all of their logits."""
    logits = torch.randn(batch_size, VOCAB + PADDING, device=DEVICE)
    if kind == "peaked":
        logits *= 4
    elif kind == "outliers":  # as language models have them
        logits = logits * 2.2 - 1
        logits[:, 100:130] = torch.linspace(22, 9, 30, device=DEVICE)
    elif kind == "masked":
        allowed = torch.rand_like(logits) < torch.rand(batch_size, 1, device=DEVICE) ** 4
        logits.masked_fill_(~allowed, -torch.inf)
        logits[:, 0] = 0.0
    elif kind == "ties":
        logits = logits.round()
    logits[:, VOCAB:] = 100
    return logits.to(dtype)


def parameters(batch_size: int, filters=FILTERS) -> tuple[torch.Tensor, ...]:
    k, p, min_p = zip(*(filters[row % len(filters)] for row in range(batch_size)), strict=True)
    return (
        torch.tensor(k, dtype=torch.int32, device=DEVICE),
        torch.tensor(p, device=DEVICE),
        torch.tensor(min_p, device=DEVICE),
    )


def seeds_and_positions(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A seed of its own for each row, position 0."""
    words = torch.zeros(batch_size, 2, dtype=torch.int32, device=DEVICE)
    words[:, 0] = torch.arange(batch_size)
    return words, torch.zeros(batch_size, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_survivors_are_those_of_a_sort(dtype, kind):
    for batch_size, offset in ((1, 0), (1, 2), (8, 2), (256, 0)):
        logits = make_logits(batch_size, kind, dtype)
        temperatures = 0.5 + torch.rand(batch_size, device=DEVICE)
        k, p, min_p = parameters(batch_size, FILTERS[offset:] + FILTERS[:offset])
        args = logits, temperatures, k, p, min_p, VOCAB
        got = OPS.filter_thresholds(*args).unsqueeze(1)
        want = torch_ops.filter_thresholds(*args).unsqueeze(1)
        for begin in range(0, batch_size, 32):
            rows = slice(begin, begin + 32)
            values = logits[rows, :VOCAB].float()
            values = values.masked_fill(values == -torch.inf, torch.nan)  # whose odds are 0
            kept, expected = values >= got[rows], values >= want[rows]
            difference = (kept ^ expected).sum(1)
            by_rank = (p[rows] == 1) & (min_p[rows] == 0)
            assert (difference[by_rank] == 0).all()
            border = (0.005 * expected.sum(1)).clamp(min=3)
            assert (difference <= border).all(), (difference, expected.sum(1))


def test_a_row_does_not_depend_on_its_batch_and_repeats():
    logits = make_logits(64, "even", torch.bfloat16)
    temperatures = torch.full((64,), 0.9, device=DEVICE)
    filters = parameters(64)
    thresholds = OPS.filter_thresholds(logits, temperatures, *filters, VOCAB)
    assert torch.equal(thresholds, OPS.filter_thresholds(logits, temperatures, *filters, VOCAB))
    for row in range(13):
        part = slice(row, row + 1)
        alone = OPS.filter_thresholds(
            logits[part], temperatures[part], *(x[part] for x in filters), VOCAB
        )
        assert torch.equal(alone, thresholds[part])


@pytest.mark.parametrize("num_passes", (1, 2, 6))
def test_any_number_of_passes_ends_at_the_same_threshold(monkeypatch, num_passes):
    monkeypatch.setattr(triton_filters, "NUM_PASSES", num_passes)
    logits = make_logits(26, "even", torch.bfloat16)
    args = logits, torch.ones(26, device=DEVICE), *parameters(26)
    got = OPS.filter_thresholds(*args, VOCAB).unsqueeze(1)
    want = torch_ops.filter_thresholds(*args, VOCAB).unsqueeze(1)
    values = logits[:, :VOCAB].float()
    expected = (values >= want).sum(1)
    assert (((values >= got).sum(1) - expected).abs() <= (0.005 * expected).clamp(min=3)).all()


def test_values_of_all_magnitudes_and_rows_without_any():
    exponents = torch.randn(4, VOCAB, device=DEVICE) * 8
    logits = exponents.exp() * torch.randn_like(exponents).sign()
    logits[2] = -torch.inf
    logits[3] = torch.nan
    args = logits, torch.ones(4, device=DEVICE), *parameters(4, ((75_000, 1.0, 0.0),))
    got = OPS.filter_thresholds(*args, VOCAB)
    assert ((logits >= got[:, None]).sum(1)[:2] == 75_000).all()
    assert not got.isnan().any()
    _, ids = OPS.sample(logits, args[1], *seeds_and_positions(4), 0, VOCAB, got)
    assert ((ids >= 0) & (ids < VOCAB)).all()


def test_small_vocabularies():
    for vocab_size in (1, 2, 5, 31, 100, 5000, 8193):
        logits = torch.randn(13, vocab_size, device=DEVICE, dtype=torch.float32)
        k, p, min_p = parameters(13)
        args = logits, torch.ones(13, device=DEVICE), k % (vocab_size + 1), p, min_p, vocab_size
        got, want = OPS.filter_thresholds(*args), torch_ops.filter_thresholds(*args)
        difference = (logits >= got[:, None]).sum(1) - (logits >= want[:, None]).sum(1)
        assert (difference.abs() <= 1).all() and (difference[(p == 1) & (min_p == 0)] == 0).all()
    empty = torch.empty(0, device=DEVICE)
    assert OPS.filter_thresholds(logits[:0], *[empty] * 4, 8193).shape == (0,)


def test_rows_further_apart_than_int32_reaches():
    stride = 2**30
    memory = torch.empty(2 * stride + VOCAB, dtype=torch.bfloat16, device=DEVICE)
    logits = memory.as_strided((3, VOCAB), (stride, 1))
    logits[:] = make_logits(3, "even", torch.bfloat16)[:, :VOCAB]
    args = torch.ones(3, device=DEVICE), *parameters(3), VOCAB
    expected = OPS.filter_thresholds(logits.clone(), *args)
    assert torch.equal(OPS.filter_thresholds(logits, *args), expected)
    race = args[0], *seeds_and_positions(3), 0, VOCAB, expected
    _, ids = OPS.sample(logits, *race)
    assert torch.equal(ids, OPS.sample(logits.clone(), *race)[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_race_among_survivors(dtype):
    batch_size = 64
    logits = make_logits(batch_size, "even", dtype)
    temperatures = torch.rand(batch_size, device=DEVICE) * 2
    temperatures[::7] = 0
    temperatures[3::7] = -1
    thresholds = OPS.filter_thresholds(logits, temperatures, *parameters(batch_size), VOCAB)
    args = logits, temperatures, *seeds_and_positions(batch_size), 0, VOCAB, thresholds
    scores, ids = OPS.sample(*args)
    expected_scores, expected_ids = torch_ops.sample(*args)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-4)
    is_sampled = temperatures >= 0
    assert (ids != expected_ids)[is_sampled].sum() <= 1
    assert (scores[~is_sampled] == -torch.inf).all()
    assert ((ids >= 0) & (ids < VOCAB)).all()
    drawn = logits.gather(1, ids.long().unsqueeze(1)).squeeze(1).float()
    assert (drawn >= thresholds)[is_sampled].all()


@pytest.mark.parametrize(("filters", "odds"), ODDS)
def test_draws_follow_the_filtered_softmax(filters, odds):
    draws = 20_000
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], device=DEVICE).log().repeat(draws, 1)
    temperatures, seeds = torch.ones(draws, device=DEVICE), seeds_and_positions(draws)
    thresholds = OPS.filter_thresholds(logits, temperatures, *parameters(draws, (filters,)), 4)
    _, ids = OPS.sample(logits, temperatures, *seeds, 0, 4, thresholds)
    shares = (ids.bincount(minlength=4) / draws).cpu()
    assert (shares[torch.tensor(odds) == 0] == 0).all()
    torch.testing.assert_close(shares, torch.tensor(odds), rtol=0, atol=0.017)


def test_in_a_cuda_graph():
    """Captured once, replayed with other logits and other parameters."""
    batch_size = 16
    logits = make_logits(batch_size, "even", torch.bfloat16)
    temperatures, seeds = torch.ones(batch_size, device=DEVICE), seeds_and_positions(batch_size)
    filters = parameters(batch_size)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        thresholds = OPS.filter_thresholds(logits, temperatures, *filters, VOCAB)
        return thresholds, OPS.sample(logits, temperatures, *seeds, 0, VOCAB, thresholds)[1]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        thresholds, ids = run()
    for kind in KINDS:
        logits.copy_(make_logits(batch_size, kind, torch.bfloat16))
        for values in filters:
            values.copy_(values.roll(1))
        graph.replay()
        expected_thresholds, expected_ids = run()
        assert torch.equal(thresholds, expected_thresholds) and torch.equal(ids, expected_ids)
