"""Streams give out, piece by piece, what `generate` gives at once, and leave nothing behind."""

import gc
from collections import defaultdict

import pytest
from engine_checks import check_nothing_is_held, drain, greedy, random_prompts, tiny_engine

from nanovllm import ArgumentError, SamplingParams


@pytest.fixture(scope="module")
def engine(tiny_dir):
    with tiny_engine(tiny_dir) as llm:
        yield llm


@pytest.fixture
def llm(engine):
    yield engine
    check_nothing_is_held(engine)
    assert not engine.requests._claims


PROMPTS = ["the quick brown fox", *random_prompts([1, 40, 300])]


def collect(items) -> dict[tuple[int, int], list]:
    """The items of each (prompt, completion), checked: nothing after the last one."""
    found = defaultdict(list)
    finished = set()
    for item in items:
        assert item.prompt_index not in finished
        assert item.token_ids or item.finish_reason
        assert (item.output is not None) == item.finished
        key = (item.prompt_index, item.index)
        assert not found[key] or found[key][-1].finish_reason is None
        found[key].append(item)
        if item.finished:
            finished.add(item.prompt_index)
    assert finished == {prompt for prompt, _ in found}
    return dict(found)


def check_equal(found, outputs) -> None:
    """The pieces add up to these outputs, and the streamed outputs equal them."""
    assert len(found) == sum(len(output.outputs) for output in outputs)
    for (prompt_index, index), items in found.items():
        expected = outputs[prompt_index].outputs[index]
        assert "".join(item.text for item in items) == expected.text
        assert [token for item in items for token in item.token_ids] == expected.token_ids
        assert items[-1].finish_reason == expected.finish_reason
        assert items[-1].stop_reason == expected.stop_reason
        if items[-1].finished:
            assert items[-1].output.outputs == outputs[prompt_index].outputs
            assert items[-1].output.prompt == outputs[prompt_index].prompt
            assert items[-1].output.request_id == items[-1].request_id


def test_the_pieces_add_up_to_what_generate_gives(llm):
    params = [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        SamplingParams(seed=1, max_tokens=1),
        SamplingParams(seed=2, max_tokens=20, n=3),
        SamplingParams(seed=3, max_tokens=40, skip_special_tokens=True, ignore_eos=True),
    ]
    items = list(llm.generate_stream(PROMPTS, params))
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    check_equal(collect(items), outputs)
    assert items[-1].output.metrics.finished_time
    # Token by token, not all at the end.
    assert [len(item.token_ids) for item in items if item.prompt_index == 0] == [1] * 12
    first_end = next(i for i, item in enumerate(items) if item.finish_reason)
    assert first_end < len(items) / 2


@pytest.mark.parametrize("included", [False, True])
def test_a_stop_string_is_never_shown(llm, included):
    [whole] = llm.generate(PROMPTS[2:3], greedy(40), use_tqdm=False)
    stop = whole["text"][20:26]
    params = SamplingParams(
        temperature=0,
        max_tokens=40,
        ignore_eos=True,
        stop=["not there", stop],
        include_stop_str_in_output=included,
    )
    items = list(llm.generate_stream(PROMPTS[2], params))
    outputs = llm.generate(PROMPTS[2], params, use_tqdm=False)
    check_equal(collect(items), outputs)
    end = whole["text"].index(stop)
    assert outputs[0]["text"] == whole["text"][: end + len(stop) if included else end]
    assert (items[-1].finish_reason, items[-1].stop_reason) == ("stop", stop)
    assert 0 < len(outputs[0]["token_ids"]) < 40


def test_without_text_there_are_tokens_only(llm):
    params = SamplingParams(max_tokens=5, ignore_eos=True, detokenize=False)
    [items] = collect(llm.generate_stream("the fox", params)).values()
    assert [item.text for item in items] == [""] * 5
    assert items[-1].output["text"] == "" and len(items[-1].output["token_ids"]) == 5


@pytest.mark.parametrize(
    ("prompts", "arguments"),
    [
        (["fine", ""], {}),
        (["fine", [10**6]], {}),
        (["a", "b"], {"sampling_params": [SamplingParams()]}),
        (["a", "b"], {"priority": [1]}),
        ("a", {"tokenization_kwargs": {"unknown": 1}}),
    ],
)
def test_errors_come_at_the_call_and_queue_nothing(llm, prompts, arguments):
    with pytest.raises(ArgumentError):
        llm.generate_stream(prompts, **arguments)
    check_nothing_is_held(llm)


def test_everything_is_queued_at_the_call(llm):
    stream = llm.generate_stream(PROMPTS, greedy(4))
    assert not llm.is_finished()
    assert len(collect(stream)) == len(PROMPTS)
    assert list(stream) == []
    assert list(llm.generate_stream([], greedy(4))) == []


def leave_by_break(llm):
    for _ in llm.generate_stream(PROMPTS, greedy(50)):
        break


def leave_by_close(llm):
    stream = llm.generate_stream(PROMPTS, greedy(50))
    next(stream)
    stream.close()
    stream.close()
    check_nothing_is_held(llm)
    assert list(stream) == []


def leave_the_block(llm):
    with llm.generate_stream(PROMPTS, greedy(50)) as stream:
        next(stream)
    check_nothing_is_held(llm)


