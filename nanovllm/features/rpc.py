"""Calls on every worker: rank 0's model runner in this process, the others' in theirs."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.errors import ArgumentError, shown
from nanovllm.guards.interrupts import DeferredInterrupt
from nanovllm.validation import check_number


def checked_call(
    method: str | Callable[..., Any],
    timeout: float | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None,
) -> tuple[float | None, tuple[Any, ...], dict[str, Any]]:
    """Timeout and arguments of a call as it is made; ArgumentError if one of them is wrong."""
    if not isinstance(method, str) and not callable(method):
        raise ArgumentError(f"method must be a method's name or a callable, got {shown(method)}")
    if timeout is not None:
        timeout = check_number("timeout", timeout, "seconds > 0", lambda seconds: seconds > 0)
    if not isinstance(args, (tuple, list)):
        raise ArgumentError(f"args must be a tuple of arguments, got {shown(args)}")
    kwargs = {} if kwargs is None else kwargs
    if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        raise ArgumentError(f"kwargs must be a dict of names and values, got {shown(kwargs)}")
    return timeout, tuple(args), kwargs


def call_ranks(
    llm: LLMEngine,
    method: str | Callable[..., Any],
    timeout: float | None = None,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> list[Any]:
    """`Executor.collective_rpc` between two steps; ends the engine if the ranks cannot go on."""
    llm.check_ready()
    llm.drain()
    executor = llm.executor
    with DeferredInterrupt(), llm.owner.stepping() if executor.has_busy_ranks else nullcontext():
        try:
            return executor.collective_rpc(method, timeout, args, kwargs or {})
        except BaseException:
            if executor.cause_of_death is not None:
                llm.exit()
            raise


def apply_model(llm: LLMEngine, func: Callable[[nn.Module], Any]) -> list[Any]:
    """`func(model)` on every rank's model; results and errors are those of `collective_rpc`.

    `llm.apply_model(print)` shows the tree of modules on each.
    """
    if not callable(func):
        raise ArgumentError(f"func must be a callable, got {shown(func)}")
    return call_ranks(llm, _apply_to_model, args=(func,))


def _apply_to_model(runner: ModelRunner, func: Callable[[nn.Module], Any]) -> Any:
    return func(runner.model)
