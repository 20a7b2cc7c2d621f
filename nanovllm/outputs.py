"""The outputs of requests.

A `RequestOutput` is nano-vLLM's dict of "text" and "token_ids" and carries vLLM's attributes, so
that scripts written for either read it.
"""

from collections.abc import Iterable, Iterator, MutableSequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NoReturn, overload

from nanovllm.lora_request import LoRARequest


@dataclass(slots=True)
class Logprob:
    """The log probability of one token at one position.

    Args:
        logprob: natural logarithm of the probability under the model alone: before temperature,
            penalties, masks and filters.
        rank: 1 for the most probable token.
        decoded_token: the text that it adds in the middle of a text, U+FFFD for a part of a
            character; None without detokenization.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class FlatLogprobs(MutableSequence[dict[int, Logprob]]):
    """Log probabilities of many positions without an object for each entry; vLLM's class.

    It reads as a list of dicts: an index makes the position's `{token id: Logprob}`, a slice is
    another FlatLogprobs. A prompt's first position is {}, where a list has None. Positions are
    added at its end only.

    Args:
        start_indices: where each position begins in the lists below.
        end_indices: where it ends, exclusive.
        token_ids: of each entry. A position has its own token first, then the most probable ones,
            so its own may be there twice; the later entry counts.
        logprobs: as `Logprob.logprob`.
        ranks: as `Logprob.rank`.
        decoded_tokens: as `Logprob.decoded_token`.
    """

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def append(self, value: dict[int, Logprob] | None) -> None:
        """Add one position; None has no entries."""
        entries = (value or {}).values()
        self.append_fast(
            value or {},
            [entry.logprob for entry in entries],
            [entry.rank for entry in entries],
            [entry.decoded_token for entry in entries],
        )

    def append_fast(
        self,
        token_ids: Iterable[int],
        logprobs: Iterable[float],
        ranks: Iterable[int | None],
        decoded_tokens: Iterable[str | None],
    ) -> None:
        """Add one position of as many entries as each of these has; ValueError if they differ."""
        entries = list(zip(token_ids, logprobs, ranks, decoded_tokens, strict=True))
        self.start_indices.append(len(self.token_ids))
        self.token_ids += (entry[0] for entry in entries)
        self.logprobs += (entry[1] for entry in entries)
        self.ranks += (entry[2] for entry in entries)
        self.decoded_tokens += (entry[3] for entry in entries)
        self.end_indices.append(len(self.token_ids))

    def extend(self, values: Iterable[dict[int, Logprob] | None]) -> None:
        """Add positions; those of another FlatLogprobs as they are."""
        if isinstance(values, FlatLogprobs):
            for position in range(len(values)):
                self.append_fast(*values._columns(position))
        else:
            for value in values:
                self.append(value)

    def __len__(self) -> int:
        return len(self.start_indices)

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob]: ...
    @overload
    def __getitem__(self, index: slice) -> "FlatLogprobs": ...
    def __getitem__(self, index: int | slice) -> "dict[int, Logprob] | FlatLogprobs":
        if isinstance(index, slice):
            selected = FlatLogprobs()
            for position in range(len(self))[index]:
                selected.append_fast(*self._columns(position))
            return selected
        token_ids, *values = self._columns(index)
        return dict(zip(token_ids, map(Logprob, *values), strict=True))

    def _columns(self, position: int) -> tuple[list[Any], ...]:
        part = slice(self.start_indices[position], self.end_indices[position])
        columns = (self.token_ids, self.logprobs, self.ranks, self.decoded_tokens)
        return tuple(column[part] for column in columns)

    def __iter__(self) -> Iterator[dict[int, Logprob]]:
        return (self[position] for position in range(len(self)))

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        raise TypeError("a position of FlatLogprobs cannot be set, only appended")

    def __delitem__(self, index: Any) -> NoReturn:
        raise TypeError("a position of FlatLogprobs cannot be deleted")

    def insert(self, index: int, value: Any) -> NoReturn:
        """Refused with a TypeError, as in vLLM."""
        raise TypeError("a position of FlatLogprobs cannot be inserted, only appended")


SampleLogprobs = FlatLogprobs | list[dict[int, Logprob]]  # vLLM's names, for annotations
PromptLogprobs = FlatLogprobs | list[dict[int, Logprob] | None]


@dataclass
class CompletionOutput:
    """One completion of a request.

    `routed_experts` of vLLM is None.

    Args:
        index: which of the request's `n` completions, from 0.
        text: what the completion adds to the text of the prompt, cut at a stop string.
        token_ids: all ids of the completion, never cut.
        cumulative_logprob: sum of the sampled tokens' log probabilities; None unless `logprobs`.
        logprobs: for each token a dict of token ids: the sampled one first, then the most probable.
            FlatLogprobs if `flat_logprobs`.
        finish_reason: "stop", "length", "repetition" or "abort"; None while it runs.
        stop_reason: the stop string or stop token id that ended it, or why it failed; None for EOS
            and all else.
        lora_request: the adapter of its request; None: it has none.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: LoRARequest | None = None
    routed_experts: ClassVar[None] = None

    def finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """When things happened to a request: seconds since the epoch, None until they do.

    Names of vLLM for the same: `queued_ts`, `first_token_ts`, `last_token_ts`, and
    `first_token_latency`. Its `scheduled_ts` is None.

    Args:
        arrival_time: it was queued.
        first_token_time: the first token of a completion was on the host.
        finished_time: the last completion ended.
    """

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    scheduled_ts: ClassVar[None] = None

    @property
    def queued_ts(self) -> float:
        """`arrival_time`."""
        return self.arrival_time

    @property
    def first_token_ts(self) -> float | None:
        """`first_token_time`."""
        return self.first_token_time

    @property
    def last_token_ts(self) -> float | None:
        """`finished_time`."""
        return self.finished_time

    @property
    def first_token_latency(self) -> float | None:
        """`time_to_first_token`."""
        return self.time_to_first_token

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def latency(self) -> float | None:
        """Seconds from arrival to the end."""
        return None if self.finished_time is None else self.finished_time - self.arrival_time


