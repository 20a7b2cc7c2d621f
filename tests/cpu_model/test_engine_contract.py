"""What `LLM` promises its callers: generate, the add_request/step loop, limits, the end."""

import copy
import gc
import itertools
import json
import random
import re
import threading
import traceback
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engine_checks import (
    check_nothing_is_held,
    drain,
    generate,
    greedy,
    random_prompts,
    scripted_step,
    tiny_engine,
)
from tiny_models import VOCAB_SIZE, reference_greedy, save_model

from nanovllm import LLM, EngineDeadError, SamplingParams
from nanovllm.engine.sequence import Sequence

PROMPTS = random_prompts((5, 7, 1, 30), seed=20)
NUM_REFERENCE = 50


@pytest.fixture(scope="module")
def reference(shallow_dir):
    return reference_greedy(shallow_dir, PROMPTS, NUM_REFERENCE)


@pytest.fixture(scope="module")
def shared_engine(shallow_dir):
    with tiny_engine(shallow_dir) as llm:
        yield llm


@pytest.fixture
def llm(shared_engine):
    """An engine with nothing queued, before and after."""
    check_nothing_is_held(shared_engine)
    yield shared_engine
    check_nothing_is_held(shared_engine)


@pytest.fixture(params=[True, False], ids=["overlapped", "synchronous"])
def new_engine(request, shallow_dir):
    """Makes fresh engines, whose request ids begin at 0."""
    engines = []

    def make(**kwargs):
        engines.append(tiny_engine(shallow_dir, async_scheduling=request.param, **kwargs))
        return engines[-1]

    yield make
    for engine in engines:
        engine.exit()


def script_tokens(llm, monkeypatch, token_ids):
    """Make a lone request generate `token_ids`."""
    script = iter(token_ids)

    def execute(plan, seqs=()):
        assert len(plan.rows) == 1
        return scripted_step(plan, seqs, [next(script)])

    monkeypatch.setattr(llm.model_runner, "execute", execute)


# ---- generate: what goes in -----------------------------------------------------------------


def test_results_are_in_prompt_order_whichever_ends_first(llm, reference):
    limits = [50, 1, 20, 3]
    outputs = generate(llm, PROMPTS, [greedy(limit) for limit in limits])
    assert outputs == [r[:limit] for r, limit in zip(reference, limits, strict=True)]


def test_what_may_take_longest_starts_first_where_requests_outnumber_slots(shallow_dir, reference):
    limits = [3, 20, 1, 20]
    with tiny_engine(shallow_dir, max_num_seqs=2) as llm:
        params = [greedy(limit) for limit in limits]
        llm.enqueue(PROMPTS, params, use_tqdm=False)
        assert [seq.request_id for seq in llm.scheduler.waiting] == [1, 3, 0, 2]
        late = llm.add_request(PROMPTS[0], greedy(50))  # longer, but in another call
        assert llm.scheduler.waiting[-1].request_id == late
        outputs = llm.wait_for_completion(use_tqdm=False)
        expected = zip([*reference, reference[0]], [*limits, 50], strict=True)
        assert [out["token_ids"] for out in outputs] == [r[:limit] for r, limit in expected]
    with tiny_engine(shallow_dir, max_num_seqs=4) as llm:
        llm.enqueue(PROMPTS, params, use_tqdm=False)
        assert [seq.request_id for seq in llm.scheduler.waiting] == [0, 1, 2, 3]


def test_one_params_serves_all_prompts_and_lists_and_tuples_give_one_each(llm, reference):
    expected = [r[:4] for r in reference]
    assert generate(llm, PROMPTS, greedy(4)) == expected
    assert generate(llm, PROMPTS, [greedy(4)] * 4) == expected
    assert generate(llm, PROMPTS, tuple([greedy(4)] * 4)) == expected
    assert generate(llm, tuple(map(tuple, PROMPTS)), greedy(4)) == expected


