"""Step consumers: each makes something of a step beside its plain tokens.

They run on every rank, launched behind the model without waiting for anything. Rank 0 alone knows
the sequences. What a consumer has for them travels to the host and is committed with the step.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.sequence import Sequence, Wants
from nanovllm.engine.sequence_errors import note_error
from nanovllm.errors import is_fault
from nanovllm.kernels import row_state
from nanovllm.kernels.copies import Download, upload_one
from nanovllm.kernels.ops import Ops
from nanovllm.layers.embedding import ParallelLMHead
from nanovllm.models.lora import AdapterModel
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.sampling.logits_sampler import LogitsSampler
from nanovllm.sampling.logprobs import LogprobsDownload, logprob_tensors
from nanovllm.sampling.request_processors import EditReport

PROMPT_LOGITS_ROWS = 256  # prompt tokens whose logits are in memory at once


@contextmanager
def errors_kept(step: LaunchedStep) -> Iterator[None]:
    """Leave what fails on rank 0 for the commit: the other ranks wait for the rest of the step.

    All sequences begin anew then.
    """
    try:
        yield
    except BaseException as error:
        if not is_fault(error):
            raise
        step.error = error


class StepConsumer(ABC):
    """Something that steps give beside plain tokens, to the sequences that want it."""

    @abstractmethod
    def run(self, step: LaunchedStep, values: torch.Tensor) -> None:
        """Work on the device's `values` of a step that has such sequences."""

    def release(self) -> None:  # noqa: B027 (most hold none)
        """Give back all memory; running sequences must begin anew."""


