"""Whatever one request makes a step raise ends that request alone."""

import json
import logging
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from engine_checks import (
    check_nothing_is_held,
    generate,
    greedy,
    random_prompts,
    tiny_engine,
    token_ids,
)
from tiny_models import reference_greedy

from nanovllm import ArgumentError, EngineDeadError, PoolingParams, RequestError, SamplingParams
from nanovllm.batch.run import main
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_plan import PlanBuilder
from nanovllm.sampling import logits_sampler

PROMPTS = random_prompts((3, 9, 260, 1, 40, 256, 7), seed=31)
MAX_TOKENS = 8
POISON = 13  # top_k of the requests that are made to fail


class InjectedError(Exception):
    pass


class PanicException(BaseException):
    """As failures of Rust code reach Python: no `Exception`."""


def poisoned(**changes):
    settings = {"temperature": 1.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    return SamplingParams(top_k=POISON, **settings, **changes)


def is_poisoned(seq):
    return seq.sampling_params.top_k == POISON


@pytest.fixture(scope="module")
def reference(shallow_dir):
    return reference_greedy(shallow_dir, PROMPTS, MAX_TOKENS)


SETTINGS = [
    {},
    {"async_scheduling": False},
    {"enable_chunked_prefill": True, "max_num_batched_tokens": 90},
    {"num_kvcache_blocks": 6, "watermark": 0},
    {"max_num_seqs": 2},
    {"enable_prefix_caching": False, "scheduling_policy": "priority"},
]


# ---- where a request can fail ----------------------------------------------------------------


def fail_in_begin(patch, llm, error):
    begin = logits_sampler.LogitsSampler.begin

    def failing(self, seqs):
        if any(map(is_poisoned, seqs)):
            raise error
        begin(self, seqs)

    patch.setattr(logits_sampler.LogitsSampler, "begin", failing)


def fail_in_sampling(patch, llm, error, num_tokens=3):
    """Later than in the first step, and after the others' state has changed."""
    sample = logits_sampler.LogitsSampler.sample

    def failing(self, logits, seqs, positions):
        sampled = sample(self, logits, seqs, positions)
        if any(is_poisoned(seq) and seq.num_completion_tokens >= num_tokens for seq in seqs):
            raise error
        return sampled

    patch.setattr(logits_sampler.LogitsSampler, "sample", failing)


def fail_in_plan(patch, llm, error):
    build = PlanBuilder.build

    def failing(self, seqs, is_prefill):
        plan = build(self, seqs, is_prefill)
        if not is_prefill and any(map(is_poisoned, seqs)):
            raise error
        return plan

    patch.setattr(PlanBuilder, "build", failing)


def fail_in_model(patch, llm, error):
    execute = llm.model_runner.execute

    def failing(plan, seqs=()):
        if any(map(is_poisoned, seqs)):
            raise error
        return execute(plan, seqs)

    patch.setattr(llm.model_runner, "execute", failing)


def fail_in_schedule(patch, llm, error):
    cache_blocks = llm.scheduler.block_manager.__class__.cache_blocks

    def failing(self, seq, num_tokens):
        if is_poisoned(seq):
            raise error
        cache_blocks(self, seq, num_tokens)

    patch.setattr(llm.scheduler.block_manager.__class__, "cache_blocks", failing)


PLACES = [fail_in_begin, fail_in_sampling, fail_in_plan, fail_in_model, fail_in_schedule]
PLACE = pytest.mark.parametrize("fail", PLACES, ids=lambda fail: fail.__name__)


def with_poison(params, indices=(4,)):
    return [poisoned() if i in indices else params for i in range(len(PROMPTS))]


def check_failed(output, error="InjectedError: odd"):
    assert output["finish_reason"] == "abort"
    assert output["stop_reason"] == output.error == error


@pytest.mark.parametrize(
    ("fail", "settings"),
    [
        pytest.param(PLACES[(i + step) % len(PLACES)], SETTINGS[i], id=f"{i}-{step}")
        for i in range(len(SETTINGS))
        for step in (0, 2)  # so each place is tried with two settings or three
    ],
)
def test_generate_completes_all_others_first(shallow_dir, reference, monkeypatch, fail, settings):
    with tiny_engine(shallow_dir, **settings) as llm:
        with monkeypatch.context() as patch:
            fail(patch, llm, InjectedError("odd"))
            with pytest.raises(RequestError, match=r"prompts\[4\] failed: InjectedError: odd") as e:
                llm.generate(PROMPTS, with_poison(greedy(MAX_TOKENS)), use_tqdm=False)
        assert isinstance(e.value.__cause__, InjectedError)
        outputs = e.value.outputs
        assert len(outputs) == len(PROMPTS)
        check_failed(outputs.pop(4))
        assert token_ids(outputs) == reference[:4] + reference[5:]
        assert all(output.error is None for output in outputs)
        check_nothing_is_held(llm)
        assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference
        check_nothing_is_held(llm)


@PLACE
@pytest.mark.parametrize("overlap", [True, False])
def test_a_loop_of_steps_goes_on(shallow_dir, reference, monkeypatch, fail, overlap):
    with tiny_engine(shallow_dir, async_scheduling=overlap) as llm:
        fail(monkeypatch, llm, InjectedError("odd"))
        ids = [
            llm.add_request(prompt, params)
            for prompt, params in zip(PROMPTS, with_poison(greedy(MAX_TOKENS), {0, 6}), strict=True)
        ]
        finished, errors, num_steps = {}, {}, 0
        while not llm.is_finished():
            num_steps += 1
            assert num_steps < 200
            for request_id, tokens in llm.step()[0]:
                finished[request_id] = tokens
                errors[request_id] = llm.get_output(request_id).error
        assert set(finished) == set(ids)
        assert sorted(i for i, error in errors.items() if error) == [0, 6]
        assert all(finished[i] == reference[i] for i in range(1, 6))
        check_nothing_is_held(llm)


@pytest.mark.parametrize("error", [InjectedError("odd"), PanicException("odd"), MemoryError()])
def test_sampled_neighbours_draw_the_same(shallow_dir, monkeypatch, error):
    """Also those that are sampled with the failing one, from their own seeds."""
    params = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=MAX_TOKENS, seed=5)
    penalised = SamplingParams(temperature=0.8, frequency_penalty=0.5, max_tokens=20, logprobs=2)
    mixed = [params, penalised, params, penalised, params, penalised, params]
    with tiny_engine(shallow_dir) as llm:
        expected = llm.generate(PROMPTS, mixed, use_tqdm=False)
    mixed[3] = poisoned(n=3)
    with tiny_engine(shallow_dir) as llm:
        fail_in_sampling(monkeypatch, llm, error)
        with pytest.raises(RequestError) as raised:
            llm.generate(PROMPTS, mixed, use_tqdm=False)
        outputs = raised.value.outputs
        failed = outputs.pop(3)
        assert [c.finish_reason for c in failed.outputs] == ["abort"] * 3
        expected.pop(3)
        assert token_ids(outputs) == token_ids(expected)
        assert [o.logprobs and len(o.logprobs) for o in (x.outputs[0] for x in outputs)] == [
            o.logprobs and len(o.logprobs) for o in (x.outputs[0] for x in expected)
        ]
        check_nothing_is_held(llm)


