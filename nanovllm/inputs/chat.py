"""Chat: turns conversations into prompts with a chat template."""

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from nanovllm.config import Config
from nanovllm.errors import ArgumentError, is_fault, shown, shown_error
from nanovllm.guards.limits import TimeLimit, limited_memory
from nanovllm.inputs.plain_tokenizer import in_full
from nanovllm.inputs.prompts import (
    check_each,
    check_tokenization_kwargs,
    check_unsupported,
    encode_prompts,
)
from nanovllm.model_files import read_chat_template
from nanovllm.validation import check_bool, check_choice

TEMPLATE_SECONDS = 10.0  # for one conversation
TEMPLATE_BYTES = 512 << 20  # likewise
Method = TypeVar("Method", bound=Callable[..., Any])
CONTENT_FORMATS = ("auto", "string", "openai")
# What `apply_chat_template` is given otherwise, or would return something else than text for.
RESERVED_TEMPLATE_KWARGS = frozenset(
    """messages conversation tools chat_template add_generation_prompt continue_final_message
    tokenize sanitize_control_tokens padding truncation max_length return_tensors return_dict
    return_assistant_tokens_mask tokenizer_kwargs""".split()
)


class ChatEngine(Protocol):
    """An engine as chat sees it; the tokenizer may be None."""

    config: Config
    input_processor: Any  # which has the tokenizer


def render_prompts(
    llm: ChatEngine,
    messages: Any,
    chat_template: str | None = None,
    chat_template_content_format: str = "auto",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[Any] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    tokenization_kwargs: dict[str, Any] | None = None,
    mm_processor_kwargs: None = None,
) -> list[dict[str, Any]]:
    """A prompt dict, with text and token ids, for each conversation; see `LLM.chat`.

    The ids are those of the rendered text without the tokenizer's own special tokens, which are
    the template's business, unless `tokenization_kwargs` has add_special_tokens.

    Raises:
        ArgumentError: an argument is wrong, or the template refuses a conversation; indices say
            which, where there are several.
    """
    check_unsupported(mm_processor_kwargs=mm_processor_kwargs)
    tokenizer = in_full(llm.input_processor.tokenizer)
    if tokenizer is None:
        raise ArgumentError("chat needs the tokenizer that skip_tokenizer_init=True left out")
    check_choice("chat_template_content_format", chat_template_content_format, CONTENT_FORMATS)
    check_bool("add_generation_prompt", add_generation_prompt)
    check_bool("continue_final_message", continue_final_message)
    if add_generation_prompt and continue_final_message:
        raise ArgumentError(
            "continue_final_message=True needs add_generation_prompt=False: the final message is "
            "either continued or answered"
        )
    options = {
        **_check_template_kwargs(chat_template_kwargs),
        "chat_template": _choose_template(llm.config.chat_template, tokenizer, chat_template),
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        "tools": _check_tools(tools),
    }

    def render(conversation: Any) -> str:
        checked = _check_conversation(conversation, chat_template_content_format)
        return _apply_template(tokenizer, checked, options, limit)

    limit = TimeLimit(TEMPLATE_SECONDS)
    try:
        texts = check_each("conversations", render, _as_conversations(messages))
    finally:
        limit.close()
    encode_kwargs = {"add_special_tokens": False, **check_tokenization_kwargs(tokenization_kwargs)}
    vocab_size = llm.config.model_config.vocab_size
    return [
        {"prompt": text, "prompt_token_ids": token_ids}
        for text, token_ids in encode_prompts(texts, tokenizer, vocab_size, encode_kwargs)
    ]


def takes_chat_options(method: Method) -> Method:
    """Decorator: `help` shows a method's `*options` as what they are: those of `render_prompts`."""
    signature = inspect.signature(method)
    own = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    options = list(inspect.signature(render_prompts).parameters.values())[2:]
    method.__signature__ = signature.replace(parameters=own + options)  # type: ignore[attr-defined]
    return method


def _apply_template(
    tokenizer: Any, conversation: list[dict[str, Any]], options: dict[str, Any], limit: TimeLimit
) -> str:
    try:
        with limited_memory(TEMPLATE_BYTES), limit.running():
            return tokenizer.apply_chat_template(conversation, tokenize=False, **options)
    except ImportError:  # jinja2 is missing or too old
        raise
    except TimeoutError as error:
        raise ArgumentError(f"the chat template takes more than {limit.seconds} s") from error
    except MemoryError as error:
        size = f"{TEMPLATE_BYTES >> 20} MiB"
        raise ArgumentError(f"the chat template takes more than {size} of memory") from error
    except BaseException as error:  # a template raises what it likes
        if not is_fault(error):
            raise
        reason = shown_error(error)
        raise ArgumentError(f"the chat template refuses the conversation: {reason}") from error


