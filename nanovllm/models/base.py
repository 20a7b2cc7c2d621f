"""The base class of all language models. A family's file says how its layers are made."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from nanovllm.layers.context import ModelContext
from nanovllm.layers.embedding import ParallelLMHead
from nanovllm.layers.weights import new_vocab_parameter
from nanovllm.models.decoder import Decoder
from nanovllm.models.extras import finish_logits, rotary_tables
from nanovllm.models.model_config import ModelConfig


class CausalLM(nn.Module, ABC):
    """A decoder-only language model, built from its config for one rank.

    `model(input_ids [T] int32, positions [T] int32, metadata)` gives hidden states
    [T, hidden_size], `lm_head(hidden states [B, hidden_size])` this rank's logits. Module names are
    those of the checkpoint's tensors, but for the keys of `checkpoint_names`, if a family has it.
    """

    def __init__(self, config: ModelConfig, context: ModelContext) -> None:
        super().__init__()
        tables = rotary_tables(config, context.max_model_len, context.device)
        layers = [
            self.new_layer(config, cos_sin, context, index) for index, cos_sin in enumerate(tables)
        ]
        self.model = Decoder(config, context, layers)
        if config.tie_word_embeddings:
            weight = self.model.embed_tokens.weight
        else:
            weight = new_vocab_parameter(config.vocab_size, config.hidden_size, context)
        self.lm_head = ParallelLMHead(config.vocab_size, weight, context)
        self.lm_head.finish = finish_logits(config)

    @staticmethod
    @abstractmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> nn.Module:
        """Layer `index` of the family, called as a `DecoderLayer` is.

        cos_sin: of `layers.rotary.cos_sin_table`.
        """
