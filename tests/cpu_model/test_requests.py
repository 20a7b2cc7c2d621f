"""What a request is from the outside: n, seeds, priorities, aborts, queues, results."""

import itertools
import time

import numpy as np
import pytest
from engine_checks import (
    check_nothing_is_held,
    drain,
    generate,
    greedy,
    random_prompts,
    tiny_engine,
)

from nanovllm import SamplingParams
from nanovllm.engine import request_output
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.errors import ArgumentError
from nanovllm.inputs.detokenizer import CompletionText

PROMPTS = random_prompts([5, 300, 40, 7], seed=3)


@pytest.fixture(scope="module")
def llm(tiny_dir):
    with tiny_engine(tiny_dir, max_logprobs=5) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(llm):
    yield
    check_nothing_is_held(llm)


def hot(**kwargs) -> SamplingParams:
    return SamplingParams(**({"temperature": 1.0, "max_tokens": 12, "ignore_eos": True} | kwargs))


def test_n_completions(llm):
    [output] = llm.generate([PROMPTS[0]], hot(n=3, seed=7), use_tqdm=False)
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3
    assert output["token_ids"] == output.outputs[0].token_ids
    assert output.finished
    # Completion i has seed + i.
    alone = [generate(llm, [PROMPTS[0]], hot(seed=7 + i))[0] for i in range(3)]
    assert [completion.token_ids for completion in output.outputs] == alone


def test_prompt_logprobs_with_n_completions(llm):
    [output] = llm.generate(
        [PROMPTS[2]], hot(n=2, seed=7, prompt_logprobs=1, max_tokens=2), use_tqdm=False
    )
    assert len(output.prompt_logprobs) == len(PROMPTS[2])
    assert [len(completion.token_ids) for completion in output.outputs] == [2, 2]


def test_n_in_a_loop_is_returned_once(llm):
    request_id = llm.add_request(PROMPTS[0], hot(n=3, max_tokens=4))
    finished = []
    while not llm.is_finished():
        outputs, _ = llm.step()
        finished += outputs
    assert [request_id for request_id, _ in finished] == [request_id]
    output = llm.get_output(request_id)
    assert finished[0][1] == output.outputs[0].token_ids
    assert [len(completion.token_ids) for completion in output.outputs] == [4, 4, 4]


def test_a_seed_draws_the_same_alone_and_in_any_batch(llm):
    params = hot(seed=42)
    [alone] = generate(llm, [PROMPTS[2]], params)
    unseeded = generate(llm, PROMPTS, hot())
    mixed = generate(llm, [*PROMPTS, PROMPTS[2]], [hot(), params, params, hot(), params])
    assert mixed[2] == alone == mixed[4]
    assert generate(llm, [PROMPTS[2]], hot(seed=43))[0] != alone
    assert unseeded[2] != alone
    assert mixed[1] == generate(llm, [PROMPTS[1]], params)[0]


def test_a_seed_draws_the_same_after_preemption(tiny_dir, llm):
    prompts = random_prompts([250] * 4, seed=5)
    params = [hot(seed=i, max_tokens=40) for i in range(4)]
    expected = generate(llm, prompts, params)
    with tiny_engine(tiny_dir, num_kvcache_blocks=5, watermark=0, async_scheduling=False) as small:
        assert generate(small, prompts, params) == expected
        assert small.scheduler.num_preemptions > 0


def test_abort(llm):
    """Case 30: of requests that run and wait some are aborted; the others do not notice."""
    expected = generate(llm, PROMPTS, greedy(20))
    ids = [llm.add_request(prompt, greedy(20)) for prompt in PROMPTS]
    llm.step()
    waiting = llm.add_request(PROMPTS[0], greedy(20))
    llm.abort_request([ids[1], str(waiting), 10**6])
    assert len(llm.scheduler.running) + len(llm.scheduler.waiting) == 3
    output = llm.get_output(ids[1])
    assert output["finish_reason"] == "abort"
    assert output.finished
    assert output["token_ids"] == expected[1][: len(output["token_ids"])]
    completions, _ = drain(llm)
    assert completions == {ids[i]: expected[i] for i in (0, 2, 3)}


