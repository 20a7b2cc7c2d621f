"""Turns what users pass as prompts and sampling parameters into checked ones."""

import marshal
import struct
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

import numpy as np

from nanovllm.errors import MAX_SHOWN, ArgumentError, is_fault, shown, shown_error
from nanovllm.lora_request import LoRARequest
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import check_bool, check_choice, check_integer, check_unicode, clamp_int32

# More than the context of any model holds. Tokenizing takes about 150 bytes for each.
MAX_CHARACTERS = 2**23
PROMPT_KEYS = ("prompt", "prompt_token_ids")
MESSAGES_ARE_FOR_CHAT = (
    "messages are no prompts: llm.chat(messages, sampling_params) applies the chat template to them"
)
NUM_SEEN_TOGETHER = 256  # prompts that `_are_plain_ids` looks at in one go
TRUNCATIONS = ("longest_first", "only_first", "do_not_truncate")
TOKENIZATION_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "add_special_tokens": check_bool,
    "split_special_tokens": check_bool,
    "truncation": lambda name, value: (
        value if isinstance(value, bool) else check_choice(name, value, TRUNCATIONS)
    ),
    "max_length": lambda name, value: clamp_int32(name, value, minimum=1),
}
Item = TypeVar("Item")
Checked = TypeVar("Checked")


class EncodedPrompt(NamedTuple):
    """A checked prompt."""

    text: str | None  # None: it came as token ids alone
    token_ids: list[int]


def as_prompt_list(prompts: Any) -> list[Any]:
    """The prompts as a list; a bare string, dict or list of token ids is one prompt."""
    prompts = _without_arrays(prompts)
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    try:
        prompts = list(prompts)
    except TypeError:
        hint = "; the prompts come before them" if isinstance(prompts, SamplingParams) else ""
        raise ArgumentError(
            f"prompts must be a list of prompts, got {shown(prompts)}{hint}"
        ) from None
    if _are_messages(prompts):
        raise ArgumentError(f"{MESSAGES_ARE_FOR_CHAT}, got {shown(prompts)}")
    if prompts and all(isinstance(item, Integral) for item in prompts):
        return [prompts]
    return prompts


def as_params_list(sampling_params: Any, num_prompts: int) -> list[SamplingParams]:
    """One SamplingParams for each prompt; a single one, or None for the defaults, serves all."""
    if sampling_params is None:
        sampling_params = SamplingParams()
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * num_prompts
    if not isinstance(sampling_params, (list, tuple)):
        raise ArgumentError(
            "sampling_params must be a SamplingParams or a list of them, got "
            + _with_hint(sampling_params)
        )
    if len(sampling_params) != num_prompts:
        raise ArgumentError(
            f"The lengths of prompts ({num_prompts}) and params ({len(sampling_params)}) "
            "must be the same."
        )
    return list(sampling_params)


def as_priority_list(priority: Any, num_prompts: int) -> list[int]:
    """One priority for each prompt; an integer is that of all, None is 0."""
    lowest, highest = -(2**63), 2**63 - 1
    if priority is None:
        return [0] * num_prompts
    if isinstance(priority, Integral):
        return [check_integer("priority", priority, lowest, highest)] * num_prompts
    if not isinstance(priority, (list, tuple)):
        raise ArgumentError(f"priority must be a list of integers, got {shown(priority)}")
    if len(priority) != num_prompts:
        raise ArgumentError(
            f"The lengths of prompts ({num_prompts}) and priority ({len(priority)}) must be the "
            "same."
        )
    return [check_integer("priority", value, lowest, highest) for value in priority]


def as_lora_list(lora_request: Any, num_prompts: int) -> list[LoRARequest | None]:
    """The adapter of each prompt; a single one serves all, None is none."""
    if lora_request is None or isinstance(lora_request, LoRARequest):
        return [lora_request] * num_prompts
    if not isinstance(lora_request, (list, tuple)) or not all(
        item is None or isinstance(item, LoRARequest) for item in lora_request
    ):
        raise ArgumentError(
            f"lora_request must be a LoRARequest or a list of them, got {shown(lora_request)}"
        )
    if len(lora_request) != num_prompts:
        raise ArgumentError(
            f"The lengths of prompts ({num_prompts}) and lora_request ({len(lora_request)}) must "
            "be the same."
        )
    return list(lora_request)


