"""Logits processors, budgets of reasoning, repetition, and logprobs of chosen tokens."""

from dataclasses import replace
from functools import partial
from importlib.metadata import EntryPoint

import pytest
import torch
from engine_checks import check_nothing_is_held, generate, random_prompts, tiny_engine
from nanovllm.v1.sample import logits_processor as interface
from nanovllm.v1.sample.logits_processor import AdapterLogitsProcessor, RequestLogitsProcessor
from nanovllm.v1.sample.logits_processor.builtin import process_dict_updates
from tiny_models import VOCAB_SIZE
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    Qwen3ForCausalLM,
    RepetitionPenaltyLogitsProcessor,
)

from nanovllm import ArgumentError, RequestError, SamplingParams, StructuredOutputsParams
from nanovllm.config import Config, ReasoningConfig, VllmConfig
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.sequence import Sequence, Wants
from nanovllm.engine.thinking import ThinkingBudget
from nanovllm.sampling import engine_processors

PROMPTS = random_prompts([250, 300, 40, 1], seed=17)
MAX_TOKENS = 10


@pytest.fixture(scope="module")
def llm(tiny_dir):
    with tiny_engine(tiny_dir, max_model_len=512, num_kvcache_blocks=32) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(llm):
    yield
    check_nothing_is_held(llm)


@pytest.fixture(scope="module")
def hf_model(tiny_dir):
    return Qwen3ForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)


# ---- logprob_token_ids, repetition_detection -------------------------------------------------


def test_logprobs_of_chosen_tokens_are_those_of_transformers(llm, hf_model):
    wanted = [None, [3, 200, 17], None, [9]]
    params = [
        SamplingParams(1.0, MAX_TOKENS, True, seed=i, logprob_token_ids=ids,
                       logprobs={0: 2, 3: 1}.get(i))
        for i, ids in enumerate(wanted)
    ]  # fmt: skip
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    plain = [SamplingParams(1.0, MAX_TOKENS, True, seed=i) for i in range(4)]
    assert [output["token_ids"] for output in outputs] == generate(llm, PROMPTS, plain)
    assert len(outputs[0]["logprobs"][0]) in (2, 3) and outputs[2]["logprobs"] is None
    for output, ids in zip(outputs, wanted, strict=True):
        if ids is None:
            continue
        prompt, completion = output.prompt_token_ids, output["token_ids"]
        with torch.inference_mode():
            logits = hf_model(torch.tensor([prompt + completion])).logits[0]
        truth = logits.log_softmax(-1)[len(prompt) - 1 :]
        for token_id, position, row in zip(completion, output["logprobs"], truth, strict=False):
            assert list(position) == [token_id, *(i for i in ids if i != token_id)]
            for entry_id, entry in position.items():
                assert entry.logprob == pytest.approx(float(row[entry_id]), abs=1e-4)
            assert position.pop(token_id).rank == 1 + int((row > row[token_id] + 1e-5).sum())
            assert {entry.rank for entry in position.values()} <= {None}
        own = sum(float(row[t]) for row, t in zip(truth, completion, strict=False))
        assert output["cumulative_logprob"] == pytest.approx(own, abs=1e-3)


def test_wrong_ids_for_logprobs_are_named(llm):
    for values, message in (
        ({"logprob_token_ids": [VOCAB_SIZE]}, f"token id {VOCAB_SIZE} is out of vocabulary"),
        ({"logprob_token_ids": list(range(129))}, "must hold at most 128 token ids, got 129"),
        ({"logprob_token_ids": [1, 2], "logprobs": 3}, "logprobs must be None or 2, .* got 3"),
    ):
        with pytest.raises(ArgumentError, match=message):
            llm.generate(PROMPTS[0], SamplingParams(**values), use_tqdm=False)


def test_a_completion_that_repeats_itself_ends(llm):
    """The same tokens as without, up to the first repetition; others of the batch go on."""
    loose = {"temperature": 1.0, "max_tokens": 40, "ignore_eos": True, "seed": 1}
    loose["allowed_token_ids"] = [30, 31, 32]
    free = generate(llm, PROMPTS, SamplingParams(**loose))
    detection = {"max_pattern_size": 3, "min_pattern_size": 2, "min_count": 3}
    params = [SamplingParams(**loose, repetition_detection=detection), SamplingParams(**loose)] * 2
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for output, tokens, own in zip(outputs, free, params, strict=True):
        if own.repetition_detection is None:
            assert (output["token_ids"], output["finish_reason"]) == (tokens, "length")
            continue
        text = "".join(map(chr, tokens))
        ends = [n for n in range(41) for k in (2, 3) if text[:n].endswith(text[:n][-k:] * 3)]
        assert output["token_ids"] == tokens[: min(n for n in ends if n >= 6)]
        assert output["finish_reason"] == "repetition"
        assert output.outputs[0].stop_reason == "repetition_detected"


