"""Copies of a tokenizer's files for transformers, each of which was read and checked once.

transformers reads a directory's files several times, takes any key of tokenizer_config.json as an
argument, and asks on stdin whether to run code that config.json names. So it gets a directory of
its own, in which nothing names code, other files or other directories.
"""

import fnmatch
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovllm.errors import ArgumentError, shown
from nanovllm.inputs.plain_tokenizer import CLASSES
from nanovllm.model_files import (
    MAX_TEMPLATE_BYTES,
    MAX_VOCABULARY_BYTES,
    is_file,
    list_directory,
    read_bytes,
    read_json_object,
    read_text,
)

TOKENIZER_JSON = "tokenizer.json"
VOCABULARIES = (
    TOKENIZER_JSON,
    "tokenizer.model",
    "tekken.json",
    "tiktoken.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
TOKENIZER_FILES = (  # all of them, as patterns
    *VOCABULARIES,
    SETTINGS,
    SPECIAL_TOKENS,
    ADDED_TOKENS,
    TEMPLATE,
    f"{MORE_TEMPLATES}/*.jinja",
)
MAX_TOKEN_ID = 2**22  # some tokenizers count up to the largest
# Keys of tokenizer_config.json that would be arguments which say where and how to load.
LEFT_OUT = frozenset(
    """auto_map backend_tokenizer cache_dir code_revision config force_download from_slow
    init_inputs is_local local_files_only merges mistral_format name_or_path post_processor proxies
    revision subfolder token tokenizer_object tokenizer_padding tokenizer_truncation tokenizer_type
    trust_remote_code use_fast vocab""".split()
)
LEFT_OUT_PATTERNS = ("_*", "*_file", "*_files")
SPECIAL_TOKEN_PATTERNS = ("*_token", "additional_special_tokens", "extra_special_tokens")


def has_vocabulary(source: str) -> bool:
    """Whether a directory holds a tokenizer."""
    return any(is_file(os.path.join(source, name)) for name in VOCABULARIES)


def copy_files(
    source: str, target: str, model_config: Mapping[str, Any], trust_remote_code: bool
) -> None:
    """Copy the tokenizer of directory `source`, checked, into the empty directory `target`.

    Args:
        source: the directory.
        target: the copies'.
        model_config: what config.json holds in `target`; there is none if it is empty.
        trust_remote_code: whether the settings may name code.

    Raises:
        ArgumentError: a file cannot be read, is too large, is damaged or names code to be run.
    """
    settings = _object(source, SETTINGS)
    if not trust_remote_code:
        _check_class(model_config, os.path.join(source, "config.json"))
        _check_class(settings, os.path.join(source, SETTINGS))
    if len(json.dumps(settings.get("chat_template"))) > MAX_TEMPLATE_BYTES:
        raise ArgumentError(
            f"{os.path.join(source, SETTINGS)}: chat_template has more than {MAX_TEMPLATE_BYTES} "
            "bytes"
        )
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        _check_token_ids(decoder.keys(), os.path.join(source, SETTINGS))
    added = _object(source, ADDED_TOKENS)
    _check_token_ids(added.values(), os.path.join(source, ADDED_TOKENS))
    special = _object(source, SPECIAL_TOKENS)
    settings = {
        name: value
        for name, value in settings.items()
        if name not in LEFT_OUT and not _matches(name, LEFT_OUT_PATTERNS)
    }
    special = {
        name: value for name, value in special.items() if _matches(name, SPECIAL_TOKEN_PATTERNS)
    }
    for name, content in (
        ("config.json", model_config),
        (SETTINGS, settings),
        (SPECIAL_TOKENS, special),
        (ADDED_TOKENS, added),
    ):
        if content:
            _write(target, name, json.dumps(content).encode())
    for name in VOCABULARIES:
        path = os.path.join(source, name)
        if is_file(path):
            _write(target, name, read_bytes(path, MAX_VOCABULARY_BYTES))
    room = MAX_TEMPLATE_BYTES  # for all of them
    for name in _templates(source):
        template = read_text(os.path.join(source, name), room).encode()
        room -= len(template)
        _write(target, name, template)


def read_copies(target: str) -> dict[str, bytes]:
    """The contents of all files that `copy_files` wrote into a directory, by their names."""
    names = [
        os.path.relpath(os.path.join(folder, name), target)
        for folder, _, files in os.walk(target)
        for name in files
    ]
    return {name: Path(target, name).read_bytes() for name in names}


def write_copies(files: Mapping[str, bytes], target: str) -> None:
    """Write what `read_copies` gave into the empty directory `target`."""
    for name, content in files.items():
        _write(target, name, content)


def _object(source: str, name: str) -> dict[str, Any]:
    """The file's JSON object; {} if there is none."""
    path = os.path.join(source, name)
    return read_json_object(path) if is_file(path) else {}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_class(settings: Mapping[str, Any], path: str) -> None:
    """ArgumentError if the settings name a class that is no tokenizer, or that a file brings."""
    name = settings.get("tokenizer_class")
    if (name is None and not settings.get("auto_map")) or (
        isinstance(name, str) and name in CLASSES
    ):
        return
    import transformers
    from transformers.utils import DummyObject

    if name is not None and (not isinstance(name, str) or not name.isidentifier()):
        raise ArgumentError(f"{path}: tokenizer_class must be a name, got {shown(name)}")
    found = None
    for spelling in (name, name.removesuffix("Fast")) if name else ():
        found = found or getattr(transformers, spelling, None)
    base = transformers.PreTrainedTokenizerBase
    is_tokenizer = isinstance(found, type) and issubclass(found, base)
    # What lacks a package is a stand-in, whose error names the package.
    if found is not None and not is_tokenizer and not isinstance(found, DummyObject):
        raise ArgumentError(f"{path}: tokenizer_class {shown(name)} is no tokenizer")
    if not is_tokenizer and settings.get("auto_map"):
        raise ArgumentError(
            f"{path}: auto_map names Python code of the directory, {shown(settings['auto_map'])}; "
            "trust_remote_code=True runs it"
        )


def _check_token_ids(token_ids: Any, path: str) -> None:
    for token_id in token_ids:
        number = str(token_id) if type(token_id) in (str, int) else ""
        if not (number.isascii() and number.isdecimal() and int(number[:9]) <= MAX_TOKEN_ID):
            raise ArgumentError(
                f"{path}: the id of an added token must be between 0 and {MAX_TOKEN_ID}, got "
                f"{shown(token_id)}"
            )


def _templates(source: str) -> list[str]:
    """The names of the files with chat templates."""
    names = [TEMPLATE] if is_file(os.path.join(source, TEMPLATE)) else []
    folder = os.path.join(source, MORE_TEMPLATES)
    if os.path.isdir(folder):
        for name in list_directory(folder):
            if name.endswith(".jinja") and is_file(os.path.join(folder, name)):
                names.append(os.path.join(MORE_TEMPLATES, name))
    return names


def _write(target: str, name: str, content: bytes) -> None:
    path = os.path.join(target, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
