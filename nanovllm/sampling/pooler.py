"""Hidden states for sequences that are pooled: prefilled, and ended without a token.

A sequence's `pooler` makes of its last token's final hidden state what the sequence keeps.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nanovllm.engine.sequence import Sequence


class HiddenStatesDownload:
    """The last tokens' hidden states of a prefill step on their way to the host.

    Args:
        seqs: the N sequences that the step completes; not all of them need be pooled.
        hidden_states: [N, hidden_size], after the final norm.
    """

    def __init__(self, seqs: "list[Sequence]", hidden_states: torch.Tensor) -> None:
        self._seqs = seqs
        self._rows = hidden_states.float()
        self._event: torch.cuda.Event | None = None
        if hidden_states.is_cuda:
            # Memory of its own, given back to torch's allocator of pinned memory.
            pinned = torch.empty(self._rows.shape, dtype=torch.float32, pin_memory=True)
            self._rows = pinned.copy_(self._rows, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def keep(self) -> None:
        """Wait, and pool the sequences that have not ended."""
        if self._event is not None:
            self._event.synchronize()
        for seq, row in zip(self._seqs, self._rows.numpy(), strict=True):
            if seq.pooler is not None and not seq.is_finished:
                try:
                    seq.pooled = seq.pooler(row)
                except BaseException as error:
                    seq.note_error(error)
