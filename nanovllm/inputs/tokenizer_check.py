"""Checks a tokenizer.json before it is loaded, and that what was loaded encodes as the file says.

transformers builds some classes anew from the vocabulary alone. With a class that does not belong
to the file, spaces or digits are silently lost.
"""

import json
from collections.abc import Mapping
from typing import Any

from nanovllm.errors import ArgumentError, shown, shown_error

# The first word may get a space before it, as settings say; from the second on nothing may differ.
PROBE = "A Probe of 2 TEXTS: it's 1234567,  naïve café — 日本語 🙂\n\n\tx_y = f(z)  end\n"
MODEL = "model"  # the last key of a file as the tokenizers library writes it
MAX_GROWTH = 2**16  # of a text: a chain of replacements can grow it without end


def read_fields(text: str, path: str) -> dict[str, Any]:
    """A tokenizer.json without its model, which is nearly all of it; `path` is for the message.

    Raises:
        ArgumentError: it is damaged, or its replacements grow a text too much.
    """
    try:
        fields = _members_before_model(text)
        if not {"normalizer", "pre_tokenizer", "decoder"} <= fields.keys():
            fields = dict(json.loads(text))
            fields.pop(MODEL, None)
        growth = max(_growth(fields.get(name)) for name in ("normalizer", "decoder"))
    except (ValueError, TypeError, IndexError, RecursionError) as error:
        raise ArgumentError(f"{path} is not valid JSON: {shown_error(error)}") from error
    if growth > MAX_GROWTH:
        raise ArgumentError(
            f"{path}: its replacements make a text {shown(growth)} times as long at worst; at most "
            f"{MAX_GROWTH} times is supported"
        )
    return fields


def _members_before_model(text: str) -> dict[str, Any]:
    """The members of the JSON object `text` that come before the model."""
    decoder, fields, position = json.JSONDecoder(), {}, _skip(text, 0, "{")
    while text[position] != "}":
        name, position = decoder.raw_decode(text, position)
        if name == MODEL:
            break
        fields[name], position = decoder.raw_decode(text, _skip(text, position, ":"))
        position = _skip(text, position, ",")
    return fields


def _skip(text: str, position: int, mark: str) -> int:
    while text[position] == mark or text[position].isspace():
        position += 1
    return position


def _growth(step: Any) -> int:
    """How many times as long a normalizer or decoder makes a text at most, by replacements."""
    if not isinstance(step, Mapping):
        return 1
    growth = 1
    for name in ("normalizers", "decoders"):
        for part in step.get(name) or ():
            growth *= _growth(part)
    if step.get("type") == "Replace":
        pattern, content = step.get("pattern"), step.get("content")
        found = pattern.get("String") if isinstance(pattern, Mapping) else None
        length = len(content) if isinstance(content, str) else 0
        growth *= max(
            1, -(-length // len(found)) if isinstance(found, str) and found else length + 1
        )
    return growth


def check_agreement(tokenizer: Any, fields: Mapping[str, Any], path: str) -> None:
    """ArgumentError if `tokenizer`, of transformers, does not encode as tokenizer.json says.

    Args:
        tokenizer: what was loaded.
        fields: of `read_fields`.
        path: the file's path, for the message.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    probe = _without_added_tokens(tokenizer, fields)
    if backend is None or not probe:
        return
    pieces = _pieces(probe, fields)
    ids = [[token.id for token in backend.model.tokenize(piece)] for piece in pieces]
    expected = [token_id for piece in ids for token_id in piece]
    num_first = len(ids[0]) if len(ids) > 1 else len(expected) // 2  # a text that is not split
    found = tokenizer.encode(probe, add_special_tokens=False)
    num_same = len(expected) - num_first
    if num_same and found[-num_same:] != expected[num_first:]:
        raise ArgumentError(
            f"{path} and the class {type(tokenizer).__name__} that transformers made of it encode "
            f"{shown(probe)} differently, to {len(expected)} and {len(found)} tokens; update "
            "transformers, or give the tokenizer itself: "
            "tokenizer=PreTrainedTokenizerFast(tokenizer_file=...)"
        )


def _without_added_tokens(tokenizer: Any, fields: Mapping[str, Any]) -> str:
    """The probe, or what is left of it: added tokens are found before a text is split."""
    listed = fields.get("added_tokens") or []
    added = {token["content"] for token in listed} | tokenizer.get_added_vocab().keys()
    probe = PROBE
    for content in sorted(filter(None, added), key=len, reverse=True):
        probe = probe.replace(content, "")
    return "" if any(content in probe for content in added) else probe


def _pieces(text: str, fields: Mapping[str, Any]) -> list[str]:
    """`text` as it reaches the model of a tokenizer.json: normalized, and split."""
    from tokenizers import Tokenizer

    replaced: dict[str, Any] = {
        "added_tokens": [],
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "decoder": None,
        MODEL: {"type": "BPE", "vocab": {}, "merges": []},
    }
    tokenizer = Tokenizer.from_str(json.dumps({**fields, **replaced}))
    normalizer, pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    normalized = normalizer.normalize_str(text) if normalizer else text
    if pre_tokenizer is None:
        return [normalized]
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(normalized)]
