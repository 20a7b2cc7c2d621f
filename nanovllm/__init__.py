"""nanovllm: a small, fast offline inference library for large language models.

What needs torch is imported on first use: `from nanovllm import SamplingParams` loads none.
"""

from typing import TYPE_CHECKING, Any

from nanovllm.errors import ArgumentError, EngineDeadError, EngineUseError, RequestError
from nanovllm.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    PoolingOutput,
    PoolingRequestOutput,
    RequestMetrics,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from nanovllm.pooling_params import PoolerConfig, PoolingParams
from nanovllm.sampling_params import BeamSearchParams, SamplingParams, StructuredOutputsParams

if TYPE_CHECKING:
    from nanovllm.features.beam_search import BeamSearchOutput
    from nanovllm.features.streaming import StreamOutput
    from nanovllm.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "ArgumentError",
    "BeamSearchOutput",
    "BeamSearchParams",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineDeadError",
    "EngineUseError",
    "Logprob",
    "PoolerConfig",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StreamOutput",
    "StructuredOutputsParams",
]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from nanovllm.llm import LLM

        return LLM
    if name == "BeamSearchOutput":
        from nanovllm.features.beam_search import BeamSearchOutput

        return BeamSearchOutput
    if name == "StreamOutput":
        from nanovllm.features.streaming import StreamOutput

        return StreamOutput
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
