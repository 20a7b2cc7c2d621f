"""The lines of the output: a result in the shape of OpenAI's batch results, or an error."""

import itertools
import json
import math
import time
from dataclasses import dataclass, field
from typing import Any

from nanovllm.inputs.detokenizer import token_offsets
from nanovllm.inputs.token_bytes import token_bytes
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.sampling_params import SamplingParams

Rows = list[tuple[int, dict[int, Logprob]]]  # each sampled token with the entries of its position
MIN_LOGPROB = -9999.0  # in place of -inf, which JSON does not have; NaN is null


@dataclass
class LineInfo:
    """The part of a line's record that comes from the line itself.

    Attributes:
        record_id: the record's id; those of completions are made of its last part.
        line: number of the input line, from 1.
        custom_id: None if the line has no usable one.
        params: the request's.
        is_chat: choices have a message instead of a text.
        return_token_ids: choices have token_ids, and the body prompt_token_ids.
    """

    record_id: str
    line: int
    custom_id: str | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    is_chat: bool = False
    return_token_ids: bool = False


def result_record(
    info: LineInfo, output: RequestOutput, model: str, tokenizer: Any = None
) -> dict[str, Any]:
    """The record of a completed line.

    Args:
        model: the name in the record's body.
        tokenizer: the engine's, for the bytes and offsets of tokens; None: from their texts.
    """
    suffix = info.record_id.rpartition("_")[2]
    num_prompt = len(output.prompt_token_ids)
    num_completion = sum(len(completion.token_ids) for completion in output.outputs)
    body: dict[str, Any] = {
        "id": f"{'chatcmpl' if info.is_chat else 'cmpl'}-{suffix}",
        "object": "chat.completion" if info.is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(info, output, completion, tokenizer) for completion in output.outputs],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
        },
    }
    if info.return_token_ids:
        body["prompt_token_ids"] = output.prompt_token_ids
    if output.prompt_logprobs is not None:
        body["prompt_logprobs"] = [_candidates(items) for items in output.prompt_logprobs]
    response = {"status_code": 200, "request_id": suffix, "body": body}
    return _record(info, response=response, error=None)


def error_record(info: LineInfo, code: str, message: str) -> dict[str, Any]:
    """The record of a line that cannot be run."""
    return _record(info, response=None, error={"code": code, "message": message})


def _record(info: LineInfo, **rest: Any) -> dict[str, Any]:
    return {"id": info.record_id, "line": info.line, "custom_id": info.custom_id, **rest}


def encode(record: dict[str, Any]) -> bytes:
    """The record as one line of UTF-8; what UTF-8 cannot hold, lone surrogates, is escaped."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _choice(
    info: LineInfo, output: RequestOutput, completion: CompletionOutput, tokenizer: Any
) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": completion.index}
    if info.is_chat:
        choice["message"] = {"role": "assistant", "content": completion.text}
    else:
        choice["text"] = completion.text
    choice["logprobs"] = None
    if completion.logprobs is not None:
        rows = list(zip(completion.token_ids, completion.logprobs, strict=True))
        params = info.params
        num_top = -1 if params.logprob_token_ids else params.logprobs
        names = TokenNames(tokenizer if info.params.detokenize else None)
        if info.is_chat:
            choice["logprobs"] = _chat_logprobs(rows, num_top, names)
        else:
            offsets = _offsets(info, output, completion, rows, names)
            choice["logprobs"] = _text_logprobs(rows, num_top, names, offsets)
    choice["finish_reason"] = completion.finish_reason
    choice["stop_reason"] = completion.stop_reason
    if info.return_token_ids:
        choice["token_ids"] = completion.token_ids
    return choice


class TokenNames:
    """How the forms of OpenAI write a token.

    Args:
        tokenizer: None: only the decoded text of a token is known.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._table = None if tokenizer is None else token_bytes(tokenizer)

    def data(self, token_id: int, logprob: Logprob) -> bytes | None:
        """The token's bytes; None for a part of a character of a tokenizer of no known kind."""
        if self._table is not None:
            return self._table[token_id]
        text = self.text(token_id, logprob)
        return None if "\ufffd" in text else text.encode("utf-8", "surrogatepass")

    def text(self, token_id: int, logprob: Logprob) -> str:
        """Its text, in which U+FFFD stands for a part of a character."""
        text = logprob.decoded_token
        return f"token_id:{token_id}" if text is None else text

    def unique(self, token_id: int, logprob: Logprob) -> str:
        r"""Its text; of a part of a character its bytes, as in `bytes:\xf0\x9f`."""
        if self._table is not None and "\ufffd" in self.text(token_id, logprob):
            data = self._table[token_id]
            try:
                data.decode()
            except UnicodeDecodeError:
                return f"bytes:{repr(data)[2:-1]}"
        return self.text(token_id, logprob)


