"""Models by name: downloads the files of a model that are needed, and finds those in the cache.

All of it is huggingface_hub's: the cache, its locks, tokens, retries, progress bars, and the
variables HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE.
"""

import fnmatch
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import ArgumentError, shown, shown_error
from nanovllm.inputs.tokenizer_files import TOKENIZER_FILES
from nanovllm.model_files import INDEX_FILE, SINGLE_FILE, read_json_object
from nanovllm.models.hf_config import PART_OF_NAME, what_it_is
from nanovllm.models.quantization_config import MODELOPT_FILE, SIDE_FILES

VARIABLE = "NANOVLLM_DOWNLOAD"
NAME = re.compile(f"({PART_OF_NAME}/)?{PART_OF_NAME}")  # some old models have no owner
CONFIG_FILE = "config.json"
FIRST_FILES = (CONFIG_FILE, INDEX_FILE)  # which say what else is needed
MODEL_FILES = (
    "generation_config.json",
    *SIDE_FILES,
    MODELOPT_FILE,
    # Of sentence-transformers: how hidden states are pooled.
    "modules.json",
    "sentence_bert_config.json",
    "[0-9]*_*/config.json",
)
CODE_FILES = ("*.py", "*.tiktoken", "*.model")  # of a tokenizer that brings code
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5")


@dataclass(frozen=True)
class Repository:
    """A repository on the hub, and what is wanted of it.

    Attributes:
        name: such as "Qwen/Qwen3-0.6B".
        kind: the parameter of `LLM` that named it, for messages.
        revision: branch, tag or commit; None: "main".
        token: for the hub; True is the one that `hf auth login` stored, None that or none, and
            False none.
        cache_dir: of the cache; None: huggingface_hub's.
        weights: whether the safetensors are wanted.
        tokenizer: whether the tokenizer's files are.
        code: whether a tokenizer's Python files are.
    """

    name: str
    kind: str
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | None = None
    weights: bool = False
    tokenizer: bool = False
    code: bool = False


def downloads(download: bool | None) -> bool:
    """Whether names are resolved: what `download` says, else the variable NANOVLLM_DOWNLOAD."""
    if download is not None:
        return download
    value = os.environ.get(VARIABLE, "").lower()
    if value not in ("", "0", "false", "no", "off", "1", "true", "yes", "on"):
        raise ArgumentError(f"{VARIABLE} in the environment must be 1 or 0, got {shown(value)}")
    return value in ("1", "true", "yes", "on")


def is_name(model: Any) -> bool:
    """Whether it names a repository: it is no directory here, and reads like a name."""
    if not isinstance(model, (str, os.PathLike)) or os.path.isdir(model):
        return False
    return NAME.fullmatch(os.fsdecode(model)) is not None


def name_of(directory: str) -> str:
    """What a model is called: its name on the hub if that is seen in the path, else the folder's.

    Caches have directories such as ".../models--Qwen--Qwen3-0.6B/snapshots/<commit>".
    """
    cached = re.search(r"(?:^|/)models--([^/]+)/snapshots/[^/]+/?$", directory)
    return cached[1].replace("--", "/") if cached else os.path.basename(directory)