def test_all_of_them_fail(shallow_dir, monkeypatch):
    with tiny_engine(shallow_dir) as llm:
        fail_in_begin(monkeypatch, llm, InjectedError("odd"))
        with pytest.raises(RequestError, match=r"prompts\[0\] failed, and 6 more: ") as raised:
            llm.generate(PROMPTS, poisoned(), use_tqdm=False)
        for output in raised.value.outputs:
            check_failed(output)
        check_nothing_is_held(llm)


def test_a_long_search_touches_only_what_it_runs(shallow_dir, monkeypatch):
    """Each of n requests is set back about log2(n) times, not at each of 2n restarts."""
    num_requests, resets, reset = 32, [], Sequence.reset
    with tiny_engine(shallow_dir) as llm:
        fail_in_begin(monkeypatch, llm, InjectedError("odd"))
        llm.enqueue([[1, 2, 3]] * num_requests, poisoned())
        monkeypatch.setattr(Sequence, "reset", lambda seq: (resets.append(seq), reset(seq)))
        outputs = llm.wait_for_completion(use_tqdm=False)
        assert all(output.error for output in outputs)
        assert len(resets) <= 10 * num_requests
        check_nothing_is_held(llm)


def test_a_failure_that_does_not_come_again_ends_nobody(
    shallow_dir, reference, monkeypatch, caplog
):
    for call in (0, 1, 2, 7):
        with tiny_engine(shallow_dir) as llm, monkeypatch.context() as patch:
            execute, count = llm.model_runner.execute, iter(range(10**9))

            def failing(plan, seqs=(), execute=execute, count=count, call=call):
                if next(count) == call:
                    raise InjectedError("once")
                return execute(plan, seqs)

            patch.setattr(llm.model_runner, "execute", failing)
            with caplog.at_level(logging.WARNING, "nanovllm"):
                assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference
            assert "is run again in parts: InjectedError: once" in caplog.text
            caplog.clear()
            check_nothing_is_held(llm)