def test_without_params_the_defaults_hold(llm):
    assert SamplingParams() == SamplingParams(temperature=1.0, max_tokens=64, ignore_eos=False)
    for arguments in ([PROMPTS], [PROMPTS, None]):
        outputs = generate_default(llm, arguments)
        assert all(len(out) == 64 or out[-1] in llm.config.eos_token_ids for out in outputs)
        assert any(len(out) > 16 for out in outputs)


def generate_default(llm, arguments):
    return [output["token_ids"] for output in llm.generate(*arguments, use_tqdm=False)]


def test_every_form_of_a_prompt_gives_the_same(llm):
    text = "the quick brown fox"
    ids = llm.tokenizer.encode(text)
    forms = [
        text,
        ids,
        [text],
        [ids],
        (ids,),
        {"prompt": text},
        {"prompt_token_ids": ids},
        [{"prompt": text}],
        [{"prompt_token_ids": ids}],
        np.array(ids),
        [np.array(ids)],
        iter([text]),
    ]
    expected = None
    for form in forms:
        outputs = generate(llm, form, greedy(8))
        assert len(outputs) == 1
        expected = expected or outputs
        assert outputs == expected


def test_strings_ids_and_dicts_can_be_mixed(llm, shallow_dir):
    text = "a paged cache keeps the keys"
    ids = llm.tokenizer.encode(text)
    [expected] = reference_greedy(shallow_dir, [ids], 8)
    [other] = reference_greedy(shallow_dir, [PROMPTS[0]], 8)
    mixed = [text, PROMPTS[0], {"prompt": text}, ids, {"prompt_token_ids": PROMPTS[0]}]
    assert generate(llm, mixed, greedy(8)) == [expected, other, expected, expected, other]


def test_no_prompts_give_no_results(llm, capfd):
    assert llm.generate([], greedy(3)) == []
    assert llm.generate([], []) == []
    assert llm.generate((), use_tqdm=False) == []


# ---- generate: what comes out ---------------------------------------------------------------


def test_a_result_is_a_dict_of_text_and_plain_ints(llm):
    for output in llm.generate(PROMPTS, SamplingParams(max_tokens=9), use_tqdm=False):
        assert isinstance(output, dict)
        assert set(output) == {"text", "token_ids"}
        assert type(output["token_ids"]) is list
        assert all(type(token) is int for token in output["token_ids"])
        assert output["text"] == llm.tokenizer.decode(output["token_ids"])
        assert json.loads(json.dumps(output)) == output


def test_the_caller_may_change_what_was_returned(llm, reference):
    outputs = llm.generate(PROMPTS, greedy(5), use_tqdm=False)
    outputs[0]["token_ids"].clear()
    assert outputs[1]["token_ids"] == reference[1][:5]
    assert generate(llm, PROMPTS, greedy(5)) == [r[:5] for r in reference]


def test_ids_beyond_the_tokenizer_decode_to_nothing(llm, monkeypatch):
    assert len(llm.tokenizer) < VOCAB_SIZE
    word = llm.tokenizer.encode("fox")
    script_tokens(llm, monkeypatch, [VOCAB_SIZE - 1, *word, VOCAB_SIZE - 2])
    params = greedy(len(word) + 2)
    [output] = llm.generate([[5]], params, use_tqdm=False)
    assert output["text"] == "fox"
    assert output["token_ids"] == [VOCAB_SIZE - 1, *word, VOCAB_SIZE - 2]


def test_the_eos_token_ends_a_completion_and_stays_visible(llm, monkeypatch):
    word = llm.tokenizer.encode("fox")
    script_tokens(llm, monkeypatch, [*word, 2, *word, *word])
    [output] = llm.generate([[5]], SamplingParams(max_tokens=20), use_tqdm=False)
    assert output == {"text": "fox<|im_end|>", "token_ids": [*word, 2]}


UNICODE = [
    "为什么天空是蓝色的",
    "10年前，我比我哥大2岁，十年后应该大几岁",
    "URGENCY🌶️",
    "👩‍👩‍👧‍👦 family",
    "ပုံပြင်လေးပြောပြပါ",
    "naïve café — “quoted”",
    "tab\tnewline\n\r\n  spaces  ",
    "نص عربي",
    "\x00\x7f",
]


