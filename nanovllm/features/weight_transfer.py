"""New weights from a trainer in another process, by broadcasts: vLLM's weight transfer.

The trainer is rank 0 of a process group, and the engine's ranks follow. Both sides are in this
file: `NCCLWeightTransferEngine` is the trainer's, the functions that take an engine are `LLM`'s.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet, finalize

import torch

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.errors import ArgumentError, shown
from nanovllm.features.prefix_cache import reset_prefix_cache
from nanovllm.features.rpc import call_ranks
from nanovllm.features.weight_update import (
    check_weights,
    check_weights_are_there,
    load_weights_on_rank,
)
from nanovllm.models.loader import FLOAT_DTYPES
from nanovllm.parallel.weight_group import PyNcclCommunicator, StatelessProcessGroup
from nanovllm.validation import check_bool, check_integer

PACKED_BUFFER_BYTES = 1 << 30  # vLLM's; both sides must have the same
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
_updating: WeakSet[LLMEngine] = WeakSet()  # between start_weight_update and finish_weight_update


@dataclass
class NCCLWeightTransferInitInfo:
    """Where the group meets. The trainer is rank 0; the engine's rank r is `rank_offset` + r.

    Attributes:
        master_address, master_port: where the trainer listens.
        rank_offset: of the engine's ranks.
        world_size: the trainer and all ranks.
    """

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int

    def __post_init__(self) -> None:
        if not isinstance(self.master_address, str) or not self.master_address:
            raise ArgumentError(
                f"init_info: master_address must be a host, got {shown(self.master_address)}"
            )
        check_integer("init_info: master_port", self.master_port, 1, 65535)
        check_integer("init_info: rank_offset", self.rank_offset, 1)
        check_integer("init_info: world_size", self.world_size, 2)


@dataclass
class NCCLWeightTransferUpdateInfo:
    """Which tensors come, in this order.

    Attributes:
        names: as in the model's checkpoint.
        dtype_names: "bfloat16", "float16", "float32" or "float64" of each.
        shapes: of each.
        packed: whether several travel as one buffer of bytes.
        packed_buffer_size_bytes: a buffer is sent when it holds more than this.
        packed_num_buffers: changes nothing.
    """

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    packed: bool = False
    packed_buffer_size_bytes: int = PACKED_BUFFER_BYTES
    packed_num_buffers: int = 2

    def __post_init__(self) -> None:
        for name in ("names", "dtype_names", "shapes"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise ArgumentError(f"update_info: {name} must be a list")
        if not len(self.names) == len(self.dtype_names) == len(self.shapes):
            raise ArgumentError(
                f"update_info: names, dtype_names and shapes must be of one length, got "
                f"{len(self.names)}, {len(self.dtype_names)} and {len(self.shapes)}"
            )
        for dtype_name in self.dtype_names:
            if dtype_name not in DTYPES:
                raise ArgumentError(
                    f"update_info: dtype_names must be of {', '.join(DTYPES)}, got "
                    f"{shown(dtype_name)}"
                )
        for shape in self.shapes:
            if not isinstance(shape, (list, tuple)):
                raise ArgumentError(f"update_info: shapes must hold lists, got {shown(shape)}")
            for size in shape:
                check_integer("update_info: shapes", size, 0)
        check_bool("update_info: packed", self.packed)
        check_integer("update_info: packed_buffer_size_bytes", self.packed_buffer_size_bytes, 1)


@dataclass
class WeightTransferInitRequest:
    """vLLM's request of `init_weight_transfer_engine`."""

    init_info: dict[str, Any] = field(default_factory=dict)


@dataclass
class WeightTransferUpdateRequest:
    """vLLM's request of `update_weights`."""

    update_info: dict[str, Any] = field(default_factory=dict)


@dataclass
class NCCLTrainerSendWeightsArgs:
    """vLLM's arguments of `NCCLWeightTransferEngine.trainer_send_weights`."""

    group: Any
    src: int = 0
    post_iter_func: Callable[[tuple[str, torch.Tensor]], torch.Tensor] | None = None
    packed: bool = False
    stream: Any = None
    packed_buffer_size_bytes: int = PACKED_BUFFER_BYTES
    packed_num_buffers: int = 2


