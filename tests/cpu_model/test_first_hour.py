"""What somebody types who comes from another library: the error says what to type instead."""

import inspect
import re

import numpy as np
import pytest
import torch
from engine_checks import tiny_engine

from nanovllm import LLM, ArgumentError, SamplingParams
from nanovllm.engine.llm_engine import LLMEngine

MESSAGES = [{"role": "user", "content": "the fox"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "the fox"}]}]


@pytest.fixture(scope="module")
def llm(tiny_dir) -> LLM:
    return tiny_engine(tiny_dir)


@pytest.mark.parametrize(
    "prompts",
    [
        MESSAGES,
        [MESSAGES, MESSAGES],
        tuple(MESSAGES),
        [MESSAGES[0], MESSAGES[0]],
        MESSAGES[0],
        {"messages": MESSAGES},
        [{"messages": MESSAGES}],
        ["the fox", MESSAGES],
        ["the fox", MESSAGES[0]],
        PARTS,
        [{"role": "assistant", "content": None}],
        [{"content": "the fox"}],
    ],
)
def test_messages_are_sent_to_chat(llm, prompts):
    for call in (llm.generate, llm.add_request, llm.enqueue, llm.generate_stream, llm.embed):
        is_nested = isinstance(prompts, list) and isinstance(prompts[0], (str, list))
        if call == llm.add_request and is_nested:
            continue  # it takes one prompt, and this is no form of one
        with pytest.raises(ArgumentError, match=r"llm\.chat\(messages, sampling_params\)"):
            call(prompts)
    assert llm.is_finished()


