"""vLLM's names of modules, such as `nanovllm.v1.metrics.reader`: modules without files.

What each offers is an object that is defined elsewhere, and is imported when it is asked for.
"""

import gc
import importlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Literal

from nanovllm.guards.garbage import heavy_imports

PACKAGE = __name__.rpartition(".")[0]
ENGINE_ARGS = {"EngineArgs": "features.engine_args"}
ASYNC_ARGS = {"AsyncEngineArgs": "features.engine_args:EngineArgs"}
ASYNC_ENGINE = {"AsyncLLMEngine": "vllm_async:AsyncLLM"}
PARSER = {"FlexibleArgumentParser": "features.engine_args"}
PORTS = {"get_open_port": "vllm_names"}
CLEANUP = {"cleanup_dist_env_and_memory": "vllm_names"}
# Module -> what it offers -> where that is, and after a colon its name there, if it has another.
MODULES: dict[str, dict[str, str]] = {
    "beam_search": dict.fromkeys(
        ("BeamSearchOutput", "BeamSearchSequence"), "features.beam_search"
    ),
    "distributed": CLEANUP,
    "distributed.parallel_state": CLEANUP,
    "distributed.device_communicators.pynccl": {"PyNcclCommunicator": "parallel.weight_group"},
    "distributed.utils": {"StatelessProcessGroup": "parallel.weight_group"},
    "distributed.weight_transfer.base": dict.fromkeys(
        ("WeightTransferInitRequest", "WeightTransferUpdateRequest"), "features.weight_transfer"
    ),
    "distributed.weight_transfer.nccl_engine": dict.fromkeys(
        (
            "NCCLTrainerSendWeightsArgs",
            "NCCLWeightTransferEngine",
            "NCCLWeightTransferInitInfo",
            "NCCLWeightTransferUpdateInfo",
        ),
        "features.weight_transfer",
    ),
    "engine.arg_utils": ENGINE_ARGS | ASYNC_ARGS,
    "engine.async_llm_engine": ASYNC_ENGINE,
    "entrypoints.chat_utils": {
        "resolve_hf_chat_template": "vllm_names:resolve_chat_template",
    },
    "entrypoints.llm": {"LLM": "llm"},
    "exceptions": dict.fromkeys(
        ("ProfilerAlreadyActiveError", "VLLMValidationError"), "errors:ArgumentError"
    ),
    "inputs.data": dict.fromkeys(("PromptType", "TextPrompt", "TokensPrompt"), "inputs"),
    "logger": {"init_logger": "vllm_names"},
    "logits_process": {"LogitsProcessor": "sampling_params:RequestLogitsProcessor"},
    "logprobs": dict.fromkeys(
        ("FlatLogprobs", "Logprob", "PromptLogprobs", "SampleLogprobs"), "outputs"
    ),
    "lora.request": {"LoRARequest": "lora_request"},
    "platforms": {"current_platform": "vllm_names"},
    "renderers.inputs.preprocess": {"parse_model_prompt": "features.renderer"},
    "renderers.hf": {"resolve_chat_template": "vllm_names"},
    "tasks": dict.fromkeys(("GenerationTask", "PoolingTask", "SupportedTask"), "vllm_names"),
    "tokenizers": {"get_tokenizer": "inputs.tokenizer"},
    "transformers_utils.tokenizer": {"get_tokenizer": "inputs.tokenizer"},
    "utils": PARSER | PORTS,
    "utils.argparse_utils": PARSER,
    "utils.network_utils": PORTS | {"get_ip": "vllm_names"},
    "utils.print_utils": {"print_embeddings": "vllm_names"},
    "utils.torch_utils": {"async_tensor_h2d": "vllm_names"},
    "v1.engine.async_llm": {"AsyncLLM": "vllm_async"},
    "v1.engine.exceptions": {"EngineDeadError": "errors"},
    "v1.engine.llm_engine": {"LLMEngine": "vllm_engine"},
    "v1.metrics.reader": dict.fromkeys(
        ("Counter", "Gauge", "Histogram", "Metric", "Vector"), "features.metrics"
    ),
}
_INTERFACE = dict.fromkeys(
    (
        "AddedRequest",
        "BatchUpdate",
        "LogitsProcessor",
        "MoveDirectionality",
        "MovedRequest",
        "RemovedRequest",
    ),
    "sampling.logits_processor",
)
_BUILTIN = {"process_dict_updates": "sampling.logits_processor"}
MODULES |= {
    "v1.sample.logits_processor": _INTERFACE
    | _BUILTIN
    | {
        "AdapterLogitsProcessor": "sampling.logits_processor",
        "LOGITSPROCS_GROUP": "sampling.engine_processors:ENTRY_POINTS",
        "RequestLogitsProcessor": "sampling_params",
    },
    "v1.sample.logits_processor.builtin": _BUILTIN,
    "v1.sample.logits_processor.interface": _INTERFACE,
}
PACKAGES = ("engine", "inputs")  # those of `MODULES`' parents that have files
# What the package itself offers, beside what needs no torch.
TOP: dict[str, str] = {
    "LLM": "llm",
    "LLMEngine": "vllm_engine",
    "AsyncLLM": "vllm_async",
    "BeamSearchOutput": "features.beam_search",
    "StreamOutput": "features.streaming",
    **ENGINE_ARGS,
    **ASYNC_ARGS,
    **ASYNC_ENGINE,
}


