"""What the runner needs of a model."""

from torch import nn
from transformers import PretrainedConfig

from nanovllm.layers.context import ModelContext
from nanovllm.layers.embedding import ParallelLMHead


class CausalLM(nn.Module):
    """A decoder-only language model, built from its config for one rank.

    `model(input_ids [T] int32, positions [T] int32, metadata)` gives hidden states
    [T, hidden_size], `lm_head(hidden states [B, hidden_size])` this rank's logits. Module names are
    those of the checkpoint's tensors.
    """

    model: nn.Module
    lm_head: ParallelLMHead

    def __init__(self, config: PretrainedConfig, context: ModelContext) -> None:
        super().__init__()
