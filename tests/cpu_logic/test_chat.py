"""Conversations become the prompts that transformers' own apply_chat_template gives."""

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import VOCAB_SIZE, save_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from nanovllm import ArgumentError
from nanovllm.inputs.chat import render_prompts
from nanovllm.model_files import read_chat_template

QWEN3 = Path(__file__).resolve().parents[2].parent / "shared" / "qwen3-0.6b"
needs_qwen3 = pytest.mark.skipif(
    not QWEN3.is_dir(), reason="the files of Qwen3-0.6B are not beside this checkout"
)
USER = {"role": "user", "content": "the quick fox"}
ANSWER = {"role": "assistant", "content": "jumps over"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}
RESULT = {"role": "tool", "content": "2"}


def add(a: int) -> int:
    """Adds one.

    Args:
        a: the number
    """
    return a + 1


def stand_in(tokenizer, vocab_size: int, chat_template: str | None = None) -> SimpleNamespace:
    """What `render_prompts` reads of an engine."""
    config = SimpleNamespace(
        chat_template=chat_template, model_config=SimpleNamespace(vocab_size=vocab_size)
    )
    return SimpleNamespace(input_processor=SimpleNamespace(tokenizer=tokenizer), config=config)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # `encode` adds a special token in front, as the tokenizers of many models do.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return stand_in(tokenizer, VOCAB_SIZE)


@pytest.fixture(scope="module")
def qwen3():
    return stand_in(AutoTokenizer.from_pretrained(QWEN3), 151936)


def expected(llm, conversation, add_generation_prompt=True, **kwargs) -> dict:
    """By transformers: the text and the ids that it tokenizes it to."""
    arguments = {"add_generation_prompt": add_generation_prompt, **kwargs}
    apply = llm.input_processor.tokenizer.apply_chat_template
    return {
        "prompt": apply(conversation, tokenize=False, **arguments),
        "prompt_token_ids": apply(conversation, **arguments)["input_ids"],
    }


def refused(message: str):
    return pytest.raises(ArgumentError, match=message)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"add_generation_prompt": False}, {"chat_template": "{{ messages[-1].content }}"}],
)
def test_one_conversation_and_several(llm, kwargs):
    conversations = [[USER], [SYSTEM, USER, ANSWER, USER], [ANSWER]]
    prompts = [expected(llm, conversation, **kwargs) for conversation in conversations]
    assert render_prompts(llm, conversations, **kwargs) == prompts
    assert render_prompts(llm, tuple(map(tuple, conversations)), **kwargs) == prompts
    assert render_prompts(llm, conversations[1], **kwargs) == prompts[1:2]
    assert render_prompts(llm, iter(conversations[1]), **kwargs) == prompts[1:2]
    assert render_prompts(llm, [], **kwargs) == []


def test_special_tokens_are_the_templates_alone(llm):
    [prompt] = render_prompts(llm, [USER])
    start, end_of_text = llm.input_processor.tokenizer.convert_tokens_to_ids(
        ["<|im_start|>", "<|endoftext|>"]
    )
    assert prompt["prompt_token_ids"][0] == start
    assert llm.input_processor.tokenizer.encode(prompt["prompt"])[:2] == [end_of_text, start]
    [prompt] = render_prompts(llm, [USER], tokenization_kwargs={"add_special_tokens": True})
    assert prompt["prompt_token_ids"][:2] == [end_of_text, start]


def test_tokenization_kwargs_reach_the_tokenizer(llm):
    [whole] = render_prompts(llm, [USER])
    [prompt] = render_prompts(llm, [USER], tokenization_kwargs={"max_length": 3})
    assert prompt["prompt_token_ids"] == whole["prompt_token_ids"][:3]
    with refused("tokenization_kwargs: 'padding' is not supported"):
        render_prompts(llm, [USER], tokenization_kwargs={"padding": True})


def test_final_message_is_continued(llm):
    [prompt] = render_prompts(
        llm, [USER, ANSWER], add_generation_prompt=False, continue_final_message=True
    )
    assert prompt["prompt"].endswith("<|im_start|>assistant\njumps over")
    assert prompt == expected(llm, [USER, ANSWER], False, continue_final_message=True)
    with refused("continue_final_message=True needs add_generation_prompt=False"):
        render_prompts(llm, [USER, ANSWER], continue_final_message=True)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "the quick fox"}], "the quick fox"),
        ([{"type": "text", "text": "the"}, "quick", {"type": "text", "text": "fox"}], None),
        ([], ""),
        ("the quick fox", "the quick fox"),
    ],
)
def test_text_parts_are_joined_or_kept_as_the_format_says(llm, content, text):
    text = "the\nquick\nfox" if text is None else text
    messages = [{"role": "user", "content": content}]
    for content_format in ("auto", "string"):
        [prompt] = render_prompts(llm, messages, chat_template_content_format=content_format)
        assert prompt == expected(llm, [{"role": "user", "content": text}])
    template = "{% for part in messages[0].content %}<{{ part.type }}>{{ part.text }}{% endfor %}!"
    [prompt] = render_prompts(
        llm, messages, chat_template=template, chat_template_content_format="openai"
    )
    parts = text.split("\n") if text else []
    assert prompt["prompt"] == "".join(f"<text>{part}" for part in parts) + "!"