@dataclass
class EmbeddingOutput:
    """An embedding: `dimensions` numbers, or as many as the model's hidden size."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many numbers it has."""
        return len(self.embedding)


@dataclass
class ClassificationOutput:
    """A number for each label of the model, by `config.hf_config.id2label`: its probability."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """The number of labels."""
        return len(self.probs)


@dataclass
class ScoringOutput:
    """A score: a probability, or the cosine of two embeddings."""

    score: float


@dataclass(eq=False)
class PoolingOutput:
    """What was pooled: a float32 tensor on the CPU.

    Args:
        data: [width] of tasks "embed" and "classify", else [tokens, width]. The width is the
            number of dimensions, or of labels.
    """

    data: Any


@dataclass
class EmbeddingRequestOutput:
    """An output of `LLM.embed`, of one prompt.

    Args:
        request_id: the request's number in its engine, as a string.
        outputs: its embedding.
        prompt_token_ids: its token ids.
        finished: whether it has ended; True.
        num_cached_tokens: prompt tokens that the prefix cache spared.
    """

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int | None = None


@dataclass
class ClassificationRequestOutput:
    """An output of `LLM.classify`, of one prompt.

    Args:
        request_id: the request's number in its engine, as a string.
        outputs: its probabilities.
        prompt_token_ids: its token ids.
        finished: whether it has ended; True.
        num_cached_tokens: prompt tokens that the prefix cache spared.
    """

    request_id: str
    outputs: ClassificationOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int | None = None


@dataclass
class PoolingRequestOutput:
    """An output of `LLM.encode` or `LLM.reward`, of one prompt.

    Args:
        request_id: the request's number in its engine, as a string.
        outputs: what was pooled.
        prompt_token_ids: its token ids.
        finished: whether it has ended; True.
        num_cached_tokens: prompt tokens that the prefix cache spared.
    """

    request_id: str
    outputs: PoolingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int | None = None


@dataclass
class ScoringRequestOutput:
    """An output of `LLM.score`, of one pair.

    Args:
        request_id: the request's number in its engine, as a string; "a_b" if the two texts were
            requests of their own.
        outputs: its score.
        prompt_token_ids: the token ids; of two requests one after the other.
        finished: whether it has ended; True.
        num_cached_tokens: prompt tokens that the prefix cache spared.
    """

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int | None = None


class RequestOutput(dict[str, Any]):
    """The result of a request: a dict of exactly "text" and "token_ids", those of `outputs[0]`.

    `output["finish_reason"]`, or any other attribute's name of this class or of `outputs[0]`, reads
    as well (by `get` too), but is no item: `==`, `set`, `json.dumps` and `{**output}` see the two.

    Args:
        request_id: the request's number in its engine, as a string.
        prompt: its text; None if token ids were given.
        prompt_token_ids: its token ids.
        prompt_logprobs: for each prompt token a dict as in `CompletionOutput.logprobs`, for the
            first None; None unless asked for. FlatLogprobs if `flat_logprobs`.
        outputs: its completions by index, one at least.
        finished: whether all of them have ended.
        metrics: its times.
        num_cached_tokens: prompt tokens that the prefix cache spared.
        error: what made it fail, as "OverflowError: ..."; its finish reason is "abort" then. None
            otherwise.
        lora_request: its adapter; None: it has none.

    `encoder_prompt`, `encoder_prompt_token_ids`, `kv_transfer_params` and
    `multi_modal_placeholders` of vLLM are None.
    """

    encoder_prompt: ClassVar[None] = None
    encoder_prompt_token_ids: ClassVar[None] = None
    kv_transfer_params: ClassVar[None] = None
    multi_modal_placeholders: ClassVar[None] = None

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        prompt_logprobs: PromptLogprobs | None,
        outputs: list[CompletionOutput],
        finished: bool,
        metrics: RequestMetrics | None = None,
        *,
        num_cached_tokens: int | None = None,
        error: str | None = None,
        lora_request: LoRARequest | None = None,
    ) -> None:
        super().__init__(text=outputs[0].text, token_ids=outputs[0].token_ids)
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.prompt_logprobs = prompt_logprobs
        self.outputs = outputs
        self.finished = finished
        self.metrics = metrics
        self.num_cached_tokens = num_cached_tokens
        self.error = error
        self.lora_request = lora_request

    def __missing__(self, key: str) -> Any:
        for attributes in (vars(self), vars(self.outputs[0])):
            if key in attributes:
                return attributes[key]
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        """`self[key]`, attributes included; `default` if there is neither."""
        try:
            return self[key]
        except KeyError:
            return default

    def to_dict(self) -> dict[str, Any]:
        """Everything as new plain dicts, lists, strings and numbers, which JSON can hold."""
        return _as_plain({**self, **vars(self)})

    def __repr__(self) -> str:
        attributes = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"RequestOutput({attributes})"


def _as_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_plain(item) for item in value]
    records = (CompletionOutput, FlatLogprobs, Logprob, LoRARequest, RequestMetrics)
    return asdict(value) if isinstance(value, records) else value
