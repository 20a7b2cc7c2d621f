"""One line of the input: what it asks for, in OpenAI's form or the short one.

{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {"messages": ...}}
{"custom_id": ..., "prompt": ..., "temperature": 0.5} or with "sampling_params": {...}
"""

import codecs
import hashlib
import json
import math
import re
import reprlib
from collections import Counter
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from nanovllm.compat import SAMPLING_HINTS
from nanovllm.compat import SAMPLING_NAMES as FOREIGN_NAMES
from nanovllm.errors import ArgumentError, nearest
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams
from nanovllm.validation import check_bool, check_integer

KIND_OF_URL = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
CHAT_OPTIONS = (
    *("tools", "chat_template_kwargs", "chat_template_content_format"),
    *("add_generation_prompt", "continue_final_message"),
)
SAMPLING_NAMES = tuple(f.name for f in fields(SamplingParams))
OPENAI_NAMES = ("max_completion_tokens", "response_format", "top_logprobs")
WITHOUT_EFFECT = ("model", "user", "metadata")  # in every OpenAI request, and no concern of ours
ONLY_FALSE = ("stream", "echo")
STRUCTURED = re.compile(r"StructuredOutputsParams\((\w+)=.*\)")  # in a hint for scripts


class LineError(ArgumentError):
    """A line that cannot be run; `code` goes to the error record."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class LineRequest:
    """A line's request; one of `prompt` and `messages` is None."""

    prompt: Any
    messages: Any
    chat_options: dict[str, Any]
    params: SamplingParams
    return_token_ids: bool


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object that the line holds.

    What Python's parser would read as something else is refused: a key that is given twice, NaN and
    Infinity, a number that a float cannot hold, an encoding other than UTF-8.
    """
    try:
        record = json.loads(
            line.removeprefix(codecs.BOM_UTF8).decode(),
            object_pairs_hook=_object,
            parse_float=_float,
            parse_constant=_refuse_constant,
        )
    except LineError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        reason = error if isinstance(error, ValueError) else type(error).__name__
        raise LineError("invalid_json", f"the line is not valid JSON: {reason}") from None
    if not isinstance(record, dict):
        raise LineError("invalid_json", f"the line must be a JSON object, got {_short(record)}")
    return record


def custom_id_of(record: dict[str, Any]) -> str:
    """The line's custom_id."""
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise ArgumentError(f"custom_id must be a string, not empty, got {_short(custom_id)}")
    return custom_id


def as_request(
    record: dict[str, Any], defaults: dict[str, Any], return_token_ids: bool, seed: int
) -> LineRequest:
    """The request of a parsed line.

    A parameter that is null is as if it were not given, but for `max_tokens`.

    Args:
        defaults: sampling parameters that the line does not set.
        return_token_ids: default of the line's own.
        seed: of a request without one.

    Raises:
        ArgumentError: an unknown key, or a wrong value, by name.
    """
    body = _body_of(record)
    sampling = _sampling_values(body)
    if sampling.get("seed", -1) == -1:  # None and -1 are vLLM's "no seed"
        sampling["seed"] = seed
    own_return = body.get("return_token_ids")
    return LineRequest(
        prompt=body.get("prompt"),
        messages=body.get("messages"),
        chat_options={name: body[name] for name in CHAT_OPTIONS if name in body},
        params=SamplingParams(**(defaults | sampling)),
        return_token_ids=return_token_ids
        if own_return is None
        else check_bool("return_token_ids", own_return),
    )


def structured_outputs(values: dict[str, Any]) -> StructuredOutputsParams:
    """A JSON object's `StructuredOutputsParams`; ArgumentError for an unknown key."""
    known = [f.name for f in fields(StructuredOutputsParams)]
    for name in values:
        if name not in known:
            raise ArgumentError(
                f"structured_outputs has no {name[:100]!r}; it has {', '.join(known)}"
            )
    return StructuredOutputsParams(**values)