@pytest.mark.parametrize("text", UNICODE)
def test_unicode_round_trip(llm, monkeypatch, text):
    ids = llm.tokenizer.encode(text)
    script_tokens(llm, monkeypatch, ids)
    [output] = llm.generate([text], greedy(len(ids)), use_tqdm=False)
    assert output["text"] == text
    assert output["token_ids"] == ids


def test_an_incomplete_character_is_the_only_replacement_character(llm, monkeypatch):
    ids = llm.tokenizer.encode("蓝色")
    assert len(ids) == 6  # bytes
    script_tokens(llm, monkeypatch, ids[:5])
    [output] = llm.generate(["x"], greedy(5), use_tqdm=False)
    assert output["text"] == "蓝\ufffd"


def test_unicode_prompts_are_encoded_as_by_the_tokenizer(llm, shallow_dir):
    ids = [llm.tokenizer.encode(text) for text in UNICODE]
    assert generate(llm, UNICODE, greedy(6)) == reference_greedy(shallow_dir, ids, 6)


# ---- the progress bar -----------------------------------------------------------------------


def test_the_bar_is_on_stderr_with_integer_rates(llm, capfd):
    llm.generate(PROMPTS, greedy(40))
    out, err = capfd.readouterr()
    assert out == ""
    last = err.replace("\r", "\n").strip().splitlines()[-1]
    pattern = r"Generating: 100%\|.*\| 4/4 \[\S+<\S+, .*, Prefill=(\d+)tok/s, Decode=(\d+)tok/s\]"
    match = re.fullmatch(pattern, last)
    assert match, repr(last)
    assert all(int(rate) > 0 for rate in match.groups())


def test_without_a_decode_step_its_rate_is_zero(llm, capfd):
    llm.generate(PROMPTS[0], greedy(1))
    assert re.search(r"1/1 .*, Prefill=[1-9]\d*tok/s, Decode=0tok/s\]", capfd.readouterr().err)


def test_no_bar_writes_nothing(llm, capfd):
    llm.generate(PROMPTS, greedy(4), use_tqdm=False)
    llm.generate(PROMPTS, greedy(4), False)  # the third positional argument, too
    assert capfd.readouterr() == ("", "")


def test_a_callable_is_used_in_place_of_tqdm(llm, capfd):
    made = []

    class Bar:
        def __init__(self, **kwargs):
            self.kwargs, self.count, self.postfix, self.is_closed = kwargs, 0, None, False
            made.append(self)

        def update(self, n):
            assert n > 0
            self.count += n

        def set_postfix(self, values):
            self.postfix = values

        def close(self):
            self.is_closed = True

    llm.generate(PROMPTS, greedy(5), use_tqdm=Bar)
    [bar] = made
    assert bar.kwargs == {"total": 4, "desc": "Generating", "dynamic_ncols": True}
    assert bar.count == 4
    assert bar.is_closed
    assert list(bar.postfix) == ["Prefill", "Decode"]
    assert all(re.fullmatch(r"\d+tok/s", value) for value in bar.postfix.values())
    assert capfd.readouterr() == ("", "")


# ---- add_request, step, is_finished ---------------------------------------------------------


def test_idle_engine(new_engine):
    llm = new_engine()
    assert llm.is_finished() is True
    assert llm.step() == ([], 0)
    assert llm.step() == ([], 0)
    assert llm.is_finished() is True


def test_ids_rise_by_one_and_every_request_is_returned_once(new_engine, reference):
    llm = new_engine()
    limits = [9, 1, 4, 6]
    ids = [llm.add_request(p, greedy(n)) for p, n in zip(PROMPTS, limits, strict=True)]
    assert ids == [0, 1, 2, 3]
    assert llm.is_finished() is False
    completions, _ = drain(llm)
    assert completions == {i: reference[i][: limits[i]] for i in ids}
    assert llm.is_finished() is True
    generate(llm, PROMPTS, greedy(1))
    assert llm.add_request(PROMPTS[0], greedy(1)) == 8
    assert list(drain(llm)[0]) == [8]


