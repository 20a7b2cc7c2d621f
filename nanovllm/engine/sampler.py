"""The fast path of sampling: greedy or by temperature, inside the CUDA graph of a decode step."""

import torch

from nanovllm.kernels.ops import Ops
from nanovllm.layers.embedding import ParallelLMHead
from nanovllm.parallel.tensor_parallel import TensorParallel


class Sampler:
    """Draws each row's token by Gumbel-max sampling and enters it in the row table.

    Adding -log(-log(u)) of uniform u to the logits and taking the largest draws from their softmax
    (Gumbel 1954). Rows with `row_state.SKIPPED` are left to `LogitsProcessing`.

    Args:
        ops: the backend.
        tp: this rank's place among the ranks, each of which has the logits of its own tokens.
        lm_head: the model's.
        row_table: int32, of `row_state`.
    """

    def __init__(
        self, ops: Ops, tp: TensorParallel, lm_head: ParallelLMHead, row_table: torch.Tensor
    ) -> None:
        self.ops = ops
        self.tp = tp
        self.lm_head = lm_head
        self.row_table = row_table

    def __call__(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        temperatures: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """The token ids [B] int32 that follow.

        Args:
            logits: [B, V] of this rank.
            rows: [B] int32, in the row table.
            temperatures: [B] float32; 0: the most probable token.
            seeds: [B, 2] int32.
            positions: [B] int32, of the input tokens.
        """
        first, vocab_size = self.lm_head.first_token_id, self.lm_head.vocab_size
        scores, token_ids = self.ops.sample(
            logits, temperatures, seeds, positions, first, vocab_size
        )
        token_ids = self.tp.argmax(scores, token_ids)
        self.ops.write_back(self.row_table, rows, token_ids, positions, temperatures)
        return token_ids
