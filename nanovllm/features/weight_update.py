"""New weights for a running engine, in place, as reinforcement learning wants them."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.errors import ArgumentError, shown
from nanovllm.features.prefix_cache import reset_prefix_cache
from nanovllm.features.rpc import call_ranks
from nanovllm.models.checkpoint import LM_HEAD
from nanovllm.models.loader import (
    FLOAT_DTYPES,
    expected_shapes,
    expected_tensors,
    is_ignored,
    load_tensor,
    shortened,
)


def load_weights(llm: LLMEngine, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Replace weights in place, all or some, as after a step of training.

    Args:
        weights: (name, tensor) pairs or a state dict, under the names and in the shapes of the
            model's checkpoint, whole dense tensors of 16, 32 or 64 bits on any device; each is
            converted to its parameter's dtype, and quantised where `quantization` quantises
            weights. `lm_head.weight` of a model with tied embeddings is left out.

    Returns:
        The names that were loaded.

    The prefix cache is emptied. Running requests go on with the new weights: the tokens they
    have stay, their K/V is computed anew.

    Raises:
        ArgumentError: a name is unknown, or a shape or type is wrong. Of a list or dict nothing
            is loaded then; what an iterator gave before stays loaded. Or the engine's own
            checkpoint is quantised and stays so: it takes no new weights.
    """
    check_weights_are_there(llm)
    _check_takes_weights(llm.config)
    shapes = call_ranks(llm, _shapes)[0]
    loaded = set()
    for name, tensor in _checked_items(shapes, weights, partial(_forget, llm)):
        if llm.executor.has_busy_ranks:
            # A compact copy: the other ranks get the tensor's bytes, and not the storage's. What is
            # quantised keeps its dtype, so as to be rounded once.
            is_quantized = llm.config.fp8_scales or llm.config.weight_format
            dtype = tensor.dtype if is_quantized else llm.config.resolve_dtype()
            tensor = tensor.detach().to("cpu", dtype, copy=True)
        call_ranks(llm, _load_on_rank, args=(name, tensor))
        loaded.add(name)
    return loaded


def reload_weights(llm: LLMEngine) -> None:
    """Load all weights from the model's directory again; as for `load_weights` otherwise."""
    check_weights_are_there(llm)
    reset_prefix_cache(llm, reset_running_requests=True)
    call_ranks(llm, "reload_weights")


def load_weights_on_rank(
    runner: ModelRunner, weights: Iterable[tuple[str, torch.Tensor]]
) -> set[str]:
    """As `load_weights`, on one rank: the caller gives every rank the whole tensors.

    The prefix cache stays as it is: `reset_prefix_cache` empties it.

    Raises:
        RuntimeError: the engine sleeps, and has dropped its weights.
    """
    first = next(iter(runner.model.parameters()))
    if first.untyped_storage().nbytes() < first.nbytes:  # as `features.offload` drops them
        raise RuntimeError("the weights sleep: call wake_up() or wake_up(['weights']) first")
    _check_takes_weights(runner.config)
    loaded = set()
    for name, tensor in _checked_items(_shapes(runner), weights):
        with runner.on_device():
            _load_on_rank(runner, name, tensor)
        loaded.add(name)
    return loaded


def check_weights(runner: ModelRunner, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ArgumentError if the model does not take tensors of these names and shapes."""
    _check_takes_weights(runner.config)
    expected = _shapes(runner)
    for name, shape in shapes.items():
        _check_item((name, torch.empty(shape, device="meta")), expected, is_there=False)


def _checked_items(
    shapes: dict[str, tuple[int, ...]], weights: Any, begin: Callable[[], object] = lambda: None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The pairs that the model takes, each checked; of a list or dict all before the first.

    begin: is called before the first.
    """
    if isinstance(weights, Mapping):
        weights = weights.items()
    try:
        items = iter(weights)
    except TypeError:
        raise ArgumentError(f"weights must be (name, tensor) pairs, got {shown(weights)}") from None
    if isinstance(weights, Collection):  # else each is checked when its turn comes
        for item in weights:
            _check_item(item, shapes)
    begin()
    for item in items:
        name, tensor = _check_item(item, shapes)
        if name in shapes:
            yield name, tensor


def _check_takes_weights(config: Config) -> None:
    quantization, weight_format = config.model_config.quantization, config.weight_format
    is_rounded = weight_format is not None and weight_format.is_on_load
    if quantization is not None and quantization.is_kept and not is_rounded:
        raise ArgumentError(
            f"load_weights does not take new weights for a checkpoint that is quantised "
            f"({quantization.method}); `quantization` with another checkpoint quantises what it is "
            "given"
        )


def _forget(llm: LLMEngine) -> None:
    reset_prefix_cache(llm, reset_running_requests=True)


def check_weights_are_there(llm: LLMEngine) -> None:
    """RuntimeError if the weights sleep."""
    llm.check_ready()
    if "weights" in llm.asleep:
        raise RuntimeError("the weights sleep: call wake_up() or wake_up(['weights']) first")


def _shapes(runner: ModelRunner) -> dict[str, tuple[int, ...]]:
    return expected_shapes(expected_tensors(runner.model))


def _load_on_rank(runner: ModelRunner, name: str, tensor: torch.Tensor) -> None:
    if runner.offload is not None:
        runner.offload.finish_copies()
    load_tensor(runner.model, name, tensor)
    runner.has_lm_head |= name == LM_HEAD


def _check_item(
    item: Any, shapes: dict[str, tuple[int, ...]], is_there: bool = True
) -> tuple[str, torch.Tensor]:
    if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[0], str):
        raise ArgumentError(f"weights must be (name, tensor) pairs, got {type(item).__name__}")
    name, tensor = item
    if name not in shapes:
        if is_ignored(name):
            return name, tensor
        raise ArgumentError(f"the model has no weight {name!r}; it has {shortened(sorted(shapes))}")
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in FLOAT_DTYPES:
        kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ArgumentError(
            f"weight {name!r} must be a floating-point tensor of 16, 32 or 64 bits, got {kind}"
        )
    if tensor.layout != torch.strided or tensor.is_meta is is_there:
        raise ArgumentError(
            f"weight {name!r} must be a dense tensor in memory, got {tensor.layout} on "
            f"{tensor.device}"
        )
    if tuple(tensor.shape) != shapes[name]:
        raise ArgumentError(
            f"weight {name!r} has shape {list(tensor.shape)}, the model asks for "
            f"{list(shapes[name])}"
        )
    return name, tensor
