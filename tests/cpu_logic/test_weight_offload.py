"""cpu_offload_gb: which layers, in which order their copies come, what is refused."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from copy_streams import EarlyCopies, LateCopies
from torch import nn

from nanovllm import ArgumentError
from nanovllm.config import Config
from nanovllm.models import size, weight_offload
from nanovllm.models.size import available_host_memory, check_offload, num_weights
from nanovllm.models.weight_offload import WeightOffload, choose_layers, spread

AUSTEN = Path(__file__).resolve().parents[2] / "nanovllm/assets/austen-7m"
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


# Which layers


@pytest.mark.parametrize(
    ("num_chosen", "num_layers", "expected"),
    [
        (1, 6, [5]),
        (2, 6, [2, 5]),
        (3, 36, [11, 23, 35]),
        (4, 6, [0, 2, 3, 5]),
        (5, 5, [0, 1, 2, 3, 4]),
    ],
)
def test_layers_are_spread_evenly_and_the_last_is_one(num_chosen, num_layers, expected):
    assert spread(num_chosen, num_layers) == expected


def test_as_few_layers_as_save_the_bytes_beyond_the_buffers():
    sizes = [10] * 8
    assert len(choose_layers(sizes, 1)) == 3  # two of them are what the buffers take
    assert len(choose_layers(sizes, 10)) == 3
    assert len(choose_layers(sizes, 11)) == 4
    assert len(choose_layers(sizes, 60)) == 8
    assert len(choose_layers(sizes, 10**9)) == 8  # as much as there is
    assert choose_layers([10], 1) == [0]
    # The buffers are for the largest of those chosen: two of 30 save nothing beside them.
    assert choose_layers([10, 10, 10, 30] * 2, 5) == [1, 3, 5, 7]


# The order of the copies


class Layer(nn.Module):
    """A matrix, which may be offloaded, and a vector, which is not."""

    def __init__(self, num_columns: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, num_columns), requires_grad=False)
        self.packed = nn.Parameter(torch.randint(9, (2, 3), dtype=torch.int8), requires_grad=False)
        self.vector = nn.Parameter(torch.randn(4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 4:
            raise ValueError("a failure inside of a layer")
        mixed = x @ self.matrix @ self.matrix.t() / len(self.matrix[0])  # about x
        return mixed + self.vector + self.packed.sum()


class Decoder(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(200 + i) for i in range(num_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def offload(decoder: Decoder, num_bytes: int, copies: EarlyCopies) -> WeightOffload:
    def new_memory(n: int) -> torch.Tensor:
        return torch.full((n,), 255, dtype=torch.uint8)

    return WeightOffload(decoder, num_bytes, CPU, copies, new_memory)  # type: ignore[arg-type]


@pytest.mark.parametrize("copies", [EarlyCopies, LateCopies])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 6])
def test_every_layer_computes_with_its_own_weights(copies, num_layers):
    torch.manual_seed(0)
    decoder = Decoder(num_layers)
    expected, x = deepcopy(decoder), torch.randn(3, 4)
    for num_bytes in (1, 6000, 10**6):
        offloaded = deepcopy(expected)
        weights = offload(offloaded, num_bytes, copies())
        for buffer in weights.buffers:
            buffer.fill_(255)
        with torch.inference_mode():
            for _ in range(2):  # the second step begins with another layer's weights in the buffers
                assert torch.equal(offloaded(x), expected(x))
            with pytest.raises(ValueError, match="inside of a layer"):
                offloaded(x[:, :2])
            # Between steps, and after a failure, parameters are the host copies.
            for name, parameter in offloaded.named_parameters():
                assert torch.equal(parameter, expected.get_parameter(name)), name
            weights.finish_copies()
            for parameter in (*offloaded.parameters(), *expected.parameters()):
                parameter.mul_(2)
            assert torch.equal(offloaded(x), expected(x))


def test_a_copy_begins_when_the_layer_before_in_its_buffer_has_been_computed():
    decoder, copies = Decoder(8), EarlyCopies()
    weights = offload(decoder, 2 * 4 * 200 * 4, copies)
    assert len(weights.layers) == 4
    addresses = [layer.buffer.data_ptr() for layer in weights.layers]
    assert addresses == [addresses[0], addresses[1]] * 2
    hooks = [f"layer {i}" for i in range(8)]
    for layer, name in zip(decoder.layers, hooks, strict=True):
        layer.register_forward_pre_hook(lambda *_, name=name: copies.log.append(name))
    decoder(torch.randn(1, 4))
    assert copies.log == [
        *("follow", "start 0", "start 1"),
        *("layer 0", "wait 0", "layer 1", "follow", "start 2"),
        *("layer 2", "wait 1", "layer 3", "follow", "start 3"),
        *("layer 4", "wait 2", "layer 5"),
        *("layer 6", "wait 3", "layer 7"),
    ]


# What is refused


def config(**kwargs) -> Config:
    return Config(str(AUSTEN), **kwargs)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "4", None, True])
def test_what_is_no_size_is_refused(value):
    with pytest.raises(ArgumentError, match="cpu_offload_gb must be finite and >= 0, got"):
        config(cpu_offload_gb=value)


def test_the_cpu_has_nothing_to_offload():
    assert check_offload(config(cpu_offload_gb=0), CPU, 1000) == 0
    with pytest.raises(ArgumentError, match=r"cpu_offload_gb \(0.5\) is for GPUs: with device='cp"):
        check_offload(config(cpu_offload_gb=0.5), CPU, 1000)


def test_host_memory_is_asked_for_beforehand(monkeypatch):
    shape = config().model_config
    share = 1 - shape.vocab_size * shape.hidden_size / num_weights(shape)
    weight_bytes = 64 << 30
    of_layers = int(weight_bytes * share)
    monkeypatch.setattr(size, "available_host_memory", lambda: 20 << 30)
    # 8 layers: two buffers take a quarter of what the layers have.
    saved = (20 << 30) - of_layers // 4
    for gib in (0.5, saved / 2**30 - 0.1):
        asked = int(gib * 2**30)
        assert check_offload(config(cpu_offload_gb=gib), CUDA, weight_bytes) == asked
    message = r"cpu_offload_gb \(.*\) needs .* GiB of host memory for 1 rank; 20.0 GiB are availabl"
    for gib in (saved / 2**30 + 0.1, 10**6, 1e308):
        with pytest.raises(ArgumentError, match=message):
            check_offload(config(cpu_offload_gb=gib), CUDA, weight_bytes)
    with pytest.raises(ArgumentError, match="for 2 ranks"):
        check_offload(config(cpu_offload_gb=8, tensor_parallel_size=2), CUDA, weight_bytes)
    # More than all layers have is all that they have.
    assert check_offload(config(cpu_offload_gb=1e308), CUDA, 1000) == int(1000 * share)


def test_available_memory_is_within_the_machines():
    assert 2**20 < available_host_memory() <= size.device_memory(CPU)


def test_memory_that_cannot_be_pinned_is_an_argument_error(monkeypatch):
    unpinned = []

    def new_pinned(num_bytes):
        if unpinned:
            raise MemoryError("cudaHostRegister of 4096 bytes failed with error 2")
        unpinned.append(torch.empty(num_bytes, dtype=torch.uint8))
        return unpinned[0]

    monkeypatch.setattr(weight_offload, "new_pinned", new_pinned)
    monkeypatch.setattr(weight_offload, "CudaCopyStream", EarlyCopies)
    freed = []
    monkeypatch.setattr(weight_offload, "unpin", freed.extend)
    monkeypatch.setattr(weight_offload, "CausalLM", nn.Module)
    model = nn.Module()
    model.model = Decoder(4)
    with pytest.raises(ArgumentError, match="no more than 0.0 GiB .* error 2; lower cpu_offload_g"):
        weight_offload.offload_weights(model, config(cpu_offload_gb=1), CPU)
    assert [x is y for x, y in zip(freed, unpinned, strict=True)] == [True]