def check_params(params: Any) -> SamplingParams:
    """A checked copy, which later changes by the caller do not reach."""
    if not isinstance(params, SamplingParams):
        raise ArgumentError(f"sampling_params must be a SamplingParams, got {_with_hint(params)}")
    checked = copy(params)
    checked.__post_init__()
    return checked


def _with_hint(params: Any) -> str:
    """A wrong value in the place of a SamplingParams, and the advice for it."""
    if isinstance(params, Mapping):
        return f"{shown(params)}; write SamplingParams(**{{...}})"
    if isinstance(params, str):
        return f"{shown(params)}; several prompts are one list: generate([...], sampling_params)"
    return shown(params)


def check_unsupported(**arguments: Any) -> None:
    """ArgumentError for the first of vLLM's arguments that is given: there is nothing behind it."""
    for name, value in arguments.items():
        if value is not None and not _is_empty(value):
            raise ArgumentError(f"{name} is not supported, got {shown(value)}")


def _is_empty(value: Any) -> bool:
    """Whether it is a dict without entries, or a list of nothing but None."""
    if isinstance(value, (list, tuple)):
        return all(item is None for item in value)
    return isinstance(value, Mapping) and not value


def check_each(name: str, check: Callable[[Item], Checked], items: Sequence[Item]) -> list[Checked]:
    """`check(item)` of each; if there are several, an ArgumentError says which: `name[index]`."""
    results = []
    for index, item in enumerate(items):
        try:
            results.append(check(item))
        except ArgumentError as error:
            if len(items) == 1:
                raise
            raise ArgumentError(f"{name}[{index}]: {error}") from error
    return results


def check_tokenization_kwargs(kwargs: Any) -> dict[str, Any]:
    """A checked copy of the keywords for `tokenizer.encode`; those that are None are left out.

    Raises:
        ArgumentError: it is no dict, a value is wrong, or a keyword is not one of
            TOKENIZATION_CHECKS: the others would not give a list of ids, or be ignored silently.
    """
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise ArgumentError(f"tokenization_kwargs must be a dict, got {shown(kwargs)}")
    checked = {}
    for name, value in kwargs.items():
        if name not in TOKENIZATION_CHECKS:
            raise ArgumentError(
                f"tokenization_kwargs: {shown(name)} is not supported; supported: "
                f"{', '.join(TOKENIZATION_CHECKS)}"
            )
        if value is not None:
            try:
                checked[name] = TOKENIZATION_CHECKS[name](name, value)
            except ArgumentError as error:
                raise ArgumentError(f"tokenization_kwargs: {error}") from None
    return checked


def encode_prompts(
    prompts: Sequence[Any],
    tokenizer: Any,
    vocab_size: int,
    tokenization_kwargs: Mapping[str, Any] | None = None,
    limits: Sequence[int | None] | None = None,
) -> list[EncodedPrompt]:
    """Text and token ids of each prompt: a string, a list of ids, or vLLM's dict with either.

    A dict with both is taken by its ids; its text is only kept. Strings are tokenized together,
    which gives what `tokenizer.encode(text, **tokenization_kwargs)` gives for each.

    Args:
        tokenizer: of transformers, or an object with its `encode`; None: strings are refused.
        limits: of each prompt, the tokens at its end that are kept; None: all.

    Raises:
        ArgumentError: a prompt is of another type, empty, or has an id outside [0, vocab_size);
            its index is named if there are several. A keyword is wrong.
    """
    kwargs = check_tokenization_kwargs(tokenization_kwargs)
    if not kwargs and _are_plain_ids(prompts, vocab_size):
        return [
            EncodedPrompt(None, list(ids) if limit is None else ids[-limit:])
            for ids, limit in zip(prompts, limits or [None] * len(prompts), strict=True)
        ]
    parts = check_each("prompts", _split_prompt, prompts)
    texts = [text for text, token_ids in parts if text is not None and token_ids is None]
    encoded = iter(_tokenize(texts, tokenizer, kwargs))
    kept = limits or [None] * len(parts)
    if kwargs.get("truncation") and any(limit is not None for limit in kept):
        raise ArgumentError(
            "truncate_prompt_tokens and tokenization_kwargs with truncation are two ways to cut a "
            "prompt: give one"
        )

    def check(part: tuple[str | None, list[int] | None, int | None]) -> EncodedPrompt:
        text, given, limit = part
        token_ids = _check_ids(next(encoded) if given is None else given, vocab_size)
        if limit is not None and len(token_ids) > limit:
            if given is None and text is not None:
                token_ids = _last_tokens(text, tokenizer, kwargs, limit)
            else:
                token_ids = token_ids[-limit:]
        return EncodedPrompt(text, token_ids)

    return check_each("prompts", check, [(*part, n) for part, n in zip(parts, kept, strict=True)])


