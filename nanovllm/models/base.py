"""What the runner needs of a model, and what a family's file defines: how a layer is made."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from nanovllm.layers.context import ModelContext
from nanovllm.layers.embedding import ParallelLMHead
from nanovllm.models.decoder import Decoder, DecoderLayer
from nanovllm.models.model_config import ModelConfig


class CausalLM(nn.Module, ABC):
    """A decoder-only language model, built from its config for one rank.

    `model(input_ids [T] int32, positions [T] int32, metadata)` gives hidden states
    [T, hidden_size], `lm_head(hidden states [B, hidden_size])` this rank's logits. Module names are
    those of the checkpoint's tensors.
    """

    def __init__(self, config: ModelConfig, context: ModelContext) -> None:
        super().__init__()
        self.model = Decoder(config, context, self.new_layer)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, context, tied)

    @staticmethod
    @abstractmethod
    def new_layer(
        config: ModelConfig, cos_sin: torch.Tensor, context: ModelContext, index: int
    ) -> DecoderLayer:
        """Layer `index` of the family; cos_sin as of `layers.rotary.cos_sin_table`."""
