"""nanovllm: a small, fast offline inference library for large language models.

What needs torch is imported on first use: `from nanovllm import SamplingParams` loads none.
"""

from typing import TYPE_CHECKING, Any

from nanovllm import vllm_names
from nanovllm.errors import ArgumentError, EngineDeadError, EngineUseError, RequestError
from nanovllm.inputs import PromptType, TextPrompt, TokensPrompt
from nanovllm.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    FlatLogprobs,
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
    from nanovllm.features.engine_args import EngineArgs
    from nanovllm.features.streaming import StreamOutput
    from nanovllm.llm import LLM
    from nanovllm.vllm_async import AsyncLLM
    from nanovllm.vllm_engine import LLMEngine

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "ArgumentError",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "EngineDeadError",
    "EngineUseError",
    "FlatLogprobs",
    "LLMEngine",
    "Logprob",
    "PoolerConfig",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "PromptType",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StreamOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
]


vllm_names.register()


def __getattr__(name: str) -> Any:
    if name in vllm_names.TOP:
        return vllm_names.found(name, vllm_names.TOP[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