def test_what_only_fails_together_gets_done(shallow_dir, reference, monkeypatch):
    """As memory that suffices for few rows alone."""
    with tiny_engine(shallow_dir) as llm:
        execute = llm.model_runner.execute

        def failing(plan, seqs=()):
            if len(plan.rows) > 3:
                raise MemoryError
            return execute(plan, seqs)

        monkeypatch.setattr(llm.model_runner, "execute", failing)
        assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference
        check_nothing_is_held(llm)


def test_requests_that_come_and_go_during_the_search(shallow_dir, reference, monkeypatch):
    with tiny_engine(shallow_dir) as llm:
        fail_in_begin(monkeypatch, llm, InjectedError("odd"))
        params = with_poison(greedy(MAX_TOKENS), {5})
        for prompt, own in zip(PROMPTS[:6], params, strict=False):
            llm.add_request(prompt, own)
        llm.step()
        assert llm.scheduler.held
        llm.abort_request([0, 3])
        late = llm.add_request(PROMPTS[6], greedy(MAX_TOKENS))
        assert not llm.is_finished()
        finished = {}
        while not llm.is_finished():
            finished.update(llm.step()[0])
        assert set(finished) == {1, 2, 4, 5, late}
        assert all(finished[i] == reference[i] for i in (1, 2, 4, 6))
        check_nothing_is_held(llm)


# ---- other ways to run ------------------------------------------------------------------------


def test_streams(shallow_dir, reference, monkeypatch):
    with tiny_engine(shallow_dir) as llm:
        fail_in_sampling(monkeypatch, llm, InjectedError("odd"))
        pieces = [[] for _ in PROMPTS]
        for item in llm.generate_stream(PROMPTS, with_poison(greedy(MAX_TOKENS))):
            pieces[item.prompt_index] += item.token_ids
            if item.finished and item.prompt_index == 4:
                check_failed(item.output)
        assert len(pieces.pop(4)) == 4  # the fifth was the one that failed
        assert pieces == reference[:4] + reference[5:]
        check_nothing_is_held(llm)


def test_queues(shallow_dir, reference, monkeypatch):
    with tiny_engine(shallow_dir) as llm:
        fail_in_sampling(monkeypatch, llm, InjectedError("odd"))
        llm.enqueue(PROMPTS, with_poison(greedy(MAX_TOKENS)))
        outputs = llm.wait_for_completion(use_tqdm=False)
        check_failed(outputs.pop(4))
        assert token_ids(outputs) == reference[:4] + reference[5:]


def test_a_batch_file(shallow_dir, tmp_path, monkeypatch):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"custom_id": str(i), "prompt": prompt, "max_tokens": 4, "temperature": 0}
        for i, prompt in enumerate(PROMPTS)
    ]
    lines[2] |= {"temperature": 1, "top_k": POISON}
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make_engine(model, **keywords):
        llm = tiny_engine(model, **keywords)
        fail_in_begin(monkeypatch, llm, InjectedError("odd"))
        return llm

    assert main([str(source), str(target), "--model", str(shallow_dir)], make_engine) == 1
    records = {r["custom_id"]: r for r in map(json.loads, target.read_text().splitlines())}
    assert len(records) == len(PROMPTS)
    assert records.pop("2")["error"] == {"code": "request_failed", "message": "InjectedError: odd"}
    assert all(record["error"] is None for record in records.values())


