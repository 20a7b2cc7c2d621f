"""Turns what users pass as prompts and sampling parameters into checked ones."""

from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

from nanovllm.errors import ArgumentError
from nanovllm.sampling_params import SamplingParams


def as_prompt_list(prompts: Any) -> list[Any]:
    """The prompts as a list; a bare string, dict or list of token ids is one prompt."""
    prompts = _without_arrays(prompts)
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    try:
        prompts = list(prompts)
    except TypeError:
        raise ArgumentError(f"prompts must be a list of prompts, got {prompts!r}") from None
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
            f"sampling_params must be a SamplingParams or a list of them, got {sampling_params!r}"
        )
    if len(sampling_params) != num_prompts:
        raise ArgumentError(
            f"The lengths of prompts ({num_prompts}) and params ({len(sampling_params)}) "
            "must be the same."
        )
    return list(sampling_params)


def check_params(params: Any) -> SamplingParams:
    """A checked copy, which later changes by the caller do not reach."""
    if not isinstance(params, SamplingParams):
        raise ArgumentError(f"sampling_params must be a SamplingParams, got {params!r}")
    return replace(params)


def encode_prompt(prompt: Any, tokenizer: Any, vocab_size: int) -> list[int]:
    """The token ids of one prompt: a string, a list of ids, or vLLM's dict with either.

    Raises:
        ArgumentError: it is of another type, empty, or has an id outside [0, vocab_size).
    """
    if isinstance(prompt, Mapping):
        prompt = _from_dict(prompt)
    if isinstance(prompt, str):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ArgumentError(f"prompt is not valid Unicode: {error}") from None
        token_ids = tokenizer.encode(prompt)
    else:
        token_ids = _as_token_ids(prompt)
    if not token_ids:
        raise ArgumentError("Prompt cannot be empty")
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        bad = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise ArgumentError(f"token id {bad} is out of the vocabulary: 0 to {vocab_size - 1}")
    return token_ids


def _from_dict(prompt: Mapping[str, Any]) -> Any:
    for key in ("prompt_token_ids", "prompt"):
        if prompt.get(key) is not None:
            unknown = [name for name in prompt if name not in ("prompt_token_ids", "prompt")]
            if unknown:
                raise ArgumentError(f"prompt has unsupported keys: {', '.join(map(str, unknown))}")
            return prompt[key]
    raise ArgumentError(f"a prompt dict needs 'prompt' or 'prompt_token_ids', got {dict(prompt)!r}")


def _without_arrays(prompt: Any) -> Any:
    """An array's or tensor's lists; all else as it is, but for bytes, which are refused."""
    # Bytes are a sequence of integers, but nobody means them as token ids.
    if isinstance(prompt, (bytes, bytearray)):
        raise ArgumentError(f"a prompt must be a string or a list of token ids, got {prompt!r}")
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt


def _as_token_ids(prompt: Any) -> list[int]:
    prompt = _without_arrays(prompt)
    try:
        token_ids = list(prompt)
    except TypeError:
        raise ArgumentError(
            f"a prompt must be a string or a list of token ids, got {prompt!r}"
        ) from None
    if set(map(type, token_ids)) <= {int}:  # a whole night's prompts pass here: no loop in Python
        return token_ids
    for token in token_ids:
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise ArgumentError(f"a prompt's token ids must be integers, got {token!r}")
    return [int(token) for token in token_ids]
