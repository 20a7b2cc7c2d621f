"""Samples, after a step's own sampler, the sequences that want more than a temperature.

Rank 0 alone knows their parameters: it gets the logits of all ranks and sends them the tokens. All
of it is launched behind the step (behind the graph, if there is one) without waiting for anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.launched_step import StepExtras
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_plan import StepPlan
from nanovllm.errors import is_fault
from nanovllm.kernels import row_state
from nanovllm.kernels.ops import Ops
from nanovllm.layers.embedding import ParallelLMHead
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.sampling.uploads import upload

if TYPE_CHECKING:
    from nanovllm.sampling.request_sampler import RequestSampler

PROMPT_LOGITS_ROWS = 256  # prompt tokens whose logits are in memory at once


class ApartSampler:
    """This rank's part in sampling the sequences of `StepPlan.apart`.

    Args:
        config: the engine's configuration.
        device: this rank's.
        tp: this rank's place among the ranks.
        ops: the backend.
    """

    def __init__(self, config: Config, device: torch.device, tp: TensorParallel, ops: Ops) -> None:
        self.config = config
        self.device = device
        self.tp = tp
        self.ops = ops
        self._request_sampler: RequestSampler | None = None
        self._sent: np.ndarray = np.empty(0, dtype=np.int32)  # what the two tensors hold
        self._rows: torch.Tensor
        self._indices: torch.Tensor

    def sample(
        self,
        plan: StepPlan,
        seqs: list[Sequence],
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        row_table: torch.Tensor,
        extras: StepExtras,
    ) -> None:
        """Sample the rows of `plan.apart` on rank 0, and enter their tokens on every rank.

        Args:
            plan: the step.
            seqs: its sequences; only rank 0 looks at them.
            logits: [B, V] this rank's logits of all sampled rows.
            token_ids: [B] int32 their tokens, where those of the A rows are replaced.
            row_table: where the step's own sampler has entered tokens, and these are entered.
            extras: where log probabilities go.
        """
        sampled_rows = plan.rows
        if plan.is_prefill:
            sampled_rows = plan.rows[plan.samples != 0]
            seqs = [seq for seq in seqs if seq.is_prefilled]
        rows, indices = self._upload(sampled_rows[plan.apart], plan.apart)
        if len(plan.apart) < len(logits):
            logits = logits.index_select(0, indices)
        # The step's sampler has entered a token: the length is two past the input's position.
        positions = row_table[:, row_state.LENGTH].index_select(0, rows) - 2
        logits = self.tp.gather(logits)
        tokens = torch.zeros_like(rows)
        if self.tp.rank == 0:
            with self._kept_in_step(extras):
                seqs = [seqs[i] for i in plan.apart]
                sampler = self._get_request_sampler()
                if plan.is_prefill:
                    sampler.begin(seqs)
                sampled = sampler.sample(logits, seqs, positions)
                tokens = sampled.token_ids
                if sampled.logprobs is not None:
                    extras.sampled = seqs, sampled.logprobs.download()
        self.tp.broadcast(tokens)
        token_ids.index_copy_(0, indices, tokens)
        self.ops.write_back(row_table, rows, tokens, positions)

    def compute_prompt_logprobs(
        self,
        plan: StepPlan,
        seqs: list[Sequence],
        hidden_states: torch.Tensor,
        lm_head: ParallelLMHead,
        extras: StepExtras,
    ) -> None:
        """The logprobs of the prompt tokens that follow the step's tokens, where they are wanted.

        hidden_states: [T, hidden_size].
        """
        ends = np.cumsum(plan.lengths)
        for number in np.flatnonzero(plan.prompt_logits):
            first = int(ends[number] - plan.lengths[number])
            start, count = int(plan.starts[number]), int(plan.prompt_logits[number])
            for offset in range(0, count, PROMPT_LOGITS_ROWS):
                size = min(PROMPT_LOGITS_ROWS, count - offset)
                chunk = hidden_states[first + offset : first + offset + size]
                logits = self.tp.gather(lm_head(chunk))
                if self.tp.rank != 0 or extras.error is not None:
                    continue
                with self._kept_in_step(extras):
                    seq, next_position = seqs[number], start + offset + 1
                    next_ids = seq.token_ids[next_position : next_position + size]
                    logprobs = self._get_request_sampler().prompt_logprobs(
                        logits, np.array(next_ids, dtype=np.int32), seq
                    )
                    extras.prompts.append((seq, logprobs.download()))

    def release(self) -> None:
        """Give back all memory; running sequences must begin anew."""
        self._request_sampler = None

    @contextmanager
    def _kept_in_step(self, extras: StepExtras) -> Iterator[None]:
        """Leave what fails on rank 0 for the commit: the other ranks wait for the rest of the step.

        All sequences begin anew then, so the sampler may be made anew as well.
        """
        try:
            yield
        except BaseException as error:
            if not is_fault(error):
                raise
            extras.error = error
            self.release()

    def _upload(self, rows: np.ndarray, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """[A] int32 and [A] int64 on the device; a decode batch that stays is uploaded once."""
        packed = np.concatenate([rows, indices])
        if not np.array_equal(packed, self._sent):
            self._rows, new_indices = upload(packed, self.device).view(2, -1)
            self._indices, self._sent = new_indices.long(), packed
        return self._rows, self._indices

    def _get_request_sampler(self) -> "RequestSampler":
        """Made when the first request needs it: what it holds takes memory."""
        if self._request_sampler is None:
            from nanovllm.sampling.request_sampler import RequestSampler

            self._request_sampler = RequestSampler(
                self.ops,
                self.device,
                self.config.model_config.vocab_size,
                self.config.max_num_seqs,
                self.config.max_model_len,
            )
        return self._request_sampler