# What marshal's version 2 writes of a list of lists of ints: a letter, and a length or an int.
MARSHALLED = np.dtype([("letter", "S1"), ("number", "<u4")])


def _are_plain_ids(prompts: Sequence[Any], vocab_size: int) -> bool:
    """Whether all prompts are lists of ints from 0 to vocab_size - 1, and none of them is empty.

    Nothing is done token by token in Python, as many prompts pass here: marshal is the fastest that
    tells types apart. False may also mean that only a closer look can tell.
    """
    for start in range(0, len(prompts), NUM_SEEN_TOGETHER):
        some = list(prompts[start : start + NUM_SEEN_TOGETHER])
        if set(map(type, some)) != {list}:
            return False
        lengths = np.array(list(map(len, some)))
        try:
            data = marshal.dumps(some, 2)
        except ValueError:  # something that it does not know
            return False
        num_written = 1 + len(some) + int(lengths.sum())
        if len(data) != num_written * MARSHALLED.itemsize or not lengths.all():
            return False
        written = np.frombuffer(data, dtype=MARSHALLED)
        # The first that is no int would begin with another letter than the one expected there.
        letters = np.full(num_written, b"i")
        letters[0] = letters[1 + np.cumsum(lengths + 1) - (lengths + 1)] = b"["
        if (written["letter"] != letters).any() or (written["number"] >= vocab_size).any():
            return False  # a negative number is a large one here
    return True


def _are_messages(prompts: Any) -> bool:
    """Whether it looks like messages for `LLM.chat`, one or a list of them."""
    if isinstance(prompts, Mapping):
        return not prompts.keys().isdisjoint(("role", "content", "messages"))
    return (
        isinstance(prompts, (list, tuple))
        and len(prompts) > 0
        and (isinstance(prompts[0], Mapping) and _are_messages(prompts[0]))
    )


def _split_prompt(prompt: Any) -> tuple[str | None, list[int] | None]:
    """A prompt's text and its ids, as far as they are given: either one, or both."""
    if isinstance(prompt, str):
        return _check_text(prompt), None
    if _are_messages(prompt):
        raise ArgumentError(f"{MESSAGES_ARE_FOR_CHAT}, got {shown(prompt)}")
    if not isinstance(prompt, Mapping):
        return None, _as_token_ids(prompt)
    given = {n: v for n, v in prompt.items() if v is not None and not _says_nothing(n, v)}
    if unknown := [
        name if isinstance(name, str) else shown(name) for name in given if name not in PROMPT_KEYS
    ]:
        raise ArgumentError(
            f"prompt has unsupported keys: {', '.join(unknown)[:MAX_SHOWN]}; a prompt dict needs "
            "'prompt' or 'prompt_token_ids'"
        )
    text, token_ids = given.get("prompt"), given.get("prompt_token_ids")
    if text is None and token_ids is None:
        raise ArgumentError(
            f"a prompt dict needs 'prompt' or 'prompt_token_ids', got {shown(dict(prompt))}"
        )
    if text is not None and not isinstance(text, str):
        raise ArgumentError(f"'prompt' of a prompt dict must be a string, got {shown(text)}")
    return (
        None if text is None else _check_text(text),
        None if token_ids is None else _as_token_ids(token_ids),
    )


