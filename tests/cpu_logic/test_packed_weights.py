"""Weights in 4 and 8 bits: products against float64, ranks' slices against the whole weight."""

import itertools

import pytest
import torch
from packed_models import packed_weight, random_packed, through_groups, values_of

from nanovllm import ArgumentError
from nanovllm.kernels.torch_ops import (
    TorchOps,
    dequantize_packed,
    pack_numbers,
    quantize_packed,
    unpack_numbers,
)
from nanovllm.kernels.types import PackedWeight
from nanovllm.layers import packed_weights
from nanovllm.layers.context import ModelContext
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.layers.moe import Experts
from nanovllm.layers.weight_format import WeightFormat
from nanovllm.layers.weights import Heads
from nanovllm.models.loader import (
    DummyCheckpoint,
    expected_tensors,
    load_tensor,
    merged_modules,
    unpack_unconverted,
)
from nanovllm.parallel.tensor_parallel import TensorParallel

CPU = torch.device("cpu")
INT4 = WeightFormat(4, 128, is_on_load=True)
KINDS = [*itertools.product((4, 8), (False, True), (False, True))]  # bits, zeros, order


def context(form: WeightFormat | None, rank: int = 0, size: int = 1) -> ModelContext:
    tp = TensorParallel(rank, size)
    return ModelContext(TorchOps(), tp, torch.float32, CPU, weight_format=form)


def named(child: torch.nn.Module) -> torch.nn.Module:
    """A model with this module, "merged"."""
    model = torch.nn.Module()
    model.merged = child
    return model


