"""Log probabilities against float64, from logits to what a user gets."""

import numpy as np
import pytest
import torch

from nanovllm import Logprob
from nanovllm.sampling import logprobs
from nanovllm.sampling.logprobs import logprob_tensors, to_logprobs
from nanovllm.sampling.state import LogprobRow, cumulative_logprob

VOCAB_SIZE = 50


def reference(logits: torch.Tensor) -> np.ndarray:
    """[R, V] float64."""
    exact = logits.double().numpy()
    exact = exact - exact.max(1, keepdims=True)
    return exact - np.log(np.exp(exact).sum(1, keepdims=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_values_ids_and_ranks(dtype, rows_at_once, monkeypatch):
    monkeypatch.setattr(logprobs, "MAX_FLOAT32_LOGITS", rows_at_once * VOCAB_SIZE)
    torch.manual_seed(0)
    # No two of a row are equal, in bfloat16 neither.
    logits = torch.stack([torch.randperm(VOCAB_SIZE) / 8 - 3 for _ in range(9)]).to(dtype)
    token_ids = torch.randint(VOCAB_SIZE, (9,), dtype=torch.int32)
    tensors = logprob_tensors(logits, token_ids, [5] * 9)
    exact = reference(logits)
    order = np.argsort(-exact, axis=1)
    assert torch.equal(tensors.token_ids[:, 0], token_ids)
    assert tensors.token_ids[:, 1:].tolist() == order[:, :5].tolist()
    expected = np.take_along_axis(exact, tensors.token_ids.long().numpy(), axis=1)
    np.testing.assert_allclose(tensors.logprobs.numpy(), expected, atol=1e-5)
    ranks = 1 + (order == token_ids[:, None].numpy()).argmax(1)
    assert tensors.ranks.tolist() == ranks.tolist()
    types = [tensor.dtype for tensor in tensors[:3]]
    assert types == [torch.int32, torch.float32, torch.int32]


def test_equal_tokens_share_a_rank():
    logits = torch.tensor([[1.0, 3.0, 3.0, -torch.inf]]).repeat(4, 1)
    tensors = logprob_tensors(logits, torch.arange(4), [0] * 4)
    assert tensors.ranks.tolist() == [3, 1, 1, 4]
    assert tensors.logprobs[3].item() == -torch.inf


def test_each_sequence_gets_as_many_as_it_asked_for():
    torch.manual_seed(0)
    counts = [None, 2, 0, None, -1, 1]
    tensors = logprob_tensors(torch.randn(4, VOCAB_SIZE), torch.arange(4), counts)
    rows = tensors.download().rows()
    lengths = [None if row is None else len(row.token_ids) for row in rows]
    assert lengths == [None, 3, 1, None, 1 + VOCAB_SIZE, 2]
    for row in rows[1:3]:  # what is kept does not hold the memory of the widest
        assert row.token_ids.base is None and row.logprobs.base is None
    assert [row.token_ids[0] for row in rows if row] == [0, 1, 2, 3]
    assert all(len(row.logprobs) == len(row.token_ids) for row in rows if row)


class Letters:
    """A tokenizer: id 0 is "a"."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(97 + token_id) for token_id in token_ids)


def test_what_a_user_gets():
    rows = [
        LogprobRow(np.array([7, 2, 5]), np.array([-3.0, -0.5, -1.0], np.float32), 9),
        LogprobRow(np.array([5, 2, 5]), np.array([-1.0, -0.5, -1.0], np.float32), 2),
        LogprobRow(np.array([1]), np.array([-0.25], np.float32), 1),
    ]
    assert [list(position.items()) for position in to_logprobs(rows, Letters())] == [
        [(7, Logprob(-3.0, 9, "h")), (2, Logprob(-0.5, 1, "c")), (5, Logprob(-1.0, 2, "f"))],
        [(5, Logprob(-1.0, 2, "f")), (2, Logprob(-0.5, 1, "c"))],
        [(1, Logprob(-0.25, 1, "b"))],
    ]
    without_text = to_logprobs(rows, None)
    assert {entry.decoded_token for position in without_text for entry in position.values()} == {
        None
    }
    assert type(next(iter(without_text[0]))) is int
    assert cumulative_logprob(rows) == -4.25
    assert to_logprobs([], Letters()) == [] and cumulative_logprob([]) == 0


@pytest.mark.parametrize("has_ties", [False, True])
def test_k_or_one_more_entries_with_all_ranks(has_ties):
    torch.manual_seed(0)
    logits = torch.randn(40, VOCAB_SIZE)
    if has_ties:
        logits = logits.round()
    token_ids = logits.softmax(1).multinomial(1).flatten()
    for k in (0, 1, 3, -1):
        rows = logprob_tensors(logits, token_ids, [k] * 40).download().rows()
        for token_id, position in zip(token_ids.tolist(), to_logprobs(rows), strict=True):
            ranks = sorted({entry.rank for entry in position.values()})
            num_best = VOCAB_SIZE if k == -1 else k
            assert next(iter(position)) == token_id
            assert len(position) in (num_best, num_best + 1)
            assert ranks[:num_best] == list(range(1, num_best + 1))
            if not has_ties:
                assert (len(position) == num_best) == (position[token_id].rank <= num_best)