def seed_of_line(seed: int, number: int) -> int:
    """62 bits for line `number` of a run with `seed`, whatever order the lines run in."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise LineError("invalid_json", f"the line has the key {_short(twice)} twice in one object")
    return values


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise LineError("invalid_json", f"the line has a number beyond a float: {text[:100]}")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise LineError("invalid_json", f"the line has {name}, which is not JSON")


def _body_of(record: dict[str, Any]) -> dict[str, Any]:
    """Prompt or messages, and the parameters, in one dict whose keys are all known."""
    record = _given(record)
    url = None
    if "body" in record:
        _check_names(record, ("custom_id", "method", "url", "body"))
        body = record["body"]
        url = record.get("url")
        if not isinstance(body, dict):
            raise ArgumentError(f"body must be an object, got {_short(body)}")
        body = _given(body)
        if record.get("method", "POST") != "POST":
            raise ArgumentError(f"method must be 'POST', got {_short(record['method'])}")
        if url is not None and url not in tuple(KIND_OF_URL):
            raise ArgumentError(f"url must be one of {', '.join(KIND_OF_URL)}, got {_short(url)}")
    else:
        body = {name: value for name, value in record.items() if name != "custom_id"}
        nested = body.pop("sampling_params", {})
        if not isinstance(nested, dict):
            raise ArgumentError(f"sampling_params must be an object, got {_short(nested)}")
        nested = _given(nested)
        _check_names(nested, SAMPLING_NAMES)
        twice = sorted(nested.keys() & body.keys())
        if twice:
            raise ArgumentError(f"{twice[0]} is given twice, beside and in sampling_params")
        body |= nested
    kinds = [name for name in ("prompt", "messages") if name in body]
    if len(kinds) != 1:
        raise ArgumentError(
            f"a line needs one of 'prompt' and 'messages', got {' and '.join(kinds) or 'neither'}"
        )
    [kind] = kinds
    if url is not None and kind != KIND_OF_URL[url]:
        raise ArgumentError(f"{url} needs {KIND_OF_URL[url]!r}, got {kind!r}")
    named = ("prompt", "return_token_ids", *SAMPLING_NAMES, *OPENAI_NAMES, *WITHOUT_EFFECT)
    chat_names = ("messages", *CHAT_OPTIONS) if kind == "messages" else ()
    _check_names(body, (*named, *ONLY_FALSE, *chat_names))
    for name in ONLY_FALSE:
        if body.get(name):
            raise ArgumentError(f"{name} is not available, got {_short(body[name])}")
    return body


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is null, but for `max_tokens`, which null sets to as many as fit."""
    return {
        name: value for name, value in values.items() if value is not None or name == "max_tokens"
    }


def _sampling_values(body: dict[str, Any]) -> dict[str, Any]:
    """The arguments of SamplingParams that a body sets, OpenAI's own names translated."""
    values = {name: body[name] for name in SAMPLING_NAMES if name in body}
    limit = body.get("max_completion_tokens")
    if limit is not None:
        if values.get("max_tokens", limit) not in (limit, None):
            raise ArgumentError("max_tokens and max_completion_tokens are both given and differ")
        values["max_tokens"] = limit
    num_top = body.get("top_logprobs")
    if isinstance(values.get("logprobs"), bool):
        if values["logprobs"]:
            values["logprobs"] = 0 if num_top is None else check_integer("top_logprobs", num_top, 0)
            num_top = None
        else:
            values["logprobs"] = None
    if num_top is not None:
        raise ArgumentError(f"top_logprobs needs logprobs=true, got {_short(num_top)} without")
    if isinstance(values.get("structured_outputs"), dict):
        values["structured_outputs"] = structured_outputs(values["structured_outputs"])
    constraint = _constraint_of(body.get("response_format"))
    if constraint:
        if "structured_outputs" in values:
            raise ArgumentError("response_format and structured_outputs are both given")
        values["structured_outputs"] = structured_outputs(constraint)
    return values


def _constraint_of(response_format: Any) -> dict[str, Any] | None:
    """OpenAI's response_format as arguments of StructuredOutputsParams; None: any text."""
    kind = response_format.get("type") if isinstance(response_format, dict) else response_format
    if kind is None or kind == "text":
        return None
    if kind == "json_object" and isinstance(response_format, dict):
        return {"json_object": True}
    if kind == "json_schema" and isinstance(response_format, dict):
        wrapper = response_format.get("json_schema")
        if isinstance(wrapper, dict) and isinstance(wrapper.get("schema"), dict):
            return {"json": wrapper["schema"]}
    raise ArgumentError(
        "response_format must be an object of type text, json_object or json_schema (with "
        f"json_schema.schema), got {_short(response_format)}"
    )


def _check_names(values: dict[str, Any], known: tuple[str, ...]) -> None:
    for name, value in values.items():
        if name not in known and value is not None:
            guess = FOREIGN_NAMES.get(name.lower()) or nearest(name[:100], known)
            hint = f"; the nearest known: {guess}" if guess in known else _foreign_hint(name)
            raise ArgumentError(f"unknown parameter {_short(name)}{hint}")


def _foreign_hint(name: str) -> str:
    """The hint at another library's parameter, as far as a line can hold what it advises."""
    hint = SAMPLING_HINTS.get(name.lower(), "")
    if not hint or "llm." in hint or "goes to" in hint:
        return ""
    return ": " + STRUCTURED.sub(r'{"\1": ...}', hint)


def _short(value: Any) -> str:
    text = _REPR.repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


_REPR = reprlib.Repr()  # works on a value of any size and depth
_REPR.maxstring = _REPR.maxother = 110
