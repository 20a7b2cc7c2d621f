"""The request sampler in whole completions, against one request at a time in plain Python."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sampler_runs import (
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    NUM_STEPS,
    SPECS,
    VOCAB_SIZE,
    WIDTH,
    Run,
    Spec,
    model_logits,
    reference_completion,
)

from nanovllm.sampling import logits_sampler


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [reference_completion(spec) for spec in SPECS]


def test_a_mixed_batch_equals_one_request_at_a_time(expected):
    completions = Run(SPECS).completions()
    for spec, completion, tokens in zip(SPECS, completions, expected, strict=True):
        assert completion == tokens, spec
    assert expected[7] == [10] * NUM_STEPS
    first_end = next(i for i, token_id in enumerate(expected[6]) if token_id in (6, 7))
    assert first_end >= 12


def test_the_rules_matter():
    """Without its rules each request is completed otherwise, so the test above can fail."""
    for spec in SPECS:
        plain = Spec(spec.prompt, {"temperature": spec.sampling_params().temperature})
        plain.seed = spec.seed
        if spec.params.keys() - {"logprobs", "temperature"} or spec.bad_word_ids:
            assert reference_completion(plain) != reference_completion(spec), spec


@pytest.mark.parametrize("number", range(len(SPECS)))
def test_a_request_alone_gets_the_same(number, expected):
    assert Run([SPECS[number]], rows=[5]).completions() == [expected[number]]


def test_order_rows_and_parts_do_not_matter(expected, monkeypatch):
    monkeypatch.setattr(logits_sampler, "MAX_EDITED_LOGITS", 3 * MAX_MODEL_LEN)
    run = Run(SPECS, rows=list(range(MAX_NUM_SEQS - 1, MAX_NUM_SEQS - 1 - len(SPECS), -1)))
    order = list(range(len(SPECS)))
    for step in range(NUM_STEPS):
        if step % 6 == 5:
            order = order[3:] + order[:3][::-1]
        run.step(order)
    run.commit()
    assert run.sampler.max_edited_rows == 3
    assert [seq.completion_token_ids for seq in run.seqs] == expected


def test_a_preempted_sequence_goes_on_in_another_row(expected):
    run = Run(SPECS)
    run.completions(9)
    run.begin([(row + 5) % MAX_NUM_SEQS for row in range(len(SPECS))])
    assert run.completions(NUM_STEPS - 9) == expected


def test_the_logits_are_left_as_they_are():
    run = Run(SPECS)
    positions = torch.tensor([len(spec.prompt) - 1 for spec in SPECS], dtype=torch.int32)
    for seq in run.seqs:
        seq.num_computed_tokens += 1
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(len(SPECS), WIDTH).to(dtype)
        before = logits.clone()
        sampled = run.sample(logits, run.seqs, positions)
        assert torch.equal(logits, before)
        assert sampled.token_ids.dtype == torch.int32


def test_seeds_change_a_draw_and_its_neighbours_do_not():
    spec = SPECS[1]
    others = [replace(spec, seed=seed) for seed in (spec.seed, 5, 2**33)]
    first, second, third = Run(others).completions()
    assert first == reference_completion(spec)
    assert len({tuple(first), tuple(second), tuple(third)}) == 3


def test_the_batch_is_prepared_once_for_many_steps(monkeypatch):
    made = []
    batch_type = logits_sampler.Batch

    def counted(*args: Any) -> Any:
        made.append(batch_type(*args))
        return made[-1]

    monkeypatch.setattr(logits_sampler, "Batch", counted)
    run = Run(SPECS)
    run.completions()
    assert len(made) == 1
    for _ in range(3):  # as beside a sequence with a grammar, which is in every other step
        run.step([*range(1, len(SPECS)), 0])
        run.step()
    assert len(made) == 2


def test_filters_and_logprobs_alone_need_no_copy_of_the_logits():
    run = Run([SPECS[1], SPECS[3], SPECS[8]])
    run.step()
    batch = run.sampler._batch
    assert batch.edited == [] and batch.next_places is None
    assert run.sampler.history._tokens is None


def test_min_tokens_costs_nothing_once_it_is_reached():
    spec = SPECS[6]
    spec = replace(spec, params={"min_tokens": 12})
    run = Run([spec])
    run.step()
    assert len(run.sampler._batch.edited) == 1
    run.completions(11)
    run.begin([0])
    run.step()
    assert run.sampler._batch.edited == []


def test_logprobs_are_raw_and_for_those_who_ask():
    run = Run(SPECS)
    run.step()
    run.step()
    sampled = run.sampled[0]
    [tensors] = sampled.logprobs
    rows = tensors.download().rows()
    wanted = [seq.sampling_params.logprobs for seq in run.seqs]
    assert [row is not None for row in rows] == [count is not None for count in wanted]
    for spec, seq, row in zip(SPECS, run.seqs, rows, strict=True):
        if row is None:
            continue
        exact = model_logits(spec.prompt[-1], len(spec.prompt) - 1)[:VOCAB_SIZE].double()
        exact = exact.log_softmax(0)
        best = exact.argsort(descending=True)[: seq.sampling_params.logprobs].tolist()
        assert row.token_ids.tolist() == [seq.completion_token_ids[0], *best]
        np.testing.assert_allclose(row.logprobs, exact[row.token_ids.tolist()], atol=1e-5)
        assert row.rank == 1 + int((exact > exact[row.token_ids[0]]).sum())
    run = Run([SPECS[1], SPECS[7]])
    run.step()
    assert run.sampled[0].logprobs == []
