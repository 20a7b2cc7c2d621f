"""Logits processors of single requests: callables on token ids and one row of logits."""

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from nanovllm.errors import shown
from nanovllm.sampling_params import RequestLogitsProcessor, takes_prompt

MAX_LOGIT = 1e30  # infinity would be no number after the filters


class OutputTokenIds(list[int]):
    """The tokens of a completion so far: a `FinishRule` that grows with them and ends nothing."""

    def on_token(self, token_id: int) -> None:
        """See `FinishRule.on_token`."""
        self.append(token_id)


class RequestProcessors:
    """The logits processors of one sequence.

    Args:
        makers: each gives a processor when the sequence begins, and again when it begins anew.
        prompt_token_ids: what they see of the prompt.
        output_token_ids: and of the completion, with which these grow.
    """

    def __init__(
        self,
        makers: list[Callable[[], RequestLogitsProcessor | None]],
        prompt_token_ids: list[int],
        output_token_ids: OutputTokenIds,
    ) -> None:
        self.makers = makers
        self.prompt_token_ids = prompt_token_ids
        self.output_token_ids = output_token_ids
        self._calls: list[tuple[str, Callable[[torch.Tensor], Any]]] | None = None

    def restart(self) -> None:
        """The sequence is computed anew."""
        self._calls = None

    def edit(self, logits: torch.Tensor) -> None:
        """Change the logits [V] float32 of the next token in place.

        Raises:
            TypeError: a processor returned no tensor.
            ValueError: it returned one of another shape, or not of floats.
        """
        if self._calls is None:
            processors = [made for make in self.makers if (made := make()) is not None]
            tokens = self.prompt_token_ids, self.output_token_ids
            self._calls = [(name_of(made), bind(made, *tokens)) for made in processors]
        edited = logits
        for name, call in self._calls:
            edited = checked_logits(name, call(edited), logits.shape)
        if edited is not logits:
            logits.copy_(edited)
        logits.clamp_(max=MAX_LOGIT)


def maker_of(processor: RequestLogitsProcessor) -> Callable[[], RequestLogitsProcessor]:
    """What a sequence calls to get a request's processor: its `clone`, as in vLLM, or itself."""
    clone = getattr(processor, "clone", None)
    return clone if callable(clone) else lambda: processor


def name_of(processor: object) -> str:
    """The name of a function, or of an object's class."""
    return getattr(processor, "__name__", type(processor).__name__)


def checked_logits(name: str, result: object, shape: torch.Size) -> torch.Tensor:
    """What a processor returned; TypeError or ValueError unless it is floats of that shape."""
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"logits processor {name} must return the logits, got {shown(result)}")
    if result.shape != shape or not result.is_floating_point():
        raise ValueError(
            f"logits processor {name} must return floats of shape {list(shape)}, got "
            f"{result.dtype} of shape {list(result.shape)}"
        )
    return result


def bind(
    processor: RequestLogitsProcessor, prompt: list[int], output: list[int]
) -> Callable[[torch.Tensor], Any]:
    """The processor with the tokens that it takes: a function of the logits [V] alone."""
    if _is_of_transformers(processor):
        return partial(_call_batched, processor, prompt, output)
    if takes_prompt(processor):
        return partial(processor, prompt, output)
    return partial(processor, output)


def _is_of_transformers(processor: object) -> bool:
    module = sys.modules.get("transformers.generation.logits_process")
    return module is not None and isinstance(processor, module.LogitsProcessor)


def _call_batched(
    processor: Callable[..., Any], prompt: list[int], output: list[int], logits: torch.Tensor
) -> Any:
    """As transformers calls it: with ids [1, prompt and completion] and scores [1, V]."""
    token_ids = torch.tensor([prompt + output], device=logits.device)
    scores = processor(token_ids, logits.unsqueeze(0))
    return scores.squeeze(0) if isinstance(scores, torch.Tensor) else scores


class EditReport:
    """What custom logits processors did in one step, beside editing: by numbers of sequences."""

    def __init__(self) -> None:
        self.failed: list[tuple[int, BaseException]] = []
        self.maxima: list[torch.Tensor] = []  # float32, the largest logits of `_checked`
        self._checked: list[int] = []

    def check(self, seqs: list[int], indices: torch.Tensor, logits: torch.Tensor) -> None:
        """Take note of the largest logit of some rows of `logits` [P, V], without waiting for it.

        A row that leaves no token, or holds NaN, becomes zeros, so that a token can be drawn.

        Args:
            seqs: C sequences.
            indices: [C] int64, their rows.
            logits: changed in place.
        """
        maxima = logits.index_select(0, indices).amax(1)
        is_usable = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        is_usable.index_copy_(0, indices, maxima > -torch.inf)
        logits.masked_fill_(~is_usable.unsqueeze(1), 0.0)
        self._checked += seqs
        self.maxima.append(maxima)

    def unusable(self, maxima: np.ndarray) -> Iterator[tuple[int, BaseException]]:
        """The sequences of which no token can be drawn, and why; `maxima` have arrived."""
        for seq, maximum in zip(self._checked, maxima.tolist(), strict=True):
            if math.isnan(maximum):
                yield seq, ValueError("logits processors left NaN among the logits")
            elif maximum == -math.inf:
                yield seq, ValueError("logits processors left no token: all logits are -inf")
