"""The progress bar of `generate`."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

from tqdm.auto import tqdm

from nanovllm.errors import ArgumentError, shown

REDRAW_SECONDS = 0.1


def check_use_tqdm(use_tqdm: Any) -> None:
    """ArgumentError if `use_tqdm` is nothing that a `ProgressBar` takes."""
    if not (callable(use_tqdm) or use_tqdm is None or isinstance(use_tqdm, (bool, int))):
        raise ArgumentError(
            "use_tqdm must be True, False or a callable that makes a progress bar, got "
            + shown(use_tqdm)
        )


class ProgressBar:
    """A tqdm bar of finished requests, with the rates of the last prefill and decode steps.

    Args:
        use_tqdm: False: nothing is shown; a callable is used in place of tqdm.
        total: number of requests.
    """

    def __init__(self, use_tqdm: bool | Callable[..., Any], total: int) -> None:
        self.bar: Any = None
        if use_tqdm:
            factory = use_tqdm if callable(use_tqdm) else tqdm
            self.bar = factory(total=total, desc="Generating", dynamic_ncols=True)
        self.rates = {"Prefill": 0, "Decode": 0}
        self.last_redraw = perf_counter()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self._show_rates()
            self.bar.close()

    def update(self, num_finished: int, num_tokens: int, seconds: float) -> None:
        """Count a step: requests finished, `num_tokens` as `step` returns it, and its time."""
        if self.bar is None:
            return
        if num_tokens:
            kind = "Prefill" if num_tokens > 0 else "Decode"
            self.rates[kind] = int(abs(num_tokens) / max(seconds, 1e-9))
        if num_finished:
            self.bar.update(num_finished)
        now = perf_counter()
        if now - self.last_redraw > REDRAW_SECONDS:
            self.last_redraw = now
            self._show_rates()

    def _show_rates(self) -> None:
        self.bar.set_postfix({name: f"{rate}tok/s" for name, rate in self.rates.items()})
