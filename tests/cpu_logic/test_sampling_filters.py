"""`torch_ops.filter_thresholds` against sorted float64 probabilities, and draws from what is left.

The reference works token by token as the parameters are documented; nothing of it is shared.
"""

import numpy as np
import pytest
import torch

from nanovllm.kernels import torch_ops
from nanovllm.kernels.types import DRAW_GROUP

DTYPES = (torch.float32, torch.bfloat16)
# Case 43: what a filter leaves of .5, .3, .15, .05 (top_k, top_p, min_p -> odds).
ODDS = (
    ((0, 0.75, 0.0), (0.625, 0.375, 0.0, 0.0)),
    ((2, 1.0, 0.0), (0.625, 0.375, 0.0, 0.0)),
    ((0, 1.0, 0.25), (0.5263, 0.3158, 0.1579, 0.0)),
)


def survivors(logits, temperature: float, k: int, p: float, min_p: float) -> set[int]:
    """The token ids that min_p, then top_k, then top_p leave of logits [V]."""
    ids = [i for i, logit in enumerate(logits) if not np.isnan(logit)]
    values = {i: float(logits[i]) for i in ids}
    largest = max(values.values())
    weights = {i: np.exp((values[i] - largest) / temperature) for i in ids}
    kept = [i for i in ids if weights[i] >= min_p]
    if 0 < k < len(logits):
        kth = sorted((values[i] for i in kept), reverse=True)[: min(k, len(kept))][-1]
        kept = [i for i in kept if values[i] >= kth]
    if p < 1:
        total = sum(weights[i] for i in kept)
        reached, crossing = 0.0, largest
        for i in sorted(kept, key=lambda i: -values[i]):
            crossing = values[i]
            reached += weights[i]
            if reached >= p * total:
                break
        kept = [i for i in kept if values[i] >= crossing]
    return set(kept)


def thresholds_of(logits, temperature, k, p, min_p, vocab_size):
    """The op's thresholds for equal parameters in all rows."""
    rows = len(logits)
    return torch_ops.filter_thresholds(
        logits,
        torch.full((rows,), temperature),
        torch.full((rows,), k, dtype=torch.int32),
        torch.full((rows,), p),
        torch.full((rows,), min_p),
        vocab_size,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", (0.5, 1.0))
def test_survivors_are_those_of_the_reference(dtype, temperature):
    """Plain and peaked rows, masked ones, ties, a NaN, and padding that would win."""
    torch.manual_seed(1)
    vocab_size = 300
    logits = torch.randn(5, vocab_size + 20) * torch.tensor([1.0, 4.0, 2.0, 1.0, 3.0])[:, None]
    logits[2, torch.rand(vocab_size + 20) < 0.9] = -torch.inf
    logits[3] = logits[3].round()
    logits[4, 7] = torch.nan
    logits[:, vocab_size:] = 100
    logits = logits.to(dtype)
    rows = logits[:, :vocab_size].double().numpy()
    for k in (0, 1, 2, 20, vocab_size - 1, vocab_size, 10**9):
        for p in (0.01, 0.5, 0.9, 1.0):
            for min_p in (0.0, 0.03, 1.0):
                got = thresholds_of(logits, temperature, k, p, min_p, vocab_size)
                for row, threshold in zip(rows, got.tolist(), strict=True):
                    kept = set(np.flatnonzero(row >= threshold)) - set(
                        np.flatnonzero(row == -np.inf)
                    )
                    expected = survivors(row, temperature, k, p, min_p)
                    expected -= set(np.flatnonzero(row == -np.inf))
                    assert kept == expected, (k, p, min_p)


def test_no_filter_and_greedy_rows_keep_everything():
    logits = torch.randn(6, 100)
    thresholds = torch_ops.filter_thresholds(
        logits,
        torch.tensor([0.0, -1.0, 1.0, 1.0, 1.0, 1.0]),
        torch.tensor([5, 5, 0, 100, 101, -1], dtype=torch.int32),
        torch.tensor([0.5, 0.5, 1.0, 1.0, 1.0, 1.0]),
        torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0, 0.0]),
        100,
    )
    assert (thresholds == -torch.inf).all()
    assert torch_ops.filter_thresholds(*[torch.empty(0, 9)] + [torch.empty(0)] * 4, 9).shape == (0,)


