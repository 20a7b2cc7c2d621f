"""Reads the files of a model directory, of which nothing is trusted.

Every file that is read must be a regular one, since a FIFO or a device would be waited for, and of
bounded size. JSON must be an object of bounded depth.
"""

import json
import os
import stat
from typing import Any

from nanovllm.errors import MAX_SHOWN, ArgumentError, shown, shown_error

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_JSON_BYTES = 16 << 20
MAX_VOCABULARY_BYTES = 64 << 20  # of tokenizer.json and its like
MAX_TEMPLATE_BYTES = 1 << 20  # of a chat template; those of models have some 10,000
MAX_DEPTH = 64
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


def is_file(path: str) -> bool:
    """Whether `path` is there; ArgumentError if it is and cannot be read as a file.

    A symbolic link is followed: the caches of hubs consist of them. One that leads nowhere is an
    error.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise ArgumentError(f"cannot read {_shown(path)}: {_reason(error)}") from error
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ArgumentError(f"cannot read {_shown(path)}: {_reason(error)}") from error
    if not stat.S_ISREG(mode):
        raise ArgumentError(f"cannot read {_shown(path)}: it is {_kind(mode)}, not a file")
    return True


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
    return next((kind for is_kind, kind in kinds if is_kind(mode)), "a device")


def read_bytes(path: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The content of a file; ArgumentError if it cannot be read or has more than `max_bytes`."""
    content = read_start(path, max_bytes + 1)
    if len(content) > max_bytes:
        raise ArgumentError(f"cannot read {_shown(path)}: it has more than {max_bytes} bytes")
    return content


def list_directory(path: str) -> list[str]:
    """The names in a directory, sorted; ArgumentError if it cannot be read."""
    try:
        return sorted(os.listdir(path))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"cannot read {_shown(path)}: {_reason(error)}") from error


def read_start(path: str, num_bytes: int) -> bytes:
    """The first bytes of a file of any size; ArgumentError as of `read_bytes`."""
    if not is_file(path):
        raise ArgumentError(f"cannot read {_shown(path)}: there is no such file")
    try:
        # Should a FIFO take the file's place meanwhile: it is not waited for.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            content = file.read(num_bytes)
    except OSError as error:
        raise ArgumentError(f"cannot read {_shown(path)}: {_reason(error)}") from error
    if content is None:  # some files of the system's are called regular, and are waited for
        raise ArgumentError(f"cannot read {_shown(path)}: it holds nothing yet")
    _check_lfs_pointer(content, path)
    return content


def _check_lfs_pointer(content: bytes, path: str) -> None:
    """ArgumentError if `content`, the first bytes of a file, is what git leaves in its place."""
    if content.startswith(LFS_POINTER):
        raise ArgumentError(
            f"{_shown(path)} is a git-lfs pointer, not the file itself: run 'git lfs pull' in "
            "its directory"
        )


def read_text(path: str, max_bytes: int = MAX_JSON_BYTES) -> str:
    """The content of a UTF-8 file; ArgumentError as of `read_bytes`, or if it is no UTF-8."""
    try:
        return read_bytes(path, max_bytes).decode()
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"cannot read {_shown(path)}: it is not UTF-8: {error.reason}"
        ) from error


def read_chat_template(template: Any) -> str:
    """The text of a Jinja template: a string that is none is the path of a file that holds it.

    Raises:
        ArgumentError: it is neither, or the file cannot be read.
    """
    if not isinstance(template, (str, os.PathLike)):
        raise ArgumentError(f"chat_template must be a template or a path, got {shown(template)}")
    if isinstance(template, str) and not {"{", "}", "\n"}.isdisjoint(template):
        return template
    path = os.fsdecode(template)
    try:
        return read_text(path, MAX_TEMPLATE_BYTES)
    except ArgumentError as error:
        raise ArgumentError(
            f"chat_template {shown(path)} is no Jinja template, and no file that can be read: "
            f"{shown_error(error)}"
        ) from error


def read_json(path: str) -> Any:
    """The value in a JSON file; ArgumentError if it is damaged, too large or nested too deeply."""
    try:
        text = read_bytes(path).decode()
        value = json.loads(text)
    except ArgumentError:
        raise
    except ValueError as error:
        raise ArgumentError(
            f"cannot read {_shown(path)}: {os.path.basename(path)} is not valid JSON: {error}"
        ) from error
    except RecursionError:
        raise ArgumentError(
            f"cannot read {_shown(path)}: it is nested more than {MAX_DEPTH} deep"
        ) from None
    _check_depth(value, path)
    return value


def read_json_object(path: str) -> dict[str, Any]:
    """The object that a JSON file holds; ArgumentError if it holds something else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ArgumentError(
            f"cannot read {_shown(path)}: {os.path.basename(path)} must hold a JSON object, got "
            f"{shown(value)}"
        )
    return value


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or shown_error(error)


def _shown(path: str) -> str:
    """A path for a message: its beginning and its end, if it is long."""
    half = MAX_SHOWN // 2 - 2
    return path if len(path) <= MAX_SHOWN else f"{path[:half]}...{path[-half:]}"


def _check_depth(value: Any, path: str) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return
        children = (c for v in level for c in (v.values() if isinstance(v, dict) else v))
        level = [child for child in children if isinstance(child, (dict, list))]
    raise ArgumentError(f"cannot read {_shown(path)}: it is nested more than {MAX_DEPTH} deep")
