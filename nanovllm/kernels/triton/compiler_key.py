"""Triton's hash of its own files, on which all names in its cache depend, noted in that cache.

To make it 400 MB are read. The note holds while these files have the same sizes and times.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

import triton
from triton import knobs
from triton.runtime import cache as triton_cache

COMPILER = Path(triton.__file__).parent


@cache
def compiler_key() -> str:
    """Triton's key, from the note if there is one; Triton itself takes it from here afterwards."""
    files = [*COMPILER.rglob("*.py"), *(COMPILER / "_C").glob("*.so")]
    name = hashlib.sha256("\n".join(states(COMPILER, files)).encode()).hexdigest()
    note = Path(knobs.cache.dir) / f"nanovllm-compiler-{name}"
    try:
        key = note.read_text()
    except OSError:
        key = ""
    if not key.startswith(triton.__version__):
        key = triton_cache.triton_key()
        write_note(note, key)
    triton_cache.triton_key = lambda: key
    return key


def states(folder: Path, files: Iterable[Path]) -> list[str]:
    """Names, sizes and times of change of files in a folder, in an order of their own."""
    found = []
    for path in sorted(files):
        state = path.stat()
        found.append(f"{path.relative_to(folder)} {state.st_size} {state.st_mtime_ns}")
    return found


def write_note(path: Path, text: str) -> None:
    """Write a file at once or not at all; nothing happens where that is not possible."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent)
        with open(descriptor, "w") as file:
            file.write(text)
        os.replace(name, path)
