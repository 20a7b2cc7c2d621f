"""What is kept for a sequence that wants more than plain tokens, and what sampling sees of one.

Nothing here needs torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from nanovllm.lora_request import LoRARequest
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.sampling.request_processors import RequestProcessors
    from nanovllm.sampling.structured_outputs import Grammar


class LogprobRow(NamedTuple):
    """The log probabilities at one position, on the host."""

    token_ids: np.ndarray  # [1 + k] int32: the sampled (or the prompt's) token, then the k best
    logprobs: np.ndarray  # [1 + k] float32
    rank: int  # of the first: 1 + the number of tokens that are strictly more probable


def cumulative_logprob(rows: list[LogprobRow]) -> float:
    """The sum of the sampled tokens' log probabilities."""
    return sum(float(row.logprobs[0]) for row in rows)


@dataclass
class FeatureState:
    """What a sequence brings for the consumers of its steps, and what it has got of them.

    Args:
        grammar: has accepted the confirmed tokens.
        ids_without_text: tokens that end a text of structured outputs and are no part of it.
        output_token_ids: of the completion, as logits processors see them.
        processors: logits processors of the request's own.
        may_be_forced: whether `forced_token` is ever set.
        forced_token: the one that must come next.
        bad_word_ids: each word as its token ids.
        num_prompt_logprobs: how many prompt tokens want log probabilities.
        pooler: makes `pooled` of what was pooled: float32 [width], or [prompt tokens, width] with
            pooling type "ALL". The width is the hidden size, or that of the model's head.
        pooling_type: what is pooled of the hidden states of the prompt's tokens: the "LAST", the
            first ("CLS"), the "MEAN" or "ALL". Only "LAST" does without those of the others.
        pooling_state: of the chunks of the prompt so far, where it needs them.
        lora_request: its adapter; None: it has none.
        adapter_slot: 1 + the adapter's slot on the device while the sequence runs; 0: none.
        prefix_root: the prefix id before its first block. K/V is shared where it is equal.
    """

    grammar: "Grammar | None" = None
    ids_without_text: frozenset[int] = frozenset()
    output_token_ids: list[int] | None = None
    processors: "RequestProcessors | None" = None
    may_be_forced: bool = False
    forced_token: int | None = None
    bad_word_ids: list[list[int]] = field(default_factory=list)
    num_prompt_logprobs: int = 0
    pooler: Callable[[np.ndarray], Any] | None = None
    pooling_type: str = "LAST"
    pooling_state: Any = None
    pooled: Any = None
    lora_request: LoRARequest | None = None
    adapter_slot: int = 0
    prefix_root: int = 0
    logprobs: list[LogprobRow] = field(default_factory=list)  # of each completion token
    prompt_logprobs: list[LogprobRow] = field(default_factory=list)  # of each but the first

    def restart(self, num_completion_tokens: int) -> None:
        """The sequence is computed anew, with so many confirmed tokens."""
        if self.processors is not None:
            self.processors.restart()
        # A commit that failed half-way may have kept the row of a token that was not.
        del self.logprobs[num_completion_tokens:]
        if len(self.prompt_logprobs) < self.num_prompt_logprobs:
            self.prompt_logprobs.clear()  # parts of a prompt are no use


class SampledSequence(Protocol):
    """A running sequence, as far as sampling reads it."""

    row: int | None
    seed: int
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    end_token_ids: frozenset[int]
    sampling_params: SamplingParams
    features: FeatureState


class FinishRule(Protocol):
    """Something that follows a sequence's tokens and may end it: stop strings, a grammar."""

    def on_token(self, token_id: int) -> tuple[str, str | None] | None:
        """Take the newest token; the finish reason and the stop reason if it ends the sequence.

        An end without a stop reason yields to that of another rule, and to a stop token's.
        """