def test_an_id_may_be_any_integer(llm):
    request_id = np.int64(llm.add_request(PROMPTS[0], greedy(20)))
    llm.step()
    llm.abort_request(request_id)
    assert llm.is_finished()
    assert llm.get_output(request_id)["finish_reason"] == "abort"


@pytest.mark.parametrize("prompt", [5, None, 1.5, object()])
def test_what_is_no_prompt_is_refused_by_add_request(llm, prompt):
    with pytest.raises(ArgumentError, match="a prompt must be a string or a list of token ids"):
        llm.add_request(prompt, greedy(1))


def test_abort_of_all_leaves_nothing(llm):
    ids = llm.enqueue(PROMPTS, greedy(20))
    llm.step()
    llm.abort_request(ids)
    assert llm.is_finished()


def test_enqueue_and_wait(llm):
    expected = generate(llm, PROMPTS, greedy(6))
    ids = llm.enqueue(PROMPTS[:2], greedy(6))
    ids += llm.enqueue(PROMPTS[2:], [greedy(6)] * 2)
    assert all(isinstance(request_id, str) for request_id in ids)
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == ids
    assert [output["token_ids"] for output in outputs] == expected
    assert llm.wait_for_completion(use_tqdm=False) == []


def test_wait_returns_what_a_generate_in_between_did_not_ask_for(llm):
    expected = generate(llm, PROMPTS[:2], greedy(3))
    [request_id] = llm.enqueue(PROMPTS[0], greedy(3))
    assert generate(llm, PROMPTS[1:2], greedy(8))[0][:3] == expected[1]
    [output] = llm.wait_for_completion(use_tqdm=False)
    assert (output.request_id, output["token_ids"]) == (request_id, expected[0])


def test_output_of_a_running_request_grows(llm):
    request_id = llm.add_request("the quick brown", greedy(6))
    lengths = []
    while not llm.is_finished():
        llm.step()
        output = llm.get_output(request_id)
        lengths.append(len(output["token_ids"]))
        assert output.finished == llm.is_finished()
    assert lengths == sorted(lengths)
    assert lengths[-1] == 6
    assert output.prompt == "the quick brown"
    assert output.prompt_token_ids == llm.tokenizer.encode("the quick brown")
    assert output["text"] == llm.tokenizer.decode(output["token_ids"])
    next_id = llm.add_request(PROMPTS[0], greedy(1))
    drain(llm)
    assert llm.get_output(str(next_id)).finished
    with pytest.raises(ArgumentError, match=f"no request {request_id}"):
        llm.get_output(request_id)


def test_output_of_a_request_that_finished_on_the_side(llm):
    """`generate` ran it to its end, `step` has not returned it yet."""
    request_id = llm.add_request(PROMPTS[0], greedy(3))
    generate(llm, PROMPTS[1:2], greedy(8))
    output = llm.get_output(request_id)
    assert output.finished
    [waited] = llm.wait_for_completion(use_tqdm=False)
    assert waited == output == llm.get_output(request_id)


def test_aborted_requests_are_forgotten(llm):
    for _ in range(3):
        llm.abort_request(llm.enqueue(PROMPTS, greedy(5)))
        assert llm.wait_for_completion(use_tqdm=False) == []
    assert not llm.requests._taken


def test_a_text_that_fails_in_a_commit_ends_its_request_alone(llm):
    """The longer sequence, which comes first, ends in the same commit."""
    expected = generate(llm, PROMPTS[:2], greedy(8))
    stopping = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop="no such text")
    first = llm.add_request(PROMPTS[1], greedy(4))
    second = llm.add_request(PROMPTS[0], stopping)
    detokenizer = llm.requests.unfinished[second].sequences[0].finish_rules[0]
    append = detokenizer.append
    num_calls = itertools.count(1)

    def fail_once(token_id):
        if next(num_calls) == 4:
            raise OSError("half-way")
        return append(token_id)

    detokenizer.append = fail_once
    finished = {}
    while not llm.is_finished():
        for request_id, _ in llm.step()[0]:
            finished[request_id] = llm.get_output(request_id)
    assert finished[first]["token_ids"] == expected[1][:4]
    assert finished[first].error is None
    assert finished[second]["token_ids"] == expected[0][:4]
    assert finished[second].error == finished[second]["stop_reason"] == "OSError: half-way"
    assert finished[second]["finish_reason"] == "abort"


