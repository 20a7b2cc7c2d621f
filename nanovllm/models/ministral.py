"""Ministral (Mistral AI 2024): Mistral with windows in some of the layers."""

from nanovllm.models.mistral import MistralForCausalLM


class MinistralForCausalLM(MistralForCausalLM):
    """Ministral with its LM head."""
