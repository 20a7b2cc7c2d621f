"""Engines on quantised checkpoints: the tokens of transformers with the weights they stand for."""

import pytest
import torch
from engine_checks import check_varied, generate, greedy, random_prompts, tiny_engine
from quantized_models import FORMATS, LINEARS, edit_config, save_quantized
from tiny_models import FAMILIES, reference_greedy, save_model

from nanovllm import ArgumentError
from nanovllm.kernels.torch_ops import TorchOps
from nanovllm.kernels.types import FP8_DTYPE, PackedWeight

MAX_TOKENS = 8
PROMPTS = random_prompts((1, 30), seed=8)
SIZES = {"num_hidden_layers": 2, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("quantized") / "model", seed=3, **SIZES)


def expected_tokens(exact_dir):
    expected = reference_greedy(exact_dir, PROMPTS, MAX_TOKENS)
    check_varied(expected)
    return expected


def kinds(llm) -> list[str]:
    """How the second layer's weights are kept: q, k and v; o; gate and up; down."""
    layer = llm.model_runner.model.model.layers[1]
    modules = layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj
    found = []
    for module in (*modules, layer.mlp.down_proj):
        if isinstance(module.weight, PackedWeight):
            found.append(f"int{module.weight.bits}")
        else:
            found.append("fp8" if module.weight.dtype == FP8_DTYPE else "plain")
    return found


@pytest.mark.parametrize(
    ("form", "kept"),
    [
        ("awq", "int4"),
        ("gptq-order", "int4"),
        ("w8a8-tensor", "int8"),
        ("fp8", "fp8"),
        ("nf4-nested", "plain"),
    ],
)
def test_tokens_are_those_of_the_dequantised_weights(form, kept, model_dir, tmp_path, monkeypatch):
    """One layer's up_proj is not converted, so the product with gate_proj has no packed weight."""
    monkeypatch.setattr(TorchOps, "has_fp8_products", True)
    quantized, exact = save_quantized(model_dir, tmp_path, form, ("layers.1.mlp.up_proj",))
    expected = expected_tokens(exact)
    with tiny_engine(quantized) as llm:
        assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == expected
        assert kinds(llm) == [kept, kept, "plain", kept]
        if form == "awq":
            with pytest.raises(ArgumentError, match="checkpoint that is quantised .awq.;"):
                llm.load_weights({})
            llm.reload_weights()
            assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == expected


@pytest.mark.parametrize(("family", "form"), [("phi4-mini", "gptq"), ("mixtral", "awq")])
def test_families_with_merged_tensors_and_experts_and_a_quantised_lm_head(family, form, tmp_path):
    settings = FAMILIES[family] | {"intermediate_size": 64}
    source = save_model(tmp_path / "model", seed=5, **settings)
    linears = *LINEARS, "lm_head.weight"
    quantized, exact = save_quantized(source, tmp_path, form, converted=linears)
    with tiny_engine(quantized) as llm:
        assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == expected_tokens(exact)
        layer = llm.model_runner.model.model.layers[0]
        assert isinstance(layer.self_attn.qkv_proj.weight, PackedWeight)
        mlp = layer.mlp.experts if family == "mixtral" else layer.mlp
        assert isinstance(mlp.down_proj.weight, PackedWeight)


def test_a_quantised_checkpoint_is_not_quantised_again(model_dir, tmp_path):
    quantized, _ = save_quantized(model_dir, tmp_path, "gptq")
    with pytest.raises(ArgumentError, match="quantization 'int8' is not supported for a checkp"):
        tiny_engine(quantized, quantization="int8")
    edit_config(quantized, quantization_config=FORMATS["w4a16"][0])  # which asks for others
    with pytest.raises(ArgumentError, match="missing tensors: .*; unexpected tensors: .*qweight"):
        tiny_engine(quantized)


def test_dummy_weights(model_dir, tmp_path):
    quantized, _ = save_quantized(model_dir, tmp_path, "gptq-8-v2")
    with tiny_engine(quantized, load_format="dummy") as llm:
        assert len(generate(llm, PROMPTS, greedy(2))) == len(PROMPTS)
        assert kinds(llm) == ["int8"] * 4
        assert llm.model_runner.model.lm_head.weight.dtype == torch.float32
