"""Repetition, frequency and presence penalties, from the tokens in the history.

Nothing of the vocabulary's size is kept between steps: each step counts anew.
"""

from collections.abc import Sequence as Items

import numpy as np
import torch

from nanovllm.kernels.copies import upload_one
from nanovllm.sampling.history import TokenHistory
from nanovllm.sampling.state import SampledSequence
from nanovllm.sampling_params import SamplingParams

# Far beyond what changes a choice. A forbidden token's logit (token_masks.FORBIDDEN) times this is
# finite, and by its inverse still the least.
MAX_REPETITION = 1e8


def has_penalties(params: "SamplingParams") -> bool:
    """Whether any of the three is on."""
    return bool(
        params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty
    )


def apply_penalties(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    num_prompt_tokens: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> None:
    """Change the logits of tokens that came before, in place.

    With c the times that a token was generated:
    (logit / repetition if logit > 0 else logit * repetition) - frequency * c - presence * [c > 0],
    the repetition penalty for tokens of the prompt too.

    Args:
        logits: [P, W] float32; the last column is no token's and holds anything afterwards.
        tokens: [P, L] int32, each row's token ids up to its position; beyond, anything.
        positions: [P] int32, of the newest token, < L.
        num_prompt_tokens: [P] int32 or int64.
        repetition, frequency, presence: [P, 1] float32.
    """
    column = torch.arange(tokens.shape[1], device=tokens.device)
    is_known = column <= positions.unsqueeze(1)
    is_output = is_known & (column >= num_prompt_tokens.unsqueeze(1))
    token_ids = torch.where(is_known, tokens, logits.shape[1] - 1).long()
    counts = torch.zeros_like(logits).scatter_add_(1, token_ids, is_output.float())
    counts = counts.gather(1, token_ids)  # [P, L], as all below
    penalised = logits.gather(1, token_ids)
    penalised = torch.where(penalised > 0, penalised / repetition, penalised * repetition)
    penalised -= frequency * counts + presence * (counts > 0)
    logits.scatter_(1, token_ids, penalised)  # a token's every occurrence writes the same


class Penalties:
    """The penalties of P sequences, for as long as these are sampled together."""

    def __init__(self, seqs: Items[SampledSequence], device: torch.device) -> None:
        self.seqs = seqs
        params = [seq.sampling_params for seq in seqs]
        factors = np.array(
            [
                np.clip([p.repetition_penalty for p in params], 1 / MAX_REPETITION, MAX_REPETITION),
                [p.frequency_penalty for p in params],
                [p.presence_penalty for p in params],
            ],
            dtype=np.float32,
        )
        self.factors = upload_one(factors, device).unsqueeze(-1)  # [3, P, 1]
        numbers = [[seq.row for seq in seqs], [seq.num_prompt_tokens for seq in seqs]]
        self.rows, self.num_prompt_tokens = upload_one(np.array(numbers, dtype=np.int64), device)

    def apply(self, logits: torch.Tensor, positions: torch.Tensor, history: TokenHistory) -> None:
        """Change `logits` [P, W] float32 in place, see `apply_penalties`.

        The history is complete up to `positions` [P] int32; a sequence without penalties need not
        be in it.
        """
        length = max(seq.num_computed_tokens for seq in self.seqs)  # the largest position + 1
        tokens = history.tokens[:, :length].index_select(0, self.rows)
        apply_penalties(logits, tokens, positions, self.num_prompt_tokens, *self.factors)
