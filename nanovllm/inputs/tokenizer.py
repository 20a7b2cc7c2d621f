"""Loads the tokenizer: before any weight is read or process started."""

import json
import os
import tempfile
from typing import Any, Protocol

from nanovllm.config import Config
from nanovllm.errors import ArgumentError, cut, shown
from nanovllm.inputs.plain_tokenizer import PlainTokenizer, plain_backend, special_tokens
from nanovllm.inputs.tokenizer_check import PROBE, check_agreement, read_fields
from nanovllm.inputs.tokenizer_files import (
    ADDED_TOKENS,
    SETTINGS,
    SPECIAL_TOKENS,
    TOKENIZER_JSON,
    copy_files,
    has_vocabulary,
    read_copies,
    write_copies,
)
from nanovllm.model_files import MAX_VOCABULARY_BYTES, is_file, read_json_object, read_text
from nanovllm.models.hf_config import why_no_directory
from nanovllm.models.hub import Repository, directory_of, downloads, is_name


class Tokenizer(Protocol):
    """A tokenizer of transformers, or what `LLM(..., tokenizer=...)` takes for one."""

    def __len__(self) -> int:
        """The number of its tokens."""


def load_tokenizer(config: Config) -> Any:
    """The engine's tokenizer: that of the model, or what `config.tokenizer` names or is.

    Returns:
        None with `skip_tokenizer_init`; else what transformers loads, a `PlainTokenizer` in its
        place, or the object given.

    Raises:
        ArgumentError: there is none, or it cannot be loaded.
    """
    given = config.tokenizer
    is_object = given is not None and not isinstance(given, (str, os.PathLike))
    if is_object and not all(callable(getattr(given, name, None)) for name in ("encode", "decode")):
        raise ArgumentError(
            "tokenizer must be the path of a directory, or an object with encode and decode, "
            f"got {shown(given)}"
        )
    if config.skip_tokenizer_init:
        return None
    if is_object:
        return given
    if given is None:
        return _load(config.model, "model", config)
    path = os.fsdecode(given)
    if not os.path.isdir(path):
        raise ArgumentError(
            f"tokenizer must be an existing local directory, got {shown(path)} "
            f"({why_no_directory(path)})"
        )
    return _load(os.path.abspath(path), "tokenizer", config)


def _load(path: str, kind: str, config: Config) -> Any:
    """The tokenizer of a directory, loaded from checked copies unless its code is trusted."""
    if not has_vocabulary(path) and not config.trust_remote_code:
        raise ArgumentError(f"{kind} directory {path!r} holds no tokenizer")
    model_config = _config_of(path, config)
    with tempfile.TemporaryDirectory(prefix="nanovllm-") as copies:
        copy_files(path, copies, model_config, config.trust_remote_code)
        plain = None if config.trust_remote_code else _plain(path, copies, model_config)
        if plain is not None:
            return plain
        return _load_copies(path, kind, copies, model_config, config.trust_remote_code)


def _plain(path: str, copies: str, model_config: dict[str, Any]) -> PlainTokenizer | None:
    """The tokenizer of the copies without transformers; None: it is needed."""
    files = read_copies(copies)
    if TOKENIZER_JSON not in files or SETTINGS not in files:
        return None
    settings = json.loads(files[SETTINGS])
    older = files.keys() & {SPECIAL_TOKENS, ADDED_TOKENS}
    if older and "added_tokens_decoder" not in settings:
        return None
    try:
        text = files[TOKENIZER_JSON].decode()
        fields = read_fields(text, os.path.join(path, TOKENIZER_JSON))
        backend = plain_backend(text, fields, settings, model_config.get("model_type", ""))
        if backend is None or backend.get_vocab_size() <= 1:
            return None
        backend.decode(backend.encode(PROBE).ids)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic of Rust's is no Exception; transformers tells what is wrong
        return None

    def load() -> Any:
        with tempfile.TemporaryDirectory(prefix="nanovllm-") as again:
            write_copies(files, again)
            return _load_copies(path, "tokenizer", again, model_config, False)

    return PlainTokenizer(backend, special_tokens(settings).get("eos_token"), load)


