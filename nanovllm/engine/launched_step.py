"""What a step computes beside its tokens."""

from typing import TYPE_CHECKING

from nanovllm.engine.sequence import Sequence
from nanovllm.sampling.pooler import HiddenStatesDownload

if TYPE_CHECKING:
    from nanovllm.sampling.logprobs import LogprobsDownload


class StepExtras:
    """What a step computes beside its tokens, on its way to the host."""

    def __init__(self) -> None:
        self.sampled: tuple[list[Sequence], LogprobsDownload] | None = None
        self.prompts: list[tuple[Sequence, LogprobsDownload]] = []
        self.hidden_states: HiddenStatesDownload | None = None
        # Raised on rank 0 between two collectives, which all ranks must reach all the same.
        self.error: BaseException | None = None

    def keep(self) -> None:
        """Wait, and give each sequence that has not ended what is its own; raises `error`."""
        if self.error is not None:
            raise self.error
        if self.hidden_states is not None:
            self.hidden_states.keep()
        for seq, download in self.prompts:
            if not seq.is_finished:
                seq.prompt_logprob_rows += download.rows()
        if self.sampled is not None:
            seqs, download = self.sampled
            for seq, row in zip(seqs, download.rows(), strict=True):
                if row is not None and not seq.is_finished:
                    seq.logprob_rows.append(row)
