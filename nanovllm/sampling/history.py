"""The tokens of running sequences on the device, where sampling reads what came before.

A sampled token is entered before the host knows it, so the next step can be launched at once.
"""

from collections.abc import Sequence as Items
from itertools import chain

import numpy as np
import torch

from nanovllm.kernels.copies import upload_one
from nanovllm.sampling.state import SampledSequence


class TokenHistory:
    """`tokens` [max_num_seqs, max_model_len] int32: the token ids of a sequence in its row.

    Allocated with the first sequence that is written. Beyond a sequence's newest token a row holds
    anything.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, device: torch.device) -> None:
        self.shape = (max_num_seqs, max_model_len)
        self.device = device
        self._tokens: torch.Tensor | None = None

    @property
    def tokens(self) -> torch.Tensor:
        """[max_num_seqs, max_model_len] int32."""
        if self._tokens is None:
            self._tokens = torch.zeros(self.shape, dtype=torch.int32, device=self.device)
        return self._tokens

    def write(self, seqs: Items[SampledSequence]) -> None:
        """Enter the confirmed tokens of `seqs`, which have no pending ones."""
        if not seqs:
            return
        token_ids = np.fromiter(chain.from_iterable(seq.token_ids for seq in seqs), dtype=np.int32)
        places = [
            first + np.arange(len(seq.token_ids))
            for seq, first in zip(seqs, self._firsts(seqs), strict=True)
        ]
        self.tokens.view(-1).index_copy_(
            0, upload_one(np.concatenate(places), self.device), upload_one(token_ids, self.device)
        )

    def next_places(self, seqs: Items[SampledSequence]) -> torch.Tensor:
        """[E] int64 for `append`; valid while the sequences keep their rows."""
        return upload_one(self._firsts(seqs) + 1, self.device)

    def append(
        self, next_places: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor
    ) -> None:
        """Enter the tokens [E] int32 sampled behind the positions [E] int32."""
        self.tokens.view(-1).index_copy_(0, next_places + positions, token_ids)

    def _firsts(self, seqs: Items[SampledSequence]) -> np.ndarray:
        """[E] int64: where the rows of `seqs` begin in the flat table."""
        return np.array([seq.row for seq in seqs], dtype=np.int64) * self.shape[1]
