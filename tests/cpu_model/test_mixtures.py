"""Mixtures of experts beyond what all families share: names, MXFP4, ranks, configurations."""

import json

import pytest
import torch
from engine_checks import generate, greedy, random_prompts, tiny_engine
from fp8_models import save_fp8, save_rounded, through_blocks, through_rows
from mxfp4 import save_mxfp4
from safetensors.torch import load_file
from tiny_models import FAMILIES, edit_config, reference_greedy, save_family, save_model
from transformers import AutoModelForCausalLM, Mxfp4Config

from nanovllm import ArgumentError
from nanovllm.config import Config
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.types import FP8_DTYPE
from nanovllm.layers.context import ModelContext
from nanovllm.models import size
from nanovllm.models.families import model_class
from nanovllm.models.loader import load_model
from nanovllm.models.quantization_config import Quantization
from nanovllm.parallel.tensor_parallel import TensorParallel

PROMPTS = random_prompts((1, 30, 100), seed=3)
TENSORS = {  # the one of each family that its model has by another name, or in another layout
    "mixtral": "model.layers.0.block_sparse_moe.experts.4.w3.weight",
    "qwen2-moe": "model.layers.0.mlp.shared_expert.up_proj.weight",
    "gpt-oss": "model.layers.0.mlp.experts.gate_up_proj",
}


ALL_TENSORS = TENSORS | {"granite-moe": "model.layers.0.block_sparse_moe.input_linear.weight"}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtures")
    return {name: save_family(folder / name, name) for name in ALL_TENSORS}


@pytest.mark.parametrize("name", ALL_TENSORS)
def test_new_weights_by_their_names_in_checkpoints(paths, name, tmp_path):
    save_model(tmp_path, seed=99, **FAMILIES[name])
    with tiny_engine(tmp_path) as other, tiny_engine(paths[name]) as llm:
        before, expected = (generate(e, PROMPTS, greedy(5)) for e in (llm, other))
        assert before != expected
        weights = load_file(tmp_path / "model.safetensors")
        assert ALL_TENSORS[name] in weights
        assert llm.load_weights(weights) == weights.keys()
        assert generate(llm, PROMPTS, greedy(5)) == expected


def new_model(path, rank=0, num_ranks=1, load_format="auto", fp8_scales=None, keeps_fp8=False):
    """One rank's model, loaded; without a process group it cannot run, but its MLPs can."""
    config, device = Config(str(path)).model_config, torch.device("cpu")
    ops = select_ops("torch", device, torch.float32, config.head_dim, False)
    ops.has_fp8_products = keeps_fp8
    tp = TensorParallel(rank, num_ranks)
    context = ModelContext(ops, tp, torch.float32, device, fp8_scales=fp8_scales)
    model = model_class(config.architectures)(config, context)
    load_model(model, str(path), load_format)
    return model


