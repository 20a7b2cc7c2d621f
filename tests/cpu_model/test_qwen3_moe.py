"""Qwen3-MoE beyond what all families share: its config's limits, new weights, experts in fp8."""

import pytest
import torch
from engine_checks import generate, greedy, random_prompts, tiny_engine
from safetensors.torch import load_file
from tiny_models import FAMILIES, edit_config, save_family, save_model
from transformers import AutoModelForCausalLM

from nanovllm import ArgumentError
from nanovllm.config import Config
from nanovllm.kernels.ops import select_ops
from nanovllm.kernels.torch_ops import dequantize_weight, quantize
from nanovllm.layers.context import ModelContext
from nanovllm.layers.moe import SparseMLP
from nanovllm.layers.tensor_parallel import TensorParallel
from nanovllm.models.loader import expected_tensors
from nanovllm.models.moe_config import is_sparse

PROMPTS = random_prompts((1, 30, 100), seed=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("moe"), "qwen3-moe")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_local_experts", 0, "num_experts must be >= 1, got 0"),
        ("num_experts_per_tok", 7, "num_experts_per_tok must be between 1 and 6, got 7"),
        ("moe_intermediate_size", 0, "moe_intermediate_size must be >= 1, got 0"),
        ("decoder_sparse_step", 0, "decoder_sparse_step must be >= 1, got 0"),
        ("mlp_only_layers", [-1], "mlp_only_layers must be >= 0, got -1"),
    ],
)
def test_numbers_that_no_model_can_have_are_refused(name, value, message, tmp_path):
    save_family(tmp_path, "qwen3-moe")
    edit_config(tmp_path, **{name: value})
    with pytest.raises(ArgumentError, match=message):
        Config(str(tmp_path))


def test_ranks_must_divide_the_experts(tmp_path):
    save_model(tmp_path, **FAMILIES["qwen3-moe"] | {"moe_intermediate_size": 42})
    with pytest.raises(ArgumentError, match=r"\(4\) must divide .*moe_intermediate_size \(42\)"):
        Config(str(tmp_path), tensor_parallel_size=4)


def test_which_layers_are_sparse(path):
    config = Config(str(path)).hf_config
    config.decoder_sparse_step, config.mlp_only_layers = 2, [3]
    assert [is_sparse(config, index) for index in range(6)] == [False, True, *[False] * 3, True]


def test_new_weights_by_their_names_in_checkpoints(path, tmp_path):
    save_model(tmp_path, seed=99, **FAMILIES["qwen3-moe"])
    with tiny_engine(tmp_path) as other, tiny_engine(path) as llm:
        before, expected = (generate(e, PROMPTS, greedy(5)) for e in (llm, other))
        assert before != expected
        weights = load_file(tmp_path / "model.safetensors")
        assert "model.layers.0.mlp.experts.5.up_proj.weight" in weights
        assert llm.load_weights(weights) == weights.keys()
        assert generate(llm, PROMPTS, greedy(5)) == expected


def test_fp8_rounds_the_rows_of_every_expert(path):
    """And not the router's; without fp8 products their values are computed with."""
    config = Config(str(path)).hf_config
    device = torch.device("cpu")
    ops = select_ops("torch", device, torch.float32, config.head_dim, False)
    context = ModelContext(ops, TensorParallel(), torch.float32, device, fp8_scales="rows")
    mlp = SparseMLP(config, context)
    checkpoint = load_file(path / "model.safetensors")
    for name, (parameter, shard) in expected_tensors(mlp).items():
        parameter.fill(shard, checkpoint[f"model.layers.0.mlp.{name}"][shard.source])

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    reference = model.model.layers[0].mlp
    for weight in (reference.experts.gate_up_proj, reference.experts.down_proj):
        weight.data = dequantize_weight(*quantize(weight.data.flatten(0, 1))).view_as(weight)
    x = torch.randn(50, config.hidden_size)
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x), reference(x[None])[0], atol=1e-5, rtol=1e-5)
