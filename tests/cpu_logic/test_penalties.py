"""Penalties against hand-calculated numbers, Hugging Face's processor and a plain count."""

from collections import Counter

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from nanovllm.sampling.penalties import apply_penalties

VOCAB_SIZE = 13


def penalise(
    logits: torch.Tensor,
    token_ids: list[list[int]],
    num_prompt_tokens: list[int],
    repetition: list[float],
    frequency: list[float],
    presence: list[float],
) -> torch.Tensor:
    """`apply_penalties` on a copy; the room behind each row's tokens holds other ids."""
    num_rows = len(token_ids)
    length = max(map(len, token_ids)) + 2
    tokens = torch.randint(VOCAB_SIZE, (num_rows, length), dtype=torch.int32)
    for row, ids in zip(tokens, token_ids, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
    padded = torch.cat((logits, torch.full((num_rows, 3), torch.nan)), dim=1)
    apply_penalties(
        padded,
        tokens,
        torch.tensor([len(ids) - 1 for ids in token_ids], dtype=torch.int32),
        torch.tensor(num_prompt_tokens),
        *(torch.tensor(values).unsqueeze(1) for values in (repetition, frequency, presence)),
    )
    return padded[:, :VOCAB_SIZE]


@pytest.mark.parametrize(
    ("factors", "logit", "expected"),
    [
        ((2.0, 0.0, 0.0), 2.0, 1.0),
        ((2.0, 0.0, 0.0), -2.0, -4.0),
        ((1.0, 0.5, 0.0), 0.0, -1.5),
        ((1.0, 0.0, 0.7), 0.0, -0.7),
        ((1.0, -0.5, -0.7), 1.0, 3.2),
        ((2.0, 0.5, 0.7), 3.0, -0.7),
    ],
)
def test_numbers_by_hand(factors, logit, expected):
    """Token 5 was generated three times."""
    logits = torch.full((1, VOCAB_SIZE), logit)
    changed = penalise(logits, [[7, 5, 5, 5]], [1], *([factor] for factor in factors))
    assert changed[0, 5].item() == pytest.approx(expected, abs=1e-6)
    in_prompt = logit / factors[0] if logit > 0 else logit * factors[0]
    assert changed[0, 7].item() == pytest.approx(in_prompt, abs=1e-6)
    assert changed[0, 0].item() == logit


@pytest.mark.parametrize(("penalty", "rank"), [(2.0, VOCAB_SIZE - 1), (-2.0, 0)])
def test_the_most_frequent_token_becomes_the_lowest_or_the_highest(penalty, rank):
    logits = torch.linspace(-0.5, 0.5, VOCAB_SIZE).unsqueeze(0)
    changed = penalise(logits, [[1, 6, 6, 6, 2, 3]], [1], [1.0], [penalty], [0.0])
    assert changed[0].argsort(descending=True)[rank] == 6


def test_repetition_equals_hugging_face():
    torch.manual_seed(0)
    logits = torch.randn(4, VOCAB_SIZE)
    token_ids = torch.randint(VOCAB_SIZE, (4, 9)).tolist()
    changed = penalise(logits, token_ids, [3] * 4, [1.3] * 4, [0.0] * 4, [0.0] * 4)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(token_ids), logits.clone())
    torch.testing.assert_close(changed, expected, rtol=1e-6, atol=0)


def test_random_rows_equal_a_plain_count():
    torch.manual_seed(1)
    lengths, num_prompt_tokens = [1, 4, 30, 17], [1, 4, 2, 9]
    factors = [[1.0, 0.5, 1.7, 2.0], [0.3, 1.0, -1.1, 2.0], [0.2, -0.4, 0.0, 1.0]]
    logits = torch.randn(4, VOCAB_SIZE)
    logits[2, 3] = -torch.inf
    token_ids = [torch.randint(VOCAB_SIZE, (length,)).tolist() for length in lengths]
    changed = penalise(logits, token_ids, num_prompt_tokens, *factors)
    for row, ids in enumerate(token_ids):
        counts = Counter(ids[num_prompt_tokens[row] :])
        repetition, frequency, presence = (values[row] for values in factors)
        for token_id in range(VOCAB_SIZE):
            expected = logits[row, token_id].item()
            if token_id in ids:
                expected = expected / repetition if expected > 0 else expected * repetition
            expected -= frequency * counts[token_id] + presence * (token_id in counts)
            assert changed[row, token_id].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
