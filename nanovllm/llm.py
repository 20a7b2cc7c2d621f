"""The public entry point."""

from nanovllm.engine.llm_engine import LLMEngine


class LLM(LLMEngine):
    """Offline inference on one model; see `LLMEngine` for the parameters and methods."""