class NCCLWeightTransferEngine:
    """The trainer's side: rank 0 of the group. No GPU is needed: the CPU's group is gloo's."""

    @staticmethod
    def trainer_init(
        init_info: "NCCLWeightTransferInitInfo | Mapping[str, Any]",
        device: int | str | torch.device | None = None,
    ) -> PyNcclCommunicator:
        """Make the group; blocks until all ranks of the engine have joined.

        Args:
            init_info: `master_address`, `master_port` and `world_size`, as the engine gets them.
            device: the trainer's. None: the current GPU, or the CPU if there is none.
        """
        info = {"rank_offset": 1} | (
            dict(init_info) if isinstance(init_info, Mapping) else vars(init_info)
        )
        checked = _made(NCCLWeightTransferInitInfo, "init_info", info)
        if device is None:
            device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        return _join(checked, 0, device)

    @staticmethod
    def trainer_send_weights(
        iterator: Iterable[tuple[str, torch.Tensor]],
        trainer_args: "NCCLTrainerSendWeightsArgs | Mapping[str, Any] | None" = None,
        **kwargs: Any,
    ) -> None:
        """Send tensors, in the order of the names that the engine's `update_weights` got.

        Args:
            iterator: (name, tensor) pairs; a tensor is moved to the group's device if it is not
                there.
            trainer_args, kwargs: `group` (of `trainer_init`), `src`, `post_iter_func`, which makes
                the tensor of a pair, `packed`, `packed_buffer_size_bytes` and `stream`.
        """
        given = trainer_args or {}
        given = dict(given) if isinstance(given, Mapping) else vars(given)
        args = _made(NCCLTrainerSendWeightsArgs, "trainer_args", given | kwargs)
        group = args.group
        make = args.post_iter_func or (lambda item: item[1])
        tensors = (make(item).detach().to(group.device).contiguous() for item in iterator)
        if args.packed:
            for chunk in _chunks(tensors, _num_bytes, args.packed_buffer_size_bytes):
                group.broadcast(torch.cat([_bytes_of(t) for t in chunk]), args.src, args.stream)
        else:
            for tensor in tensors:
                group.broadcast(tensor, args.src, args.stream)


# ---- of LLM --------------------------------------------------------------------------------------


def init_weight_transfer_engine(
    llm: LLMEngine, request: WeightTransferInitRequest | Mapping[str, Any]
) -> None:
    """Join a trainer's process group with every rank; blocks until the trainer is there.

    Args:
        request: its `init_info` has `master_address`, `master_port`, `rank_offset` and
            `world_size`. The trainer calls `NCCLWeightTransferEngine.trainer_init` meanwhile.

    The group is NCCL's, where each process needs a GPU of its own, or gloo's on the CPU.

    Raises:
        ArgumentError: `weight_transfer_config` was not given to `LLM`, or an entry is wrong.
        RuntimeError: the trainer did not come in time.
    """
    _check_is_configured(llm)
    given = _entry(request, "init_info")
    info = _made(NCCLWeightTransferInitInfo, "init_info", given)
    last_rank = info.rank_offset + llm.config.tensor_parallel_size - 1
    if last_rank >= info.world_size:
        raise ArgumentError(
            f"init_info: world_size must be > {last_rank}, the engine's last rank, got "
            f"{info.world_size}"
        )
    call_ranks(llm, _join_on_rank, args=(info,))


def start_weight_update(llm: LLMEngine, is_checkpoint_format: bool = True) -> None:
    """Say that `update_weights` follows, any number of times, and then `finish_weight_update`.

    Args:
        is_checkpoint_format: only True: names and shapes are those of the model's checkpoint.

    Raises:
        RuntimeError: the weights sleep, or an update goes on already.
    """
    _check_is_configured(llm)
    if is_checkpoint_format is not True:
        raise ArgumentError(
            f"is_checkpoint_format={shown(is_checkpoint_format)} is not supported: names and "
            "shapes are those of the checkpoint"
        )
    check_weights_are_there(llm)
    if llm in _updating:
        raise RuntimeError("a weight update goes on already: call finish_weight_update() first")
    _updating.add(llm)


def update_weights(
    llm: LLMEngine, request: WeightTransferUpdateRequest | Mapping[str, Any]
) -> None:
    """Take tensors that the trainer sends meanwhile by `trainer_send_weights`, on every rank.

    Args:
        request: its `update_info` has `names`, `dtype_names` and `shapes`, those of the model's
            checkpoint, and `packed` with `packed_buffer_size_bytes` as the trainer has them.

    Without `start_weight_update` the call is an update of its own.

    Raises:
        ArgumentError: an entry is wrong, or the model has no such weights. Nothing was received:
            the trainer waits in vain.
        RuntimeError: the weights sleep, there is no group, or the trainer sent nothing in time.
    """
    _check_is_configured(llm)
    info = _made(NCCLWeightTransferUpdateInfo, "update_info", _entry(request, "update_info"))
    check_weights_are_there(llm)
    check_weights(llm.model_runner, dict(zip(info.names, map(tuple, info.shapes), strict=True)))
    if not hasattr(llm.model_runner, "weight_group"):
        raise RuntimeError("there is no group yet: call init_weight_transfer_engine first")
    call_ranks(llm, _receive_on_rank, args=(info,))
    if llm not in _updating:
        reset_prefix_cache(llm, reset_running_requests=True)