def leave_by_exception(llm):
    def consume():
        for _ in llm.generate_stream(PROMPTS, greedy(50)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        consume()
    del caught


def never_begin(llm):
    llm.generate_stream(PROMPTS, greedy(50))


@pytest.mark.parametrize(
    "leave",
    [leave_by_break, leave_by_close, leave_the_block, leave_by_exception, never_begin],
)
def test_an_abandoned_stream_ends_its_requests(llm, leave):
    leave(llm)
    gc.collect()  # an exception's traceback may hold the stream
    check_nothing_is_held(llm)
    assert drain(llm) == ({}, [])
    [after] = llm.generate(PROMPTS[:1], greedy(6), use_tqdm=False)
    assert len(after["token_ids"]) == 6


@pytest.mark.parametrize("error", [SystemExit("enough"), KeyboardInterrupt()])
def test_what_breaks_a_step_off_ends_the_stream(llm, monkeypatch, error):
    stream = llm.generate_stream(PROMPTS, greedy(50))
    items = [next(stream) for _ in range(8)]
    assert len({item.request_id for item in items}) == len(PROMPTS)

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(llm.executor, "launch", fail)
        with pytest.raises(type(error)):
            list(stream)
    check_nothing_is_held(llm)
    assert list(stream) == []
    assert len(collect(llm.generate_stream(PROMPTS, greedy(3)))) == len(PROMPTS)


def test_the_garbage_collector_may_end_a_stream_in_the_middle_of_a_step(llm, monkeypatch):
    other = llm.add_request("the", greedy(9))
    cycle = [llm.generate_stream(PROMPTS, greedy(50))]
    next(cycle[0])
    cycle.append(cycle)
    schedule = llm.scheduler.schedule

    def schedule_and_collect(*arguments):
        planned = schedule(*arguments)
        gc.collect()
        return planned

    del cycle
    monkeypatch.setattr(llm.scheduler, "schedule", schedule_and_collect)
    assert llm.requests.unfinished.keys() > {other}  # the step has them all
    llm.step()
    assert llm.requests.unfinished.keys() == {other}
    completions, _ = drain(llm)
    assert completions.keys() == {other}
    assert len(completions[other]) == 9


def test_a_streamed_request_can_be_aborted_alone(llm):
    found = defaultdict(list)
    for item in llm.generate_stream(PROMPTS[:3], greedy(10)):
        found[item.prompt_index].append(item)
        if item.prompt_index == 1 and len(found[1]) == 2:
            llm.abort_request(item.request_id)
    [*_, aborted] = found[1]
    assert (aborted.finish_reason, aborted.finished) == ("abort", True)
    assert aborted.output["token_ids"] == [t for item in found[1] for t in item.token_ids]
    assert 2 <= len(aborted.output["token_ids"]) < 10
    for index in (0, 2):
        assert len(found[index]) == 10
        assert found[index][-1].finish_reason == "length"


def test_of_an_aborted_stream_nothing_is_kept(llm):
    """Memory stays the same however many streams end early."""
    with llm.generate_stream(PROMPTS[:2], greedy(10)) as stream:
        item = next(stream)
        llm.abort_request(item.request_id)
        assert llm.get_output(item.request_id)["finish_reason"] == "abort"
    with pytest.raises(ArgumentError, match="there is no request"):
        llm.get_output(item.request_id)


def test_steps_and_other_requests_go_on_beside_a_stream(llm):
    """Whoever drives the engine, each result goes to the one who asked for it."""
    before = llm.add_request("before", greedy(3))
    [expected] = llm.generate("the fox", greedy(30), use_tqdm=False)
    stream = llm.generate_stream(["the fox", "the"], greedy(30))
    returned = dict(llm.step()[0])
    items = [next(stream), next(stream)]
    within = llm.add_request("within", greedy(2))
    for _ in range(4):  # the stream's requests get tokens too: its next items have several
        returned |= dict(llm.step()[0])
    assert returned.keys() == {before, within}
    items.append(next(stream))
    assert len(items[-1].token_ids) > 1
    # Both of the stream end within this call, and are neither its result nor `step`'s.
    outputs = llm.generate(["a", "b"], greedy(60), use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [60, 60]
    assert llm.is_finished() and llm.step() == ([], 0)
    found = collect([*items, *stream])
    assert "".join(item.text for item in found[0, 0]) == expected["text"]
    assert [t for item in found[0, 0] for t in item.token_ids] == expected["token_ids"]
    assert found[1, 0][-1].finish_reason == "length"


def test_two_streams_side_by_side(llm):
    streams = [llm.generate_stream([prompt, "the"], greedy(8)) for prompt in PROMPTS[1:3]]
    items = [[], []]
    for pair in zip(*streams, strict=False):
        for own, item in zip(items, pair, strict=True):
            own.append(item)
    found = [collect([*own, *stream]) for own, stream in zip(items, streams, strict=True)]
    for own, prompt in zip(found, PROMPTS[1:3], strict=True):
        check_equal(own, llm.generate([prompt, "the"], greedy(8), use_tqdm=False))


def test_the_progress_bar_counts_requests(llm, capsys):
    list(llm.generate_stream(PROMPTS, greedy(3)))
    assert capsys.readouterr().err == ""
    list(llm.generate_stream(PROMPTS, greedy(3), use_tqdm=True))
    assert "4/4" in capsys.readouterr().err