def _says_nothing(name: Any, value: Any) -> bool:
    """Whether it is an entry of vLLM's prompts that is empty, or names the kind of prompt."""
    if name == "type":
        return value in ("token", "text", "tokens")
    return name not in PROMPT_KEYS and _is_empty(value)


def _check_text(text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise ArgumentError(
            f"a prompt may have {MAX_CHARACTERS} characters, got {len(text)}: {shown(text)}"
        )
    return check_unicode("prompt", text)


def _tokenize(texts: list[str], tokenizer: Any, kwargs: dict[str, Any]) -> list[list[int]]:
    """The ids of each text: all in one call of a fast tokenizer, which uses every core."""
    if not texts:
        return []
    if tokenizer is None:
        raise ArgumentError(
            "a string prompt needs the tokenizer that skip_tokenizer_init=True left out; pass "
            "'prompt_token_ids'"
        )
    try:
        if len(texts) > 1 and getattr(tokenizer, "is_fast", False):
            return tokenizer(texts, return_attention_mask=False, **kwargs)["input_ids"]
        return [_as_token_ids(tokenizer.encode(text, **kwargs)) for text in texts]
    except BaseException as error:  # of many types
        if not is_fault(error):
            raise
        raise ArgumentError(f"the tokenizer refuses the prompt: {shown_error(error)}") from error


def _last_tokens(text: str, tokenizer: Any, kwargs: dict[str, Any], limit: int) -> list[int]:
    """What transformers leaves of a text if it truncates on the left: special tokens stay."""
    side = getattr(tokenizer, "truncation_side", None)
    if side is None:  # of another library
        return _tokenize([text], tokenizer, kwargs)[0][-limit:]
    try:
        tokenizer.truncation_side = "left"
        return _tokenize([text], tokenizer, kwargs | {"truncation": True, "max_length": limit})[0]
    finally:
        tokenizer.truncation_side = side


def _check_ids(token_ids: list[int], vocab_size: int) -> list[int]:
    if not token_ids:
        raise ArgumentError("Prompt cannot be empty")
    if not _are_within(token_ids, vocab_size):
        bad = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise ArgumentError(f"token id {shown(bad)} is out of vocabulary: 0 to {vocab_size - 1}")
    return token_ids


def _are_within(token_ids: list[int], vocab_size: int) -> bool:
    """Whether all are from 0 to vocab_size - 1; half the time of `min` and `max`."""
    try:
        ids = np.frombuffer(struct.pack(f"{len(token_ids)}q", *token_ids), dtype=np.int64)
    except struct.error:  # one has more than 64 bits
        return False
    return bool(ids.min() >= 0 and ids.max() < vocab_size)


def _without_arrays(prompt: Any) -> Any:
    """An array's or tensor's lists; all else as it is, but for bytes, which are refused."""
    # Bytes are a sequence of integers, but nobody means them as token ids.
    if isinstance(prompt, (bytes, bytearray)):
        raise ArgumentError(
            f"a prompt must be a string or a list of token ids, got {shown(prompt)}"
        )
    if not hasattr(prompt, "tolist"):
        return prompt
    try:
        return prompt.tolist()
    except Exception as error:  # of many types: it has no data, or is on a device that failed
        raise ArgumentError(
            f"a prompt must be a string or a list of token ids, got {shown(prompt)}"
        ) from error


def _as_token_ids(prompt: Any) -> list[int]:
    prompt = _without_arrays(prompt)
    try:
        token_ids = list(prompt)
    except TypeError:
        raise ArgumentError(
            f"a prompt must be a string or a list of token ids, got {shown(prompt)}"
        ) from None
    if set(map(type, token_ids)) <= {int}:  # a whole night's prompts pass here: no loop in Python
        return token_ids
    for token in token_ids:
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise ArgumentError(f"a prompt's token ids must be integers, got {shown(token)}")
    return [int(token) for token in token_ids]
