"""The logits processors that an engine has: loaded, and told of the batch as vLLM tells them."""

import importlib
from collections.abc import Callable
from collections.abc import Sequence as Items
from functools import cache, partial, reduce
from importlib.metadata import entry_points

import numpy as np
import torch

from nanovllm.config import Config, VllmConfig
from nanovllm.errors import ArgumentError, shown, shown_error
from nanovllm.kernels.copies import upload_one
from nanovllm.sampling.logits_processor import (
    AdapterLogitsProcessor,
    AddedRequest,
    BatchUpdate,
    LogitsProcessor,
    MoveDirectionality,
    MovedRequest,
)
from nanovllm.sampling.request_processors import MAX_LOGIT, checked_logits, name_of
from nanovllm.sampling.state import SampledSequence
from nanovllm.sampling_params import RequestLogitsProcessor, SamplingParams

ENTRY_POINTS = "nanovllm.logits_processors"  # vLLM's plugins are not loaded: nobody asked for them


def load_processors(config: Config, device: torch.device) -> "EngineProcessors | None":
    """Those of installed packages, then those that `LLM` was given; None: there are none.

    Raises:
        ArgumentError: one cannot be loaded or made, or the model generates nothing.
    """
    given = config.logits_processors or []
    if config.model_config.head is not None:
        if given:
            raise ArgumentError(
                f"logits_processors: {config.model_config.architectures[0]} has a classification "
                f"head and generates nothing, got {shown(given)}"
            )
        return None
    classes = [_loaded(path) for path in installed_paths()]
    classes += [_loaded(item) if isinstance(item, str) else _checked(item) for item in given]
    return EngineProcessors(classes, config, device) if classes else None


@cache
def installed_paths() -> list[str]:
    """Those of installed packages, as "module:Class"; read once."""
    return [entry.value for entry in entry_points(group=ENTRY_POINTS)]


def _loaded(path: str) -> type[LogitsProcessor]:
    """The class of "module:Class"."""
    module, _, name = path.partition(":")
    try:
        return _checked(reduce(getattr, name.split("."), importlib.import_module(module)))
    except ArgumentError:
        raise
    except Exception as error:
        raise ArgumentError(
            f'logits_processors: {shown(path)} cannot be loaded as "module:Class": '
            f"{type(error).__name__}: {shown_error(error)}"
        ) from error


def _checked(found: object) -> type[LogitsProcessor]:
    if isinstance(found, type) and issubclass(found, LogitsProcessor):
        return found
    hint = "; a function goes into SamplingParams(logits_processors=[...])"
    raise ArgumentError(
        f"logits_processors must be subclasses of LogitsProcessor, got {shown(found)}"
        + (hint if callable(found) and not isinstance(found, type) else "")
    )


