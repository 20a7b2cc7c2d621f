"""A step on its way through the device, and what the host gets of it."""

from collections.abc import Callable

import torch

from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_plan import StepPlan
from nanovllm.kernels.copies import Download


class LaunchedStep:
    """A step of one rank, launched without waiting for the device.

    Args:
        plan: its input; the sequences' own numbers move on with the next step.
        seqs: the plan's sequences on rank 0, none elsewhere.

    Attributes:
        token_ids: [B] int32 on the device, of the sequences whose last token the step computes;
            None if there are none.
        positions: [B] int32 on the device, of the last tokens of a prefill.
        commits: what the consumers have for the sequences: called in order, on the host, when the
            step is committed.
        error: what a consumer raised; `commit` raises it.
        seconds: spent on the launch; on the CPU that is the whole computation.
    """

    def __init__(self, plan: StepPlan, seqs: list[Sequence]) -> None:
        self.plan = plan
        self.seqs = seqs
        self.token_ids: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.commits: list[Callable[[], None]] = []
        self.error: BaseException | None = None
        self.seconds = 0.0
        self._download: Download | None = None

    def start_download(self) -> None:
        """Let the tokens travel to the host."""
        if self.token_ids is not None:
            self._download = Download(self.token_ids)

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._download is None or self._download.is_done()

    def wait(self) -> list[int | None]:
        """The token sampled for each sequence, None where a prompt is not complete yet.

        For a sequence that is pooled it means nothing.
        """
        token_ids = self._download.wait()[0].tolist() if self._download else []
        if not self.plan.is_prefill:
            return token_ids
        sampled = iter(token_ids)
        return [next(sampled) if is_last else None for is_last in self.plan.is_last]

    def commit(self) -> None:
        """Give the sequences what the consumers have for them; raises `error`."""
        if self.error is not None:
            raise self.error
        for commit in self.commits:
            commit()
