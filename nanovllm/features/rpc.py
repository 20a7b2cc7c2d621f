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


def collective_rpc(
    llm: LLMEngine,
    method: str | Callable[..., Any],
    timeout: float | None = None,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> list[Any]:
    """Call a method on every worker, one for each rank, between two steps.

    Args:
        method: the name of a method of `ModelRunner`, or a callable, which gets the worker as
            its first argument: a `ModelRunner`, with `rank`, `model`, `device` and `config`.
            With several ranks callable and arguments are pickled: the callable must be defined
            at the top level of a module, and tensors travel by value.
        timeout: seconds for the workers to answer; None: for ever. The call on rank 0 runs in
            this process and is not broken off.
        args: positional arguments.
        kwargs: keyword arguments.

    Returns:
        The results in rank order. Tensors should be on the CPU.

    Raises:
        ArgumentError: there is no such method, or call or result cannot be pickled.
        TimeoutError: a worker has not answered in time; the engine has ended then.
        EngineDeadError: a worker died.
        Exception: what the call raised on the lowest rank where it failed; its cause shows the
            traceback on that rank. The engine stays usable, but a call that uses collectives
            must not fail on some ranks only: the others would wait for it.

    If the call changes the weights, call `reset_prefix_cache` after it.
    """
    if isinstance(method, str):
        if not callable(getattr(llm.model_runner, method, None)):
            raise ArgumentError(f"workers have no method {shown(method)}")
    elif not callable(method):
        raise ArgumentError(f"method must be a method's name or a callable, got {shown(method)}")
    if timeout is not None:
        timeout = check_number("timeout", timeout, "seconds > 0", lambda seconds: seconds > 0)
    if not isinstance(args, (tuple, list)):
        raise ArgumentError(f"args must be a tuple of arguments, got {shown(args)}")
    kwargs = {} if kwargs is None else kwargs
    if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
        raise ArgumentError(f"kwargs must be a dict of names and values, got {shown(kwargs)}")
    return call_ranks(llm, method, timeout, tuple(args), kwargs)


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
    return collective_rpc(llm, _apply_to_model, args=(func,))


def _apply_to_model(runner: ModelRunner, func: Callable[[nn.Module], Any]) -> Any:
    return func(runner.model)
