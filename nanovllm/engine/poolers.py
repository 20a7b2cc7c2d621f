"""Step consumers that pool: hidden states of a prompt become one row, or one for each token.

A classification head is applied on the device, so that its few numbers travel and not the states.
"""

import numpy as np
import torch
from torch import Tensor, nn

from nanovllm.engine.consumers import StepConsumer, errors_kept
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.sequence import Sequence, Wants
from nanovllm.engine.sequence_errors import note_error
from nanovllm.kernels.copies import Download
from nanovllm.models.heads import PoolerHead, head_of


class LastTokenPooling(StepConsumer):
    """Pooling of the last hidden states of sequences that end without a token.

    Args:
        model: whose classification head is applied, if it has one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.head = PoolerHead(head_of(model))

    def run(self, step: LaunchedStep, values: Tensor) -> None:
        """Pool the sequences with `Wants.POOLING` alone that the step completes.

        values: [N, hidden_size] last hidden states of all sequences that it completes.
        """
        if not step.seqs:
            return  # not rank 0
        completed = [seq for seq in step.seqs if seq.is_prefilled]
        own = Wants.POOLING | Wants.STATES
        numbers = [i for i, seq in enumerate(completed) if seq.wants & own == Wants.POOLING]
        if not numbers:
            return
        with errors_kept(step):
            # All rows are taken, which are in one piece: others are few in a step that pools.
            download = Download(self.head(values))
            step.commits.append(lambda: _commit(download, numbers, completed))


class TokenPooling(StepConsumer):
    """Pooling of every hidden state of a prompt, also of one that comes in chunks.

    Args:
        model: whose classification head is applied, if it has one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.head = PoolerHead(head_of(model))

    def run(self, step: LaunchedStep, values: Tensor) -> None:
        """Take the states of the sequences with `Wants.STATES`; pool those that are complete.

        A sequence that begins anew begins at its first token: these never read the prefix cache.

        values: [T, hidden_size] hidden states of all tokens.
        """
        if not step.seqs:
            return  # not rank 0
        plan, ends = step.plan, np.cumsum(step.plan.lengths)
        rows: list[Tensor] = []
        seqs: list[Sequence] = []
        with errors_kept(step):
            for number in np.flatnonzero(plan.wants & Wants.STATES):
                seq, end = step.seqs[number], int(ends[number])
                own = values[end - int(plan.lengths[number]) : end]
                is_first, is_last = plan.starts[number] == 0, bool(plan.is_last[number])
                if seq.features.pooling_type == "ALL":
                    self._take_all(step, seq, own, is_first, is_last)
                    continue
                row = _accumulate(seq, own, is_first)
                if is_last:
                    rows.append(row)
                    seqs.append(seq)
            if rows:
                download = Download(self.head(torch.stack(rows)))
                step.commits.append(lambda: _commit(download, range(len(seqs)), seqs))

    def _take_all(
        self, step: LaunchedStep, seq: Sequence, states: Tensor, is_first: bool, is_last: bool
    ) -> None:
        """states [n, hidden_size] of a chunk go to the host, to be joined with the last."""
        download = Download(self.head(states))
        downloads: list[Download] = [] if is_first else seq.features.pooling_state
        seq.features.pooling_state = downloads = [*downloads, download]

        def commit() -> None:
            _finish(seq, np.concatenate([part.wait()[0] for part in downloads]))

        if is_last:
            seq.features.pooling_state = None
            step.commits.append(commit)


def _accumulate(seq: Sequence, states: Tensor, is_first: bool) -> Tensor:
    """float32 [hidden_size], of a prompt up to the chunk with these states [n, hidden_size].

    The sum of a mean stays on the device between the chunks.
    """
    features = seq.features
    if features.pooling_type == "CLS":
        row = states[0].float() if is_first else features.pooling_state
    else:
        row = states.sum(0, dtype=torch.float32)
        row = row if is_first else features.pooling_state + row
    features.pooling_state = None if seq.is_prefilled else row
    is_mean = features.pooling_type == "MEAN" and seq.is_prefilled
    return row / seq.num_prompt_tokens if is_mean else row


def _commit(download: Download, numbers: "range | list[int]", seqs: list[Sequence]) -> None:
    """Give the sequences of these numbers the rows that have arrived."""
    [rows] = download.wait()
    for number in numbers:
        _finish(seqs[number], rows[number])


def _finish(seq: Sequence, values: np.ndarray) -> None:
    """Let the sequence's pooler make its result of [width] or [n, width]."""
    if seq.is_finished:
        return
    assert seq.features.pooler is not None
    try:
        seq.features.pooled = seq.features.pooler(values)
    except BaseException as error:
        note_error(seq, error)
