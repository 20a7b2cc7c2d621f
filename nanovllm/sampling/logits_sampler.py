"""Samples the sequences whose parameters go beyond the temperature.

vLLM's order: raw logprobs, masks and biases, logits processors, penalties, then argmax or
temperature, min_p, top_k, top_p, draw. Nothing waits for the device. Sequences that have filters
only are sampled from the model's own logits, without a copy. A draw depends on its own sequence
alone.
"""

from collections.abc import Sequence as Items
from typing import NamedTuple

import torch

from nanovllm.kernels.ops import Ops
from nanovllm.sampling.batch import Batch, DrawInputs, needs_history
from nanovllm.sampling.engine_processors import EngineProcessors
from nanovllm.sampling.history import TokenHistory
from nanovllm.sampling.logprobs import LogprobTensors, logprob_tensors
from nanovllm.sampling.request_processors import EditReport
from nanovllm.sampling.state import SampledSequence
from nanovllm.sampling.token_rules import TokenRules, compile_rules

MAX_EDITED_LOGITS = 2**24  # float32 copies of logits in memory at a time: 64 MiB


class Sampled(NamedTuple):
    """What a step gave E sequences."""

    token_ids: torch.Tensor  # [E] int32
    logprobs: list[LogprobTensors]  # each of some of the sequences
    report: EditReport


class LogitsSampler:
    """The sampler of rank 0; all its work goes to the current stream.

    Beside its results it takes some hundred MB at most while it runs (with penalties), and keeps
    [max_num_seqs, max_model_len] int32 once a sequence has penalties or bad words.

    Args:
        ops: `sample` and `filter_thresholds` are used.
        device: the logits'.
        vocab_size: number of token ids.
        max_num_seqs: rows that sequences may have.
        max_model_len: tokens of a sequence at most.
        engine_processors: the engine's logits processors.
    """

    def __init__(
        self,
        ops: Ops,
        device: torch.device,
        vocab_size: int,
        max_num_seqs: int,
        max_model_len: int,
        engine_processors: EngineProcessors | None = None,
    ) -> None:
        self.ops = ops
        self.device = device
        self.vocab_size = vocab_size
        self.history = TokenHistory(max_num_seqs, max_model_len, device)
        self.max_edited_rows = max(1, MAX_EDITED_LOGITS // max(vocab_size, max_model_len))
        self.processors = None
        if engine_processors is not None and engine_processors.is_batched:
            self.processors = engine_processors
            self.max_edited_rows = max_num_seqs  # they know the batch as a whole
        self._rules: list[TokenRules | None] = [None] * max_num_seqs  # of the sequence in each row
        self._batch: Batch | None = None
        self._previous_batch: Batch | None = None

    @torch.inference_mode()
    def begin(self, seqs: Items[SampledSequence]) -> None:
        """Take note of `seqs`, which have just got their rows and have no pending tokens.

        To be called before they are sampled for the first time, and again after a preemption.
        """
        with_history = []
        for seq in seqs:
            assert seq.row is not None
            rules = self._rules[seq.row] = compile_rules(seq, self.vocab_size)
            if needs_history(seq, rules):
                with_history.append(seq)
        if self.processors is not None:
            self.processors.begin(seqs)
        self.history.write(with_history)
        self._batch = self._previous_batch = None

    @torch.inference_mode()
    def sample(
        self, logits: torch.Tensor, seqs: Items[SampledSequence], positions: torch.Tensor
    ) -> Sampled:
        """Sample a token for each of `seqs`.

        Args:
            logits: [E, >= vocab_size], as the model gave them; not changed.
            seqs: E sequences; each one's `num_computed_tokens` is its position + 1.
            positions: [E] int32 on the device, index of the input token in its sequence.
        """
        batch, report = self._prepare(seqs), EditReport()
        if batch.draw is not None:
            token_ids = self._draw(logits, batch.draw, positions)
        else:
            token_ids = torch.empty(len(seqs), dtype=torch.int32, device=self.device)
        for edited in batch.edited:
            if edited.indices is None:
                own_logits = edited.edit(logits, positions, report)
                token_ids = self._draw(own_logits, edited.draw, positions)
                continue
            own_positions = positions.index_select(0, edited.indices)
            own_logits = edited.edit(logits.index_select(0, edited.indices), own_positions, report)
            own_ids = self._draw(own_logits, edited.draw, own_positions)
            token_ids.index_copy_(0, edited.indices, own_ids)
        if batch.next_places is not None:
            self.history.append(batch.next_places, positions, token_ids)
        return Sampled(token_ids, self._logprobs(logits, token_ids, batch), report)

    def _prepare(self, seqs: Items[SampledSequence]) -> Batch:
        """The batch of `seqs`: the last one, the one before, or a new one.

        Sequences with a grammar are in every other step only, so with them two batches alternate.
        """
        if self._batch is None or not self._batch.is_of(seqs):
            self._batch, self._previous_batch = self._previous_batch, self._batch
        if self._batch is None or not self._batch.is_of(seqs):
            self._batch = Batch(
                seqs,
                self._rules,
                self.history,
                self.vocab_size,
                self.max_edited_rows,
                self.device,
                self.processors,
            )
        return self._batch

    def _draw(
        self, logits: torch.Tensor, draw: DrawInputs, positions: torch.Tensor
    ) -> torch.Tensor:
        thresholds = None
        if draw.has_filters:
            thresholds = self.ops.filter_thresholds(
                logits, draw.temperatures, draw.top_k, draw.top_p, draw.min_p, self.vocab_size
            )
        _, token_ids = self.ops.sample(
            logits, draw.temperatures, draw.seeds, positions, 0, self.vocab_size, thresholds
        )
        return token_ids

    def _logprobs(
        self, logits: torch.Tensor, token_ids: torch.Tensor, batch: Batch
    ) -> list[LogprobTensors]:
        logits = logits[:, : self.vocab_size]
        found = []
        if (best := batch.best_logprobs).is_any:
            found.append(logprob_tensors(best.rows(logits), best.rows(token_ids), best.counts))
        if (chosen := batch.chosen_logprobs).is_any:
            rows, own_ids = chosen.rows(logits), chosen.rows(token_ids)
            found.append(logprob_tensors(rows, own_ids, chosen.counts, batch.chosen_ids))
        return found
