"""fp8 weights in memory, each rank's slices against the whole weights that fp8 rounded."""

from pathlib import Path

import pytest
import torch
from fp8_models import save_fp8, through_blocks, through_rows
from safetensors.torch import load_file, save_file
from tiny_models import save_model
from transformers import AutoConfig

from nanovllm import ArgumentError
from nanovllm.config import Config
from nanovllm.kernels import select
from nanovllm.kernels.device import DeviceLimits
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.torch_ops import dequantize_weight
from nanovllm.kernels.types import FP8_DTYPE
from nanovllm.layers import weights
from nanovllm.layers.context import ModelContext
from nanovllm.layers.linear import RowParallelLinear
from nanovllm.models.family import Family
from nanovllm.models.loader import expected_tensors, load_model, load_tensor
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.parallel.tensor_parallel import TensorParallel

CPU = torch.device("cpu")
DOWN_PROJ = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """Split over two ranks, o_proj keeps whole blocks; QKV, and the MLP of 288, do not."""
    directory = tmp_path_factory.mktemp("models") / "model"
    sizes = {"hidden_size": 160, "intermediate_size": 288, "head_dim": 32}
    return save_model(directory, num_hidden_layers=1, **sizes)


@pytest.fixture(scope="module")
def fp8_dir(model_dir, tmp_path_factory) -> Path:
    return save_fp8(model_dir, tmp_path_factory.mktemp("models") / "fp8")


def build(directory: Path, scales: str, keeps_fp8: bool, rank: int = 0, size: int = 1):
    config = ModelConfig.from_hf(AutoConfig.from_pretrained(directory), Family("", ""))
    ops = select_ops("torch", CPU, torch.float32, config.head_dim, compile_torch_ops=False)
    ops.has_fp8_products = keeps_fp8
    tp = TensorParallel(rank, size)
    model = Qwen3ForCausalLM(config, ModelContext(ops, tp, torch.float32, CPU, fp8_scales=scales))
    load_model(model, str(directory), "auto")
    return model


def check_weights(model, exact: dict[str, torch.Tensor], through_fp8, of_slice: bool) -> set[str]:
    """Compares each rank's part of the layers' weights; returns the names of those in fp8."""
    in_fp8 = set()
    modules = dict(model.named_modules())
    for name, [(parameter, shard)] in expected_tensors(model).items():
        if not name.endswith("_proj.weight"):
            continue
        weight = parameter.data
        scales = next(
            module.weight_scale
            for module in modules.values()
            if getattr(module, "weight", None) is parameter
        )
        if scales is not None:
            assert weight.dtype == FP8_DTYPE
            in_fp8.add(name.split(".")[-2])
            weight = dequantize_weight(weight, scales)
        part, whole = shard.source, exact[name]
        expected = through_fp8(whole[part]) if of_slice else through_fp8(whole)[part]
        assert torch.equal(weight[shard.target], expected), name
    return in_fp8


ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("size", "keeps_fp8", "in_fp8"),
    [
        (1, False, set()),
        (2, False, set()),
        (1, True, ALL - {"gate_proj", "up_proj"}),
        (2, True, {"o_proj"}),
    ],
)
def test_blocks(model_dir, fp8_dir, size, keeps_fp8, in_fp8) -> None:
    """What cuts through blocks, or lies on none, is dequantized: 288 rows and then 288 more."""
    exact = load_file(model_dir / "model.safetensors")
    for rank in range(size):
        model = build(fp8_dir, "blocks", keeps_fp8, rank, size)
        assert check_weights(model, exact, through_blocks, of_slice=False) == in_fp8


