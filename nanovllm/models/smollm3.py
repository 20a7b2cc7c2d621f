"""SmolLM3 (Hugging Face 2025): Llama with no rotation in every fourth layer (arXiv 2501.18795)."""

from nanovllm.models.llama import LlamaForCausalLM


class SmolLM3ForCausalLM(LlamaForCausalLM):
    """SmolLM3 with its LM head. `ModelConfig.rope_of` says which layers rotate."""