def test_the_number_of_tokens_of_every_step(new_engine, reference):
    llm = new_engine()
    llm.add_request(PROMPTS[0], greedy(3))  # 5 tokens
    llm.add_request(PROMPTS[1], greedy(5))  # 7 tokens
    assert llm.step() == ([], 12)
    assert llm.step() == ([], -2)
    # The sequences that finish in a decode pass count.
    assert llm.step() == ([(0, reference[0][:3])], -2)
    assert llm.step() == ([], -1)
    assert llm.step() == ([(1, reference[1][:5])], -1)
    assert llm.is_finished()
    assert llm.step() == ([], 0)
    check_nothing_is_held(llm)


def test_a_request_of_one_token_finishes_in_a_prefill_step(new_engine, reference):
    llm = new_engine()
    llm.add_request(PROMPTS[0], greedy(1))
    llm.add_request(PROMPTS[1], greedy(2))
    assert llm.step() == ([(0, reference[0][:1])], 12)
    assert llm.step() == ([(1, reference[1][:2])], -1)


def test_an_eos_as_first_token_finishes_in_a_prefill_step(new_engine, monkeypatch):
    llm = new_engine()
    script_tokens(llm, monkeypatch, [2, 5, 5])
    llm.add_request([5, 6], SamplingParams())
    assert llm.step() == ([(0, [2])], 2)
    assert llm.is_finished()
    assert llm.step() == ([], 0)
    check_nothing_is_held(llm)


def test_cached_tokens_are_not_counted(new_engine):
    llm = new_engine()
    [prompt] = random_prompts([600], seed=21)
    for expected in (600, 88):
        llm.add_request(prompt, greedy(2))
        assert drain(llm)[1] == [expected, -1]


def test_requests_may_come_between_steps(new_engine, reference):
    llm = new_engine()
    llm.add_request(PROMPTS[0], greedy(10))
    assert llm.step()[1] == 5
    llm.add_request(PROMPTS[1], greedy(2))
    completions, counts = drain(llm)
    assert completions == {0: reference[0][:10], 1: reference[1][:2]}
    assert [count for count in counts if count > 0] == [7]
    assert all(count for count in counts)


def test_later_changes_by_the_caller_have_no_effect(new_engine, reference):
    llm = new_engine()
    ids, params = list(PROMPTS[0]), greedy(6)
    llm.add_request(ids, params)
    ids[0] = (ids[0] + 1) % VOCAB_SIZE
    ids.append(1)
    params.max_tokens, params.temperature = 50, 1.0
    llm.step()
    params.max_tokens = 1
    completions, _ = drain(llm)
    assert completions == {0: reference[0][:6]}
    assert len(ids) == 6  # and the engine did not append its tokens to the caller's list


def test_neither_prompts_nor_params_are_changed(new_engine):
    llm = new_engine(max_model_len=40)
    prompts, params = copy.deepcopy(PROMPTS), [greedy(None if i else 3) for i in range(4)]
    llm.generate(prompts, params, use_tqdm=False)
    assert prompts == PROMPTS
    assert params == [greedy(None if i else 3) for i in range(4)]


def test_the_returned_completion_is_the_callers_own(new_engine, reference):
    llm = new_engine()
    llm.add_request(PROMPTS[0], greedy(2))
    llm.step()
    [(_, completion)], _ = llm.step()
    completion.clear()
    assert generate(llm, [PROMPTS[0]], greedy(2)) == [reference[0][:2]]


# ---- generate while other requests are pending ------------------------------------------------


def test_generate_returns_its_own_and_step_the_others_later(new_engine, reference):
    llm = new_engine()
    llm.add_request(PROMPTS[2], greedy(40))  # outlives the generate call
    llm.add_request(PROMPTS[3], greedy(3))  # ends during it
    outputs = generate(llm, PROMPTS[:2], greedy(8))
    assert outputs == [reference[0][:8], reference[1][:8]]
    assert llm.is_finished() is False
    completions, _ = drain(llm)
    assert completions == {0: reference[2][:40], 1: reference[3][:3]}
    check_nothing_is_held(llm)


