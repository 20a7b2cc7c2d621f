"""Decoder layers whose weights wait in pinned host memory: for models that do not fit on the GPU.

The matrices of some layers, the offloaded ones, stay on the host. Two buffers on the GPU, each for
the matrices of one layer, take turns: while a layer computes from one of them, a copy stream brings
those of the next offloaded layer into the other. Vectors (norms, biases, scales of rows) are small
and stay on the GPU, as do embedding and LM head.

The cost is the bus. A step copies every offloaded layer once, however many tokens it computes:

    seconds of a step >= offloaded bytes / bandwidth of the bus

The bandwidth is about 25 GB/s by PCIe 4.0 x16, 55 GB/s by PCIe 5.0 x16, and several times that by
NVLink-C2C. So 4 GiB in host memory cost 78 ms a step at 55 GB/s. An H200 reads as much of its own
memory in 1 ms. A batch shares the step: 256 sequences get 256 tokens of it. A prefill hides the
copies if it is long enough. A weight of 2 bytes takes 2 / 55e9 s to copy and 2 operations a token
to compute, so at 600 TFLOP/s both take equally long with 11,000 tokens; or with a quarter of these,
if a quarter of the layers is offloaded. Of a mixture all experts are copied, whichever are needed.

The offloaded layers are spread evenly, each at the end of a group of resident ones. Its copy runs
while these compute. If the first layers were taken instead, the bus would idle during all others.
Copies end with their step. So a CUDA graph contains those of its step, from and to fixed addresses,
and needs nothing from outside. The bus idles while the last layer and the LM head compute.

Outside the forward pass of its layer a parameter is its host copy. Whatever loads, changes or looks
at weights sees that one, and need not know of the buffers.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from nanovllm.config import Config
from nanovllm.errors import ArgumentError
from nanovllm.kernels.copy_stream import (
    CopyStream,
    CudaCopyStream,
    PendingCopy,
    new_pinned,
    unpin,
)
from nanovllm.layers.context import ModelContext
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import Decoder
from nanovllm.models.model_config import ModelConfig

NUM_BUFFERS = 2
ALIGNMENT = 256  # bytes, of a parameter in the memory of its layer; kernels may rely on it


# ---- which layers -------------------------------------------------------------------------------


def spread(num_chosen: int, num_layers: int) -> list[int]:
    """The last layer of each of `num_chosen` groups of (nearly) equal size."""
    return [(i + 1) * num_layers // num_chosen - 1 for i in range(num_chosen)]


def choose_layers(sizes: Sequence[int], num_bytes: int) -> list[int]:
    """The layers to offload: as few as save `num_bytes` of GPU memory, or all.

    sizes: of each layer the bytes that can be offloaded. The buffers are as large as the largest of
        those chosen. So one layer or two save nothing.
    """
    for number in range(1, len(sizes)):
        chosen = spread(number, len(sizes))
        of_chosen = [sizes[i] for i in chosen]
        if sum(of_chosen) - min(number, NUM_BUFFERS) * max(of_chosen) >= num_bytes:
            return chosen
    return list(range(len(sizes)))


def matrices(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters of a layer that can be offloaded."""
    found = [parameter for parameter in layer.parameters() if parameter.dim() > 1]
    assert all(parameter.is_contiguous() for parameter in found)
    return found


def _bytes(parameter: Tensor) -> int:
    """What a parameter takes in the memory of its layer."""
    return -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT


# ---- the layers ---------------------------------------------------------------------------------


class OffloadedLayer:
    """A layer's matrices in host memory, and their places in a buffer while the layer computes.

    Args:
        layer: its parameters are in ordinary host memory. The content of the matrices is kept.
        memory: [bytes of all matrices] uint8, their home from now on.
        buffer: uint8 on the GPU, as large at least.
    """

    def __init__(self, layer: nn.Module, memory: Tensor, buffer: Tensor) -> None:
        self.parameters = matrices(layer)
        self.memory, self.buffer = memory, buffer[: len(memory)]
        self._at_home, self._in_buffer = self._views(memory), self._views(buffer)
        for parameter, view in zip(self.parameters, self._at_home, strict=True):
            view.copy_(parameter.data)
        self.use(in_buffer=False)

    def _views(self, memory: Tensor) -> list[Tensor]:
        """The parameters' places in `memory`, as tensors like them."""
        views, start = [], 0
        for parameter in self.parameters:
            part = memory[start : start + parameter.nbytes]
            views.append(part.view(parameter.dtype).view(parameter.shape))
            start += _bytes(parameter)
        return views

    def use(self, in_buffer: bool) -> None:
        """Let the parameters be what is in the buffer, or the host copies."""
        views = self._in_buffer if in_buffer else self._at_home
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view


