"""Run by test_triton_interpreter.py with TRITON_INTERPRET=1: the filters' thresholds and the race.

Small chunks and samples, so that a row of 700 logits goes through what one of 151,936 does.
"""

import pytest
import torch

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton import filters as triton_filters
from nanovllm.kernels.triton import sampling as triton_sampling

VOCAB = 700
# top_k, top_p, min_p
FILTERS = (
    (20, 1.0, 0.0),
    (0, 0.9, 0.0),
    (20, 0.95, 0.0),
    (400, 0.8, 0.0),
    (0, 1.0, 0.05),
    (0, 0.9, 0.02),
    (1, 1.0, 0.0),
    (VOCAB - 1, 1.0, 0.0),
    (VOCAB, 1.0, 0.0),
    (0, 0.01, 0.0),
)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(triton_sampling, "CHUNK", 512)
    sizes = {"CHUNK": 256, "TILE": 128, "UNROLL": 2, "CAPACITY": 32, "MAXIMUM_TILE": 512}
    for name, value in {**sizes, "SAMPLE": 128, "SAMPLE_BLOCK": 8, "SAMPLE_STEPS": 5}.items():
        monkeypatch.setattr(triton_filters, name, value)


def parameters(rows: int, filters=FILTERS):
    k, p, min_p = zip(*(filters[row % len(filters)] for row in range(rows)), strict=True)
    return torch.tensor(k, dtype=torch.int32), torch.tensor(p), torch.tensor(min_p)


def check(logits, temperatures, k, p, min_p):
    """The survivors of both backends differ by a value at top-p's border at most."""
    got = triton_filters.filter_thresholds(logits, temperatures, k, p, min_p, VOCAB)
    want = torch_ops.filter_thresholds(logits, temperatures, k, p, min_p, VOCAB)
    values = logits[:, :VOCAB].float()
    differs = (values >= got[:, None]) != (values >= want[:, None])
    differs &= values > -torch.inf
    assert not differs[p == 1].any()
    for row in differs.nonzero()[:, 0].unique():
        assert values[row][differs[row]].unique().numel() == 1
    assert differs.any(1).float().mean() < 0.2
    return got


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_thresholds(dtype):
    """Even, peaked and masked rows, ties, a NaN, padding that would win, rows not sampled."""
    rows = len(FILTERS) + 2
    logits = torch.randn(rows, VOCAB + 8)
    shift = 0 if dtype == torch.float32 else 1  # each filter meets two kinds of rows
    kind = (torch.arange(rows) + shift) % 3
    logits[kind == 1] *= 4
    logits[kind == 2] = (logits[kind == 2] * 4).round()
    logits[5:7, torch.rand(VOCAB + 8) < 0.97] = -torch.inf
    logits[:, 11] = torch.nan
    logits[:, VOCAB:] = 100
    temperatures = torch.full((rows,), 0.8)
    temperatures[-2:] = torch.tensor([0.0, -1.0])
    got = check(logits.to(dtype), temperatures, *parameters(rows))
    assert (got[-2:] == -torch.inf).all()


def test_a_row_that_passes_do_not_finish(monkeypatch):
    """One pass only, and values of very different magnitudes."""
    monkeypatch.setattr(triton_filters, "NUM_PASSES", 1)
    filters = ((0, 0.7, 0.0), (300, 1.0, 0.0))
    logits = torch.randn(2, VOCAB)
    logits[1] = -(10.0 ** (logits[1] * 3))
    check(logits, torch.ones(2), *parameters(2, filters))


def test_rows_without_a_finite_logit():
    logits = torch.full((2, VOCAB), -torch.inf)
    logits[1] = torch.nan
    got = triton_filters.filter_thresholds(
        logits, torch.ones(2), *parameters(2, ((5, 0.5, 0.1), (0, 0.5, 0.0))), VOCAB
    )
    assert not got.isnan().any() and (got < -1e38).all()


def test_the_race_among_survivors():
    rows = 12
    logits = torch.randn(rows, VOCAB).half()
    temperatures = torch.linspace(-1, 2, rows)
    temperatures[4] = 0
    words = torch.randint(-(2**31), 2**31, (rows, 2)).int()
    thresholds = torch.where(temperatures == 0, -torch.inf, torch.linspace(-1, 3, rows))
    args = logits, temperatures, words, words[:, 0].clone(), 0, VOCAB, thresholds
    scores, ids = triton_sampling.sample(*args)
    expected_scores, expected_ids = torch_ops.sample(*args)
    is_sampled = temperatures >= 0
    assert (scores[~is_sampled] == -torch.inf).all() and ((ids >= 0) & (ids < VOCAB)).all()
    assert torch.equal(ids[is_sampled], expected_ids[is_sampled])
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-5)