@pytest.mark.parametrize("messages", ["the fox", ["the fox"], ["the", "fox"], [["the fox"]]])
def test_a_string_in_the_place_of_messages_is_told_both_ways(llm, messages):
    for call in (llm.chat, llm.enqueue_chat):
        with pytest.raises(ArgumentError, match="message") as raised:
            call(messages)
        if not isinstance(messages[0], list):
            assert 'llm.chat([{"role": "user", "content": "..."}])' in str(raised.value)
            assert "llm.generate(prompt)" in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SamplingParams(), ["the fox"]), "got SamplingParams.*; the prompts come before them"),
        (("the fox", {"temperature": 0}), r"got \{'temperature': 0\}; write SamplingParams\(\*\*"),
        ((["the fox"], [{"n": 2}]), r"got \{'n': 2\}; write SamplingParams\(\*\*"),
        (("the", "fox"), r"got 'fox'; several prompts are one list: generate\(\[\.\.\.\]"),
        ((None,), "prompts must be a list of prompts, got None"),
        ((5,), "prompts must be a list of prompts, got 5"),
    ],
)
def test_arguments_in_each_others_place_are_told_apart(llm, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        llm.generate(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate("a", max_tokens=5), "into SamplingParams(max_tokens=...)"),
        (lambda llm: llm.generate("a", max_new_tokens=5), "into SamplingParams(max_tokens=...)"),
        (lambda llm: llm.chat(MESSAGES, temperature=0), "into SamplingParams(temperature=...)"),
        (lambda llm: llm.generate_stream("a", stop="b"), "into SamplingParams(stop=...)"),
        (lambda llm: llm.enqueue("a", top_p=0.5), "into SamplingParams(top_p=...)"),
        (lambda llm: llm.add_request("a", n=2), "into SamplingParams(n=...)"),
        (lambda llm: llm.generate("a", do_sample=False), "write temperature=0 for greedy"),
        (lambda llm: llm.generate("a", stream=True), ": call llm.generate_stream(prompts, "),
        (lambda llm: llm.generate(messages=MESSAGES), ": call llm.chat(messages, "),
        (lambda llm: llm.chat(prompts="a"), ": call llm.generate(prompts, "),
        (lambda llm: llm.generate(prompt="a"), "; the nearest known is 'prompts'"),
        (lambda llm: llm.generate("a", params=None), "; the nearest known is 'sampling_params'"),
        (lambda llm: llm.generate("a", use_tdqm=False), "; the nearest known is 'use_tqdm'"),
        (lambda llm: llm.generate(input_ids=[1]), ": token ids are prompts: "),
        (lambda llm: llm.chat(MESSAGES, enable_thinking=False), ": write chat_template_kwargs="),
        (lambda llm: llm.generate("a", tools=[]), ": it goes to llm.chat(messages, "),
        (lambda llm: llm.generate("a", beam_size=4), ": beam search is a call of its own"),
        (lambda llm: llm.generate("a", regex="a"), ", a sampling parameter: write structured_"),
        (lambda llm: llm.chat(MESSAGES, user="me"), ": nanovllm is no server"),
        (lambda llm: llm.generate("a", foo=1), "; help(nanovllm.LLM.generate) names those"),
    ],
)
def test_unknown_keywords_of_methods_are_explained(llm, call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call(llm)
    assert llm.is_finished()


def test_explained_methods_keep_signature_and_description():
    for name in ("generate", "add_request"):
        explained, plain = getattr(LLM, name), getattr(LLMEngine, name)
        assert inspect.signature(explained) == inspect.signature(plain)
        assert explained.__doc__ == plain.__doc__
    assert list(inspect.signature(LLM).parameters) == ["model", "kwargs"]
    chat, enqueue_chat = (inspect.signature(m).parameters for m in (LLM.chat, LLM.enqueue_chat))
    assert sorted(enqueue_chat) == sorted(chat)  # vLLM has priorities in these two places
    assert list(chat)[-1] == "priority"
    assert list(enqueue_chat)[4:7] == ["lora_request", "priority", "chat_template"]
    for name, parameter in chat.items():
        assert enqueue_chat[name] == parameter


@pytest.mark.parametrize("make", [lambda: LLM(), lambda: LLM(None), lambda: LLM(model=None)])
def test_without_a_model_the_error_says_how_to_get_one(make):
    with pytest.raises(ArgumentError, match="hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B"):
        make()


def test_an_engine_shows_itself_in_one_line(tiny_dir):
    llm = tiny_engine(tiny_dir)
    start = f"LLM(model={str(tiny_dir)!r}, dtype='float32', device='cpu', tensor_parallel_size=1, "
    assert repr(llm) == str(llm) == start + "state='idle')"
    llm.add_request([1, 2])
    assert repr(llm) == start + "state='1 requests')"
    llm.sleep(0, mode="keep")
    assert repr(llm) == start + "state='asleep')"
    llm.exit()
    assert repr(llm) == f"LLM(model={str(tiny_dir)!r})"
    assert repr(LLM.__new__(LLM)) == "LLM(not started)"


def test_the_tree_of_modules_can_still_be_seen(llm, capsys):
    assert llm.apply_model(print) == [None]
    assert "(embed_tokens): VocabParallelEmbedding()" in capsys.readouterr().out


WRONG = [5, 1.5, object(), b"x", np.array("x"), torch.zeros(2), SamplingParams()]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm, v: llm.collective_rpc(len, args=v), "args must be a tuple of arguments, got "),
        (lambda llm, v: llm.collective_rpc(len, kwargs=v), "kwargs must be a dict of names and "),
        (lambda llm, v: llm.collective_rpc(len, kwargs={5: v}), "kwargs must be a dict of names"),
        (lambda llm, v: llm.load_weights(v), "weights must be \\(name, tensor\\) pairs, got "),
        (lambda llm, v: llm.start_profile(v), "profile_prefix must be a path, got "),
        (lambda llm, v: llm.wake_up([v]), "tags must be of weights, kv_cache, scheduling, got "),
        (lambda llm, v: llm.reset_prefix_cache(v), "reset_running_requests must be True or False"),
        (lambda llm, v: llm.chat(v), "messages must be a list of messages|a conversation must be"),
    ],
)
def test_wrong_types_are_refused_by_the_arguments_name(llm, call, message):
    for value in WRONG:
        with pytest.raises(ArgumentError, match=message):
            call(llm, value)


@pytest.mark.parametrize("use_tqdm", ["no", 1.5, [], np.zeros(2), torch.zeros(2), object()])
def test_use_tqdm_is_a_switch_or_makes_a_bar(llm, use_tqdm):
    for call in (llm.generate, llm.generate_stream, llm.enqueue, llm.embed):
        with pytest.raises(ArgumentError, match="use_tqdm must be True, False or a callable"):
            call("the fox", use_tqdm=use_tqdm)
    with pytest.raises(ArgumentError, match="use_tqdm must be True, False or a callable"):
        llm.wait_for_completion(use_tqdm=use_tqdm)
    assert llm.is_finished()


def test_engine_args_are_an_object_with_attributes(tiny_dir):
    for wrong in ({"model": str(tiny_dir)}, None, str(tiny_dir)):
        with pytest.raises(ArgumentError, match="engine_args must be an object with attributes"):
            LLM.from_engine_args(wrong)