@pytest.mark.parametrize("keeps_fp8", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_rows(model_dir, size, keeps_fp8) -> None:
    """Scales are those of a rank's columns."""
    exact = load_file(model_dir / "model.safetensors")
    for rank in range(size):
        model = build(model_dir, "rows", keeps_fp8, rank, size)
        in_fp8 = check_weights(model, exact, through_rows, of_slice=True)
        assert in_fp8 == (ALL if keeps_fp8 else set())


@pytest.mark.parametrize("scales", ["blocks", "rows"])
def test_pieces_of_a_tensor_have_the_scales_of_the_whole(model_dir, fp8_dir, scales, monkeypatch):
    directory = fp8_dir if scales == "blocks" else model_dir
    whole = dict(build(directory, scales, True).named_parameters())
    monkeypatch.setattr(weights, "MAX_PIECE", 1)  # 128 rows of 288
    for name, parameter in build(directory, scales, True).named_parameters():
        assert torch.equal(parameter.float(), whole[name].float()), name


def test_new_tensor_is_quantized(model_dir) -> None:
    model = build(model_dir, "rows", keeps_fp8=True)
    exact = load_file(model_dir / "model.safetensors")
    exact[DOWN_PROJ] = torch.randn(exact[DOWN_PROJ].shape)
    load_tensor(model, DOWN_PROJ, exact[DOWN_PROJ])
    check_weights(model, exact, through_rows, of_slice=True)


def test_sizes_that_no_kernel_takes_are_dequantized() -> None:
    ops = select_ops("torch", CPU, torch.float32, 32, compile_torch_ops=False)
    ops.has_fp8_products = True
    context = ModelContext(ops, TensorParallel(), torch.float32, CPU, None, "rows")
    assert RowParallelLinear(96, 72, False, context).weight.dtype == torch.float32
    assert RowParallelLinear(96, 80, False, context).weight.dtype == FP8_DTYPE


@pytest.mark.parametrize(
    ("capability", "dtype", "backend", "expected"),
    [
        ((9, 0), torch.bfloat16, "auto", True),
        ((9, 0), torch.float16, "triton", True),
        ((9, 0), torch.float32, "auto", False),
        ((9, 0), torch.bfloat16, "torch", False),
        ((8, 9), torch.bfloat16, "auto", False),
        ((10, 0), torch.bfloat16, "auto", False),
    ],
)
def test_products_in_fp8_are_hoppers(monkeypatch, capability, dtype, backend, expected) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    limits = DeviceLimits(capability, num_sms=1, shared_memory=0)
    monkeypatch.setattr(select, "device_limits", lambda device: limits)
    ops = select_ops(backend, torch.device("cuda", 0), dtype, 128, compile_torch_ops=False)
    assert ops.has_fp8_products == expected


def test_missing_scales_are_named(fp8_dir, tmp_path) -> None:
    tensors = load_file(fp8_dir / "model.safetensors")
    del tensors[f"{DOWN_PROJ}_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((fp8_dir / "config.json").read_text())
    with pytest.raises(ArgumentError, match=f"missing tensors: {DOWN_PROJ}_scale_inv"):
        build(tmp_path, "blocks", keeps_fp8=True)
    with pytest.raises(ArgumentError, match=f"{DOWN_PROJ}.* is fp8 without .*_scale_inv"):
        build(tmp_path, "blocks", keeps_fp8=False)


def with_tensors(fp8_dir: Path, target: Path, changes: dict[str, torch.Tensor]) -> Path:
    tensors = load_file(fp8_dir / "model.safetensors") | changes
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((fp8_dir / "config.json").read_text())
    return target


@pytest.mark.parametrize("keeps_fp8", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (4, 5), (2, 3, 1), (160,), ()])
def test_misshapen_scales_are_named(fp8_dir, tmp_path, shape, keeps_fp8) -> None:
    """The weight is [160, 288], its scales are [2, 3]."""
    directory = with_tensors(fp8_dir, tmp_path, {f"{DOWN_PROJ}_scale_inv": torch.ones(shape)})
    for rank, size in ((0, 1), (1, 2)):
        with pytest.raises(ArgumentError) as raised:
            build(directory, "blocks", keeps_fp8, rank, size)
        assert f"'{DOWN_PROJ}_scale_inv' has shape {list(shape)}" in str(raised.value)
        assert "[2, 3]" in str(raised.value)


@pytest.mark.parametrize("keeps_fp8", [False, True])
def test_scales_beside_a_weight_that_is_not_fp8_are_refused(fp8_dir, tmp_path, keeps_fp8) -> None:
    weight = load_file(fp8_dir / "model.safetensors")[DOWN_PROJ].bfloat16()
    directory = with_tensors(fp8_dir, tmp_path, {DOWN_PROJ: weight})
    message = f"tensor '{DOWN_PROJ}' is torch.bfloat16, not fp8, beside '{DOWN_PROJ}_scale_inv'"
    with pytest.raises(ArgumentError, match=message):
        build(directory, "blocks", keeps_fp8)


def test_scales_beside_a_vector_are_refused(fp8_dir, tmp_path) -> None:
    norm = "model.norm.weight"
    changes = {norm: torch.ones(160).to(FP8_DTYPE), f"{norm}_scale_inv": torch.ones(2)}
    directory = with_tensors(fp8_dir, tmp_path, changes)
    with pytest.raises(ArgumentError, match=f"unexpected tensors: {norm}_scale_inv"):
        build(directory, "blocks", keeps_fp8=False)


def test_config(model_dir, fp8_dir) -> None:
    assert Config(str(model_dir)).fp8_scales is None
    assert Config(str(model_dir), quantization="fp8").fp8_scales == "rows"
    assert Config(str(fp8_dir)).fp8_scales == "blocks"
    assert Config(str(fp8_dir), quantization="fp8").fp8_scales == "blocks"
    # An fp8 checkpoint's values can be rounded to fewer bits.
    packed = Config(str(fp8_dir), quantization="int4")
    assert packed.fp8_scales is None and packed.weight_format.bits == 4
    for wrong in ("gguf", "FP8", 8, True):
        with pytest.raises(
            ArgumentError, match=f"quantization must be one of fp8, .*, got {wrong!r}"
        ):
            Config(str(model_dir), quantization=wrong)