def directory_of(repository: Repository) -> str:
    """The directory in the cache that has all that is wanted, which is downloaded if it is not.

    What is in the cache in full is used without asking the hub. A file that breaks off is taken up
    again where it ended, and files that are complete are kept for the next call.

    Raises:
        ArgumentError: there is no such repository or revision, it may not be read, it has no
            config.json or no safetensors, the hub cannot be reached, or the disk is full.
    """
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    try:
        return _fetch(repository, local_files_only=True)
    except (ArgumentError, CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        pass  # it is not in the cache, or nothing tells whether all of it is
    except Exception as error:
        raise _explained(error, repository) from error
    try:
        return _fetch(repository, local_files_only=False)
    except ArgumentError:
        raise
    except Exception as error:
        raise _explained(error, repository) from error


def _fetch(repository: Repository, local_files_only: bool) -> str:
    """The directory with the wanted files; an error of huggingface_hub if one is not to be had."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    folder = _snapshot(repository, repository.revision, FIRST_FILES, local_files_only)
    commit = os.path.basename(folder)
    try:  # each download leaves a listing of the commit in the cache
        tree = get_cached_repo_tree(
            repository.name, revision=commit, cache_dir=repository.cache_dir
        )
        names = {file.path for file in tree}
    except CachedRepoTreeNotFoundError:
        if local_files_only:
            raise
        # The hub is out of reach: what other libraries put into the cache has to do.
        names, tree = _files_of(folder), None
    files = _wanted(repository, names, folder)
    _snapshot(repository, commit, files, local_files_only)
    missing = [name for name in files if not os.path.isfile(os.path.join(folder, name))]
    if missing and tree is None:
        raise ArgumentError(
            f"{_shown(repository)} is in the cache only in part, {shown(missing[0])} is not, and "
            f"the hub was not reached{_how_to_get(repository)}"
        )
    if missing:
        raise ArgumentError(
            f"{_shown(repository)}: {INDEX_FILE} names {shown(missing[0])}, which is not there"
        )
    return folder


def _snapshot(
    repository: Repository, revision: str | None, files: Iterable[str], local_files_only: bool
) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(
        repository.name,
        revision=revision,
        cache_dir=repository.cache_dir,
        token=repository.token,
        allow_patterns=list(files),
        local_files_only=local_files_only,
        library_name="nanovllm",
    )


def _files_of(folder: str) -> set[str]:
    paths = (os.path.join(path, name) for path, _, names in os.walk(folder) for name in names)
    return {os.path.relpath(path, folder) for path in paths}


def _wanted(repository: Repository, names: Collection[str], folder: str) -> list[str]:
    """The files of a repository that an engine reads, out of `names`."""
    if CONFIG_FILE not in names and repository.kind == "model":
        raise ArgumentError(f"{_shown(repository)} holds no config.json{what_it_is(names)}")
    patterns = [*FIRST_FILES, *MODEL_FILES]
    if repository.tokenizer:
        patterns += TOKENIZER_FILES
    at_root = CODE_FILES if repository.code else ()
    wanted = [
        name
        for name in names
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        or ("/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in at_root))
    ]
    return sorted({*wanted, *(_weights(repository, names, folder) if repository.weights else ())})


def _weights(repository: Repository, names: Collection[str], folder: str) -> list[str]:
    """The files that `SafetensorsCheckpoint` reads: model.safetensors, the index's, or all."""
    found = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if SINGLE_FILE in found:
        return [SINGLE_FILE]
    if INDEX_FILE in names:
        index = read_json_object(os.path.join(folder, INDEX_FILE)).get("weight_map")
        files = index.values() if isinstance(index, dict) else ()
        return [name for name in set(map(str, files)) if name.endswith(".safetensors")]
    if not found:
        others = sorted(name for name in names if name.endswith(OTHER_WEIGHTS))
        raise ArgumentError(
            f"{_shown(repository)} holds no *.safetensors file"
            + (f"; {shown(others[0])} is of a kind that is not read" if others else "")
            + ("; save_pretrained of transformers converts it" if others else "")
        )
    return found


def _shown(repository: Repository) -> str:
    revision = "" if repository.revision is None else f" at revision {shown(repository.revision)}"
    return f"{repository.kind} {shown(repository.name)}{revision}"


def _how_to_get(repository: Repository) -> str:
    return f": run 'hf download {repository.name}' where there is a network"


def _explained(error: Exception, repository: Repository) -> ArgumentError:
    """What an error of huggingface_hub means, and what to do."""
    from huggingface_hub import constants, errors

    who, where = _shown(repository), f"{constants.ENDPOINT}/{repository.name}"
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
    told = cause if isinstance(cause, Exception) else error
    status = getattr(getattr(told, "response", None), "status_code", None)
    login = "give hf_token, or run 'hf auth login'"
    match told:
        case errors.GatedRepoError():
            why = f"it is gated: ask for access at {where}, and {login}"
        case errors.RepositoryNotFoundError():
            why = (
                f"there is no such directory here and no such model at {constants.ENDPOINT}, or it "
                f"is private: check the name, or {login}"
            )
        case errors.RevisionNotFoundError():
            why = f"there is no such revision: {where}/tree/main shows branches and tags"
        case errors.OfflineModeIsEnabled():
            why = (
                f"HF_HUB_OFFLINE is set, and not all of it is in the cache{_how_to_get(repository)}"
            )
        case errors.LocalTokenNotFoundError():
            why = "hf_token=True, but no token is stored: run 'hf auth login'"
        case _ if status in (401, 403):
            why = f"it may not be read ({status}): {login}"
        case errors.HFValidationError():
            why = "that is no name of a model"
        case _:
            why = f"{shown_error(told)}; files that are complete are kept: call again to go on"
    return ArgumentError(f"cannot download {who}: {why}")
