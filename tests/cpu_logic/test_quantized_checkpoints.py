"""Quantised checkpoints: every format's numbers, in parts, packed and as weights; refusals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantized_models import (
    AWQ,
    FORMATS,
    INT8,
    NF4_CONFIG,
    awq,
    contiguous,
    fp8,
    gptq,
    gptq_config,
    groups_config,
    llm_int8,
    nf4,
    of_group,
    pack_quantized,
    save_quantized,
)
from safetensors.torch import save_file
from tiny_models import edit_config, save_model
from transformers import AutoConfig

from nanovllm import ArgumentError
from nanovllm.config import Config
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.torch_ops import dequantize_packed
from nanovllm.kernels.types import PackedWeight
from nanovllm.layers.context import ModelContext
from nanovllm.layers.linear import RowParallelLinear
from nanovllm.layers.linear_weight import LinearWeight
from nanovllm.models.checkpoint import SafetensorsCheckpoint
from nanovllm.models.family import Family
from nanovllm.models.loader import load_model, merged_modules
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.quantization_config import Quantization, parse_quantization, with_quantization
from nanovllm.models.quantized_checkpoint import QuantizedCheckpoint, unconverted_modules
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.parallel.tensor_parallel import TensorParallel

CPU = torch.device("cpu")
N, K = 48, 96
WEIGHT = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
ALL = slice(0, N), slice(0, K)
PARTS = [ALL, (slice(16, 48), slice(0, K)), (slice(0, N), slice(32, 64)), (slice(3, 7), ALL[1])]
DEQUANTIZED = ("nf4", "nf4-nested", "fp8-static", "modelopt")
IN_FP8 = ("fp8", "fp8-channels")


def written(directory: Path, **modules: dict[str, torch.Tensor]) -> SafetensorsCheckpoint:
    tensors = {f"{name}.{end}": t for name, part in modules.items() for end, t in part.items()}
    save_file(contiguous(tensors), directory / "model.safetensors")
    return SafetensorsCheckpoint(str(directory))


def packed_tensors(form, module: str = "x") -> list[str]:
    kinds = ["numbers", "scales"] + ["zeros"] * form.has_zeros + ["order"] * form.has_order
    return [f"{module}.{kind}" for kind in kinds]


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_of_the_definition(name, tmp_path):
    config, pack = FORMATS[name]
    tensors, expected = pack(WEIGHT)
    files = written(tmp_path, x=tensors, y={"weight": WEIGHT[0]})
    quantization = parse_quantization(config, "here")
    checkpoint = QuantizedCheckpoint(files, {"x.weight"}, quantization)
    assert checkpoint.names() == {"x.weight", "y.weight"} and checkpoint.shape("x.weight") == (N, K)
    assert torch.equal(checkpoint.read("y.weight", (slice(0, K),)), WEIGHT[0])
    for part in PARTS:
        assert torch.equal(checkpoint.read("x.weight", part), expected[part])
    form, fp8_scales = quantization.weight_format, quantization.fp8_scales
    kept = [["x"]] if quantization.is_kept else []
    assert unconverted_modules(str(tmp_path), quantization, kept) == set()
    assert (fp8_scales == "channels") == (name in IN_FP8)
    if fp8_scales:
        scales = "x.weight_scale_inv"
        checkpoint = QuantizedCheckpoint(files, {"x.weight", scales}, quantization)
        assert checkpoint.shape(scales) == (N,) and checkpoint.names() > {scales, "x.weight"}
        for part in PARTS:
            found = checkpoint.read(scales, part[:1]).unsqueeze(1)
            assert torch.equal(checkpoint.read("x.weight", part).float() * found, expected[part])
    assert (form is None) == (name in (*DEQUANTIZED, *IN_FP8))
    if form is None:
        return
    names = packed_tensors(form)
    checkpoint = QuantizedCheckpoint(files, {*names}, quantization)
    assert checkpoint.names() == {*names, "y.weight"}
    whole = {
        end: checkpoint.read(end, tuple(slice(0, n) for n in checkpoint.shape(end)))
        for end in names
    }
    parts = [whole.get(f"x.{kind}") for kind in ("numbers", "scales", "zeros", "order")]
    size = K if form.group_size == -1 else form.group_size
    packed = PackedWeight(*parts, bits=form.bits, group_size=size)
    assert packed.shape == (N, K) and packed.numbers.dtype == torch.uint8
    assert torch.equal(dequantize_packed(packed, torch.float32), expected)
    each = 8 // form.bits
    for rows, columns in PARTS[1:3]:
        of_bytes = slice(columns.start // each, columns.stop // each)
        found = checkpoint.read("x.numbers", (rows, of_bytes))
        assert torch.equal(found, packed.numbers[rows, of_bytes])
        groups = slice(columns.start // size, -(-columns.stop // size))
        for kind in ("x.scales", "x.zeros"):
            if kind in names:
                assert torch.equal(checkpoint.read(kind, (rows, groups)), whole[kind][rows, groups])


def test_what_is_stored_otherwise_is_not_packed(tmp_path):
    """Modules that are not converted, or have other bits, groups, zeros, or orders than most."""
    modules = {
        "a": gptq(WEIGHT)[0],
        "b": gptq(WEIGHT, bits=8)[0],
        "c": gptq(WEIGHT, group_size=48)[0],
        "d": gptq(WEIGHT, is_symmetric=False)[0],
        "e": gptq(WEIGHT, has_order=True)[0],
        "f": {"weight": WEIGHT},
    }
    written(tmp_path, **modules)
    rules = {"-:f": {}, "b": {"bits": 8}, "+:^c$": {"group_size": 48}}
    quantization = parse_quantization(gptq_config(dynamic=rules), "here")
    merged = [[name] for name in modules]
    assert unconverted_modules(str(tmp_path), quantization, merged) == {*"bcdef"}


def test_modules_that_are_multiplied_together_have_one_order(tmp_path):
    first, other = (gptq(WEIGHT, has_order=True)[0] for _ in range(2))
    other["g_idx"] = other["g_idx"].flip(0)
    written(tmp_path, **{"a.q": first, "a.k": other, "b.q": first, "b.k": first, "b.o": other})
    quantization = parse_quantization(gptq_config(desc_act=True), "here")
    merged = [["a.q", "a.k"], ["b.q", "b.k"], ["b.o"]]
    assert unconverted_modules(str(tmp_path), quantization, merged) == {"a.q", "a.k"}


def test_fp8_modules_are_those_with_scales(tmp_path):
    rows, plain = fp8(WEIGHT, shape=(1, 1))[0], {"weight": WEIGHT}
    blocks = {"weight": rows["weight"], "weight_scale_inv": torch.ones(1, 1)}
    written(tmp_path, a=rows, b=plain)
    quantization = parse_quantization(FORMATS["fp8"][0], "here")
    assert unconverted_modules(str(tmp_path), quantization, [["a"], ["b"]]) == {"b"}
    fields = FORMATS["fp8"][0] | {"weight_block_size": [128, 128]}
    quantization = parse_quantization(fields, "here")
    written(tmp_path, a=blocks, b=plain)
    assert unconverted_modules(str(tmp_path), quantization, [["a"], ["b"]]) == {"b"}


def test_biases_of_zeros_and_scales_of_activations_are_left_out(tmp_path):
    tensors = gptq(WEIGHT)[0]
    files = written(
        tmp_path,
        x=tensors | {"bias": torch.zeros(N)},
        y=tensors | {"bias": torch.ones(N)},
        z=tensors | {"bias": torch.zeros(N)},
    )
    expected = {"x.weight", "y.weight", "z.weight", "z.bias"}
    checkpoint = QuantizedCheckpoint(files, expected, parse_quantization(gptq_config(), "here"))
    assert checkpoint.names() == expected | {"y.bias"}  # which the loader refuses
    files = written(tmp_path, x=fp8(WEIGHT, is_static=True)[0], k={"k_scale": torch.ones(1)})
    quantization = parse_quantization(FORMATS["modelopt"][0], "here")
    assert QuantizedCheckpoint(files, {"x.weight"}, quantization).names() == {"x.weight"}


BROKEN = [
    ("awq", awq(WEIGHT)[0] | {"scales": torch.ones(3, N + 8).half()}, r"'x.scales' has shape"),
    ("awq", {n: t for n, t in awq(WEIGHT)[0].items() if n != "qzeros"}, "missing .*'x.qzeros'"),
    ("awq", awq(WEIGHT, group_size=48)[0], r"'x.scales' has shape \[2, 48\].* \[3, 48\]"),
    ("awq", awq(WEIGHT)[0] | {"qweight": torch.ones(8).int()}, r"'x.qweight' has shape \[8\]"),
    ("gptq", gptq(WEIGHT)[0] | {"scales": torch.ones(3).half()}, r"'x.scales' has shape \[3\]"),
    ("awq", {"qweight": torch.ones(8, 4)}, "'x.qweight' .* is torch.float32; supported: I32"),
    ("gptq", gptq(WEIGHT)[0] | {"g_idx": torch.zeros(K - 1).int()}, "'x.qweight' has shape"),
    ("gptq", gptq(WEIGHT)[0] | {"g_idx": torch.full((K,), 3).int()}, "of the 3 groups, got 3"),
    (
        "w4a16",
        pack_quantized(WEIGHT)[0] | {"weight_shape": torch.tensor([N, K * 2])},
        "'x.weight_packed' has shape",
    ),
    (
        "w4a16",
        pack_quantized(WEIGHT)[0] | {"weight_scale": torch.ones(N + 1, 3)},
        "which fits no weight",
    ),
    ("fp8", fp8(WEIGHT)[0] | {"weight_scale": torch.ones(7)}, "'x.weight_scale' has shape"),
    ("nf4", nf4(WEIGHT)[0] | {"weight.absmax": torch.ones(3)}, "'x.weight.absmax' has shape"),
    (
        "nf4",
        nf4(WEIGHT)[0] | {"weight.quant_state.bitsandbytes__nf4": torch.zeros(3).byte()},
        "cannot read 'x.weight.quant_state.bitsandbytes__nf4'",
    ),
    ("llm-int8", llm_int8(WEIGHT)[0] | {"SCB": torch.ones(N - 1)}, "'x.SCB' has shape"),
    ("llm-int8", llm_int8(WEIGHT)[0] | {"weight_format": torch.tensor(1)}, "weight_format"),
]


@pytest.mark.parametrize(("name", "tensors", "message"), BROKEN)
def test_tensors_that_do_not_fit_each_other_are_named(name, tensors, message, tmp_path):
    files = written(tmp_path, x=tensors)
    with pytest.raises(ArgumentError, match=message):
        QuantizedCheckpoint(files, {"x.weight"}, parse_quantization(FORMATS[name][0], "here"))


def rank_model(directory: Path, rank: int, quantization: Quantization | None):
    """Rank `rank`'s of two."""
    config = ModelConfig.from_hf(AutoConfig.from_pretrained(directory), Family("", ""))
    ops = select_ops("torch", CPU, torch.float32, config.head_dim, compile_torch_ops=False)
    context = ModelContext(ops, TensorParallel(rank, 2), torch.float32, CPU)
    if quantization is not None:
        context = replace(context, weight_format=quantization.weight_format)
    model = Qwen3ForCausalLM(config, context)
    if quantization is not None:
        plain = unconverted_modules(str(directory), quantization, merged_modules(model))
        assert not plain
    load_model(model, str(directory), "auto", quantization=quantization)
    return model