# ---- logits processors of requests -----------------------------------------------------------


def with_processors(*processors, **values) -> SamplingParams:
    settings = {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True} | values
    return SamplingParams(**settings, logits_processors=list(processors))


def alternate(token_ids, logits):
    """After an even id an odd one, and the other way round; in place."""
    if token_ids:
        logits[token_ids[-1] % 2 :: 2] = -torch.inf
    return logits


def no_prompt_tokens(prompt_token_ids, token_ids, logits):
    return logits.index_fill(0, torch.tensor(prompt_token_ids), -torch.inf)


class NoPromptTokens(LogitsProcessor):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, input_ids[0, : self.length], -torch.inf)


class Alternate(LogitsProcessor):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > self.length:
            scores[:, input_ids[0, -1] % 2 :: 2] = -torch.inf
        return scores


def transformers_tokens(hf_model, prompt, processors, max_tokens=MAX_TOKENS) -> list[int]:
    ids = torch.tensor([prompt])
    out = hf_model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
        eos_token_id=None, logits_processor=processors,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


SWITCHES = [
    {},
    {"async_scheduling": False},
    {"enable_chunked_prefill": True, "max_num_batched_tokens": 90},
    {"num_kvcache_blocks": 3, "watermark": 0, "max_num_seqs": 3},  # preempts
]


@pytest.fixture(scope="module")
def edited(hf_model):
    """What each request gives by transformers' generate, and how it is asked for here."""
    repeats = [NoRepeatNGramLogitsProcessor(1), RepetitionPenaltyLogitsProcessor(1.7)]
    cases = []
    for prompt in PROMPTS:
        length = len(prompt)
        cases += [
            (prompt, [], SamplingParams(0, MAX_TOKENS, True)),
            (prompt, [Alternate(length)], with_processors(alternate)),
            (prompt, [NoPromptTokens(length), Alternate(length)],
             with_processors(no_prompt_tokens, alternate)),
            (prompt, repeats, with_processors(*repeats)),
        ]  # fmt: skip
    expected = [transformers_tokens(hf_model, p, LogitsProcessorList(c)) for p, c, _ in cases]
    assert len({tuple(tokens) for tokens in expected}) > 12
    return [p for p, _, _ in cases], [own for _, _, own in cases], expected


@pytest.mark.parametrize("settings", SWITCHES, ids=lambda s: "-".join(s) or "default")
def test_greedy_tokens_are_those_of_transformers_with_the_same_processors(
    tiny_dir, edited, settings
):
    prompts, params, expected = edited
    with tiny_engine(tiny_dir, **({"max_model_len": 512} | settings)) as engine:
        assert generate(engine, prompts, params) == expected
        if "watermark" in settings:
            assert engine.scheduler.num_preemptions > 0
        check_nothing_is_held(engine)


def test_processors_see_all_tokens_before_and_the_model_s_own_logits(llm, hf_model):
    """Each call has the prompt and a completion that grows by one, whatever runs beside it."""
    seen = []

    def note(prompt, output, logits):
        seen.append((prompt, list(output), logits.clone()))
        return logits

    others = [SamplingParams(1.0, 4, seed=1), SamplingParams(0.5, 30, True, top_k=3, seed=2)]
    params = [others[0], with_processors(note), *others]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    tokens = outputs[1]["token_ids"]
    assert [output for _, output, _ in seen] == [tokens[:n] for n in range(MAX_TOKENS)]
    assert all(prompt == PROMPTS[1] for prompt, _, _ in seen)
    with torch.inference_mode():
        truth = hf_model(torch.tensor([PROMPTS[1] + tokens])).logits[0, len(PROMPTS[1]) - 1 :]
    for (_, _, logits), row in zip(seen, truth, strict=False):
        torch.testing.assert_close(logits, row, atol=1e-4, rtol=1e-4)


