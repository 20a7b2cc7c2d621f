"""Trained weights that registry packages carry as GGUF files, as transformers reads them.

The converted models, some hundred megabytes each, stay in ~/.cache/nanovllm-tests. No code of the
packages is run.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from filelock import FileLock  # torch requires it
from transformers import AutoModelForCausalLM, AutoTokenizer

READERS = ("gguf", "accelerate")


def missing(*packages: str) -> list[str]:
    """Of the packages, and of what reads GGUF files, those that are not installed."""
    return [name for name in (*packages, *READERS) if not importlib.util.find_spec(name)]


def folder_of(package: str) -> Path:
    """Where an installed package lies."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def converted(name: str, parts: list[Path]) -> Path:
    """The model's Hugging Face directory in bf16, made by the first who needs it.

    Args:
        name: of the model.
        parts: the GGUF file's parts, in order.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm-tests"
    caches.mkdir(parents=True, exist_ok=True)
    version = transformers.__version__
    target = caches / f"{name}-{digest.hexdigest()[:12]}-transformers-{version}"
    with FileLock(f"{target}.lock"):  # other processes of pytest-xdist
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=caches) as folder:
                source = Path(folder) / "model.gguf"
                with source.open("wb") as whole:
                    for part in parts:
                        with part.open("rb") as file:
                            shutil.copyfileobj(file, whole)
                _convert(source, Path(folder) / "model")
                os.rename(Path(folder) / "model", target)  # whole, or not there
    return target


def _convert(source: Path, target: Path) -> None:
    """Save what the GGUF file has as a Hugging Face directory."""
    settings = {"gguf_file": source.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # without it the weights are always unpacked
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(source.parent, **settings).save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(target)
