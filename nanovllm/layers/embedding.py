"""The token embedding and the LM head, split over the ranks by token id."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.kernels.types import Unreduced
from nanovllm.layers.context import ModelContext
from nanovllm.layers.weights import Parameter, new_vocab_parameter


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding table; a rank gives zeros for ids it does not hold."""

    def __init__(self, vocab_size: int, hidden_size: int, context: ModelContext) -> None:
        super().__init__()
        self.tp = context.tp
        self.weight = new_vocab_parameter(vocab_size, hidden_size, context)
        self.first_token_id = self.tp.rank * len(self.weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [T] int32 -> [T, hidden_size]."""
        if self.tp.size == 1:
            return F.embedding(input_ids, self.weight)
        peers = self.tp.peers
        if peers is not None and peers.takes(len(input_ids)):
            return peers.embedding(input_ids, self.weight, self.first_token_id)
        local_ids = input_ids - self.first_token_id
        held = (local_ids >= 0) & (local_ids < self.weight.shape[0])
        y = F.embedding(torch.where(held, local_ids, 0), self.weight)
        return self.tp.all_reduce(Unreduced(y * held.unsqueeze(-1)))


class ParallelLMHead(nn.Module):
    """Logits of this rank's token ids; `weight` is of `new_vocab_parameter`."""

    def __init__(self, vocab_size: int, weight: Parameter, context: ModelContext) -> None:
        super().__init__()
        self.vocab_size, self.weight, self.ops = vocab_size, weight, context.ops
        self.first_token_id = context.tp.rank * len(weight)
        self.finish: Callable[[Tensor], Tensor] | None = None  # changes the logits in place

    def forward(self, hidden_states: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden_states [B, hidden_size] -> logits [B, rows of this rank], padding included.

        out: where to put the logits.
        """
        logits = self.ops.vocab_linear(hidden_states, self.weight, out)
        return self.finish(logits) if self.finish else logits
