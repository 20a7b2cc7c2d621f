"""What the device needs to know of the sequences that are sampled together.

Built on the host and uploaded when the batch changes, then used step after step.
"""

from collections.abc import Sequence as Items

import numpy as np
import torch

from nanovllm.errors import is_fault
from nanovllm.kernels import row_state
from nanovllm.kernels.copies import upload_one
from nanovllm.sampling.engine_processors import EngineProcessors
from nanovllm.sampling.history import TokenHistory
from nanovllm.sampling.penalties import Penalties, has_penalties
from nanovllm.sampling.request_processors import EditReport
from nanovllm.sampling.state import SampledSequence
from nanovllm.sampling.token_masks import AllowedTokens, ForbiddenTokens, LogitBias
from nanovllm.sampling.token_rules import TokenRules

ALIGNMENT = 64  # of the width of logits that are edited


def needs_history(seq: SampledSequence, rules: TokenRules | None) -> bool:
    """Whether sampling `seq` depends on the tokens before."""
    return has_penalties(seq.sampling_params) or (rules is not None and rules.needs_history)


def edited_width(vocab_size: int) -> int:
    """Columns of edited logits. The last is no token's: what must not be written goes there."""
    return (vocab_size // ALIGNMENT + 1) * ALIGNMENT


class DrawInputs:
    """What the filters and the draw read of E sequences.

    is_elsewhere: which of them are to be skipped.
    is_scaled: whether the logits are divided by the temperatures already.
    """

    def __init__(
        self,
        seqs: Items[SampledSequence],
        is_elsewhere: Items[bool],
        device: torch.device,
        is_scaled: bool = False,
    ) -> None:
        params = [seq.sampling_params for seq in seqs]
        temperatures = [p.temperature for p in params]
        self.has_filters = False
        for i, p in enumerate(params):
            if is_elsewhere[i]:
                temperatures[i] = row_state.SKIPPED
            elif p.top_k or p.top_p < 1 or p.min_p:
                self.has_filters = True
        floats = [temperatures, [p.top_p for p in params], [p.min_p for p in params]]
        uploaded = upload_one(np.array(floats, dtype=np.float32), device)
        self.temperatures, self.top_p, self.min_p = uploaded  # [E] each
        self.true_temperatures = self.temperatures
        if is_scaled:
            self.temperatures = (self.temperatures > 0).float()
        self.top_k = upload_one(np.array([p.top_k for p in params], dtype=np.int32), device)
        seeds = np.array([seq.seed for seq in seqs], dtype=np.uint64)
        self.seeds = upload_one(seeds.view(np.int32).reshape(-1, 2), device)  # low and high words


class EditedRows:
    """P of the E sequences: those whose logits change before the draw, in a float32 copy.

    Args:
        seqs: all E.
        indices: which of them; those with a grammar first, then those with allowed ids.
        rules: of these P.
        history: the tokens of all running sequences.
        vocab_size: number of token ids.
        device: the logits'.
        engine_processors: these edit all P; None: there are none.
    """

    def __init__(
        self,
        seqs: Items[SampledSequence],
        indices: list[int],
        rules: Items[TokenRules | None],
        history: TokenHistory,
        vocab_size: int,
        device: torch.device,
        engine_processors: EngineProcessors | None = None,
    ) -> None:
        self.history = history
        self.vocab_size = vocab_size
        self.indices: torch.Tensor | None = None  # [P] int64; None: all of them, in order
        if indices != list(range(len(seqs))):
            self.indices = upload_one(np.array(indices, dtype=np.int64), device)
        self.width = edited_width(vocab_size)
        own = self.seqs = [seqs[i] for i in indices]
        self.engine_processors = engine_processors
        self.is_scaled = engine_processors is not None and engine_processors.has_invariant
        self.draw = DrawInputs(own, [False] * len(own), device, self.is_scaled)
        self.forbidden = ForbiddenTokens(own, rules, device)
        self.allowed = AllowedTokens(own, rules, vocab_size, device)
        self.bias = LogitBias(rules, self.width, device)
        self.numbers = indices
        self.processors = [(i, p) for i, seq in enumerate(own) if (p := seq.features.processors)]
        self.processed = [indices[i] for i, _ in self.processors]
        own_indices = [i for i, _ in self.processors]
        if engine_processors is not None:
            self.processed, own_indices = indices, list(range(len(own)))
        if self.processed:
            self.processed_indices = upload_one(np.array(own_indices, dtype=np.int64), device)
        self.forcible = [(i, s.features) for i, s in enumerate(own) if s.features.may_be_forced]
        self.penalties: Penalties | None = None
        if any(has_penalties(seq.sampling_params) for seq in own):
            self.penalties = Penalties(own, device)

    def edit(
        self, logits: torch.Tensor, positions: torch.Tensor, report: EditReport
    ) -> torch.Tensor:
        """The edited copy, float32 [P, width], of logits [P, >= vocab_size] at positions [P].

        What logits processors do wrong is left in `report`.
        """
        edited = torch.empty((len(logits), self.width), dtype=torch.float32, device=logits.device)
        edited[:, : self.vocab_size].copy_(logits[:, : self.vocab_size])
        # The forbidden first, as FORBIDDEN must not replace the -inf of what is not allowed.
        self.forbidden.apply(edited, positions, self.history)
        self.allowed.apply(edited)
        self.bias.apply(edited)
        self._process(edited[:, : self.vocab_size], report)
        if self.penalties is not None:
            self.penalties.apply(edited, positions, self.history)
        if self.is_scaled:
            self._process_scaled(edited[:, : self.vocab_size], report)
        self._force(edited)
        return edited

    def _force(self, logits: torch.Tensor) -> None:
        """Leave only the token that must come next, where there is one, in `logits` [P, W]."""
        forced = [(i, f.forced_token) for i, f in self.forcible if f.forced_token is not None]
        if forced:
            rows, token_ids = upload_one(np.array(forced, dtype=np.int64).T, logits.device)
            logits.index_fill_(0, rows, -torch.inf)
            logits[rows, token_ids] = 0.0

    def _process(self, logits: torch.Tensor, report: EditReport) -> None:
        """Let the requests' own processors, then the engine's, change `logits` [P, V] in place."""
        for index, processors in self.processors:
            try:
                processors.edit(logits[index])
            except BaseException as error:
                if not is_fault(error):
                    raise
                report.failed.append((self.numbers[index], error))
        if self.engine_processors is not None:
            self.slots = self.engine_processors.update(self.seqs)
            self.engine_processors.apply(logits, self.slots, is_invariant=False)
        if self.processed:
            report.check(self.processed, self.processed_indices, logits)

    def _process_scaled(self, logits: torch.Tensor, report: EditReport) -> None:
        """Divide by the temperatures what is drawn, and let argmax invariant processors edit it."""
        assert self.engine_processors is not None
        temperatures = self.draw.true_temperatures.unsqueeze(1)
        is_drawn = temperatures > 0
        scaled = logits / torch.where(is_drawn, temperatures, 1.0)
        self.engine_processors.apply(scaled, self.slots, is_invariant=True)
        logits.copy_(torch.where(is_drawn, scaled, logits))
        report.check(self.processed, self.processed_indices, logits)


class WantedLogprobs:
    """Which R of E sequences want log probabilities, and how many: `counts`, None for none."""

    def __init__(self, counts: list[int | None], device: torch.device) -> None:
        self.counts = counts
        wanting = [i for i, count in enumerate(counts) if count is not None]
        self.is_any = len(wanting) > 0
        self._indices: torch.Tensor | None = None  # [R] int64; None: all
        if 0 < len(wanting) < len(counts):
            self._indices = upload_one(np.array(wanting, dtype=np.int64), device)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of those that want them, [R, ...] of [E, ...]."""
        return tensor if self._indices is None else tensor.index_select(0, self._indices)


class Batch:
    """E sequences that are sampled together, as long as they keep their rows.

    Args:
        seqs: the sequences.
        rules_of_row: the rules of the sequence in each row.
        history: the tokens of all running sequences.
        vocab_size: number of token ids.
        max_edited_rows: rows of logits that are edited at once.
        device: the logits'.
        engine_processors: these edit all E; None: there are none.
    """

    def __init__(
        self,
        seqs: Items[SampledSequence],
        rules_of_row: Items[TokenRules | None],
        history: TokenHistory,
        vocab_size: int,
        max_edited_rows: int,
        device: torch.device,
        engine_processors: EngineProcessors | None = None,
    ) -> None:
        self.seqs = list(seqs)
        self.rows = [seq.row for seq in seqs]
        rules = [_rules_in_effect(seq, rules_of_row) for seq in seqs]
        is_edited = [
            engine_processors is not None
            or rule is not None
            or seq.features.grammar is not None
            or seq.features.processors is not None
            or seq.features.may_be_forced
            or has_penalties(seq.sampling_params)
            for seq, rule in zip(seqs, rules, strict=True)
        ]
        self.draw: DrawInputs | None = None  # of those that are not edited; None: all are
        if not all(is_edited):
            self.draw = DrawInputs(seqs, is_edited, device)
        edited = sorted(
            np.flatnonzero(is_edited).tolist(),
            key=lambda i: (
                seqs[i].features.grammar is None,
                not seqs[i].sampling_params.allowed_token_ids,
            ),
        )
        parts = [edited[i : i + max_edited_rows] for i in range(0, len(edited), max_edited_rows)]
        self.edited = [
            EditedRows(
                seqs,
                part,
                [rules[i] for i in part],
                history,
                vocab_size,
                device,
                engine_processors,
            )
            for part in parts
        ]
        self.next_places: torch.Tensor | None = None  # where the history goes on, if it is needed
        if any(needs_history(seq, rule) for seq, rule in zip(seqs, rules, strict=True)):
            self.next_places = history.next_places(seqs)
        params = [seq.sampling_params for seq in seqs]
        self.best_logprobs = WantedLogprobs(
            [None if p.logprob_token_ids else p.logprobs for p in params], device
        )
        ids = [p.logprob_token_ids for p in params]
        self.chosen_logprobs = WantedLogprobs([len(i) if i else None for i in ids], device)
        if self.chosen_logprobs.is_any:
            width = max(len(i) for i in ids if i)
            padded = [i + [0] * (width - len(i)) for i in ids if i]
            self.chosen_ids = upload_one(np.array(padded, dtype=np.int64), device)

    def is_of(self, seqs: Items[SampledSequence]) -> bool:
        """Whether these are the same sequences, in the same order and the same rows."""
        return self.seqs == seqs and self.rows == [seq.row for seq in seqs]


def _rules_in_effect(
    seq: SampledSequence, rules_of_row: Items[TokenRules | None]
) -> TokenRules | None:
    """The rules of `seq`, None once they change nothing any more."""
    assert seq.row is not None
    rules = rules_of_row[seq.row]
    return rules if rules and rules.end >= seq.num_computed_tokens else None
