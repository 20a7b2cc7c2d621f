"""A note in Triton's cache that all kernels which an engine can launch are there.

A later start of an engine with the same traits need not find out which they are: it looks for their
files alone. Should a note be wrong, a kernel is compiled as it is launched.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from nanovllm.kernels.triton.compiler_key import compiler_key, states, write_note

PACKAGE = Path(__file__).parents[2]


class KernelIndex:
    """The note of engines with certain traits.

    Args:
        traits: all that decides on the kernels but for this package, the compiler and the
            environment.
        capability: compute capability of the GPU.
    """

    def __init__(self, traits: str, capability: tuple[int, int]) -> None:
        backend = make_backend(GPUTarget("cuda", 10 * capability[0] + capability[1], 32))
        environment = sorted(get_cache_invalidating_env_vars().items())
        modules = states(PACKAGE, PACKAGE.rglob("*.py"))
        parts = [traits, compiler_key(), backend.hash(), str(environment), *modules]
        name = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        self._path = Path(knobs.cache.dir) / f"nanovllm-{name}.json"

    def is_complete(self) -> bool:
        """Whether there is a note, and all files that it names."""
        try:
            files = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return False
        return bool(files) and all(map(os.path.exists, files))

    def write(self, files: Iterable[str]) -> None:
        """Note the files of all kernels; nothing happens where that is not possible."""
        write_note(self._path, json.dumps(sorted(files)))
