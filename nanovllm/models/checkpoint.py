"""Checkpoints as the loader reads them: tensors by name, in parts; the files of a directory."""

import math
import os
from typing import Any, Protocol

import torch
from safetensors import safe_open

from nanovllm.errors import ArgumentError, shown, shown_error
from nanovllm.model_files import (
    INDEX_FILE,
    SINGLE_FILE,
    is_file,
    list_directory,
    read_json_object,
    read_start,
)

LM_HEAD = "lm_head.weight"
BYTE = "U8"
# Of the text part's tensors in a multimodal model.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.")
MAX_MAPPED_BYTES = 1 << 28  # that are read of the files before their pages are let go of
PACKED = {BYTE: 2, "I32": 8}  # numbers of 4 bits in an element
WEIGHT_DTYPES = ("BF16", "F16", "F32", "F64", "F8_E4M3")  # by their names in the files


class Checkpoint(Protocol):
    """A source of named tensors that can be read in part."""

    def names(self) -> set[str]:
        """Names of the tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """A part of the tensor."""


class SafetensorsCheckpoint:
    """The weights of a directory: model.safetensors, else the files of its index, else all.

    Names are those of a language model. `is_bare`: the decoder's tensors lack the "model." that
    `names` gives them, as embedding models are saved; they need no LM head. A multimodal model's
    have one of TEXT_PREFIXES.

    Raises:
        ArgumentError: there is none, the index names a missing one, one is damaged, or two have a
            tensor of the same name.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._files: dict[str, str] = {}  # tensor name -> file name
        self._handles: dict[str, Any] = {}
        self._read_files: set[str] = set()  # of which pages are in memory
        self._num_read = 0  # bytes of these
        file_names, index = self._choose_files()
        for file_name in file_names:
            path = os.path.join(directory, file_name)
            read_start(path, 64)  # refuses what is no file of its own
            self._open(file_name)
            for name in self._handles[file_name].keys():  # noqa: SIM118 (not a dict)
                if index.get(name, file_name) != file_name:
                    continue
                other = self._files.setdefault(name, file_name)
                if other != file_name:
                    raise ArgumentError(
                        f"tensor {shown(name)} is in both {other} and {file_name} of {directory!r}"
                    )
        self.is_bare = "embed_tokens.weight" in self._files
        self._stored_names: dict[str, str] = {}
        for name in self._files:
            other = self._stored_names.setdefault(self._name_of(name), name)
            if other != name:
                raise ArgumentError(
                    f"tensor {shown(self._name_of(name))} is in {directory!r} twice, as "
                    f"{shown(other)} and {shown(name)}"
                )

    def _open(self, file_name: str) -> None:
        """Map a file; if it is mapped already, that lets go of its pages that are in memory."""
        path = os.path.join(self.directory, file_name)
        try:
            self._handles[file_name] = safe_open(path, framework="pt")
        except Exception as error:  # of the file's header or of the memory map
            raise ArgumentError(f"cannot read {path}: {shown_error(error)}") from error

    def _choose_files(self) -> tuple[list[str], dict[str, str]]:
        """The files to read, and which tensor is in which of them where an index says so."""
        names = list_directory(self.directory)
        found = [name for name in names if name.endswith(".safetensors")]
        if SINGLE_FILE in found:
            return [SINGLE_FILE], {}
        if index := self._read_index():
            return sorted(set(index.values())), index
        if not found:
            others = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf"))]
            raise ArgumentError(
                f"model directory {self.directory!r} holds no *.safetensors file "
                "(load_format='dummy' runs on random weights)"
                + (f"; {shown(others[0])} is of a kind that is not read" if others else "")
                + ("; save_pretrained of transformers converts it" if others else "")
            )
        return found, {}

    def _read_index(self) -> dict[str, str]:
        """Tensor name -> file name; {} if there is no index."""
        path = os.path.join(self.directory, INDEX_FILE)
        if not is_file(path):
            return {}
        index = read_json_object(path).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ArgumentError(f"cannot read {path}: it has no weight_map, or an empty one")
        for name in index.values():
            if not isinstance(name, str) or not name or os.path.basename(name) != name:
                raise ArgumentError(
                    f"cannot read {path}: weight_map must hold names of files in its directory, "
                    f"got {shown(name)}"
                )
        return index

    def _name_of(self, stored_name: str) -> str:
        if self.is_bare and stored_name != LM_HEAD:
            return f"model.{stored_name}"
        for prefix in TEXT_PREFIXES:
            if stored_name.startswith(prefix):
                return f"model.{stored_name.removeprefix(prefix)}"
        return stored_name

    def names(self) -> set[str]:
        """See `Checkpoint`."""
        return set(self._stored_names)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._stored_names

    def num_weights(self) -> int:
        """The numbers of all tensors together, of 4 bits where bytes or words are packed."""
        total = 0
        for name, file_name in self._files.items():
            tensor = self._handles[file_name].get_slice(name)
            total += math.prod(tensor.get_shape()) * PACKED.get(tensor.get_dtype(), 1)
        return total

    def dtype(self, name: str) -> str:
        """The dtype of a tensor, by its name in the files."""
        dtype: str = self._slice(name).get_dtype()
        return dtype

    def shape(self, name: str, dtypes: tuple[str, ...] = WEIGHT_DTYPES) -> tuple[int, ...]:
        """See `Checkpoint`; ArgumentError if the tensor is of none of these dtypes."""
        tensor = self._slice(name)
        if tensor.get_dtype() not in dtypes:
            raise ArgumentError(
                f"tensor {shown(name)} of {self.directory!r} is {_dtype(tensor)}; supported: "
                f"{', '.join(dtypes)}"
            )
        return tuple(tensor.get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """See `Checkpoint`; its shape was asked for before."""
        if self._num_read > MAX_MAPPED_BYTES:
            for file_name in self._read_files:
                self._open(file_name)
            self._read_files, self._num_read = set(), 0
        part = self._slice(name)[index]
        self._read_files.add(self._files[self._stored_names[name]])
        self._num_read += part.nbytes
        return part

    def _slice(self, name: str) -> Any:
        name = self._stored_names[name]
        return self._handles[self._files[name]].get_slice(name)


def _dtype(tensor: Any) -> str:
    """The dtype of a slice of a file, by torch's name if torch has it."""
    try:
        return str(tensor[:0].dtype)
    except Exception:
        return tensor.get_dtype()