class EngineProcessors:
    """One of each class, and the batch that they know.

    If all of them only make processors of single requests, these are called with their requests,
    and there is no batch. Else every request is in it: `is_batched`.

    Args:
        classes: in the order in which they edit.
        config: the engine's.
        device: the logits'.

    Raises:
        ArgumentError: one cannot be made.
    """

    def __init__(
        self, classes: list[type[LogitsProcessor]], config: Config, device: torch.device
    ) -> None:
        self.classes = classes
        self._config = config
        self._device = device
        self.restart()
        try:
            processors = self._get_processors()
        except Exception as error:
            raise ArgumentError(
                f"logits_processors: {type(error).__name__}: {shown_error(error)}"
            ) from error
        self._adapters = [p for p in processors if isinstance(p, AdapterLogitsProcessor)]
        self.is_batched = len(self._adapters) < len(classes) or not all(
            _is_plain(adapter) for adapter in self._adapters
        )
        self.has_invariant = self.is_batched and any(p.is_argmax_invariant() for p in processors)

    def restart(self) -> None:
        """Forget the batch, after an error, so that processors that know it are made anew."""
        self._processors: list[LogitsProcessor] | None = None
        self._members: list[SampledSequence] = []  # by their indices
        self._rows: list[int | None] = []  # theirs in the row table; None: they begin anew
        self._slots = np.empty(0, dtype=np.int64)  # of the newest step, and on the device

    def _get_processors(self) -> list[LogitsProcessor]:
        if self._processors is None:
            is_cuda = self._device.type == "cuda"
            self._processors = [
                cls(VllmConfig(self._config), self._device, is_cuda) for cls in self.classes
            ]
        return self._processors

    # ---- requests -----------------------------------------------------------------------------

    def validate(self, params: SamplingParams) -> None:
        """ArgumentError if a processor refuses the parameters of a request."""
        for cls in self.classes:
            try:
                cls.validate_params(params)
            except Exception as error:
                raise ArgumentError(f"{cls.__name__}: {shown_error(error)}") from error

    def makers(self, params: SamplingParams) -> list[Callable[[], RequestLogitsProcessor | None]]:
        """For a sequence of a request: what makes its own processors, when it begins.

        Raises:
            ArgumentError: a processor cannot be made.
        """
        found = []
        for adapter in [] if self.is_batched else self._adapters:
            make = partial(adapter.new_req_logits_processor, params)
            try:
                first = make()
            except Exception as error:
                raise ArgumentError(f"{name_of(adapter)}: {shown_error(error)}") from error
            if first is not None:
                found.append(_starting_with(first, make))
        return found

    # ---- the batch ----------------------------------------------------------------------------

    def begin(self, seqs: Items[SampledSequence]) -> None:
        """Take note of sequences that begin, or begin anew."""
        begun = set(map(id, seqs))
        for slot, member in enumerate(self._members):
            if id(member) in begun:
                self._rows[slot] = None

    def update(self, seqs: Items[SampledSequence]) -> torch.Tensor:
        """Tell the processors of the batch with P sequences of a step: their indices, int64 [P]."""
        ended = [
            slot
            for slot, (seq, row) in enumerate(zip(self._members, self._rows, strict=True))
            if row is None or seq.row != row
        ]
        known = {id(seq) for slot, seq in enumerate(self._members) if slot not in set(ended)}
        new = [seq for seq in seqs if id(seq) not in known]
        update = self._change(ended, new) if ended or new else None
        for processor in self._get_processors():
            processor.update_state(update)
        slot_of = {id(seq): slot for slot, seq in enumerate(self._members)}
        slots = np.array([slot_of[id(seq)] for seq in seqs], dtype=np.int64)
        if not np.array_equal(slots, self._slots):
            self._slots, self._uploaded_slots = slots, upload_one(slots, self._device)
        return self._uploaded_slots

    def _change(self, holes: list[int], new: list[SampledSequence]) -> BatchUpdate:
        """Fill the indices that are free with the new ones, then with the last ones."""
        members, rows = self._members, self._rows
        added: list[AddedRequest] = []
        removed: list[int] = []
        moved: list[MovedRequest] = []
        for seq in new:
            slot = holes.pop(0) if holes else len(members)
            members[slot : slot + 1], rows[slot : slot + 1] = [seq], [seq.row]
            prompt = seq.token_ids[: seq.num_prompt_tokens]
            output = seq.features.output_token_ids
            assert output is not None
            added.append((slot, seq.sampling_params, prompt, output))
        while holes:
            last = len(members) - 1
            if holes[-1] == last:
                removed.append(holes.pop())
            else:
                slot = holes.pop(0)
                members[slot], rows[slot] = members[last], rows[last]
                moved.append((last, slot, MoveDirectionality.UNIDIRECTIONAL))
            del members[last], rows[last]
        return BatchUpdate(len(members), removed, added, moved)

    def apply(self, logits: torch.Tensor, slots: torch.Tensor, is_invariant: bool) -> None:
        """Let those that are argmax invariant, or all others, edit P rows in place.

        Rows of requests that are not in the step are zeros.

        Args:
            logits: float32 [P, V].
            slots: of the rows, by `update`.
            is_invariant: which of them.
        """
        chosen = [p for p in self._get_processors() if p.is_argmax_invariant() is is_invariant]
        if not chosen:
            return
        batch = logits.new_zeros((len(self._members), logits.shape[1]))
        batch.index_copy_(0, slots, logits)
        shape = batch.shape
        for processor in chosen:
            batch = checked_logits(name_of(processor), processor.apply(batch), shape)
        logits.copy_(batch.index_select(0, slots)).clamp_(max=MAX_LOGIT)


def _is_plain(adapter: AdapterLogitsProcessor) -> bool:
    """Whether it does nothing but make the processors of requests, ahead of the temperature."""
    cls = type(adapter)
    return (
        cls.update_state is AdapterLogitsProcessor.update_state
        and cls.apply is AdapterLogitsProcessor.apply
        and not adapter.is_argmax_invariant()
    )


def _starting_with(
    first: RequestLogitsProcessor, make: Callable[[], RequestLogitsProcessor | None]
) -> Callable[[], RequestLogitsProcessor | None]:
    waiting = [first]
    return lambda: waiting.pop() if waiting else make()
