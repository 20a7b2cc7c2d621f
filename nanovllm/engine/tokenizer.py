"""Loads the tokenizer and reads chat templates: before any weight is read or process started."""

import os
from typing import Any

from nanovllm.config import Config
from nanovllm.errors import ArgumentError


def load_tokenizer(config: Config) -> Any:
    """The engine's tokenizer: that of the model, or what `config.tokenizer` names or is.

    The chat template of `config` is replaced by its text.

    Returns:
        None with `skip_tokenizer_init`; else what transformers loads, or the object given.

    Raises:
        ArgumentError: there is none, it cannot be loaded, or the chat template cannot be read.
    """
    if config.chat_template is not None:
        config.chat_template = read_chat_template(config.chat_template)
    given = config.tokenizer
    is_object = given is not None and not isinstance(given, (str, os.PathLike))
    if is_object and not all(callable(getattr(given, name, None)) for name in ("encode", "decode")):
        raise ArgumentError(
            "tokenizer must be the path of a directory, or an object with encode and decode, "
            f"got {given!r}"
        )
    if config.skip_tokenizer_init:
        return None
    if is_object:
        return given
    if given is None:
        return _load(config.model, "model", config.trust_remote_code)
    path = os.fspath(given)
    if not os.path.isdir(path):
        raise ArgumentError(
            f"tokenizer must be an existing local directory, got {path!r} (nothing is downloaded, "
            "and '~' is not expanded: use os.path.expanduser)"
        )
    return _load(path, "tokenizer", config.trust_remote_code)


def _load(path: str, kind: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # of many types
        raise ArgumentError(f"cannot load the tokenizer of {path!r}: {error}") from error
    if len(tokenizer) <= 1:  # transformers makes up an empty one where the files are missing
        raise ArgumentError(f"{kind} directory {path!r} holds no tokenizer")
    return tokenizer


def read_chat_template(template: Any) -> str:
    """The text of a Jinja template: a string that is none is the path of a file that holds it.

    Raises:
        ArgumentError: it is neither, or the file cannot be read.
    """
    if not isinstance(template, (str, os.PathLike)):
        raise ArgumentError(f"chat_template must be a template or a path, got {template!r}")
    if isinstance(template, str) and not {"{", "}", "\n"}.isdisjoint(template):
        return template
    path = os.fspath(template)
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"chat_template {path!r} is no Jinja template, and no file that can be read: {error}"
        ) from error