def test_times_of_a_request(llm):
    start = time.time()
    [output] = llm.generate([PROMPTS[0]], greedy(5), use_tqdm=False)
    metrics = output.metrics
    assert start <= metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time
    assert metrics.finished_time <= time.time()


@pytest.mark.parametrize("is_busy", [True, False])
def test_outputs_are_made_while_the_device_works(llm, monkeypatch, is_busy):
    """Each after the step that ended its request, before the next one is waited for."""
    params = [greedy(n) for n in (2, 9, 5, 3)]
    expected = llm.generate(PROMPTS, params, use_tqdm=False)
    events: list[int | str] = []
    wait, make_output = llm.executor.wait, request_output.make_output

    def recorded_wait(step):
        events.append("wait")
        return wait(step)

    def recorded_output(request, *args):
        events.append(request.request_id)
        return make_output(request, *args)

    monkeypatch.setattr(LaunchedStep, "is_done", lambda step: not is_busy)
    monkeypatch.setattr(llm.executor, "wait", recorded_wait)
    monkeypatch.setattr(request_output, "make_output", recorded_output)
    parts = []

    def recorded_append(text, token_ids):
        parts.append(len(token_ids))
        return append(text, token_ids)

    append = CompletionText.append
    monkeypatch.setattr(CompletionText, "append", recorded_append)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [dict(output) for output in outputs] == [dict(output) for output in expected]
    assert all(output.finished for output in outputs)
    first, second, third, fourth = (int(output.request_id) for output in outputs)
    waits = ["wait"] * 9
    if is_busy:
        assert events == [*waits[:2], first, "wait", fourth, *waits[:2], third, *waits[:4], second]
        assert max(parts) == 1  # the texts grow too
    else:
        assert events == [*waits, first, second, third, fourth]
        assert parts == [2, 9, 5, 3]


def test_cached_tokens(llm):
    prompt = random_prompts([600], seed=9)
    outputs = [llm.generate(prompt, greedy(1), use_tqdm=False)[0] for _ in range(2)]
    assert [output.num_cached_tokens for output in outputs] == [0, 512]
    [output] = llm.generate(
        prompt,
        SamplingParams(temperature=0, max_tokens=1, skip_reading_prefix_cache=True),
        use_tqdm=False,
    )
    assert output.num_cached_tokens == 0
    assert output == outputs[0]


def test_cached_tokens_are_the_prompts_also_after_a_preemption(tiny_dir):
    """What a preempted request finds of its own K/V is no cached prompt."""
    with tiny_engine(tiny_dir, num_kvcache_blocks=5, watermark=0) as small:
        outputs = small.generate(random_prompts([250] * 4, seed=5), greedy(40), use_tqdm=False)
        assert small.scheduler.num_preemptions > 0
    assert [output.num_cached_tokens for output in outputs] == [0] * 4


def test_each_token_keeps_its_logprobs_when_a_commit_fails(llm, monkeypatch):
    params = hot(seed=1, logprobs=2)
    expected = llm.generate(PROMPTS, params, use_tqdm=False)
    llm.enqueue(PROMPTS, params)
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(llm.scheduler, "postprocess", lambda seqs, token_ids: 1 / 0)
            llm.step()
        assert llm.scheduler.held
        while llm.scheduler.held:
            llm.step()
    outputs = llm.wait_for_completion(use_tqdm=False)
    for output, uninterrupted in zip(outputs, expected, strict=True):
        assert output == uninterrupted
        assert [[*position] for position in output["logprobs"]] == [
            [*position] for position in uninterrupted["logprobs"]
        ]