def test_others_that_ended_during_generate_keep_the_engine_unfinished(new_engine, reference):
    llm = new_engine()
    llm.add_request(PROMPTS[2], greedy(3))
    generate(llm, PROMPTS[:2], greedy(20))
    generate(llm, PROMPTS[:2], greedy(20))  # a second call loses nothing either
    assert llm.is_finished() is False
    assert llm.step() == ([(0, reference[2][:3])], 0)
    assert llm.is_finished() is True
    assert llm.step() == ([], 0)


def test_generate_after_some_steps_of_a_loop(new_engine, reference):
    llm = new_engine()
    llm.add_request(PROMPTS[0], greedy(12))
    for _ in range(4):
        assert llm.step()[0] == []
    assert generate(llm, PROMPTS[1:], greedy(30)) == [r[:30] for r in reference[1:]]
    assert drain(llm)[0] == {0: reference[0][:12]}


# ---- limits ---------------------------------------------------------------------------------


def test_no_max_tokens_goes_on_to_max_model_len(new_engine, reference):
    llm = new_engine(max_model_len=40)
    assert generate(llm, PROMPTS, greedy(None)) == [
        completion[: 40 - len(prompt)]
        for prompt, completion in zip(PROMPTS, reference, strict=True)
    ]


def test_max_model_len_bounds_prompt_and_completion(new_engine, shallow_dir):
    llm = new_engine(max_model_len=20)
    prompts = random_prompts((1, 5, 10, 18, 19), seed=22)
    expected = reference_greedy(shallow_dir, prompts, 20)
    for max_tokens in (30, 2):
        outputs = generate(llm, prompts, greedy(max_tokens))
        assert outputs == [
            completion[: min(20 - len(prompt), max_tokens)]
            for prompt, completion in zip(prompts, expected, strict=True)
        ]


def test_a_prompt_one_short_of_max_model_len_gives_one_token(new_engine, shallow_dir):
    llm = new_engine(max_model_len=2048)
    fits, too_long = random_prompts((2047, 2048), seed=23)
    assert generate(llm, [fits], greedy(8)) == reference_greedy(shallow_dir, [fits], 1)
    with pytest.raises(ValueError, match=r"prompt length 2048 .*at least 1 .*2048"):
        generate(llm, [too_long], greedy(1))
    check_nothing_is_held(llm)


def test_max_model_len_is_capped_to_the_models_maximum(shallow_dir):
    for asked, granted in ((4096, 2048), (None, 2048), (300, 300)):
        with LLM(str(shallow_dir), device="cpu", max_model_len=asked) as llm:
            assert llm.config.max_model_len == granted


def test_max_num_seqs_bounds_the_sequences_in_flight(new_engine, reference):
    llm = new_engine(max_num_seqs=3)
    rng = random.Random(1)
    limits = [rng.randint(1, 12) for _ in range(11)]
    for i, limit in enumerate(limits):
        llm.add_request(PROMPTS[i % 4], greedy(limit))
    completions, widest = {}, 0
    while not llm.is_finished():
        outputs, num_tokens = llm.step()
        completions.update(outputs)
        assert len(llm.scheduler.running) <= 3
        assert num_tokens >= -3
        widest = min(widest, num_tokens)
    assert widest == -3
    assert completions == {i: reference[i % 4][:limit] for i, limit in enumerate(limits)}


def test_first_come_first_served_within_the_token_budget(new_engine):
    """The third prompt would fit beside the first, but the second comes before it."""
    llm = new_engine(max_num_batched_tokens=1024, max_num_seqs=3)
    for prompt in random_prompts((800, 801, 10, 11), seed=24):
        llm.add_request(prompt, greedy(4))
    _, counts = drain(llm)
    assert [count for count in counts if count > 0] == [800, 811, 11]


def test_a_prompt_that_can_never_fit_the_pool_is_refused(new_engine):
    llm = new_engine(num_kvcache_blocks=2)
    with pytest.raises(ValueError, match=r"513 .*512 .*2 blocks of 256.*num_kvcache_blocks"):
        llm.add_request([1] * 513, greedy(1))
    assert llm.is_finished()


