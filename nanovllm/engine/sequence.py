"""One completion's state on the host: its tokens, how far they are computed, its blocks."""

from enum import Enum, auto

from nanovllm.sampling.state import FeatureState, FinishRule
from nanovllm.sampling_params import SamplingParams


class SequenceStatus(Enum):
    """Where a sequence is in its life."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Wants:
    """The bits of `Sequence.wants`: what the engine does for it beside computing a plain token."""

    LOGITS = 1  # its token is sampled by the logits processors instead of the fast path
    CONFIRMED = 2  # it is computed only when no token of it is pending
    PROMPT = 4  # every hidden state of its prompt: cached blocks cannot stand in for them
    POOLING = 8  # its last hidden state, and no token: it ends when it is prefilled
    STATES = 16  # with POOLING: every hidden state of its prompt; it skips the prefix cache


class Sequence:
    """A prompt and what has been generated after it.

    Tokens are confirmed (in `token_ids`), or pending: sampled on the device by a step that is
    launched and not yet committed. Positions below `num_computed_tokens` have their K/V in the
    cache, or will by the time any later launched step reads them (one stream orders all writes).

    Args:
        token_ids: the prompt; copied.
        sampling_params: how to sample and when to stop.
        request_id: the number of its request in the engine.
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
        request_id: int = 0,
        max_length: int | None = None,
        seed: int = 0,
        index: int = 0,
        priority: int = 0,
    ) -> None:
        self.sampling_params = params = sampling_params or SamplingParams()
        self.request_id, self.index = request_id, index
        self.seed, self.priority = seed, priority
        self.finish_reason: str | None = None  # "stop", "length" or "abort"
        self.stop_reason: int | str | None = None  # the stop string or id; None: EOS, or no stop
        self.error: BaseException | None = None  # what it raised: it ends with "abort"
        self.end_token_ids: frozenset[int] = frozenset()  # EOS and stop ids, set when queued
        self.finish_rules: list[FinishRule] = []  # beside EOS, stop ids and the length
        self.ending: tuple[str, str | None] | None = None  # of a rule, with the newest token
        self.wants = Wants.LOGITS if params.needs_logits else 0
        self.features = FeatureState()  # of what it wants
        self.token_ids = list(token_ids)
        self.num_prompt_tokens = len(token_ids)
        if max_length is None:
            if params.max_tokens is None:
                raise ValueError("max_length is required when max_tokens is None")
            max_length = self.num_prompt_tokens + params.max_tokens
        self.max_length = max_length
        # Of the leading full blocks: chain hash and packed tokens, made once.
        self.block_keys: list[tuple[int, bytes]] = []
        self.num_cached_tokens = 0  # tokens that the prefix cache spared at the last admission
        self.num_cached_prompt_tokens = 0  # the same at the first one, when there is only a prompt
        self.was_admitted = False  # once at least
        self.reset()

    def reset(self) -> None:
        """Back to waiting, nothing computed and nothing held; confirmed tokens stay."""
        self.status = SequenceStatus.WAITING
        self.row: int | None = None  # index in the device's row table while running
        self.block_table: list[int] = []
        self.further_tables: list[list[int]] = []  # of other cache groups than the first
        self.num_hashed_blocks = 0  # leading blocks of block_table that are in the prefix cache
        self.num_shared_tokens = 0  # tokens in blocks found in the cache: never written again
        # K/V of its first block that is not shared: (target unit, source unit, number of units).
        self.copies: list[tuple[int, int, int]] = []
        self.num_copied_tokens = 0  # by `copies`
        self.copied_tokens = b""  # these, packed
        self.num_prefill_tokens = len(self.token_ids)  # to compute before decoding (again)
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0  # tokens that the newest scheduled step computes
        self.num_pending_tokens = 0
        self.features.restart(self.num_completion_tokens)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.finish_reason is not None

    def reason_to_end(self, eos_token_ids: frozenset[int]) -> str | None:
        """Why it ends with its newest token; None: it goes on. Sets its stop reason."""
        if self.error is not None:
            return "abort"
        if self.ending is not None and self.ending[1] is not None:
            finish_reason, self.stop_reason = self.ending
            return finish_reason
        if self.num_completion_tokens > 0:
            params, token_id = self.sampling_params, self.token_ids[-1]
            if self.num_completion_tokens >= params.min_tokens and token_id in self.end_token_ids:
                is_eos = token_id in eos_token_ids and not params.ignore_eos
                self.stop_reason = None if is_eos else token_id
                return "stop"
        if self.ending is not None:
            return self.ending[0]
        return "length" if len(self.token_ids) >= self.max_length else None

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
    def may_read_prefix_cache(self) -> bool:
        """Whether cached blocks may stand in for computing the prompt's tokens."""
        return not (self.sampling_params.skip_reading_prefix_cache or self.wants & Wants.PROMPT)

    @property
    def is_prefilled(self) -> bool:
        """Whether all tokens known at admission are computed: from then on it decodes."""
        return self.num_computed_tokens >= self.num_prefill_tokens

    @property
    def num_tokens_with_pending(self) -> int:
        """Tokens once every launched step is committed (if none of them ends the sequence)."""
        return len(self.token_ids) + self.num_pending_tokens