@pytest.mark.parametrize(
    ("name", "is_packed"),
    [("awq", [True, True]), ("w8a16", [True, True]), ("gptq-order", [True, False])],
)
def test_a_rank_reads_its_slices(name, is_packed, tmp_path):
    """A slice of columns in an order of their own is not packed."""
    source = save_model(tmp_path / "model", num_hidden_layers=1, intermediate_size=128)
    quantized, exact = save_quantized(source, tmp_path, name)
    quantization = parse_quantization(FORMATS[name][0], "here")
    edit_config(quantized, quantization_config=None)
    for rank in range(2):
        found, expected = (
            [m for m in model.modules() if isinstance(m, LinearWeight)]
            for model in (
                rank_model(quantized, rank, quantization),
                rank_model(exact, rank, None),
            )
        )
        assert len(found) == 4
        for module, plain in zip(found, expected, strict=True):
            weight = module.weight
            by_columns = isinstance(module, RowParallelLinear)
            assert isinstance(weight, PackedWeight) == is_packed[by_columns]
            if isinstance(weight, PackedWeight):
                weight = dequantize_packed(weight, torch.float32)
            assert torch.equal(weight, plain.weight)


FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
W4 = of_group(4, strategy="group", group_size=32)
REFUSED = [
    (AWQ | {"bits": 8}, "'awq' with bits 8 is not supported; supported: 4"),
    (AWQ | {"version": "gemv"}, "version 'gemv' is not supported; supported: 'gemm'"),
    (AWQ | {"version": "Marlin"}, "version 'marlin' is not supported"),
    (AWQ | {"backend": "llm-awq"}, "backend 'llm-awq' is not supported"),
    (AWQ | {"group_size": "128"}, "group_size '128' is not supported"),
    (gptq_config(bits=3), "'gptq' with bits 3 is not supported; supported: 4, 8"),
    (gptq_config(group_size=0), "group_size 0 is not supported"),
    (gptq_config(checkpoint_format="marlin"), "checkpoint_format 'marlin' is not supported"),
    (gptq_config(is_marlin_format=True), "is_marlin_format True is not supported"),
    (gptq_config(dynamic={"x": {"bits": 2}}), "dynamic 'x' with bits 2 is not supported"),
    (gptq_config(dynamic={"x": {"format": "gptq_v2"}}), "dynamic 'x' with 'format' is not"),
    (gptq_config(adapter={"rank": 8}), "adapter {'rank': 8} is not supported"),
    (groups_config("marlin-24", W4), "format 'marlin-24' is not supported"),
    (groups_config("pack-quantized", of_group(3, strategy="channel")), "num_bits 3 is not"),
    (groups_config("pack-quantized", of_group(4, strategy="block")), "strategy 'block' is not"),
    (groups_config("nvfp4-pack-quantized", W4), "format 'nvfp4-pack-quantized' is not"),
    (
        groups_config("mixed-precision", W4, of_group(4, type="float", strategy="group")),
        "'group_1': weights with num_bits 4 is not supported",
    ),
    (
        groups_config("pack-quantized", W4 | {"output_activations": INT8}),
        "'group_0' with output_activations .* is not supported",
    ),
    (
        groups_config("pack-quantized", W4) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparsity_config with format 'sparse-24-bitmask' is not supported",
    ),
    (groups_config("pack-quantized", W4) | {"transform_config": {"a": 1}}, "transform_config"),
    (groups_config("pack-quantized", W4) | {"kv_cache_scheme": FP8}, "kv_cache_scheme .* is not"),
    (groups_config("pack-quantized"), "config_groups must be an object"),
    (FP8 | {"kv_cache_scheme": "static"}, "kv_cache_scheme 'static' is not supported"),
    (FP8 | {"activation_scheme": "other"}, "activation_scheme 'other' is not supported"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4' is not supported"),
    (NF4_CONFIG | {"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type 'int4' is not supported"),
    (NF4_CONFIG | {"bnb_4bit_quant_storage": "bfloat16"}, "quant_storage 'bfloat16' is not"),
    ({"quant_method": "hqq"}, "quantization_config 'hqq' is not supported"),
    ({"quant_method": ["awq"]}, r"quantization_config \['awq'\] is not supported"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_cannot_be_read_is_refused_by_name(config, message):
    with pytest.raises(ArgumentError, match=f"^the/config.json: .*{message}"):
        parse_quantization(config, "the/config.json")


@pytest.mark.parametrize(
    ("file_name", "text", "found"),
    [
        ("quantize_config.json", '{"bits": 4, "group_size": 128, "desc_act": true}', "gptq"),
        ("quant_config.json", '{"w_bit": 4, "q_group_size": 128, "zero_point": true}', "awq"),
        (
            "hf_quant_config.json",
            '{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}',
            "fp8",
        ),
    ],
)
def test_files_beside_an_older_config_count(file_name, text, found, tmp_path):
    assert with_quantization({"a": 1}, str(tmp_path)) == {"a": 1}
    (tmp_path / file_name).write_text(text)
    fields = with_quantization({"a": 1}, str(tmp_path))["quantization_config"]
    assert parse_quantization(fields, "here").method == found
    own = {"quantization_config": gptq_config()}
    assert with_quantization(own, str(tmp_path)) == own


def test_the_older_field_of_compressed_tensors_is_read(tmp_path):
    fields = groups_config("pack-quantized", W4)
    found = with_quantization({"compression_config": fields}, str(tmp_path))
    assert found == {"quantization_config": fields}


def test_config(tmp_path):
    """What is kept in memory; scales of a KV cache, which an override leaves out."""
    directory = save_model(tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(ArgumentError, match="'awq' is for .* not quantised; 'int4', 'int8' and"):
        Config(str(directory), quantization="awq")
    for name, (fields, _) in FORMATS.items():
        edit_config(directory, quantization_config=fields)
        quantization = parse_quantization(fields, "here")
        config = Config(str(directory))
        assert config.weight_format == quantization.weight_format
        assert config.fp8_scales == quantization.fp8_scales
        # vLLM's scripts name the checkpoint's own kind.
        method = fields["quant_method"]
        named = [method, f"{method}_marlin"] if method in ("awq", "gptq") else [method]
        for given in named if method != "fp8" else []:  # which rounds on load as well
            assert Config(str(directory), quantization=given) == config, name
        other = "gptq" if method == "awq" else "awq"
        message = f"quantization '{other}' is for checkpoints of that kind, but this one is "
        with pytest.raises(ArgumentError, match=f"{message}'{method}'; leave it out"):
            Config(str(directory), quantization=other)
        if config.weight_format is not None:
            with pytest.raises(ArgumentError, match="quantization 'fp8' is not supported for a ch"):
                Config(str(directory), quantization="fp8")
        else:
            own = quantization.fp8_scales or "rows"
            assert Config(str(directory), quantization="fp8").fp8_scales == own, name
    scheme = {"num_bits": 8, "type": "float"}
    fields = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": scheme}
    edit_config(directory, quantization_config=fields)
    with pytest.raises(ArgumentError, match="kv_cache_scheme .* is not supported: hf_overrides="):
        Config(str(directory))
    config = Config(str(directory), hf_overrides={"quantization_config": {"kv_cache_scheme": None}})
    assert config.model_config.quantization == Quantization("fp8")
