"""Calls on every worker: rank 0's model runner in this process, the others' in theirs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from nanovllm.errors import ArgumentError, EngineDeadError, shown
from nanovllm.guards.interrupts import DeferredInterrupt
from nanovllm.validation import check_number

if TYPE_CHECKING:
    from nanovllm.engine.model_runner import ModelRunner
    from nanovllm.llm import LLM


def collective_rpc(
    llm: "LLM",
    method: str | Callable[..., Any],
    timeout: float | None = None,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> list[Any]:
    """See `LLM.collective_rpc`."""
    llm._check_ready()
    runner, workers = llm.model_runner, llm._workers
    if isinstance(method, str):
        if not callable(getattr(runner, method, None)):
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
    llm._settle()
    with DeferredInterrupt():
        if workers is None:
            return [runner.call(method, *args, **kwargs)]
        llm._owner.is_stepping = True  # the ranks are busy: a function may not call the engine
        try:
            return workers.call(runner, method, tuple(args), kwargs, timeout)
        except BaseException as error:
            if workers.is_broken:
                is_death = isinstance(error, EngineDeadError)
                llm._cause_of_death = str(error) if is_death else f"a call failed: {error!r}"
                llm.exit()
            raise
        finally:
            llm._owner.is_stepping = False


def apply_model(llm: "LLM", func: Callable[[nn.Module], Any]) -> list[Any]:
    """See `LLM.apply_model`."""
    if not callable(func):
        raise ArgumentError(f"func must be a callable, got {shown(func)}")
    return collective_rpc(llm, _apply_to_model, args=(func,))


def _apply_to_model(runner: "ModelRunner", func: Callable[[nn.Module], Any]) -> Any:
    return func(runner.model)
