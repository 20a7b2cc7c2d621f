"""What the step consumers make of a step's values, without a model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanovllm.engine.consumers import PromptLogprobs, errors_kept
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.poolers import LastTokenPooling, TokenPooling
from nanovllm.engine.sequence import Sequence, Wants
from nanovllm.engine.step_plan import StepPlan
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.sampling_params import SamplingParams

VOCAB_SIZE, HIDDEN_SIZE = 50, 8


def int32(*numbers) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def launched(seqs: list[Sequence], starts: list[int], lengths: list[int]) -> LaunchedStep:
    """A prefill step that has computed `lengths` tokens of each sequence from `starts` on."""
    for seq, start, length in zip(seqs, starts, lengths, strict=True):
        seq.num_scheduled_tokens, seq.num_computed_tokens = length, start + length
    plan = StepPlan(
        True,
        rows=np.arange(len(seqs), dtype=np.int32),
        updates=np.empty((0, 2), dtype=np.int32),
        wants=int32(*[seq.wants for seq in seqs]),
        starts=int32(*starts),
        lengths=int32(*lengths),
        is_last=int32(*[seq.is_prefilled for seq in seqs]),
    )
    return LaunchedStep(plan, seqs)


def wanting(prompt: list[int], count: int) -> Sequence:
    """A sequence that wants prompt logprobs."""
    seq = Sequence(prompt, SamplingParams(prompt_logprobs=count))
    seq.wants |= Wants.PROMPT
    seq.features.num_prompt_logprobs = len(prompt) - 1
    return seq


def test_prompt_logprobs_of_chunks():
    lm_head = torch.nn.Linear(HIDDEN_SIZE, VOCAB_SIZE + 14, bias=False)  # padded
    config = SimpleNamespace(model_config=SimpleNamespace(vocab_size=VOCAB_SIZE))
    consumer = PromptLogprobs(config, TensorParallel(), lm_head)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    seq, other = wanting(prompt, 2), Sequence([7, 7], SamplingParams())
    hidden_states = torch.randn(10, HIDDEN_SIZE)
    with torch.inference_mode():
        first = launched([other, seq], [0, 0], [2, 5])
        consumer.run(first, hidden_states[:7])
        first.commit()
        assert seq.wants & Wants.PROMPT
        second = launched([seq], [5], [3])
        consumer.run(second, hidden_states[7:])
        second.commit()
        exact = lm_head(hidden_states[2:9]).double()[:, :VOCAB_SIZE].log_softmax(1)
    assert not seq.wants & Wants.PROMPT
    rows = seq.features.prompt_logprobs
    assert [int(row.token_ids[0]) for row in rows] == prompt[1:]
    assert other.features.prompt_logprobs == []
    for row, values in zip(rows, exact, strict=True):
        assert row.token_ids[1:].tolist() == values.argsort(descending=True)[:2].tolist()
        np.testing.assert_allclose(row.logprobs, values[row.token_ids.tolist()], atol=1e-5)


def test_parts_of_a_prompt_are_no_use_after_a_restart():
    seq = wanting([1, 2, 3, 4], 0)
    seq.features.prompt_logprobs = [None, None]
    seq.reset()
    assert seq.features.prompt_logprobs == [] and seq.wants & Wants.PROMPT
    seq.features.prompt_logprobs = whole = [None, None, None]
    seq.reset()
    assert seq.features.prompt_logprobs is whole and len(whole) == 3


def test_pooling_takes_the_rows_of_prompts_that_are_complete():
    seqs = [Sequence([1, 2, 3]) for _ in range(3)]
    for seq in seqs[:2]:
        seq.wants |= Wants.POOLING
        seq.features.pooler = np.sum
    step = launched(seqs, [0, 0, 0], [2, 3, 3])
    LastTokenPooling(torch.nn.Module()).run(
        step, torch.tensor([[1.0, 2.0], [5.0, 6.0]], dtype=torch.bfloat16)
    )
    step.commit()
    assert [seq.features.pooled for seq in seqs] == [None, 3.0, None]


def test_states_are_pooled_over_chunks_and_anew_after_a_restart():
    """A head on the mean of three tokens in two chunks, beside a prompt of which all are wanted."""
    model = torch.nn.Module()
    model.score = torch.nn.Linear(2, 1, bias=False)
    mean, both = Sequence([1, 2, 3]), Sequence([7, 8])
    for seq, pooling_type in ((mean, "MEAN"), (both, "ALL")):
        seq.wants |= Wants.POOLING | Wants.STATES
        seq.features.pooling_type = pooling_type
        seq.features.pooler = np.copy
    states = torch.randn(5, 2, dtype=torch.bfloat16)
    pooling = TokenPooling(model)
    with torch.inference_mode():
        for _ in range(2):  # the first time the step is not committed, and both begin anew
            step = launched([mean, both], [0, 0], [2, 2])
            pooling.run(step, states[[0, 1, 3, 4]])
            assert mean.features.pooled is None
            last = launched([mean], [2], [1])
            pooling.run(last, states[2:3])
        step.commit()
        last.commit()
        exact = model.score.weight.double()
    assert mean.features.pooling_state is None and both.features.pooling_state is None
    expected = states[:3].double().mean(0) @ exact.T
    np.testing.assert_allclose(mean.features.pooled, expected, rtol=1e-5)
    np.testing.assert_allclose(both.features.pooled, states[3:].double() @ exact.T, rtol=1e-5)


def test_a_pooler_that_raises_ends_its_sequence_alone():
    def fails(row):
        raise ValueError("no")

    seqs = [Sequence([1]), Sequence([1])]
    for seq, pooler in zip(seqs, (fails, np.sum), strict=True):
        seq.wants |= Wants.POOLING
        seq.features.pooler = pooler
    step = launched(seqs, [0, 0], [1, 1])
    LastTokenPooling(torch.nn.Module()).run(step, torch.ones(2, 4))
    step.commit()
    assert "no" in str(seqs[0].stop_reason) and seqs[0].error is not None
    assert seqs[1].features.pooled == 4.0 and seqs[1].error is None


def test_a_failure_kept_for_the_commit_is_raised_there():
    step = launched([Sequence([1])], [0], [1])
    with errors_kept(step):
        raise ValueError("of a consumer")
    with pytest.raises(ValueError, match="of a consumer"):
        step.commit()
    with pytest.raises(KeyboardInterrupt), errors_kept(step):
        raise KeyboardInterrupt
