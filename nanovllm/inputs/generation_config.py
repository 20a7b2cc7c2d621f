"""Reads a model's generation_config.json: default sampling parameters and ids that end."""

import os
from collections.abc import Mapping
from typing import Any

from nanovllm.errors import ArgumentError, shown
from nanovllm.model_files import is_file, read_json_object
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import check_bool

# Its sampling parameters by our names; all else in the file is not ours.
SAMPLING_KEYS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def default_sampling_params(
    model_dir: str, generation_config: str = "auto", override: Mapping[str, Any] | None = None
) -> SamplingParams:
    """The parameters of a request for which none are given, a new object at each call.

    `do_sample: false` is greedy, as in transformers; where it is absent the file's `temperature`
    decides, else 1.0, as in vLLM.

    Args:
        model_dir: the model's directory; a missing generation_config.json says nothing.
        generation_config: "auto": the file in `model_dir`; "vllm": none; else the path of another
            directory that holds one.
        override: keys of a generation_config.json that win over the file's.

    Raises:
        ArgumentError: a value is wrong, naming the file and the value; `override` has an unknown
            key; the other directory has no such file.
    """
    values: dict[str, Any] = {}
    if generation_config != "vllm":
        path = _path(model_dir, generation_config)
        values = _sampling_values(_read(path), path)
    if override is not None:
        values |= _override_values(override)
    return SamplingParams(**values)


def eos_token_ids(
    model_dir: str, tokenizer: Any, generation_config: str = "auto", fallback: Any = None
) -> frozenset[int]:
    """Ids that end a completion: the tokenizer's, and those of the generation config.

    Without a generation_config.json that is made of config.json, as in transformers.

    Args:
        model_dir: the model's directory.
        tokenizer: one with `eos_token_id`, or None.
        generation_config: as in `default_sampling_params`, but "vllm" reads `model_dir`'s as well.
        fallback: config.json's eos_token_id (an id, a list of them or None). It also counts where
            there is a generation_config.json, but neither that nor the tokenizer names any.

    Raises:
        ArgumentError: the file is damaged or its ids are not integers.
    """
    path = _path(model_dir, generation_config)
    of_config = _as_ids(fallback, "config.json")
    of_tokenizer = _as_ids(getattr(tokenizer, "eos_token_id", None), "tokenizer")
    listed = _as_ids(_read(path).get("eos_token_id"), path) if is_file(path) else of_config
    return frozenset([*of_tokenizer, *listed] or of_config)


def _as_ids(listed: Any, source: str) -> list[int]:
    """An id, a list of them or None as a list without None."""
    ids = listed if isinstance(listed, list) else [listed]
    if not all(token_id is None or type(token_id) is int for token_id in ids):
        raise ArgumentError(f"{source}: eos_token_id must be integers, got {shown(ids)}")
    return [token_id for token_id in ids if token_id is not None]


def _path(model_dir: str, generation_config: str) -> str:
    if generation_config in ("auto", "vllm"):
        return os.path.join(model_dir, "generation_config.json")
    try:
        path = os.path.join(generation_config, "generation_config.json")
    except TypeError:
        path = ""
    if not path or not is_file(path):
        raise ArgumentError(
            'generation_config must be "auto", "vllm" or the path of a directory with a '
            f"generation_config.json, got {shown(generation_config)}"
        )
    return path


def _read(path: str) -> dict[str, Any]:
    """The file's object; {} if there is no file."""
    return read_json_object(path) if is_file(path) else {}


def _override_values(override: Any) -> dict[str, Any]:
    known = [*SAMPLING_KEYS, "do_sample"]
    unknown = override.keys() - set(known) if isinstance(override, Mapping) else {}
    if unknown or not isinstance(override, Mapping):
        raise ArgumentError(
            f"override_generation_config must be a dict with keys out of {', '.join(known)}, "
            f"got {shown(override)}"
        )
    return _sampling_values(override, "override_generation_config")


def _sampling_values(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The keywords of SamplingParams that `content` gives; ArgumentError names `source`."""
    values = {
        name: content[key] for key, name in SAMPLING_KEYS.items() if content.get(key) is not None
    }
    if isinstance(values.get("top_k"), float) and values["top_k"].is_integer():
        values["top_k"] = int(values["top_k"])  # as some files write it
    try:
        if content.get("do_sample") is not None and not check_bool(
            "do_sample", content["do_sample"]
        ):
            values["temperature"] = 0.0
        SamplingParams(**values)
    except ArgumentError as error:
        raise ArgumentError(f"{source}: {error}") from None
    return values