def test_each_completion_has_a_clone_and_one_that_edits_nothing_changes_nothing(llm):
    class Counting:
        clones = 0

        def __init__(self):
            self.calls = 0

        def clone(self):
            Counting.clones += 1
            return Counting()

        def __call__(self, token_ids, logits):
            assert self.calls == len(token_ids)  # of its own completion alone
            self.calls += 1
            return logits

    sampled = {"temperature": 0.8, "seed": 5, "n": 3, "top_p": 0.9, "repetition_penalty": 1.2}
    plain, counted = (
        llm.generate(PROMPTS[:2], params, use_tqdm=False)
        for params in (
            SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, **sampled),
            with_processors(Counting(), **sampled),
        )
    )
    assert [c.token_ids for o in plain for c in o.outputs] == [
        c.token_ids for o in counted for c in o.outputs
    ]
    assert Counting.clones == 6


class MineError(Exception):
    pass


def fail(token_ids, logits):
    if len(token_ids) == 3:
        raise MineError("no more")
    return logits


WRONG = {
    "fail": (fail, "MineError: no more"),
    "nothing": (lambda ids, logits: None, "logits processor <lambda> must return the logits, got"),
    "shape": (lambda ids, logits: logits[:5], r"floats of shape \[384\], got .* of shape \[5\]"),
    "dtype": (lambda ids, logits: logits.int(), r"must return floats .*, got torch.int32"),
    "nan": (lambda ids, logits: logits * torch.nan, "left NaN among the logits"),
    "nothing left": (lambda ids, logits: logits - torch.inf, "left no token: all logits are -inf"),
}


def test_what_fails_ends_its_request_alone(llm):
    expected = generate(llm, PROMPTS, SamplingParams(0, MAX_TOKENS, True))
    for processor, message in WRONG.values():
        params = [SamplingParams(0, MAX_TOKENS, True, logprobs=0)] * 4
        params[2] = with_processors(processor, logprobs=0)
        with pytest.raises(RequestError, match=rf"prompts\[2\] failed: .*{message}") as raised:
            llm.generate(PROMPTS, params, use_tqdm=False)
        outputs = raised.value.outputs
        assert [o["token_ids"] for o in outputs[:2] + outputs[3:]] == expected[:2] + expected[3:]
        failed = outputs[2]
        kept = 3 if processor is fail else 0  # no token is made of what failed
        assert failed["token_ids"] == expected[2][:kept] and len(failed["logprobs"]) == kept
        assert failed["finish_reason"] == "abort" and failed.error
    assert llm.scheduler.num_preemptions == 0  # nobody was run again
    assert generate(llm, PROMPTS, SamplingParams(0, MAX_TOKENS, True)) == expected


def test_what_is_no_processor_is_named():
    for wrong, message in (
        ([3], "logits_processors must be callables, got 3"),
        (5, "logits_processors must be a list of callables"),
        ([lambda logits: logits], r"must take \(token_ids, logits\) or \(prompt_token_ids, "),
        ([dict], r"of a request must be callables, got <class 'dict'>; a class goes into LLM\("),
    ):
        with pytest.raises(ArgumentError, match=message):
            SamplingParams(logits_processors=wrong)
    with pytest.raises(ArgumentError, match="extra_args must be a dict, got 3"):
        SamplingParams(extra_args=3)
    assert SamplingParams(logits_processors=[]).logits_processors is None


def test_infinity_is_the_largest_logit(llm):
    def only(token_ids, logits):
        logits[77 + len(token_ids)] = torch.inf
        return logits

    params = [with_processors(only), with_processors(only, temperature=1.0, top_p=0.5, top_k=9)]
    assert generate(llm, PROMPTS[:2], params) == [list(range(77, 77 + MAX_TOKENS))] * 2


# ---- logits processors of the engine ---------------------------------------------------------


