"""vLLM's names of modules, such as `nanovllm.v1.metrics.reader`: modules without files.

What each offers is an object that is defined elsewhere, and is imported when it is asked for.
"""

import gc
import importlib
import logging
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]
ENGINE_ARGS = {"EngineArgs": "features.engine_args"}
PARSER = {"FlexibleArgumentParser": "features.engine_args"}
CLEANUP = {"cleanup_dist_env_and_memory": "vllm_names"}
# Module -> what it offers -> where that is, and after a colon its name there, if it has another.
MODULES: dict[str, dict[str, str]] = {
    "beam_search": dict.fromkeys(
        ("BeamSearchOutput", "BeamSearchSequence"), "features.beam_search"
    ),
    "distributed": CLEANUP,
    "distributed.parallel_state": CLEANUP,
    "engine.arg_utils": ENGINE_ARGS,
    "entrypoints.llm": {"LLM": "llm"},
    "exceptions": {"VLLMValidationError": "errors:ArgumentError"},
    "inputs.data": dict.fromkeys(("PromptType", "TextPrompt", "TokensPrompt"), "inputs"),
    "logger": {"init_logger": "vllm_names"},
    "logprobs": {"Logprob": "outputs"},
    "utils": PARSER,
    "utils.argparse_utils": PARSER,
    "utils.print_utils": {"print_embeddings": "vllm_names"},
    "v1.engine.exceptions": {"EngineDeadError": "errors"},
    "v1.engine.llm_engine": {"LLMEngine": "vllm_engine"},
    "v1.metrics.reader": dict.fromkeys(
        ("Counter", "Gauge", "Histogram", "Metric", "Vector"), "features.metrics"
    ),
}
# What the package itself offers, beside what needs no torch.
TOP: dict[str, str] = {
    "LLM": "llm",
    "LLMEngine": "vllm_engine",
    "BeamSearchOutput": "features.beam_search",
    "EngineArgs": "features.engine_args",
    "StreamOutput": "features.streaming",
}


def found(name: str, target: str) -> Any:
    """The object `name` of a module, or what stands after a colon in its place."""
    module, _, other = target.partition(":")
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), other or name)


def register() -> None:
    """Make the modules importable."""
    for name, offered in MODULES.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            if (prefix := ".".join(parts[:end])) not in MODULES and parts[0] in (
                "v1",
                "entrypoints",
            ):
                _add(prefix, {})
        _add(name, offered)


def _add(name: str, offered: dict[str, str]) -> None:
    full_name = f"{PACKAGE}.{name}"
    if full_name in sys.modules:
        return
    module = ModuleType(full_name, "Names of vLLM; see nanovllm.vllm_names.")
    vars(module)["__getattr__"] = _getter(full_name, offered)
    vars(module)["__path__"] = []  # what is below it is registered as well
    sys.modules[full_name] = module
    parent, _, child = full_name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)


def _getter(module: str, offered: dict[str, str]) -> Callable[[str], Any]:
    def __getattr__(name: str) -> Any:
        if name in offered:
            return found(name, offered[name])
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Free what nobody refers to, and the GPU memory that torch keeps for reuse.

    An engine frees its own at `exit`; process groups are the engines' own.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def init_logger(name: str) -> logging.Logger:
    """Python's logger of that name."""
    return logging.getLogger(name)


def print_embeddings(embeddings: Iterable[float], prefix: str = "Embeddings") -> None:
    """Print the first four numbers, and how many there are."""
    numbers = list(embeddings)
    shown = ", ".join(f"{number:.4f}" for number in numbers[:4])
    print(f"{prefix}: [{shown}{', ...' if len(numbers) > 4 else ''}] (size={len(numbers)})")