def test_stop_ids(llm):
    """Case 28: the id stays in the completion and is the stop reason."""
    [[first, second, *_]] = generate(llm, [PROMPTS[0]], greedy(4))
    for stop_token_ids in ([second, 383], [383, second]):
        params = SamplingParams(
            temperature=0, max_tokens=4, ignore_eos=True, stop_token_ids=stop_token_ids
        )
        [output] = llm.generate([PROMPTS[0]], params, use_tqdm=False)
        assert output["token_ids"] == ([first] if first == second else [first, second])
        assert output["finish_reason"] == "stop"
        assert output["stop_reason"] == second
    [output] = llm.generate([PROMPTS[0]], greedy(2), use_tqdm=False)
    assert (output["finish_reason"], output["stop_reason"]) == ("length", None)


def test_stop_string(llm):
    """Case 48: the text is cut, the ids are not, and the string is the reason."""
    [whole] = llm.generate([PROMPTS[0]], greedy(12), use_tqdm=False)
    text = whole["text"]
    stop = next(text[i : i + 3] for i in range(4, len(text)) if "\ufffd" not in text[i : i + 3])
    end = text.index(stop)
    for is_included in (False, True):
        params = SamplingParams(
            temperature=0,
            max_tokens=12,
            ignore_eos=True,
            stop=stop,
            include_stop_str_in_output=is_included,
        )
        [output] = llm.generate([PROMPTS[0]], params, use_tqdm=False)
        assert output["text"] == text[: end + len(stop) * is_included]
        assert (output["finish_reason"], output["stop_reason"]) == ("stop", stop)
        num_tokens = len(output["token_ids"])
        assert output["token_ids"] == whole["token_ids"][:num_tokens]
        assert stop in llm.tokenizer.decode(output["token_ids"])
        assert stop not in llm.tokenizer.decode(output["token_ids"][:-1])


def test_without_detokenization(llm):
    params = SamplingParams(
        temperature=0, max_tokens=3, ignore_eos=True, detokenize=False, logprobs=1
    )
    [output] = llm.generate([PROMPTS[0]], params, use_tqdm=False)
    assert output["text"] == ""
    assert len(output["token_ids"]) == 3
    entries = [entry for position in output["logprobs"] for entry in position.values()]
    assert {entry.decoded_token for entry in entries} == {None}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logprobs": 6}, "logprobs must be at most max_logprobs (5), got 6"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be at most max_logprobs (5), got -1"),
        ({"allowed_token_ids": [384]}, "384"),
        ({"logit_bias": {10**7: 1.0}}, "10000000"),
        ({"stop_token_ids": [999999]}, "999999"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_it_is_queued(llm, params, message):
    with pytest.raises(ArgumentError) as error:
        llm.generate(PROMPTS, [hot(), hot(), hot(), hot(**params)], use_tqdm=False)
    assert message in str(error.value)
    assert llm.is_finished()


@pytest.mark.parametrize("arguments", [{"lora_request": 1}, {"mm_processor_kwargs": {"a": 1}}])
def test_what_is_not_there_is_refused(llm, arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        llm.generate(PROMPTS, hot(), use_tqdm=False, **arguments)


def test_priorities(tiny_dir):
    settings = {"scheduling_policy": "priority", "max_num_seqs": 1}
    with tiny_engine(tiny_dir, **settings) as llm:
        priorities = (3, 1, 2, 1)
        ids = [
            llm.add_request(prompt, greedy(2), priority=priority)
            for prompt, priority in zip(PROMPTS, priorities, strict=True)
        ]
        order = []
        while not llm.is_finished():
            order += [request_id for request_id, _ in llm.step()[0]]
        assert order == [ids[1], ids[3], ids[2], ids[0]]
        for priority in ([], [1, 2]):
            with pytest.raises(ArgumentError, match=r"prompts \(4\) and priority"):
                llm.generate(PROMPTS, greedy(2), use_tqdm=False, priority=priority)