def _choose_template(default: str | None, tokenizer: Any, chat_template: Any) -> str | None:
    """The call's template, else the engine's `default`; None: the tokenizer's own."""
    if chat_template is not None:
        return read_chat_template(chat_template)
    if default is None and not getattr(tokenizer, "chat_template", None):
        raise ArgumentError("the tokenizer has no chat template: give one as chat_template=...")
    return default


def _check_template_kwargs(kwargs: Any) -> dict[str, Any]:
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise ArgumentError(f"chat_template_kwargs must be a dict of names, got {shown(kwargs)}")
    if reserved := sorted(RESERVED_TEMPLATE_KWARGS & kwargs.keys()):
        raise ArgumentError(f"chat_template_kwargs must not have {', '.join(reserved)}")
    return dict(kwargs)


def _check_tools(tools: Any) -> list[Any] | None:
    """Tools as dicts (JSON schemas); functions stay, for transformers to describe."""
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)):
        raise ArgumentError(f"tools must be a list of dicts or functions, got {shown(tools)}")

    def check(tool: Any) -> Any:
        if not isinstance(tool, Mapping) and not callable(tool):
            raise ArgumentError(f"a tool must be a dict or a function, got {shown(tool)}")
        return dict(tool) if isinstance(tool, Mapping) else tool

    return check_each("tools", check, tools)


def _as_conversations(messages: Any) -> list[Any]:
    """The conversations as a list; a list of dicts is one conversation."""
    try:
        if isinstance(messages, (str, Mapping)):
            raise TypeError
        conversations = list(messages)
    except TypeError:
        raise ArgumentError(
            "messages must be a list of messages, dicts with 'role' and 'content', or a list of "
            f"such lists, got {shown(messages)}{_hint(messages)}"
        ) from None
    is_single = conversations and isinstance(conversations[0], Mapping)
    return [conversations] if is_single else conversations


def _hint(messages: Any) -> str:
    """The advice for a string or a lone message."""
    if isinstance(messages, str):
        text = '[{"role": "user", "content": "..."}]'
        return f"; write llm.chat({text}), or llm.generate(prompt) without a chat template"
    return "; a single message goes into a list too" if isinstance(messages, Mapping) else ""


def _check_conversation(conversation: Any, content_format: str) -> list[dict[str, Any]]:
    if not isinstance(conversation, (list, tuple)):
        raise ArgumentError(
            f"a conversation must be a list of messages, got {shown(conversation)}"
            f"{_hint(conversation)}"
        )
    if not conversation:
        raise ArgumentError("a conversation needs a message, got none")
    return check_each(
        "messages", lambda message: _check_message(message, content_format), conversation
    )


def _check_message(message: Any, content_format: str) -> dict[str, Any]:
    """A copy whose content is a string or, in the "openai" format, a list of parts."""
    if not isinstance(message, Mapping):
        raise ArgumentError(f"a message must be a dict, got {shown(message)}")
    role = message.get("role")
    if not isinstance(role, str):
        raise ArgumentError(f"a message needs a 'role', a string, got {shown(role)}")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise ArgumentError(f"a message of role {shown(role)} needs 'content' (or tool_calls)")
    texts = _texts(content)
    # Templates ask whether a key is there: None would count as given.
    given = {name: value for name, value in message.items() if value is not None}
    if isinstance(given.get("tool_calls"), (list, tuple)):
        given["tool_calls"] = [_with_decoded_arguments(call) for call in given["tool_calls"]]
    if content_format == "openai":
        return given | {"content": [{"type": "text", "text": text} for text in texts]}
    return given | {"content": "\n".join(texts)}


def _with_decoded_arguments(call: Any) -> Any:
    """A copy of a tool call whose arguments, JSON text in OpenAI's form, are what they say.

    Templates write them as JSON themselves.
    """
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    arguments = function["arguments"]
    try:
        decoded = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise ArgumentError(
            f"the arguments of a tool call must be JSON, got {shown(arguments)}: {error}"
        ) from error
    return {**call, "function": {**function, "arguments": decoded}}


def _texts(content: Any) -> list[str]:
    """The text of each part of a message's content."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, (list, tuple)):
        raise ArgumentError(
            f"'content' must be a string or a list of text parts, got {shown(content)}"
        )
    texts = [part.get("text") if _is_text(part) else part for part in content]
    for text in texts:
        if isinstance(text, Mapping):
            raise ArgumentError(
                f"a content part of type {shown(text.get('type'))} is not supported; supported: "
                "text"
            )
        if not isinstance(text, str):
            raise ArgumentError(f"a text part must hold a string, got {shown(text)}")
    return texts


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text"
