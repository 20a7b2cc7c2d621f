"""nanovllm: a small, fast offline inference library for large language models.

`LLM` is imported on first use, so that `from nanovllm import SamplingParams` loads no torch.
"""

from typing import TYPE_CHECKING, Any

from nanovllm.errors import ArgumentError, EngineDeadError
from nanovllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams

if TYPE_CHECKING:
    from nanovllm.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "ArgumentError",
    "CompletionOutput",
    "EngineDeadError",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from nanovllm.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