def test_pooling(shallow_dir):
    with tiny_engine(shallow_dir) as llm:
        from nanovllm.features import pooling

        def pooler(hidden_state):
            raise InjectedError("odd")

        expected = llm.embed(PROMPTS, use_tqdm=False)
        llm.add_request(PROMPTS[0], greedy(4))
        with pytest.raises(RequestError, match=r"prompts\[0\] failed, and 6 more: InjectedError"):
            poolings = [pooling.Pooling("LAST", pooler)] * len(PROMPTS)
            pooling.pool(llm, PROMPTS, poolings, use_tqdm=False)
        again = llm.embed(PROMPTS, pooling_params=PoolingParams(), use_tqdm=False)
        for output, other in zip(again, expected, strict=True):
            assert output.outputs.embedding == pytest.approx(other.outputs.embedding, abs=1e-5)
        assert llm.has_unfinished_requests()
        llm.wait_for_completion(use_tqdm=False)
        check_nothing_is_held(llm)


# ---- what fails for one sequence when a step is committed --------------------------------------


def tokenizer_that_fails(llm, monkeypatch, bad_id, error=None):
    """Its `decode` fails for lists with this id."""
    decode = llm.tokenizer.decode

    def failing(ids, **options):
        if bad_id in ids:
            raise error or InjectedError("no text")
        return decode(ids, **options)

    backend = SimpleNamespace(encode=llm.tokenizer.encode, decode=failing)
    monkeypatch.setattr(llm, "tokenizer", backend)
    monkeypatch.setattr(llm.input_processor, "tokenizer", backend)


@pytest.mark.parametrize("stop", [None, ["never"]])
def test_a_tokenizer_that_fails_for_one_text(shallow_dir, reference, monkeypatch, stop):
    bad_id = next(t for t in reference[1] if not any(t in r for r in reference[2:] + reference[:1]))
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, stop=stop)
    with tiny_engine(shallow_dir) as llm:
        tokenizer_that_fails(llm, monkeypatch, bad_id)
        with pytest.raises(RequestError, match=r"prompts\[1\] failed: InjectedError: no text") as e:
            llm.generate(PROMPTS, params, use_tqdm=False)
        outputs = e.value.outputs
        check_failed(outputs[1], "InjectedError: no text")
        assert outputs[1]["text"] == "" and outputs[1]["token_ids"]
        del outputs[1]
        assert token_ids(outputs) == reference[:1] + reference[2:]
        assert all(output["text"] for output in outputs)
        check_nothing_is_held(llm)
        stream = list(llm.generate_stream(PROMPTS, params))
        ends = [item.output for item in stream if item.finished]
        assert sorted(int(o.error is not None) for o in ends) == [0] * (len(PROMPTS) - 1) + [1]
        check_nothing_is_held(llm)


def test_a_tokenizer_that_fails_while_other_requests_run(shallow_dir, reference, monkeypatch):
    """The output of the request that ends first is made while the device works."""
    bad_id = next(t for t in reference[1] if not any(t in r for r in reference[2:] + reference[:1]))
    lengths = [MAX_TOKENS] * len(PROMPTS)
    lengths[1] = reference[1].index(bad_id) + 1
    assert lengths[1] < MAX_TOKENS - 1
    monkeypatch.setattr(LaunchedStep, "is_done", lambda step: False)
    with tiny_engine(shallow_dir) as llm:
        tokenizer_that_fails(llm, monkeypatch, bad_id)
        with pytest.raises(RequestError, match=r"prompts\[1\] failed: InjectedError: no text") as e:
            llm.generate(PROMPTS, list(map(greedy, lengths)), use_tqdm=False)
        outputs = e.value.outputs
        assert token_ids(outputs) == [r[:n] for r, n in zip(reference, lengths, strict=True)]
        assert [bool(output["text"]) for output in outputs] == [i != 1 for i in range(len(PROMPTS))]
        check_failed(outputs[1], "InjectedError: no text")
        check_nothing_is_held(llm)


def test_a_grammar_that_fails_in_mid_text(shallow_dir, monkeypatch):
    pytest.importorskip("llguidance")
    from nanovllm import StructuredOutputsParams
    from nanovllm.sampling.structured_outputs import Grammar

    accept, count = Grammar.accept, iter(range(10**9))

    def failing(self, token_id):
        if next(count) == 7:
            raise PanicException("in the parser")
        accept(self, token_id)

    monkeypatch.setattr(Grammar, "accept", failing)
    digits = StructuredOutputsParams(regex="[0-9]{8}")
    params = SamplingParams(temperature=1, max_tokens=20, structured_outputs=digits, seed=3)
    with tiny_engine(shallow_dir) as llm:
        with pytest.raises(RequestError, match="PanicException: in the parser") as raised:
            llm.generate(PROMPTS[:3], params, use_tqdm=False)
        errors = [output.error for output in raised.value.outputs]
        assert sum(error is not None for error in errors) == 1
        for output in raised.value.outputs:
            assert output.error or (output["text"].isdigit() and output["finish_reason"] == "stop")
        check_nothing_is_held(llm)