@pytest.mark.parametrize(("length", "num_tokens"), [(512, 1), (511, 2), (500, 13), (256, 20)])
def test_a_lone_sequence_that_reaches_the_pools_limit_ends_there(
    new_engine, shallow_dir, monkeypatch, length, num_tokens
):
    llm = new_engine(num_kvcache_blocks=2)
    reasons = []
    finish = llm.scheduler.finish
    monkeypatch.setattr(
        llm.scheduler, "finish", lambda seq, why: (reasons.append(why), finish(seq, why))
    )
    prompts = random_prompts((length, 300), seed=25)  # the second has to wait or give way
    expected = reference_greedy(shallow_dir, prompts, 20)
    outputs = generate(llm, prompts, greedy(20))
    assert outputs == [expected[0][:num_tokens], expected[1]]
    assert reasons == ["length", "length"]
    check_nothing_is_held(llm)


# ---- the process around the engine ------------------------------------------------------------


def test_two_engines_at_once_and_one_after_another(shallow_dir, tmp_path, reference):
    other_dir = save_model(tmp_path / "other", seed=5, num_hidden_layers=1)
    other_reference = reference_greedy(other_dir, PROMPTS, 20)
    with (
        tiny_engine(shallow_dir) as first,
        tiny_engine(other_dir, max_model_len=512, kvcache_block_size=512) as second,
    ):
        for llm in (first, second):
            assert [llm.add_request(p, greedy(20)) for p in PROMPTS] == [0, 1, 2, 3]
        results = {}, {}
        while not (first.is_finished() and second.is_finished()):  # steps in turn
            for llm, result in zip((first, second), results, strict=True):
                result.update(llm.step()[0])
        assert list(map(results[0].get, range(4))) == [r[:20] for r in reference]
        assert list(map(results[1].get, range(4))) == other_reference
    with tiny_engine(other_dir) as third:
        assert generate(third, PROMPTS, greedy(20)) == other_reference


def test_exit_may_be_called_again_and_ends_the_engine(new_engine):
    llm = new_engine()
    llm.add_request(PROMPTS[0], greedy(50))
    llm.step()
    llm.exit()
    llm.exit()
    for call in (
        lambda: llm.generate(PROMPTS, greedy(1)),
        lambda: llm.add_request(PROMPTS[0], greedy(1)),
        lambda: llm.step(),
    ):
        with pytest.raises(EngineDeadError, match=r"exit\(\)"):
            call()


def test_the_context_manager_ends_the_engine_also_after_an_error(shallow_dir):
    with pytest.raises(KeyError), tiny_engine(shallow_dir) as llm:
        raise KeyError
    with pytest.raises(EngineDeadError):
        llm.step()


@pytest.mark.parametrize("is_busy", [False, True])
def test_dropping_the_engine_frees_it(shallow_dir, is_busy):
    llm = tiny_engine(shallow_dir)
    generate(llm, PROMPTS, greedy(4))
    if is_busy:
        llm.add_request(PROMPTS[0], greedy(50))
        llm.step()
    references = [
        weakref.ref(thing)
        for thing in (
            llm,
            llm.scheduler,
            llm.model_runner,
            llm.model_runner.model,
            llm.model_runner.kv_cache,
        )
    ]
    del llm
    gc.collect()
    assert [ref() for ref in references] == [None] * 5


def test_exit_frees_the_model_while_the_engine_is_held(shallow_dir):
    llm = tiny_engine(shallow_dir)
    references = [weakref.ref(llm.model_runner.model), weakref.ref(llm.model_runner.kv_cache)]
    llm.exit()
    gc.collect()
    assert [ref() for ref in references] == [None, None]