def finish_weight_update(llm: LLMEngine) -> None:
    """End an update: cached K/V is forgotten, and running requests go on as with `load_weights`.

    Raises:
        RuntimeError: no update was started.
    """
    _check_is_configured(llm)
    if llm not in _updating:
        raise RuntimeError("no weight update goes on: call start_weight_update() first")
    reset_prefix_cache(llm, reset_running_requests=True)
    _updating.discard(llm)


def _check_is_configured(llm: LLMEngine) -> None:
    llm.check_ready()
    if llm.config.weight_transfer_config is None:
        raise ArgumentError(
            "weight transfer is off: build LLM with weight_transfer_config={'backend': 'nccl'}; "
            "load_weights takes tensors of this process without it"
        )
    if llm.config.data_parallel_size > 1:
        raise ArgumentError(
            f"weight transfer is not supported with data_parallel_size "
            f"({llm.config.data_parallel_size}) > 1; load_weights reaches all replicas"
        )


def _entry(request: Any, name: str) -> dict[str, Any]:
    found = request.get(name) if isinstance(request, Mapping) else getattr(request, name, None)
    if isinstance(found, (NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo)):
        found = vars(found)
    if not isinstance(found, Mapping):
        raise ArgumentError(f"the request must have {name}, a dict, got {shown(request)}")
    return dict(found)


def _made(cls: Any, name: str, given: Mapping[str, Any]) -> Any:
    """An object of a dataclass; ArgumentError for an entry that is missing or unknown."""
    try:
        return cls(**given)
    except TypeError as error:
        raise ArgumentError(f"{name}: {str(error).partition(' ')[2]}") from None


# ---- on a rank -----------------------------------------------------------------------------------


def _join(
    info: NCCLWeightTransferInitInfo, rank: int, device: int | str | torch.device
) -> PyNcclCommunicator:
    group = StatelessProcessGroup.create(
        info.master_address, info.master_port, rank, info.world_size
    )
    return PyNcclCommunicator(group, device)


def _join_on_rank(runner: ModelRunner, info: NCCLWeightTransferInitInfo) -> None:
    older = vars(runner).pop("weight_group", None)
    if older is not None:
        older.shutdown()
    group = _join(info, info.rank_offset + runner.rank, runner.device)
    vars(runner)["weight_group"] = group
    finalize(runner, group.shutdown)


def _receive_on_rank(runner: ModelRunner, info: NCCLWeightTransferUpdateInfo) -> None:
    group = vars(runner)["weight_group"]
    kinds = [
        (name, DTYPES[dtype_name], shape)
        for name, dtype_name, shape in zip(info.names, info.dtype_names, info.shapes, strict=True)
    ]
    limit = info.packed_buffer_size_bytes if info.packed else 0
    for chunk in _chunks(kinds, _num_announced_bytes, limit):
        tensors = [torch.empty(shape, dtype=d, device=runner.device) for _, d, shape in chunk]
        if info.packed:
            sizes = [_num_bytes(tensor) for tensor in tensors]
            buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=runner.device)
            group.broadcast(buffer, 0)
            for tensor, part in zip(tensors, buffer.split(sizes), strict=True):
                _bytes_of(tensor).copy_(part)
        else:
            for tensor in tensors:
                group.broadcast(tensor, 0)
        names = [name for name, _, _ in chunk]
        load_weights_on_rank(runner, list(zip(names, tensors, strict=True)))


def _chunks(items: Iterable[Any], size_of: Callable[[Any], int], limit: int) -> Iterator[list[Any]]:
    """Items in lists, each of which ends with the one that makes it larger than `limit` bytes."""
    chunk: list[Any] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += size_of(item)
        if size > limit:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _num_announced_bytes(kind: tuple[str, torch.dtype, list[int]]) -> int:
    return math.prod(kind[2]) * kind[1].itemsize


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor, as uint8 [bytes]."""
    return tensor.reshape(-1).view(torch.uint8)