# ---- several ranks ----------------------------------------------------------------------------


def check_two_ranks(llm, reference, monkeypatch):
    """A failure between two collectives, or before the ranks are told, leaves them in step."""
    for fail in (fail_in_begin, fail_in_sampling, fail_in_plan, fail_in_schedule):
        with monkeypatch.context() as patch:
            fail(patch, llm, InjectedError("odd"))
            with pytest.raises(RequestError, match=r"prompts\[4\] failed") as raised:
                llm.generate(PROMPTS, with_poison(greedy(MAX_TOKENS)), use_tqdm=False)
        outputs = raised.value.outputs
        check_failed(outputs.pop(4))
        assert token_ids(outputs) == reference[:4] + reference[5:]
        check_nothing_is_held(llm)


@pytest.mark.usefixtures("forked_workers")
def test_two_ranks(shallow_dir, reference, monkeypatch):
    with tiny_engine(shallow_dir, tensor_parallel_size=2) as llm:
        check_two_ranks(llm, reference, monkeypatch)
        fail_in_model(monkeypatch, llm, InjectedError("odd"))
        with pytest.raises(EngineDeadError, match="a tensor-parallel step failed"):
            llm.generate(PROMPTS, with_poison(greedy(MAX_TOKENS)), use_tqdm=False)


@pytest.mark.usefixtures("ranks_are_threads")
def test_two_ranks_without_overlap(shallow_dir, reference, monkeypatch):
    with tiny_engine(shallow_dir, tensor_parallel_size=2, async_scheduling=False) as llm:
        check_two_ranks(llm, reference, monkeypatch)


# ---- errors of odd kinds ----------------------------------------------------------------------


@dataclass(frozen=True)
class FrozenError(Exception):
    """Not even its `__cause__` can be set the usual way."""

    text: str


class MuteError(Exception):
    def __str__(self):
        raise PanicException("no text")


class StickyError(Exception):
    def with_traceback(self, trace):
        raise InjectedError("sticks to its traceback")


ODD_ERRORS = [FrozenError("odd"), MuteError(), StickyError("odd"), PanicException("odd")]
ODD = pytest.mark.parametrize("error", ODD_ERRORS, ids=lambda error: type(error).__name__)


@ODD
def test_an_error_of_any_class_ends_its_request_alone(shallow_dir, reference, monkeypatch, error):
    with tiny_engine(shallow_dir) as llm:
        with monkeypatch.context() as patch:
            fail_in_begin(patch, llm, error)
            llm.enqueue(PROMPTS, with_poison(greedy(MAX_TOKENS)))
            outputs = llm.wait_for_completion(use_tqdm=False)
        assert outputs.pop(4).error.startswith(type(error).__name__)
        assert token_ids(outputs) == reference[:4] + reference[5:]
        bad_id = next(t for t in reference[1] if not any(t in r for r in reference[2:]))
        tokenizer_that_fails(llm, monkeypatch, bad_id, error)
        llm.enqueue(PROMPTS[1:], greedy(MAX_TOKENS))
        outputs = llm.wait_for_completion(use_tqdm=False)
        assert outputs.pop(0).error.startswith(type(error).__name__)
        assert token_ids(outputs) == reference[2:]
        check_nothing_is_held(llm)


@ODD
def test_a_tokenizer_that_fails_to_encode_refuses_by_name(shallow_dir, monkeypatch, error):
    with tiny_engine(shallow_dir) as llm:

        def encode(text, **options):
            raise error

        backend = SimpleNamespace(encode=encode, decode=llm.tokenizer.decode)
        monkeypatch.setattr(llm, "tokenizer", backend)
        monkeypatch.setattr(llm.input_processor, "tokenizer", backend)
        for call in (llm.generate, llm.add_request, llm.enqueue, llm.generate_stream, llm.embed):
            with pytest.raises(ArgumentError, match="tokenizer refuses the prompt: (odd|MuteErr)"):
                call("the fox")
        with pytest.raises(ArgumentError, match="the tokenizer refuses 'fox': (odd|MuteErr)"):
            llm.generate([1], SamplingParams(bad_words=["fox"]))
        assert llm.is_finished()