def _load_copies(
    path: str, kind: str, copies: str, model_config: dict[str, Any], trust_remote_code: bool
) -> Any:
    """transformers' tokenizer of the copies of a directory, checked."""
    json_path = os.path.join(path, TOKENIZER_JSON)
    fields = None
    if is_file(json_path):
        text = read_text(os.path.join(copies, TOKENIZER_JSON), MAX_VOCABULARY_BYTES)
        fields = read_fields(text, json_path)
    try:
        source = path if trust_remote_code else copies
        tokenizer = _from_pretrained(source, model_config, trust_remote_code)
        if len(tokenizer) <= 1:  # transformers makes up an empty one where files are missing
            raise ArgumentError(f"{kind} directory {path!r} holds no tokenizer")
        tokenizer.decode(tokenizer.encode(PROBE))  # fails here, if at all, and not in a request
        if fields is not None and not trust_remote_code:
            check_agreement(tokenizer, fields, json_path)
    except (ArgumentError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of many types; a panic of Rust's is no Exception
        reason = str(error).replace(copies, path)
        raise ArgumentError(f"cannot load the tokenizer of {path!r}: {cut(reason)}") from error
    _rename(tokenizer, copies, path)
    return tokenizer


def _config_of(path: str, config: Config) -> dict[str, Any]:
    """The tokenizer's fields in the directory's config.json; the model's was checked before."""
    names = ("model_type", "tokenizer_class", "transformers_version")
    if path == config.model:
        fields = {name: config.source.stated(name) for name in names}
        fields["model_type"] = config.source.model_type
    else:
        other = os.path.join(path, "config.json")
        fields = read_json_object(other) if is_file(other) else {}
    return {name: fields[name] for name in names if isinstance(fields.get(name), str)}


def _from_pretrained(path: str, model_config: dict[str, Any], trust_remote_code: bool) -> Any:
    from transformers import CONFIG_MAPPING, AutoTokenizer, PretrainedConfig

    # Without a configuration transformers reads the directory's, and guesses by the path's name.
    model_type = model_config.get("model_type", "")
    is_known = model_type in CONFIG_MAPPING
    hf_config = CONFIG_MAPPING[model_type]() if is_known else PretrainedConfig()
    if "tokenizer_class" in model_config:
        hf_config.tokenizer_class = model_config["tokenizer_class"]
    return AutoTokenizer.from_pretrained(
        path, config=hf_config, trust_remote_code=trust_remote_code, local_files_only=True
    )


def _rename(tokenizer: Any, copies: str, path: str) -> None:
    """Let the tokenizer name the directory that the copies were made of."""
    tokenizer.name_or_path = path
    for values in (vars(tokenizer), getattr(tokenizer, "init_kwargs", {})):
        for name, value in list(values.items()):
            if isinstance(value, str) and value.startswith(copies):
                values[name] = path + value.removeprefix(copies)


def get_tokenizer(
    tokenizer_name: str,
    *args: Any,
    revision: str | None = None,
    download_dir: str | None = None,
    tokenizer_mode: str = "auto",
    **kwargs: Any,
) -> Any:
    """vLLM's: transformers' tokenizer of a directory, or of a name as with `LLM`'s `download`.

    Args:
        tokenizer_name: path or name.
        args, kwargs: of `AutoTokenizer.from_pretrained`.
        revision, download_dir: of a name, as for `LLM`.
        tokenizer_mode: changes nothing.
    """
    from transformers import AutoTokenizer

    if downloads(None) and is_name(tokenizer_name):
        code = bool(kwargs.get("trust_remote_code"))
        tokenizer_name = directory_of(
            Repository(
                tokenizer_name,
                "tokenizer",
                revision,
                cache_dir=download_dir,
                tokenizer=True,
                code=code,
            )
        )
    return AutoTokenizer.from_pretrained(tokenizer_name, *args, local_files_only=True, **kwargs)
