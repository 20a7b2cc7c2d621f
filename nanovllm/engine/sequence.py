"""One completion's state on the host: its tokens, how far they are computed, its blocks."""

from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from nanovllm.errors import describe, is_fault
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.inputs.detokenizer import OutputText
    from nanovllm.sampling.structured_outputs import Grammar


class SequenceStatus(Enum):
    """Where a sequence is in its life."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """A prompt and what has been generated after it.

    Tokens are confirmed (in `token_ids`), or pending: sampled on the device by a step that is
    launched and not yet committed. Positions below `num_computed_tokens` have their K/V in the
    cache, or will by the time any later launched step reads them (one stream orders all writes).

    Args:
        token_ids: the prompt; copied.
        sampling_params: how to sample and when to stop.
        seq_id: the request's number in its engine.
        max_length: tokens at which the sequence ends with reason "length", prompt included; None:
            the prompt plus `max_tokens`.
        seed: 64 bits that key the sampling of this sequence.
        index: which of the request's `n` completions this is.
        priority: the lower, the earlier under `scheduling_policy="priority"`.
    """

    def __init__(
        self,
        token_ids: list[int],
        sampling_params: SamplingParams | None = None,
        seq_id: int = 0,
        max_length: int | None = None,
        seed: int = 0,
        index: int = 0,
        priority: int = 0,
    ) -> None:
        self.sampling_params = sampling_params or SamplingParams()
        self.seq_id = seq_id
        self.seed = seed
        self.index = index
        self.priority = priority
        self.finish_reason: str | None = None  # "stop", "length" or "abort"
        self.stop_reason: int | str | None = None  # the stop string or id; None: EOS, or no stop
        self.error: BaseException | None = None  # what it raised: it ends with "abort"
        self.end_token_ids: frozenset[int] = frozenset()  # EOS and stop ids, set when queued
        # Whether its logits go through `sampling.RequestSampler` instead of the fast sampler.
        self.is_sampled_apart = self.sampling_params.is_sampled_apart
        self.bad_word_ids: list[list[int]] = []
        self.grammar: Grammar | None = None  # has accepted the confirmed tokens
        self.detokenizer: OutputText | None = None  # only where text decides when it stops
        self.logprob_rows: list[Any] = []  # of each completion token, if logprobs are wanted
        self.prompt_logprob_rows: list[Any] = []  # of each prompt token but the first
        # With it the sequence ends when it is prefilled, without a token. It makes `pooled` of the
        # last token's final hidden state: [hidden_size] float32, in memory that is reused.
        self.pooler: Callable[[Any], Any] | None = None
        self.pooled: Any = None
        self.token_ids = list(token_ids)
        self.num_prompt_tokens = len(token_ids)
        if max_length is None:
            if self.sampling_params.max_tokens is None:
                raise ValueError("max_length is required when max_tokens is None")
            max_length = self.num_prompt_tokens + self.sampling_params.max_tokens
        self.max_length = max_length
        self.block_hashes: list[int] = []  # chain hashes of the leading full blocks, computed once
        self.num_cached_tokens = 0  # tokens that the prefix cache spared at the last admission
        self.num_cached_prompt_tokens = 0  # the same at the first one, when there is only a prompt
        self.was_admitted = False  # once at least
        self.reset()

    def reset(self) -> None:
        """Back to waiting, nothing computed and nothing held; confirmed tokens stay."""
        self.status = SequenceStatus.WAITING
        self.row: int | None = None  # index in the device's row table while running
        self.block_table: list[int] = []
        self.num_hashed_blocks = 0  # leading blocks of block_table that are in the prefix cache
        self.num_shared_tokens = 0  # tokens in blocks found in the cache: never written again
        self.num_prefill_tokens = len(self.token_ids)  # to compute before decoding (again)
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0  # tokens that the newest scheduled step computes
        self.num_pending_tokens = 0
        # A commit that failed half-way may have kept the row of a token that was not.
        del self.logprob_rows[self.num_completion_tokens :]
        if self.wants_prompt_logprobs:
            self.prompt_logprob_rows = []  # parts of a prompt are no use: all anew

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.finish_reason is not None

    def note_error(self, error: BaseException) -> None:
        """It ends with "abort" because of `error`, or has ended so; Ctrl-C goes on.

        What the error's traceback refers to is not kept.
        """
        if not is_fault(error):
            raise error
        if self.error is None:
            self.error = error
            for name in ("__traceback__", "__cause__", "__context__"):
                BaseException.__setattr__(error, name, None)  # its class may forbid it
            self.stop_reason = describe(error)
            if self.is_finished:
                self.finish_reason = "abort"

    @property
    def num_tokens(self) -> int:
        """Confirmed tokens, prompt and completion."""
        return len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        """Confirmed tokens after the prompt."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt's ids, a new list."""
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def completion_token_ids(self) -> list[int]:
        """The ids generated so far, a new list."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt logprobs are asked for, of the first completion, and not complete yet."""
        return (
            self.sampling_params.prompt_logprobs is not None
            and self.index == 0
            and len(self.prompt_logprob_rows) < self.num_prompt_tokens - 1
        )

    @property
    def may_read_prefix_cache(self) -> bool:
        """Whether cached blocks may stand in for computing the prompt's tokens."""
        params = self.sampling_params
        return not (params.skip_reading_prefix_cache or self.wants_prompt_logprobs)

    @property
    def is_prefilled(self) -> bool:
        """Whether all tokens known at admission are computed: from then on it decodes."""
        return self.num_computed_tokens >= self.num_prefill_tokens

    @property
    def num_tokens_with_pending(self) -> int:
        """Tokens once every launched step is committed (if none of them ends the sequence)."""
        return len(self.token_ids) + self.num_pending_tokens
