"""Command R7B and Command A (Cohere 2024, arXiv 2504.00698): Command R with windows.

Layers without a window do not rotate: see `Family.rope_layers`."""

from nanovllm.models.cohere import CohereForCausalLM


class Cohere2ForCausalLM(CohereForCausalLM):
    """Command R7B or Command A with its LM head."""