def test_messages_and_tools_of_the_caller_are_left_alone(llm):
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    template = "{{ messages[0].content }}{{ 'name' in messages[0] }}{{ tools[0].function.name }}"
    [prompt] = render_prompts(llm, messages, tools=tools, chat_template=template)
    assert prompt["prompt"] == "aFalseadd"
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}]


# Templates


def test_template_is_that_of_the_call_else_the_engines_else_the_tokenizers(llm, tmp_path):
    with_default = stand_in(
        llm.input_processor.tokenizer, VOCAB_SIZE, "engine: {{ messages[0].content }}"
    )
    assert render_prompts(with_default, [USER])[0]["prompt"] == "engine: the quick fox"
    file = tmp_path / "template.jinja"
    file.write_text("file: {{ messages[0].content }}")
    for template in (file, str(file), file.read_text()):
        [prompt] = render_prompts(with_default, [USER], chat_template=template)
        assert prompt["prompt"] == "file: the quick fox"


def test_tokenizer_without_a_template_needs_one(llm, tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = None
    bare = stand_in(tokenizer, VOCAB_SIZE)
    with refused(r"the tokenizer has no chat template: give one as chat_template="):
        render_prompts(bare, [USER])
    [prompt] = render_prompts(bare, [USER], chat_template="{{ messages[0].content }}")
    assert prompt["prompt"] == "the quick fox"


def test_path_that_is_neither_file_nor_template_is_refused(tmp_path):
    for template in (str(tmp_path / "nowhere"), tmp_path, "nowhere"):
        with refused("is no Jinja template, and no file that can be read"):
            read_chat_template(template)
    with refused("chat_template must be a template or a path, got 5"):
        read_chat_template(5)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 + }}", "the chat template refuses the conversation: unexpected"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.at_all }}", "has no attribute 'nothing'"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{{ '' }}", "Prompt cannot be empty"),
    ],
)
def test_what_a_template_raises_is_an_argument_error(llm, template, message):
    with refused(message):
        render_prompts(llm, [USER], chat_template=template)
    with refused(r"\[0\]: .*" + message):
        render_prompts(llm, [[USER], [USER]], chat_template=template)


def test_chat_template_kwargs_reach_the_template_but_for_reserved_ones(llm):
    template = "{{ messages[0].content }}{{ ' twice' if twice }}"
    for twice, end in ((True, "fox twice"), (False, "fox")):
        [prompt] = render_prompts(
            llm, [USER], chat_template=template, chat_template_kwargs={"twice": twice}
        )
        assert prompt["prompt"].endswith(end)
    for name in ("tokenize", "messages", "chat_template", "return_dict"):
        with refused(f"chat_template_kwargs must not have {name}"):
            render_prompts(llm, [USER], chat_template_kwargs={name: False})
    with refused("chat_template_kwargs must be a dict of names, got 5"):
        render_prompts(llm, [USER], chat_template_kwargs=5)


# Qwen3's own template


@needs_qwen3
@pytest.mark.parametrize("enable_thinking", [True, False])
def test_thinking_switched_off_puts_an_empty_thought_in_the_prompt(qwen3, enable_thinking):
    [prompt] = render_prompts(
        qwen3, [USER], chat_template_kwargs={"enable_thinking": enable_thinking}
    )
    think = qwen3.input_processor.tokenizer.convert_tokens_to_ids("<think>")
    assert (think in prompt["prompt_token_ids"]) is not enable_thinking
    assert prompt == expected(qwen3, [USER], enable_thinking=enable_thinking)


@needs_qwen3
def test_tools_and_their_calls(qwen3):
    conversation = [SYSTEM, USER, CALL, RESULT]
    [prompt] = render_prompts(qwen3, conversation, tools=[add])
    assert '"name": "add"' in prompt["prompt"]
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in prompt["prompt"]
    assert "<tool_response>\n2\n</tool_response>" in prompt["prompt"]
    called = CALL | {"content": ""}  # absent content is empty text
    assert prompt == expected(qwen3, [SYSTEM, USER, called, RESULT], tools=[add])
    schema = {"type": "function", "function": {"name": "add", "parameters": {}}}
    [prompt] = render_prompts(qwen3, [USER], tools=[schema])
    assert prompt == expected(qwen3, [USER], tools=[schema])