@torch.inference_mode()
def check_sum_of_ranks(models, path, tolerance=1e-5) -> None:
    """The first layer's MLP against that of transformers with the weights of `path`."""
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model.layers[0].mlp
    x = torch.randn(1, 50, 64)
    expected = reference(x)
    expected = expected if isinstance(expected, torch.Tensor) else expected[0]
    got = sum(model.model.layers[0].mlp(x[0]).term for model in models)
    torch.testing.assert_close(got, expected.view(50, 64), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", TENSORS)
def test_ranks_add_up(paths, name):
    """Biases of the experts' outputs count once."""
    check_sum_of_ranks([new_model(paths[name], rank, 4) for rank in range(4)], paths[name])


@pytest.mark.parametrize("name", ALL_TENSORS)
def test_random_weights_are_the_same_for_any_number_of_ranks(paths, name):
    [whole] = [new_model(paths[name], load_format="dummy").model.layers[0].mlp]
    ranks = [new_model(paths[name], r, 2, "dummy").model.layers[0].mlp for r in range(2)]
    x = torch.randn(9, 64)
    torch.testing.assert_close(sum(mlp(x).term for mlp in ranks), whole(x).term)
    assert whole(x).term.abs().max() > 0


@pytest.mark.parametrize("keeps_fp8", [False, True])
@pytest.mark.parametrize("name", TENSORS)
def test_fp8_rounds_the_rows_of_every_expert(paths, name, keeps_fp8, tmp_path):
    model = new_model(paths[name], fp8_scales="rows", keeps_fp8=keeps_fp8)
    rounded = save_rounded(paths[name], tmp_path / "rounded", through_rows)
    check_sum_of_ranks([model], rounded)
    weights = [
        p for n, p in model.named_parameters() if "layers.0.mlp.experts" in n and p.dim() > 1
    ]
    in_fp8 = keeps_fp8 and name != "qwen2-moe"  # whose experts' 40 features are not multiplied so
    assert {p.dtype for p in weights} == {FP8_DTYPE if in_fp8 else torch.float32}


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_fp8_checkpoints_are_read_by_their_names(paths, name, tmp_path):
    fp8_dir = save_fp8(paths[name], tmp_path / "fp8")
    rounded = save_rounded(paths[name], tmp_path / "rounded", through_blocks)
    check_sum_of_ranks([new_model(fp8_dir, fp8_scales="blocks")], rounded)


# MXFP4


@pytest.fixture(scope="module")
def mxfp4_dir(paths, tmp_path_factory):
    return save_mxfp4(paths["gpt-oss"], tmp_path_factory.mktemp("mxfp4") / "model")


@pytest.fixture(scope="module")
def dequantized_dir(mxfp4_dir, tmp_path_factory):
    """What transformers makes of it."""
    model = AutoModelForCausalLM.from_pretrained(
        mxfp4_dir, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    model.config.quantization_config = None
    path = tmp_path_factory.mktemp("dequantized")
    model.save_pretrained(path)
    return path


def test_mxfp4_weights_give_the_tokens_of_transformers(
    paths, mxfp4_dir, dequantized_dir, monkeypatch
):
    """`load_weights` takes them unpacked."""
    monkeypatch.setattr(size, "SMALL", 0)  # a byte counts as two weights
    expected = reference_greedy(dequantized_dir, PROMPTS, 8)
    with tiny_engine(mxfp4_dir) as llm:
        assert generate(llm, PROMPTS, greedy(8)) == expected
        others = load_file(paths["gpt-oss"] / "model.safetensors")
        llm.load_weights({TENSORS["gpt-oss"]: 2 * others[TENSORS["gpt-oss"]]})
        assert generate(llm, PROMPTS, greedy(8)) != expected
        llm.reload_weights()
        assert generate(llm, PROMPTS, greedy(8)) == expected


def test_ranks_cut_through_blocks_of_mxfp4(mxfp4_dir, dequantized_dir):
    """48 of 96 features."""
    check_sum_of_ranks([new_model(mxfp4_dir, rank, 2) for rank in range(2)], dequantized_dir)


# Configurations

GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


def model_config(directory, raw, ranks=1):
    (directory / "config.json").write_text(json.dumps(raw))
    return Config(str(directory), tensor_parallel_size=ranks).model_config


def test_the_config_of_gpt_oss_20b(tmp_path):
    config = model_config(tmp_path, GPT_OSS_20B)
    assert (config.num_experts, config.num_experts_per_tok) == (32, 4)
    assert (config.moe_intermediate_size, config.norm_topk_prob) == (2880, True)
    assert (config.swiglu_alpha, config.swiglu_limit) == (1.702, 7.0)
    assert config.layer_windows == (128, None) * 12
    assert config.max_positions == 131072 and config.quantization == Quantization("mxfp4")
    assert size.num_weights(config) == pytest.approx(20.3e9, rel=0.01)  # 20.9e9 with the LM head
    with pytest.raises(ArgumentError, match=r"swiglu_limit must be .* got 0"):
        model_config(tmp_path, GPT_OSS_20B | {"swiglu_limit": 0})


def test_fields_of_other_mixtures_do_not_matter_to_mixtral(paths, tmp_path):
    """transformers' Mixtral does not know them."""
    raw = json.loads((paths["mixtral"] / "config.json").read_text())
    others = {"norm_topk_prob": False, "moe_intermediate_size": 7, "mlp_only_layers": [0]}
    config = model_config(tmp_path, raw | others)
    assert config == model_config(tmp_path, raw)
    assert config.norm_topk_prob and config.is_sparse(0) and config.moe_intermediate_size == 96


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
@pytest.mark.parametrize("field", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_has_two_names(family, field, tmp_path):
    """transformers stores Mixtral's by one and OLMoE's by the other."""
    save_family(tmp_path, family)
    edit_config(tmp_path, num_experts=None, num_local_experts=None)
    edit_config(tmp_path, **{field: 5})
    assert Config(str(tmp_path)).model_config.num_experts == 5


def test_ranks_must_divide_the_shared_expert(paths, tmp_path):
    raw = json.loads((paths["qwen2-moe"] / "config.json").read_text())
    with pytest.raises(ArgumentError, match=r"\(4\) must .* shared_expert_intermediate_size \(50"):
        model_config(tmp_path, raw | {"shared_expert_intermediate_size": 50}, ranks=4)


def test_a_window_that_is_off_may_be_zero(paths, tmp_path):
    """As transformers saves it; a callable's changes are checked again."""
    raw = json.loads((paths["qwen2-moe"] / "config.json").read_text())
    assert raw["sliding_window"] == 0
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = Config(str(tmp_path), hf_overrides=lambda hf_config: hf_config).model_config
    assert config.layer_windows == (None,) * 3