class OnlyTarget(interface.LogitsProcessor):
    """vLLM's example: requests with extra_args["target"] get that token alone, in one batch."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self.targets: dict[int, int] = {}
        self.vocab_size = vllm_config.model_config.get_vocab_size()

    @classmethod
    def validate_params(cls, params):
        if (params.extra_args or {}).get("target", 0) < 0:
            raise ValueError("target must be positive")

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        process_dict_updates(
            self.targets,
            batch_update,
            lambda params, _, __: params.extra_args and params.extra_args.get("target"),
        )

    def apply(self, logits):
        assert logits.shape[1] == self.vocab_size
        if self.targets:
            rows = torch.tensor(list(self.targets))
            columns = torch.tensor(list(self.targets.values()))
            kept = logits[rows, columns].clone()
            logits[rows] = -torch.inf
            logits[rows, columns] = kept
        return logits


class Mirror(interface.LogitsProcessor):
    """Holds what it is told of, checks it in each step, and bans what a request has generated."""

    def __init__(self, vllm_config, device, is_pin_memory):
        self.requests = {}
        self.size = 0
        self.updates = []

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        self.updates.append(batch_update)
        process_dict_updates(self.requests, batch_update, lambda *request: request)
        if batch_update is not None:
            self.size = batch_update.batch_size
        assert sorted(self.requests) == list(range(self.size))

    def apply(self, logits):
        assert len(logits) == self.size
        for index, (params, _, output) in self.requests.items():
            if params.extra_args:
                if params.extra_args.get("fail_at") == len(output):
                    raise MineError("no more")
                logits[index, output] = -torch.inf
        return logits


class Alternating(AdapterLogitsProcessor):
    """vLLM's further examples: a function for each request that asks for it, on one device."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        super().__init__(vllm_config, device, is_pin_memory)
        self.is_cpu = device.type == "cpu"

    def is_argmax_invariant(self):
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        asks = params.extra_args and params.extra_args.get("alternates")
        return alternate if asks and self.is_cpu else None


class Halving(interface.LogitsProcessor):
    """Argmax invariant: every logit behind the best three is out, as by top_k=3."""

    def __init__(self, vllm_config, device, is_pin_memory):
        pass

    def is_argmax_invariant(self):
        return True

    def update_state(self, batch_update):
        pass

    def apply(self, logits):
        return logits.masked_fill(logits < logits.topk(3).values[:, -1:], -torch.inf)


def extra(temperature=0, max_tokens=MAX_TOKENS, **values) -> SamplingParams:
    return SamplingParams(temperature, max_tokens, True, seed=1, extra_args=values or None)


def pick(found, group):
    return found[group]


def test_vllms_example_runs_on_every_way_to_name_the_class(tiny_dir, llm, monkeypatch):
    params = [extra(target=128), extra(), extra(target=67), extra(1.0)]
    expected = generate(llm, PROMPTS, params)  # extra_args mean nothing without processors
    assert expected == generate(llm, PROMPTS, [extra(), extra(), extra(), extra(1.0)])
    expected[0], expected[2] = [128] * MAX_TOKENS, [67] * MAX_TOKENS
    path = f"{__name__}:OnlyTarget"
    for given in ([OnlyTarget], path, None):
        if given is None:
            found = {"nanovllm.logits_processors": [EntryPoint("own", path, "")]}
            monkeypatch.setattr(engine_processors, "entry_points", partial(pick, found))
            installed = engine_processors.installed_paths.__wrapped__  # anew, as none are
            monkeypatch.setattr(engine_processors, "installed_paths", installed)
        with tiny_engine(tiny_dir, max_model_len=512, logits_processors=given) as engine:
            assert generate(engine, PROMPTS, params) == expected
            with pytest.raises(ArgumentError, match="OnlyTarget: target must be positive"):
                engine.generate(PROMPTS, extra(target=-1), use_tqdm=False)
            assert len(engine.embed(PROMPTS[:1], use_tqdm=False)) == 1
            check_nothing_is_held(engine)


@pytest.mark.parametrize("settings", [{}, SWITCHES[2] | SWITCHES[3]], ids=["default", "small"])
def test_a_batch_processor_sees_the_batch_as_vllm_tells_it(tiny_dir, banned, settings):
    """Tokens that were generated are banned: transformers' own ban of repeats says the same."""
    prompts, params, expected = banned
    settings = {"max_model_len": 512, "max_num_seqs": 5} | settings
    with tiny_engine(tiny_dir, logits_processors=[Mirror], **settings) as engine:
        assert generate(engine, prompts, params) == expected
        assert not engine.config.async_scheduling
        check_nothing_is_held(engine)