def test_the_callers_torch_settings_are_left_alone(shallow_dir, tmp_path):
    def settings():
        return (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.get_rng_state().tolist(),
            random.getstate(),
            dist.is_initialized(),
        )

    before = settings()
    for load_format in ("auto", "dummy"):
        with tiny_engine(shallow_dir, dtype="bfloat16", load_format=load_format) as llm:
            generate(llm, PROMPTS, SamplingParams(max_tokens=3))
            assert settings() == before
    (tmp_path / "config.json").write_text((shallow_dir / "config.json").read_text())
    with pytest.raises(Exception):  # noqa: B017 (whatever it is)
        tiny_engine(tmp_path)
    assert settings() == before


def test_works_inside_the_callers_own_process_group(shallow_dir, tmp_path, reference):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with tiny_engine(shallow_dir) as llm:
            assert generate(llm, PROMPTS, greedy(5)) == [r[:5] for r in reference]
        assert dist.is_initialized()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_generate_in_another_thread(llm, reference):
    results = []
    thread = threading.Thread(target=lambda: results.append(generate(llm, PROMPTS, greedy(9))))
    thread.start()
    thread.join()
    assert results == [[r[:9] for r in reference]]


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_few_frames_lie_between_generate_and_the_model(shallow_dir, monkeypatch, async_scheduling):
    """On CUDA two more follow: `_execute_decode` and the graph's `replay`."""
    names = []
    with tiny_engine(shallow_dir, async_scheduling=async_scheduling) as llm:
        execute = llm.model_runner.execute

        def record(plan, seqs):
            stack = [frame.name for frame in traceback.extract_stack()]
            decorators = ("call", "exclusive")
            names.append([n for n in stack[stack.index("generate") :] if n not in decorators])
            return execute(plan, seqs)

        monkeypatch.setattr(llm.model_runner, "execute", record)
        llm.generate(PROMPTS[:1], greedy(3), use_tqdm=False)
    frames = ["generate", "run", "advance", "_launch", "launch", "record"]
    assert names == [frames] * 3


def test_dummy_weights_are_the_same_in_every_engine(shallow_dir):
    outputs = []
    for _ in range(2):
        with tiny_engine(shallow_dir, load_format="dummy") as llm:
            outputs.append(generate(llm, PROMPTS, greedy(9)))
    assert outputs[0] == outputs[1]
    assert len({tuple(completion) for completion in outputs[0]}) > 1


def test_the_internal_names_of_the_guide(shallow_dir, reference):
    """The loop that nano-vLLM's guide shows as the body of `step`."""
    from nanovllm.engine.llm_engine import LLMEngine

    assert issubclass(LLM, LLMEngine)
    with tiny_engine(shallow_dir) as llm:
        for prompt in PROMPTS:
            llm.add_request(prompt, greedy(5))
        finished = {}
        for is_prefill_expected in itertools.chain([True], itertools.repeat(False)):
            if llm.scheduler.is_finished():
                break
            seqs, is_prefill = llm.scheduler.schedule()
            assert is_prefill is is_prefill_expected
            if is_prefill:
                token_ids = llm.model_runner.call("run", seqs, is_prefill)
            else:
                token_ids = llm.model_runner.run(seqs, is_prefill)
            llm.scheduler.postprocess(seqs, token_ids)
            for seq in seqs:
                if seq.is_finished:
                    finished[seq.request_id] = seq.completion_token_ids
                    assert len(seq) == len(PROMPTS[seq.request_id]) + 5
        assert finished == {i: r[:5] for i, r in enumerate(reference)}
        outputs = llm.wait_for_completion(use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == [r[:5] for r in reference]
        assert not llm.requests.unfinished and llm.is_finished()


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_sequence_may_be_given_to_the_scheduler_itself(shallow_dir, reference, async_scheduling):
    """Its owner sees it finish; `step` returns the requests of `add_request` alone."""
    with tiny_engine(shallow_dir, async_scheduling=async_scheduling) as llm:
        request_id = llm.add_request(PROMPTS[0], greedy(9))
        seq = Sequence(PROMPTS[1], greedy(5), request_id=99)
        llm.scheduler.add(seq)
        returned = []
        while not llm.is_finished():
            returned += llm.step()[0]
        assert returned == [(request_id, reference[0][:9])]
        assert seq.is_finished and seq.completion_token_ids == reference[1][:5]
        check_nothing_is_held(llm)
