"""OLMo 3 (OLMo team 2025, arXiv 2512.13961): OLMo 2 with windows in some of the layers.

Rotary embeddings may be scaled in the layers without a window alone."""

from nanovllm.models.olmo2 import Olmo2ForCausalLM


class Olmo3ForCausalLM(Olmo2ForCausalLM):
    """OLMo 3 with its LM head."""