@pytest.fixture(scope="module")
def banned(hf_model):
    """More requests than rows, of different lengths; two of three ban what they generated."""
    prompts = PROMPTS * 3
    lengths = [3, 9, 6, 12, 1, 7, 10, 5, 8, 2, 11, 4]
    params = [extra(0, n, bans=True) if i % 3 else extra(0, n) for i, n in enumerate(lengths)]
    expected = []
    for prompt, own, length in zip(prompts, params, lengths, strict=True):
        processors = LogitsProcessorList([BanGenerated(len(prompt))] if own.extra_args else [])
        expected.append(transformers_tokens(hf_model, prompt, processors, length))
    return prompts, params, expected


class BanGenerated(LogitsProcessor):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, input_ids[0, self.length :], -torch.inf)


def test_processors_made_for_requests_leave_the_others_alone(tiny_dir, llm, hf_model):
    params = [extra(), extra(alternates=1), SamplingParams(0.9, MAX_TOKENS, True, seed=4)]
    [first, third] = generate(llm, [PROMPTS[0], PROMPTS[2]], [params[0], params[2]])
    length = len(PROMPTS[1])
    second = transformers_tokens(hf_model, PROMPTS[1], LogitsProcessorList([Alternate(length)]))
    with tiny_engine(tiny_dir, max_model_len=512, logits_processors=[Alternating]) as engine:
        assert generate(engine, PROMPTS[:3], params) == [first, second, third]
        assert engine.config.async_scheduling


def test_argmax_invariant_processors_act_behind_the_temperature(tiny_dir, llm):
    sampled = [SamplingParams(t, 20, True, seed=3, top_k=k) for k in (0, 3) for t in (0, 0.7, 2.0)]
    prompts = [PROMPTS[2]] * 3
    expected = generate(llm, prompts, sampled[3:])
    assert expected[1:] != generate(llm, prompts, sampled[:3])[1:]
    with tiny_engine(tiny_dir, max_model_len=512, logits_processors=[Halving]) as engine:
        assert generate(engine, prompts, sampled[:3]) == expected


def test_a_batch_processor_that_fails_ends_the_request_it_fails_with(tiny_dir, llm):
    """It is found by running the batch in parts, each with a new processor."""
    params = [extra(bans=1), extra(bans=1, fail_at=4), extra(), extra(bans=1)]
    with tiny_engine(tiny_dir, max_model_len=512, logits_processors=[Mirror]) as engine:
        expected = generate(engine, PROMPTS, [extra(bans=1), extra(bans=1), extra(), extra(bans=1)])
        with pytest.raises(RequestError, match=r"prompts\[1\] failed: MineError") as raised:
            engine.generate(PROMPTS, params, use_tqdm=False)
        outputs = [output["token_ids"] for output in raised.value.outputs]
        assert outputs[1] == expected[1][:4] and [outputs[i] for i in (0, 2, 3)] == [
            expected[i] for i in (0, 2, 3)
        ]
        assert generate(engine, PROMPTS, [extra(bans=1)] * 4)[0] == expected[0]
        check_nothing_is_held(engine)


class Broken(Mirror):
    def __init__(self, *args):
        raise MineError("not here")


def test_wrong_processors_of_an_engine_are_named(tiny_dir):
    for wrong, message in (
        ([alternate], r"of an engine must be classes or .*; a function goes into SamplingParams\("),
        (3, "logits_processors must be a list of classes, got 3"),
        ([dict], "must be subclasses of LogitsProcessor, got <class 'dict'>"),
        (["nowhere:Class"], "'nowhere:Class' cannot be loaded as .*No module named 'nowhere'"),
        (["json:Class"], "'json:Class' cannot be loaded as .*has no attribute 'Class'"),
        (["json:loads"], r"subclasses of LogitsProcessor, got <function loads .*; a function goes"),
        ([Broken], "logits_processors: MineError: not here"),
    ):
        with pytest.raises(ArgumentError, match=message):
            tiny_engine(tiny_dir, logits_processors=wrong)


# ---- thinking_token_budget -------------------------------------------------------------------


def last_index(tokens: list[int], part: list[int]) -> int:
    places = range(len(tokens) - len(part), -1, -1)
    return next((i for i in places if tokens[i : i + len(part)] == part), -1)


