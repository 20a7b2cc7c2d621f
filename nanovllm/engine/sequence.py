"""One request's state on the host: its tokens, how far they are computed, the blocks it holds."""

from enum import Enum, auto

from nanovllm.sampling_params import SamplingParams


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
        seed: 64 bits that key the sampling of this request.
    """

    def __init__(
        self,
        token_ids: list[int],
        sampling_params: SamplingParams | None = None,
        seq_id: int = 0,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        self.sampling_params = sampling_params or SamplingParams()
        self.seq_id = seq_id
        self.seed = seed
        self.finish_reason: str | None = None  # "stop", "length" or "abort"
        self.token_ids = list(token_ids)
        self.num_prompt_tokens = len(token_ids)
        if max_length is None:
            if self.sampling_params.max_tokens is None:
                raise ValueError("max_length is required when max_tokens is None")
            max_length = self.num_prompt_tokens + self.sampling_params.max_tokens
        self.max_length = max_length
        self.block_hashes: list[int] = []  # chain hashes of the leading full blocks, computed once
        self.num_cached_tokens = 0  # tokens that the prefix cache spared at the last admission
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

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.finish_reason is not None

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
    def is_prefilled(self) -> bool:
        """Whether all tokens known at admission are computed: from then on it decodes."""
        return self.num_computed_tokens >= self.num_prefill_tokens

    @property
    def num_tokens_with_pending(self) -> int:
        """Tokens once every launched step is committed (if none of them ends the sequence)."""
        return len(self.token_ids) + self.num_pending_tokens