# Wrong messages


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages must be a list of messages, .* got 'hello'"),
        (USER, "messages must be a list of messages"),
        (None, "messages must be a list of messages"),
        ([[USER], []], r"^conversations\[1\]: a conversation needs a message, got none"),
        ([[]], "^a conversation needs a message, got none"),
        ([[USER], "hello"], r"^conversations\[1\]: a conversation must be a list of messages"),
        ([USER, "hello"], r"^messages\[1\]: a message must be a dict, got 'hello'"),
        (
            [[USER], [USER, 5]],
            r"^conversations\[1\]: messages\[1\]: a message must be a dict, got 5",
        ),
        ([USER, [USER]], r"^messages\[1\]: a message must be a dict"),
        ([{"content": "a"}], "^a message needs a 'role', a string, got None"),
        ([USER, {"role": 3, "content": "a"}], r"^messages\[1\]: a message needs a 'role'"),
        ([{"role": "user"}], "^a message of role 'user' needs 'content'"),
        (
            [{"role": "assistant", "content": None}],
            "^a message of role 'assistant' needs 'content'",
        ),
        ([{"role": "user", "content": 5}], "'content' must be a string or a list of text parts"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "a content part of type 'image_url' is not supported; supported: text",
        ),
        ([{"role": "user", "content": [{"text": "a"}]}], "content part of type None"),
        ([{"role": "user", "content": [{"type": "text"}]}], "a text part must hold a string"),
        ([{"role": "user", "content": [5]}], "a text part must hold a string, got 5"),
        ([{"role": "user", "content": "\ud800"}], "not valid Unicode"),
    ],
)
def test_wrong_messages_are_named(llm, messages, message):
    with refused(message):
        render_prompts(llm, messages)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tools": 5}, "tools must be a list of dicts or functions, got 5"),
        ({"tools": [add, "add"]}, r"tools\[1\]: a tool must be a dict or a function, got 'add'"),
        ({"chat_template_content_format": "xml"}, "must be one of auto, string, openai, got 'xml'"),
        ({"add_generation_prompt": 1}, "add_generation_prompt must be True or False, got 1"),
        ({"continue_final_message": "content"}, "continue_final_message must be True or False"),
    ],
)
def test_wrong_options_are_named(llm, kwargs, message):
    with refused(message):
        render_prompts(llm, [USER], **kwargs)


def test_chat_without_a_tokenizer_is_refused():
    with refused("chat needs the tokenizer that skip_tokenizer_init=True left out"):
        render_prompts(stand_in(None, VOCAB_SIZE), [USER])


def test_arguments_of_tool_calls_may_be_json_text(llm):
    """OpenAI's form; templates write them as JSON themselves."""
    template = "{% for m in messages %}{% for t in m.tool_calls or [] %}"
    template += "{{ t.function.arguments | tojson }}{% endfor %}{% endfor %}"
    for text, expected in (('{"city": "Rome"}', '{"city": "Rome"}'), ("", "{}")):
        call = {"type": "function", "function": {"name": "f", "arguments": text}}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        [prompt] = render_prompts(
            llm, [USER, message], chat_template=template, add_generation_prompt=False
        )
        assert prompt["prompt"] == expected
        assert call["function"]["arguments"] == text  # the caller's is as it was
    call["function"]["arguments"] = "{"
    with pytest.raises(ArgumentError, match="arguments of a tool call must be JSON, got '{'"):
        render_prompts(llm, [USER, message], chat_template=template)


# What a template may do


@pytest.mark.parametrize(
    "body",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro again() %}{% for i in range(99999) %}{{ again() }}{% endfor %}{% endmacro %}"
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    ],
)
def test_a_template_without_end_is_ended(body, llm, monkeypatch):
    monkeypatch.setattr("nanovllm.inputs.chat.TEMPLATE_SECONDS", 0.3)
    num_threads = threading.active_count()
    with pytest.raises(ArgumentError, match="the chat template takes more than 0.3 s"):
        render_prompts(llm, [USER], chat_template=body)
    deadline = time.monotonic() + 30
    while threading.active_count() > num_threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= num_threads  # the watching thread is gone


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
@pytest.mark.parametrize(
    "body",
    [
        "{{ [1] * 10**9 }}",
        "{{ 'x' * 10**10 }}",
        "{{ 'x'.center(10**10) }}",
        "{% set ns = namespace(a='x' * 999) %}{% for i in range(60) %}"
        "{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
    ],
)
def test_a_template_that_takes_all_memory_is_refused(body, llm):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ArgumentError, match="the chat template takes more than 512 MiB of memory"):
        render_prompts(llm, [USER], chat_template=body)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


@pytest.mark.parametrize(
    "body",
    [
        "{{ raise_exception('no' * 5000) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('echo ran') }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ 1 / 0 }}",
        "{% if %}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    ],
)
def test_a_template_that_tries_what_it_may_not_is_refused_in_few_words(body, llm):
    with pytest.raises(ArgumentError, match="the chat template refuses") as raised:
        render_prompts(llm, [USER], chat_template=body)
    assert len(str(raised.value)) < 500