class LogitsProcessing(StepConsumer):
    """Samples the tokens that want more than a temperature, by the processors of `sampling`.

    Args:
        config: the engine's configuration.
        device: this rank's.
        tp: this rank's place among the ranks.
        ops: the backend.
        row_table: where the tokens are entered.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        tp: TensorParallel,
        ops: Ops,
        row_table: torch.Tensor,
    ) -> None:
        self.config = config
        self.device = device
        self.tp = tp
        self.ops = ops
        self.row_table = row_table
        self._sampler: LogitsSampler | None = None
        self._sent: np.ndarray = np.empty(0, dtype=np.int32)  # what the two tensors hold
        self._rows: torch.Tensor
        self._indices: torch.Tensor

    def run(self, step: LaunchedStep, values: torch.Tensor) -> None:
        """Sample the A rows with `Wants.LOGITS` on rank 0, and enter their tokens on every rank.

        values: [B, V] this rank's logits of all sampled rows.
        """
        plan, seqs, token_ids = step.plan, step.seqs, step.token_ids
        assert token_ids is not None
        rows, wants = plan.rows, plan.wants
        if plan.is_prefill:
            is_last = plan.is_last != 0
            rows, wants = rows[is_last], wants[is_last]
            seqs = [seq for seq in seqs if seq.is_prefilled]
        numbers = np.flatnonzero(wants & Wants.LOGITS).astype(np.int32)
        if not len(numbers):
            return  # their prompts are not complete
        own_rows, indices = self._upload(rows[numbers], numbers)
        logits = values
        if len(numbers) < len(logits):
            logits = logits.index_select(0, indices)
        if step.positions is not None:
            positions = step.positions.index_select(0, indices)
        else:  # the input is the row's last token
            positions = self.row_table[:, row_state.LENGTH].index_select(0, own_rows) - 1
        logits = self.tp.gather(logits)
        tokens = torch.zeros_like(own_rows)
        if self.tp.rank == 0:
            with errors_kept(step):
                seqs = [seqs[i] for i in numbers]
                sampler = self._get_sampler()
                if plan.is_prefill:
                    sampler.begin(seqs)
                sampled = sampler.sample(logits, seqs, positions)
                tokens = sampled.token_ids
                if sampled.report.maxima:
                    maxima = Download(torch.cat(sampled.report.maxima))
                    step.commits.append(partial(_note_errors, seqs, sampled.report, maxima))
                for tensors in sampled.logprobs:
                    step.commits.append(partial(_keep_logprobs, seqs, tensors.download()))
            if step.error is not None:
                self.release()
        self.tp.broadcast(tokens)
        token_ids.index_copy_(0, indices, tokens)
        self.ops.write_back(self.row_table, own_rows, tokens, positions)

    def release(self) -> None:
        """See `StepConsumer.release`."""
        self._sampler = None
        if self.config.engine_processors is not None:
            self.config.engine_processors.restart()

    def _upload(self, rows: np.ndarray, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """[A] int32 and [A] int64 on the device; a decode batch that stays is uploaded once."""
        packed = np.concatenate([rows, numbers])
        if not np.array_equal(packed, self._sent):
            self._rows, new_indices = upload_one(packed, self.device).view(2, -1)
            self._indices, self._sent = new_indices.long(), packed
        return self._rows, self._indices

    def _get_sampler(self) -> LogitsSampler:
        """Made when the first request needs it: what it holds takes memory."""
        if self._sampler is None:
            config = self.config
            self._sampler = LogitsSampler(
                self.ops,
                self.device,
                config.model_config.vocab_size,
                config.max_num_seqs,
                config.max_model_len,
                config.engine_processors,
            )
        return self._sampler


class PromptLogprobs(StepConsumer):
    """The log probabilities of prompt tokens.

    Args:
        config: the engine's configuration.
        tp: this rank's place among the ranks.
        lm_head: the model's.
        adapters: the rank's, if it takes any.
    """

    def __init__(
        self,
        config: Config,
        tp: TensorParallel,
        lm_head: ParallelLMHead,
        adapters: AdapterModel | None = None,
    ) -> None:
        self.vocab_size = config.model_config.vocab_size
        self.tp = tp
        self.lm_head = lm_head
        self.adapters = adapters

    def run(self, step: LaunchedStep, values: torch.Tensor) -> None:
        """The logprobs of the prompt tokens that follow the step's.

        values: [T, hidden_size] hidden states of all tokens.
        """
        plan = step.plan
        ends = np.cumsum(plan.lengths)
        for number in np.flatnonzero(plan.wants & Wants.PROMPT):
            start, first = int(plan.starts[number]), int(ends[number] - plan.lengths[number])
            count = int(plan.lengths[number] - plan.is_last[number])  # nothing follows the last
            for offset in range(0, count, PROMPT_LOGITS_ROWS):
                size = min(PROMPT_LOGITS_ROWS, count - offset)
                tokens = slice(first + offset, first + offset + size)
                with nullcontext() if self.adapters is None else self.adapters.step.reading(tokens):
                    logits = self.tp.gather(self.lm_head(values[tokens]))
                if self.tp.rank != 0 or step.error is not None:
                    continue
                with errors_kept(step):
                    seq, next_position = step.seqs[number], start + offset + 1
                    next_ids = seq.token_ids[next_position : next_position + size]
                    wanted = [seq.sampling_params.prompt_logprobs] * size
                    own_ids = upload_one(np.array(next_ids, dtype=np.int32), logits.device)
                    tensors = logprob_tensors(logits[:, : self.vocab_size], own_ids, wanted)
                    commit = partial(_keep_prompt_logprobs, seq, tensors.download())
                    step.commits.append(commit)


def _note_errors(seqs: list[Sequence], report: EditReport, maxima: Download) -> None:
    """Let the sequences end whose logits processors failed, or left no token."""
    for index, error in (*report.failed, *report.unusable(maxima.wait()[0])):
        if not seqs[index].is_finished:
            note_error(seqs[index], error)


def _keep_logprobs(seqs: list[Sequence], download: LogprobsDownload) -> None:
    for seq, row in zip(seqs, download.rows(), strict=True):
        if row is not None and not seq.is_finished and seq.error is None:
            seq.features.logprobs.append(row)


def _keep_prompt_logprobs(seq: Sequence, download: LogprobsDownload) -> None:
    if not seq.is_finished:
        features = seq.features
        features.prompt_logprobs += [row for row in download.rows() if row is not None]
        if len(features.prompt_logprobs) == features.num_prompt_logprobs:
            seq.wants &= ~Wants.PROMPT
