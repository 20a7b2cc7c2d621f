"""vLLM's view of a rank: the worker that calls get, and attribute paths that lead to the model.

Trainers reach the model as `worker.model_runner.model` in a call on every rank, or from the engine
as `llm.llm_engine.model_executor.driver_worker.model_runner.model`.
"""

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.errors import ArgumentError, shown, shown_error
from nanovllm.features.rpc import call_ranks, checked_call
from nanovllm.features.weight_update import load_weights_on_rank

OWN_NAMES = ("rank", "device", "model", "config", "tp", "ops", "kv_cache")  # of each runner
INSTEAD = (
    "llm.apply_model(function) gives the model's module on every rank, llm.config the settings"
)


class LoadableModel:
    """A model's module with vLLM's `load_weights`; all else is the module's own.

    Attributes:
        load_weights: takes (name, tensor) pairs or a state dict, as `LLM.load_weights` does.
        module: the module itself.
    """

    def __init__(self, module: nn.Module, load: Callable[[Any], set[str]]) -> None:
        self.module, self.load_weights = module, load

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self.module)


class _View:
    """An object of vLLM's with a few of its attributes; the others are refused by name."""

    def __init__(self, kind: str, **attributes: Any) -> None:
        vars(self).update(attributes, _kind=kind)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = ", ".join(known for known in vars(self) if not known.startswith("_"))
        raise AttributeError(f"{self._kind} has no {name!r} here, but {known}; {INSTEAD}")


class WorkerView:
    """What vLLM's worker has beside what a `ModelRunner` has; mixed into it on every rank."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"the worker has no {name!r} here, but rank, local_rank, device, config, model_config, "
            f"model, model_runner and get_model; {INSTEAD}"
        )

    @property
    def local_rank(self: Any) -> int:
        """The rank: all are on this host."""
        return self.rank

    @property
    def model_config(self: Any) -> Any:
        """The engine's configuration."""
        return self.config

    @property
    def model_runner(self: Any) -> Any:
        """Has `model`, with a `load_weights` that loads this rank's part of whole tensors."""
        return _View(
            "the model runner",
            model=self.get_model(),
            device=self.device,
            model_config=self.config,
            kv_cache=self.kv_cache,
        )

    def get_model(self: Any) -> LoadableModel:
        """The same model."""
        return LoadableModel(self.model, lambda weights: load_weights_on_rank(self, weights))


def find_extension(qualified_name: str | None) -> type | None:
    """The class that `worker_extension_cls` names; None if there is none.

    Raises:
        ArgumentError: it is not there, or has a name that the worker has already.
    """
    if qualified_name is None:
        return None
    module, _, name = qualified_name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(
            f"worker_extension_cls {shown(qualified_name)} is not there: {shown_error(error)}"
        ) from error
    if not isinstance(found, type):
        raise ArgumentError(f"worker_extension_cls must be a class, got {shown(found)}")
    for name in dir(found):
        is_taken = hasattr(ModelRunner, name) or hasattr(WorkerView, name) or name in OWN_NAMES
        if is_taken and not name.startswith("__"):
            raise ArgumentError(
                f"worker_extension_cls {shown(qualified_name)}: the worker has an attribute "
                f"{name!r} of its own; rename it"
            )
    return found


def as_worker(runner: ModelRunner) -> None:
    """Give a rank's runner what `WorkerView` and the user's class have, once and for all."""
    if not isinstance(runner, WorkerView):
        extension = find_extension(runner.config.worker_extension_cls)
        bases = (type(runner), WorkerView, *([extension] if extension else []))
        runner.__class__ = type("Worker", bases, {})


def collective_rpc(
    llm: LLMEngine,
    method: str | Callable[..., Any],
    timeout: float | None = None,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> list[Any]:
    """Call a method on every worker, one for each rank of each replica, between two steps.

    Args:
        method: the name of a method of the worker, one of `worker_extension_cls` among them, or a
            callable, which gets the worker as its first argument. The worker is a `ModelRunner`,
            with `rank`, `local_rank`, `model`, `device`, `config`, and vLLM's `model_runner`, whose
            `model` has a `load_weights`. With several ranks or replicas callable and arguments are
            pickled: the callable must be defined at the top level of a module, and tensors travel
            by value.
        timeout: seconds for the workers to answer; None: for ever. Without replicas the call on
            rank 0 runs in this process and is not broken off.
        args: positional arguments.
        kwargs: keyword arguments.

    Returns:
        The results in rank order, those of replica 0 first. Tensors should be on the CPU.

    Raises:
        ArgumentError: there is no such method, or call or result cannot be pickled.
        TimeoutError: a worker has not answered in time; the engine has ended then.
        EngineDeadError: a worker died.
        Exception: what the call raised on the lowest rank where it failed; its cause shows the
            traceback on that rank. The engine stays usable, but a call that uses collectives
            must not fail on some ranks only: the others would wait for it.

    If the call changes the weights, call `reset_prefix_cache` after it.
    """
    timeout, args, kwargs = checked_call(method, timeout, args, kwargs)
    extension = find_extension(llm.config.worker_extension_cls)
    classes = (ModelRunner, WorkerView, extension)
    if isinstance(method, str) and not any(callable(getattr(c, method, None)) for c in classes):
        raise ArgumentError(f"workers have no method {shown(method)}")
    return call_ranks(llm, _call_worker, timeout, (method, args, kwargs))


def _call_worker(
    runner: ModelRunner,
    method: str | Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    as_worker(runner)
    return runner.call(method, *args, **kwargs)


def model_executor(
    llm: LLMEngine, load: Callable[[Any], set[str]], rpc: Callable[..., list[Any]]
) -> Any:
    """vLLM's `llm.llm_engine.model_executor`, as far as trainers use it.

    load, rpc: `LLM.load_weights`, which reaches every rank, and `LLM.collective_rpc`.
    """
    model = LoadableModel(llm.model_runner.model, load)
    of_rank_0 = {"device": llm.model_runner.device, "model_config": llm.config}
    runner = _View("the model runner", model=model, **of_rank_0)
    worker = _View("the worker", model_runner=runner, get_model=lambda: model, rank=0, **of_rank_0)
    vars(worker)["worker"] = worker  # vLLM's driver_worker wraps the worker
    return _View("the executor", driver_worker=worker, collective_rpc=rpc, shutdown=llm.exit)


def vllm_config(llm: LLMEngine) -> Any:
    """vLLM's `llm.llm_engine.vllm_config`, as far as scripts read it."""
    config = llm.config
    size = config.tensor_parallel_size
    return _View(
        "the configuration",
        model_config=config,
        parallel_config=_View("it", tensor_parallel_size=size, world_size=size, rank=0),
        cache_config=_View(
            "it",
            block_size=config.kvcache_block_size,
            num_gpu_blocks=llm.config.num_kvcache_blocks,
            gpu_memory_utilization=config.gpu_memory_utilization,
            cache_dtype=config.kv_cache_dtype,
            enable_prefix_caching=config.enable_prefix_caching,
        ),
        scheduler_config=_View(
            "it",
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            enable_chunked_prefill=config.enable_chunked_prefill,
        ),
    )


def engine_core(executor: Any) -> Any:
    """vLLM's `llm.llm_engine.engine_core`, as far as scripts use it.

    executor: what `model_executor` made.
    """

    def shutdown(timeout: float | None = None) -> None:
        executor.shutdown()

    core = _View("the engine core", model_executor=executor, shutdown=shutdown)
    vars(core)["engine_core"] = core  # in vLLM a client wraps it
    return core