def _chat_logprobs(rows: Rows, num_top: int | None, names: TokenNames) -> dict[str, Any]:
    content = []
    for token_id, items in rows:
        ranked = sorted(items.items(), key=lambda item: -item[1].logprob)
        entry = _chat_token(token_id, items[token_id], names)
        top = ranked if num_top == -1 else ranked[:num_top]
        entry["top_logprobs"] = [_chat_token(key, value, names) for key, value in top]
        content.append(entry)
    return {"content": content}


def _chat_token(token_id: int, logprob: Logprob, names: TokenNames) -> dict[str, Any]:
    data = names.data(token_id, logprob)
    return {
        "token": names.text(token_id, logprob),
        "logprob": _finite(logprob.logprob),
        "bytes": None if data is None else list(data),
    }


def _text_logprobs(
    rows: Rows, num_top: int | None, names: TokenNames, offsets: list[int]
) -> dict[str, Any]:
    return {
        "tokens": [names.unique(token_id, items[token_id]) for token_id, items in rows],
        "token_logprobs": [_finite(items[token_id].logprob) for token_id, items in rows],
        "top_logprobs": None if num_top == 0 else [_top(items, names) for _, items in rows],
        "text_offset": offsets,
    }


def _top(items: dict[int, Logprob], names: TokenNames) -> dict[str, float | None]:
    """The form has one place for each text: of tokens that share one the more probable has it."""
    best: dict[str, float] = {}
    for token_id, value in items.items():
        name = names.unique(token_id, value)
        if name in best and "\ufffd" in name:  # parts of characters, maybe of different ones
            name = f"token_id:{token_id}"
        if name not in best or value.logprob > best[name]:
            best[name] = value.logprob
    return {name: _finite(logprob) for name, logprob in best.items()}


def _offsets(
    info: LineInfo,
    output: RequestOutput,
    completion: CompletionOutput,
    rows: Rows,
    names: TokenNames,
) -> list[int]:
    """Where each token begins in the text; at its end if a stop string has cut the token off."""
    if names.tokenizer is None:
        lengths = (len(names.text(token_id, items[token_id])) for token_id, items in rows)
        offsets = [0, *itertools.accumulate(lengths)][: len(rows)]
    else:
        offsets = token_offsets(
            names.tokenizer, completion.token_ids, info.params, output.prompt_token_ids
        )
    return [min(offset, len(completion.text)) for offset in offsets]


def _candidates(items: dict[int, Logprob] | None) -> dict[str, Any] | None:
    """One prompt position, as in `prompt_logprobs`; None for the first, which has none."""
    if not items:
        return None
    return {
        str(token_id): {
            "logprob": _finite(value.logprob),
            "rank": value.rank,
            "decoded_token": value.decoded_token,
        }
        for token_id, value in items.items()
    }


def _finite(logprob: float) -> float | None:
    return None if math.isnan(logprob) else max(logprob, MIN_LOGPROB)