@torch.inference_mode()
def budgeted_tokens(hf_model, prompt, budget, start, end) -> list[int]:
    """Greedy decoding in which the end follows once there are `budget` tokens behind the start."""
    tokens, forced = list(prompt), []
    for _ in range(MAX_TOKENS):
        begun = last_index(tokens, start)
        is_thinking = begun > last_index(tokens, end)
        if not forced and is_thinking and len(tokens) - begun - len(start) >= budget:
            forced = list(end)
        best = int(hf_model(torch.tensor([tokens])).logits[0, -1].argmax())
        tokens.append(forced.pop(0) if forced else best)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("end", [[7], [301, 302, 303]])
def test_reasoning_ends_when_its_budget_is_used_up(tiny_dir, llm, hf_model, monkeypatch, end):
    short = random_prompts([9, 3], seed=4)
    plain = generate(llm, short, SamplingParams(0, MAX_TOKENS, True))
    start = plain[0][2:4]  # what the first one generates anyway; others have it in the prompt
    cases = [(prompt, budget) for prompt in (short[0], short[1] + start) for budget in range(3)]
    cases += [([*short[1], *start, 9, 8], 4), ([*start, 5, 6, 4, 3], 2), ([*start, 5, *end, 4], 2)]
    cases += [(PROMPTS[0][:-2] + start, 5), (short[1], 0), (short[0], 100), (short[0], None)]
    expected = [
        budgeted_tokens(hf_model, prompt, 100 if budget is None else budget, start, end)
        for prompt, budget in cases
    ]
    assert len({tuple(tokens) for tokens in expected}) > 8
    ids = {"<a>": start, "<b>": end}
    monkeypatch.setattr(InputProcessor, "_reasoning_ids", lambda self, text: ids[text])
    config = {"reasoning_start_str": "<a>", "reasoning_end_str": "<b>"}
    params = [SamplingParams(0, MAX_TOKENS, True, thinking_token_budget=b) for _, b in cases]
    for settings in ({}, SWITCHES[2] | SWITCHES[3]):
        settings = {"max_model_len": 512, "reasoning_config": config} | settings
        with tiny_engine(tiny_dir, **settings) as engine:
            assert generate(engine, [prompt for prompt, _ in cases], params) == expected
            check_nothing_is_held(engine)


def test_only_a_sequence_that_may_be_cut_off_next_waits_for_its_token():
    seq = Sequence([1, 2], SamplingParams(max_tokens=20))
    rule = ThinkingBudget(seq, 3, [8], [9, 9])
    waits, forced = [], []
    for token_id in (5, 8, 5, 5, 5, 9, 9, 5):
        rule.on_token(token_id)
        waits.append(bool(seq.wants & Wants.CONFIRMED))
        forced.append(seq.features.forced_token)
    assert waits == [False, False, False, True, True, True, False, False]
    assert forced == [None, None, None, None, 9, 9, None, None]


def test_budgets_read_the_texts_around_reasoning(tiny_dir, llm):
    with pytest.raises(ArgumentError, match="thinking_token_budget needs LLM\\(.*reasoning_config"):
        llm.generate(PROMPTS, SamplingParams(thinking_token_budget=3), use_tqdm=False)
    for wrong, message in (
        ({"reasoning_start_str": "<a>"}, "must have reasoning_start_str and reasoning_end_str"),
        ({"reasoning_parser": "mine"}, "reasoning_parser='mine' is not supported"),
        ({"reasoning_start_str": "a", "reasoning_end_str": "a"}, "begins and ends with 'a'"),
        (3, "reasoning_config must be a dict, got 3"),
    ):
        with pytest.raises(ArgumentError, match=message):
            Config(str(tiny_dir), reasoning_config=wrong)
    assert Config(str(tiny_dir), reasoning_config=ReasoningConfig()).reasoning_config is None
    config = ReasoningConfig(reasoning_parser="qwen3")
    with tiny_engine(tiny_dir, max_model_len=512, reasoning_config=config) as engine:
        encode = engine.get_tokenizer().encode
        params = SamplingParams(0, 20, True, thinking_token_budget=2)
        [output] = engine.generate([encode("<think>")], params, use_tqdm=False)
        end = encode("</think>")
        assert output["token_ids"][2 : 2 + len(end)] == end
        choice = StructuredOutputsParams(choice=["a"])
        with pytest.raises(ArgumentError, match="is not supported with structured_outputs"):
            engine.generate("a", replace(params, structured_outputs=choice), use_tqdm=False)