class WeightOffload:
    """Keeps the weights of some layers on the host, and has each on the GPU when its layer runs.

    Args:
        decoder: calls its `layers` one after another. Their parameters are in host memory, see
            `with_layers_on_host`; those that do not stay there are moved to the GPU.
        num_bytes: of GPU memory to save.
        device: the GPU.
        copies: a stream to it.
        new_memory: makes so many bytes of host memory that `copies` reads.

    Attributes:
        layers: the offloaded ones, in the order in which they run.
        buffers: the memory on the GPU. Only a forward pass uses it.
    """

    def __init__(
        self,
        decoder: Decoder,
        num_bytes: int,
        device: torch.device,
        copies: CopyStream,
        new_memory: Callable[[int], Tensor],
    ) -> None:
        modules = list(decoder.layers)
        sizes = [sum(map(_bytes, matrices(module))) for module in modules]
        chosen = choose_layers(sizes, num_bytes)
        size = max(sizes[i] for i in chosen)
        self.buffers = [
            torch.empty(size, dtype=torch.uint8, device=device) for _ in chosen[:NUM_BUFFERS]
        ]
        self.layers: list[OffloadedLayer] = []
        self._copies = copies
        self._started: list[PendingCopy] = []  # in this forward pass
        decoder.register_forward_pre_hook(self._begin)
        for index, module in enumerate(modules):
            resident = list(module.parameters())
            if index in chosen:
                resident = [parameter for parameter in resident if parameter.dim() <= 1]
                self._offload(module, new_memory(sizes[index]))
            for parameter in resident:
                parameter.data = parameter.data.to(device)

    def _offload(self, module: nn.Module, memory: Tensor) -> None:
        number = len(self.layers)
        layer = OffloadedLayer(module, memory, self.buffers[number % NUM_BUFFERS])
        self.layers.append(layer)
        module.register_forward_pre_hook(partial(self._before, number))
        module.register_forward_hook(partial(self._after, number), always_call=True)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of all offloaded layers that are in host memory."""
        return [parameter for layer in self.layers for parameter in layer.parameters]

    @property
    def num_bytes(self) -> int:
        """Of host memory, which every step copies."""
        return sum(len(layer.memory) for layer in self.layers)

    def finish_copies(self) -> None:
        """Return when no copy reads the host memory: before its content changes."""
        self._copies.finish()

    # What a forward pass calls; the order of the hooks is that of the layers.

    def _begin(self, *_: object) -> None:
        """Fill the buffers, once the steps before are done with them."""
        self._started.clear()
        self._copies.follow_compute()
        for _buffer in self.buffers:
            self._start_next()

    def _start_next(self) -> None:
        layer = self.layers[len(self._started)]
        self._started.append(self._copies.start(layer.buffer, layer.memory))

    def _before(self, number: int, *_: object) -> None:
        """Compute layer `number` when its copy has arrived."""
        self._copies.wait(self._started[number])
        self.layers[number].use(in_buffer=True)

    def _after(self, number: int, module: nn.Module, inputs: object, output: object) -> None:
        """Let the next copy into the layer's buffer begin when the layer has been computed."""
        self.layers[number].use(in_buffer=False)
        has_failed = output is None
        if not has_failed and len(self._started) < len(self.layers):
            self._copies.follow_compute()
            self._start_next()


# ---- models -------------------------------------------------------------------------------------


def with_layers_on_host(family: type[CausalLM]) -> type[CausalLM]:
    """`family` with the parameters of its layers in host memory, of which no page is used yet."""

    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> nn.Module:
        on_host = replace(context, device=torch.device("cpu"))
        return family.new_layer(config, cos_sin, on_host, index)

    members = {"new_layer": staticmethod(new_layer), "__module__": family.__module__}
    return cast(type[CausalLM], type(family.__name__, (family,), members))


def offload_weights(model: nn.Module, config: Config, device: torch.device) -> WeightOffload | None:
    """`cpu_offload_gb` for a model of `families.new_model` that is not loaded; None if it is 0.

    Raises:
        ArgumentError: the system does not give or lock so much memory.
    """
    if not config.cpu_offload_bytes:
        return None
    assert isinstance(model, CausalLM)
    pinned: list[Tensor] = []

    def new_memory(num_bytes: int) -> Tensor:
        try:
            pinned.append(new_pinned(num_bytes))
        except (MemoryError, RuntimeError, OSError) as error:
            so_far = sum(map(len, pinned)) / 2**30
            raise ArgumentError(
                f"no more than {so_far:.1f} GiB of host memory can be pinned for cpu_offload_gb "
                f"({config.cpu_offload_gb:g}): {error}; lower cpu_offload_gb"
            ) from error
        return pinned[-1]

    copies = CudaCopyStream(device)
    try:
        offload = WeightOffload(model.model, config.cpu_offload_bytes, device, copies, new_memory)
    except BaseException:
        unpin(pinned)
        raise
    # With the model, or not at all: the end of the process needs no more CUDA calls.
    weakref.finalize(offload, unpin, pinned).atexit = False
    return offload
