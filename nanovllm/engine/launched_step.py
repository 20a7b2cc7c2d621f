"""A step that runs on the device: what the host waits for, and what the sequences get of it."""

from typing import TYPE_CHECKING

from nanovllm.engine.copies import Download
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_plan import StepPlan
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


class LaunchedStep:
    """A step on its way: its sequences and the tokens that it samples."""

    def __init__(
        self,
        seqs: list[Sequence],
        plan: StepPlan,
        download: Download | None,
        extras: StepExtras,
        seconds: float,
    ) -> None:
        self.seqs = seqs
        self.plan = plan  # the sequences' own numbers move on with the next step
        self.download = download
        self.extras = extras
        self.seconds = seconds  # spent on the launch; on the CPU that is the whole computation

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self.download is None or self.download.is_done()

    def wait(self) -> list[int | None]:
        """The token sampled for each sequence, None where a prompt is not complete yet.

        For a sequence that is pooled it means nothing.
        """
        token_ids = self.download.wait() if self.download else []
        if not self.plan.is_prefill:
            return list(token_ids)
        sampled = iter(token_ids)
        return [next(sampled) if samples else None for samples in self.plan.samples]