# What a request is for, as vLLM's annotations name it.
GenerationTask = Literal["generate"]
PoolingTask = Literal["embed", "classify", "token_embed", "token_classify"]
SupportedTask = GenerationTask | PoolingTask


class _Platform:
    """vLLM's `current_platform`: which devices this host has, by torch."""

    @property
    def device_type(self) -> str:
        """ "cuda" or "cpu"."""
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def is_cuda(self) -> bool:
        """Whether there is a GPU of NVIDIA."""
        return self.device_type == "cuda"

    def is_cpu(self) -> bool:
        """Whether there is none."""
        return not self.is_cuda()

    is_cuda_alike = is_cuda

    def is_rocm(self) -> bool:
        """False, as the devices below are not used."""
        return False

    is_xpu = is_tpu = is_rocm


current_platform = _Platform()


def found(name: str, target: str) -> Any:
    """The object `name` of a module, or what stands after a colon in its place."""
    module, _, other = target.partition(":")
    with heavy_imports():
        return getattr(importlib.import_module(f"{PACKAGE}.{module}"), other or name)


def register() -> None:
    """Make the modules importable."""
    for name, offered in MODULES.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            parent = ".".join(parts[:end])
            if parent in PACKAGES:
                importlib.import_module(f"{PACKAGE}.{parent}")
            elif parent not in MODULES:
                _add(parent, {})
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


def async_tensor_h2d(data: Any, device: Any = None, dtype: Any = None) -> Any:
    """A tensor of a list, an array or a tensor of the host, on a device; no kernel is waited for.

    device: None: the GPU, if there is one.
    """
    import torch

    device = torch.device(device or current_platform.device_type)
    tensor = torch.as_tensor(data, dtype=dtype)
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def get_ip() -> str:
    """This host's address, as others see it: VLLM_HOST_IP, else that of its route outwards."""
    if address := os.environ.get("VLLM_HOST_IP"):
        return address
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outwards:
            outwards.connect(("192.0.2.1", 9))  # of documentation; nothing is sent
            return str(outwards.getsockname()[0])
    except OSError:  # no network
        return "127.0.0.1"


def get_open_port() -> int:
    """A TCP port that is free at this moment."""
    with socket.socket() as bound:
        bound.bind(("", 0))
        return int(bound.getsockname()[1])


def init_logger(name: str) -> logging.Logger:
    """Python's logger of that name."""
    return logging.getLogger(name)


def resolve_chat_template(
    tokenizer: Any, chat_template: str | None = None, tools: Any = None, **_: Any
) -> str | None:
    """The template that a tokenizer of transformers uses: the one given, else its own."""
    if chat_template is not None:
        return chat_template
    return tokenizer.get_chat_template(None, tools) if tokenizer.chat_template else None


def print_embeddings(embeddings: Iterable[Any], prefix: str = "Embeddings") -> None:
    """Print the first four numbers, or rows of them, and how many there are."""
    items = list(embeddings)
    shown = ", ".join(f"{i:.4f}" if isinstance(i, float) else str(i) for i in items[:4])
    print(f"{prefix}: [{shown}{', ...' if len(items) > 4 else ''}] (size={len(items)})")