def test_rows_without_a_finite_logit():
    logits = torch.full((2, 50), -torch.inf)
    logits[1] = torch.nan
    thresholds = thresholds_of(logits, 1.0, 5, 0.5, 0.1, 50)
    assert not thresholds.isnan().any()
    scores, ids = draws(logits, 1.0, thresholds)
    assert (scores == -torch.inf).all() and ((ids >= 0) & (ids < 50)).all()


@pytest.mark.parametrize("rows_at_a_time", (1, 3))
def test_slices_of_the_batch(monkeypatch, rows_at_a_time):
    logits = torch.randn(7, 64)
    expected = thresholds_of(logits, 1.0, 10, 0.8, 0.0, 64)
    monkeypatch.setattr(torch_ops, "MAX_SAMPLE_ELEMENTS", 64 * rows_at_a_time)
    assert torch.equal(thresholds_of(logits, 1.0, 10, 0.8, 0.0, 64), expected)


def draws(logits: torch.Tensor, temperature: float, thresholds: torch.Tensor | None):
    """A token for each row, each with a seed of its own."""
    words = torch.zeros(len(logits), 2, dtype=torch.int32)
    words[:, 0] = torch.arange(len(logits))
    temperatures = torch.full((len(logits),), temperature)
    return torch_ops.sample(
        logits, temperatures, words, words[:, 1], 0, logits.shape[1], thresholds
    )


@pytest.mark.parametrize(("filters", "odds"), ODDS)
def test_draws_follow_the_filtered_softmax(filters, odds):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(20_000, 1)
    _, ids = draws(logits, 1.0, thresholds_of(logits, 1.0, *filters, 4))
    shares = ids.bincount(minlength=4) / len(ids)
    assert (shares[torch.tensor(odds) == 0] == 0).all()
    torch.testing.assert_close(shares, torch.tensor(odds), rtol=0, atol=0.017)


@pytest.mark.parametrize("filters", ((20, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1)))
def test_draws_follow_the_filtered_softmax_over_many_groups(filters):
    """Groups that survive whole, in part, and not at all."""
    row, temperature = torch.randn(53, generator=torch.Generator().manual_seed(5)), 0.7
    kept = sorted(survivors(row, temperature, *filters))
    assert 5 < len(kept) < 40
    thresholds = thresholds_of(row.unsqueeze(0), temperature, *filters, 53)
    _, ids = draws(row.expand(20_000, -1), temperature, thresholds.expand(20_000))
    counts = ids.bincount(minlength=53).double()
    assert counts[kept].sum() == len(ids)
    expected = (row[kept].double() / temperature).softmax(0) * len(ids)
    chi_square = ((counts[kept] - expected).square() / expected).sum()
    assert abs(chi_square - (len(kept) - 1)) < 4 * np.sqrt(2 * len(kept))


def test_a_winner_whose_group_survives_wins_among_survivors():
    """The race is the same race: a filter takes groups away or makes them later."""
    logits = torch.randn(2000, 48)
    scores, ids = draws(logits, 1.0, None)
    thresholds = thresholds_of(logits, 1.0, 40, 1.0, 0.0, 48)
    filtered_scores, filtered_ids = draws(logits, 1.0, thresholds)
    groups = (logits >= thresholds[:, None]).unflatten(1, (-1, DRAW_GROUP))
    survives = groups.all(2).gather(1, ids.long()[:, None] // DRAW_GROUP)[:, 0]
    assert 0.1 < survives.float().mean() < 0.9
    assert torch.equal(ids[survives], filtered_ids[survives])
    assert torch.equal(scores[survives], filtered_scores[survives])
    assert (filtered_scores <= scores).all()
    assert (logits.gather(1, filtered_ids.long()[:, None])[:, 0] >= thresholds).all()


def test_rows_of_negative_temperature_are_skipped():
    logits = torch.randn(4, 50)
    logits[1] = torch.nan  # is not looked at
    words = torch.zeros(4, 2, dtype=torch.int32)
    temperatures = torch.tensor([-1.0, -1.0, 0.0, 1.0])
    scores, ids = torch_ops.sample(logits, temperatures, words, words[:, 0], 0, 50)
    assert (scores[:2] == -torch.inf).all() and ((ids >= 0) & (ids < 50)).all()
    assert scores[2] == logits[2].max() and ids[2] == logits[2].argmax()
    alone = torch_ops.sample(logits[3:], temperatures[3:], words[3:], words[3:, 0], 0, 50)
    assert (scores[3], ids[3]) == (alone[0][0], alone[1][0])