def fill(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    assert expected_tensors(model).keys() == tensors.keys()
    for name, tensor in tensors.items():
        load_tensor(model, name, tensor)


@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_survive_packing_and_slices_of_32_columns_stay_slices(bits):
    values = torch.randint(2**bits, (6, 96), dtype=torch.uint8)
    packed = pack_numbers(values, bits)
    assert packed.shape == (6, 96 * bits // 8) and packed.dtype == torch.uint8
    assert torch.equal(unpack_numbers(packed, bits), values)
    part = packed[:, 32 * bits // 8 : 64 * bits // 8]
    assert torch.equal(unpack_numbers(part, bits), values[:, 32:64])


@pytest.mark.parametrize(("bits", "has_zeros", "has_order"), KINDS)
def test_a_product_is_that_of_the_values(bits, has_zeros, has_order):
    weight = packed_weight(random_packed(16, 96, bits, 32, has_zeros, has_order, 1), bits, 32)
    assert weight.shape == (16, 96)
    exact = values_of(weight)
    torch.testing.assert_close(dequantize_packed(weight, torch.float64), exact, rtol=1e-6, atol=0)
    x, bias = torch.randn(5, 96), torch.randn(16)
    expected = (x.double() @ exact.T + bias).float()
    got = TorchOps().packed_linear(x, weight, bias)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3 * float(exact.abs().max()))
    part = weight.rows(slice(4, 12))
    torch.testing.assert_close(dequantize_packed(part, torch.float64), exact[4:12])


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_to_the_nearest_number(bits):
    weight = torch.randn(32, 256) * 4.0 ** torch.arange(-16, 16)[:, None]
    weight[3, :128] = 0
    weight[5, 130] = torch.nan
    packed = quantize_packed(weight, bits, 128)
    found = dequantize_packed(packed, torch.float32)
    assert torch.equal(found[3, :128], torch.zeros(128))
    assert found[5, 128:].isnan().all() and found.isnan().sum() == 128
    steps = packed.scales.repeat_interleave(128, 1)
    finite = ~found.isnan()
    assert ((found - weight).abs() <= 0.5001 * steps)[finite].all()
    others = [row for row in range(32) if row not in (3, 5)]
    torch.testing.assert_close(found[others], through_groups(weight, bits)[others])


# Layers


SIZES = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
ORDER = tuple(torch.randperm(16, generator=torch.Generator().manual_seed(5)).tolist())
HEADS = {name: Heads(n // 16, 16, ORDER if name == "q_proj" else ()) for name, n in SIZES.items()}


def reordered(values: torch.Tensor) -> torch.Tensor:
    return values.unflatten(0, (-1, 16))[:, list(ORDER)].flatten(0, 1)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    ("bits", "has_zeros", "has_order"), [(4, False, False), (4, True, True), (8, True, False)]
)
def test_merged_projections_have_the_heads_of_their_rank(bits, has_zeros, has_order, num_ranks):
    form = WeightFormat(bits, 32, has_zeros, has_order)
    parts = {
        name: random_packed(n, 64, bits, 32, has_zeros, has_order, seed)
        for seed, (name, n) in enumerate(SIZES.items())
    }
    if has_order:  # what is multiplied together has one order
        for part in parts.values():
            part["order"] = parts["q_proj"]["order"]
    values = {name: values_of(packed_weight(part, bits, 32)) for name, part in parts.items()}
    values["q_proj"] = reordered(values["q_proj"])
    for rank in range(num_ranks):
        model = named(ColumnParallelLinear(64, HEADS, False, context(form, rank, num_ranks)))
        fill(model, {f"{n}.{end}": t for n, part in parts.items() for end, t in part.items()})
        assert isinstance(model.merged.weight, PackedWeight)
        expected = torch.cat([v.chunk(num_ranks)[rank] for v in values.values()])
        x = torch.randn(3, 64)
        torch.testing.assert_close(
            model.merged(x), (x.double() @ expected.T).float(), rtol=1e-4, atol=1e-2
        )


def test_projections_that_order_their_columns_differently_are_refused():
    form = WeightFormat(4, 32, has_order=True)
    model = named(ColumnParallelLinear(64, HEADS, False, context(form)))
    orders = {name: torch.randperm(64).int() for name in SIZES}
    load_tensor(model, "q_proj.order", orders["q_proj"])
    load_tensor(model, "k_proj.order", orders["q_proj"])
    with pytest.raises(ArgumentError, match="'v_proj' and 'q_proj'.* in different orders"):
        load_tensor(model, "v_proj.order", orders["v_proj"])


@pytest.mark.parametrize(
    ("group_size", "has_order", "num_ranks", "is_packed"),
    [
        (32, False, 4, True),
        (64, False, 2, True),
        (64, False, 4, False),  # a slice of 32 columns cuts a group
        (-1, False, 4, True),
        (128, True, 1, True),
        (32, True, 2, False),
    ],
)
def test_slices_of_columns_add_up_to_the_whole_product(group_size, has_order, num_ranks, is_packed):
    form = WeightFormat(4, group_size, has_order=has_order)
    group_size = 128 if group_size == -1 else group_size
    tensors = random_packed(16, 128, 4, group_size, False, has_order, 0)
    values = values_of(packed_weight(tensors, 4, group_size))
    x = torch.randn(3, 128)
    total = 0
    for rank in range(num_ranks):
        model = named(RowParallelLinear(128, 16, False, context(form, rank, num_ranks)))
        if is_packed:
            fill(model, {f"merged.{end}": tensor for end, tensor in tensors.items()})
        else:  # a checkpoint gives the values then
            fill(model, {"merged.weight": values})
        assert isinstance(model.merged.weight, PackedWeight) == is_packed
        total = total + model.merged(x.chunk(num_ranks, 1)[rank]).term
    torch.testing.assert_close(total, (x.double() @ values.T).float(), rtol=1e-4, atol=1e-2)


def test_modules_that_a_checkpoint_leaves_as_they_are():
    """One of three merged projections is enough; an expert's, and all experts have its dtype."""
    for names, is_packed in (({"k_proj"}, False), ({*SIZES}, False), ({"proj"}, True)):
        model = named(ColumnParallelLinear(64, HEADS, False, context(WeightFormat(4, 32))))
        assert merged_modules(model) == [[*SIZES]]
        unpack_unconverted(model, names)
        assert isinstance(model.merged.weight, PackedWeight) == is_packed
        if not is_packed:
            fill(model, {f"{name}.weight": torch.randn(n, 64) for name, n in SIZES.items()})
            assert model.merged(torch.randn(3, 64)).shape == (3, 128)
    model = torch.nn.Module()
    model.experts = Experts(2, 64, 32, context(WeightFormat(4, 32)))
    assert isinstance(model.experts.gate_up_proj.weight, PackedWeight)
    unpack_unconverted(model, {"experts.1.down_proj"})
    assert not isinstance(model.experts.gate_up_proj.weight, PackedWeight)
    assert all(name.endswith("_proj.weight") for name in expected_tensors(model))


def test_experts_of_a_checkpoint_over_two_ranks():
    num_ranks, num_experts, form = 2, 3, WeightFormat(4, 32, has_zeros=True)
    shapes = {"gate_proj": (64, 64), "up_proj": (64, 64), "down_proj": (64, 64)}
    tensors, values = {}, {}
    for expert, (name, shape) in itertools.product(range(num_experts), shapes.items()):
        part = random_packed(*shape, 4, 32, True, False, expert)
        part["scales"] /= 32
        name = f"experts.{expert}.{name}"
        tensors |= {f"{name}.{end}": tensor for end, tensor in part.items()}
        values[name] = values_of(packed_weight(part, 4, 32)).float()
    x, logits = torch.randn(5, 64), torch.randn(5, num_experts)
    total = 0
    for rank in range(num_ranks):
        model = torch.nn.Module()
        model.experts = Experts(num_experts, 64, 64, context(form, rank, num_ranks))
        fill(model, tensors)
        weights = model.experts.gate_up_proj.weight, model.experts.down_proj.weight
        assert all(isinstance(weight, PackedWeight) for weight in weights)
        total = total + TorchOps().experts(x, logits, *weights, 2, True)
    gate_up, down = [], []
    for expert in range(num_experts):
        gate_up += [values[f"experts.{expert}.{name}"] for name in ("gate_proj", "up_proj")]
        down.append(values[f"experts.{expert}.down_proj"])
    expected = TorchOps().experts(x, logits, torch.cat(gate_up), torch.cat(down), 2, True)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("num_columns", "num_ranks", "group_size"), [(256, 1, 128), (256, 2, 128), (192, 2, 32)]
)
def test_weights_are_rounded_as_they_are_loaded(num_columns, num_ranks, group_size, monkeypatch):
    monkeypatch.setattr(packed_weights, "MAX_ROUNDED_ELEMENTS", 3 * num_columns)
    weight = torch.randn(32, num_columns)
    for rank in range(num_ranks):
        model = named(RowParallelLinear(num_columns, 32, False, context(INT4, rank, num_ranks)))
        fill(model, {"merged.weight": weight})
        assert model.merged.weight.group_size == group_size
        own = weight.chunk(num_ranks, 1)[rank]
        expected = through_groups(own)
        torch.testing.assert_close(dequantize_packed(model.merged.weight, torch.float32), expected)


@pytest.mark.parametrize(("num_columns", "num_rows"), [(80, 32), (64, 24)])
def test_sizes_that_are_not_packed_are_not_rounded(num_columns, num_rows):
    model = named(RowParallelLinear(num_columns, num_rows, False, context(INT4)))
    weight = torch.randn(num_rows, num_columns)
    fill(model, {"merged.weight": weight})
    assert torch.equal(model.merged.weight.data, weight)


def test_random_weights_of_a_packed_checkpoint():
    """They are the same for any number of ranks, and of the deviation that was asked for."""
    for bits in (4, 8):
        form, wholes = WeightFormat(bits, 64, has_zeros=True), []
        for num_ranks in (1, 2):
            parts = []
            for rank in range(num_ranks):
                model = named(RowParallelLinear(256, 64, False, context(form, rank, num_ranks)))
                expected = expected_tensors(model)
                checkpoint = DummyCheckpoint(expected, 0.02, CPU)
                for name, shards in expected.items():
                    for parameter, shard in shards:
                        parameter.fill(shard, checkpoint.read(name, shard.source))
                parts.append(dequantize_packed(model.merged.weight, torch.float32))
            wholes.append(torch.cat(parts, 1))
        assert torch.equal(*wholes)
        assert 0.019 < float(wholes[0].std()) < 0.021
