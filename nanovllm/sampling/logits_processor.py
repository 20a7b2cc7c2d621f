"""vLLM's interface of logits processors that an engine has: its classes, by its names.

`LLM(logits_processors=[...])` takes subclasses of `LogitsProcessor`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, TypeVar

import torch

from nanovllm.config import VllmConfig
from nanovllm.sampling.request_processors import bind
from nanovllm.sampling_params import RequestLogitsProcessor, SamplingParams

State = TypeVar("State")


class MoveDirectionality(Enum):
    """Whether a request moves in the batch, or two change places."""

    UNIDIRECTIONAL = auto()
    SWAP = auto()


# The request's index, its parameters, its prompt's token ids, and those of its completion: a list
# that grows with it.
AddedRequest = tuple[int, SamplingParams, list[int] | None, list[int]]
MovedRequest = tuple[int, int, MoveDirectionality]  # from, to
RemovedRequest = int


@dataclass(frozen=True)
class BatchUpdate:
    """What changed in the batch: removed, then added, then moved.

    What is added or moved may replace a request at its index, which is not removed then.

    Attributes:
        batch_size: requests in the batch now, which have the indices below.
        removed: indices.
        added: new requests, and those that begin anew.
        moved: those that have another index now.
    """

    batch_size: int
    removed: Sequence[RemovedRequest]
    added: Sequence[AddedRequest]
    moved: Sequence[MovedRequest]


class LogitsProcessor(ABC):
    """Edits the logits of all requests of a batch.

    Args:
        vllm_config: the engine's configuration.
        device: that of the logits.
        is_pin_memory: whether host memory should be pinned.
    """

    @abstractmethod
    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool
    ) -> None: ...

    @classmethod  # noqa: B027 (most have nothing to check)
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for parameters of a request that are wrong."""

    @abstractmethod
    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The edited logits, float32 [batch_size, vocabulary]; may be changed in place."""

    @abstractmethod
    def is_argmax_invariant(self) -> bool:
        """Whether the most probable token stays: greedy requests go without it then."""

    @abstractmethod
    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Take note of the batch before each `apply`; None: the requests are those before."""


class AdapterLogitsProcessor(LogitsProcessor):
    """Makes logits processors of single requests, by what their parameters say."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.req_info: dict[int, Callable[[torch.Tensor], Any]] = {}  # by index

    @abstractmethod
    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        """What edits the logits of a request, see `SamplingParams.logits_processors`; or None."""

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """See `LogitsProcessor.update_state`."""
        process_dict_updates(self.req_info, batch_update, self._new_call)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """See `LogitsProcessor.apply`."""
        for index, call in self.req_info.items():
            logits[index] = call(logits[index])
        return logits

    def _new_call(
        self, params: SamplingParams, prompt: list[int] | None, output: list[int]
    ) -> Callable[[torch.Tensor], Any] | None:
        processor = self.new_req_logits_processor(params)
        return None if processor is None else bind(processor, prompt or [], output)


def process_dict_updates(
    req_entries: dict[int, State],
    batch_update: BatchUpdate | None,
    new_state: Callable[[SamplingParams, list[int] | None, list[int]], State | None],
) -> bool:
    """Bring a dict of states by index up to date; whether anything changed.

    new_state: makes one of a request's parameters, prompt and completion; None: it has none.
    """
    if batch_update is None:
        return False
    before = dict(req_entries)
    for index in batch_update.removed:
        req_entries.pop(index, None)
    for index, params, prompt, output in batch_update.added:
        req_entries.pop(index, None)
        state = new_state(params, prompt, output)
        if state is not None:
            req_entries[index] = state
    for source, target, direction in batch_update.moved:
        moved, replaced = req_entries.pop(source, None), req_entries.pop(target, None)
        if moved is not None:
            req_entries[target] = moved
        if replaced is not None and direction is MoveDirectionality.SWAP:
            req_entries[source] = replaced
    return req_entries.keys() != before.keys() or any(
        req_entries[index] is not before[index] for index in before
    )
