"""Qwen3-MoE beyond what all families share: its config's limits, new weights, experts in fp8."""

import pytest
import torch
from engine_checks import generate, greedy, random_prompts, tiny_engine
from fp8_models import save_fp8, save_rounded, through_blocks, through_rows
from safetensors.torch import load_file
from tiny_models import FAMILIES, edit_config, save_family, save_model
from transformers import AutoModelForCausalLM

from nanovllm import ArgumentError
from nanovllm.config import Config
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.types import FP8_DTYPE
from nanovllm.layers.context import ModelContext
from nanovllm.models import qwen3_moe
from nanovllm.models.checkpoint import SafetensorsCheckpoint
from nanovllm.models.family import Family
from nanovllm.models.fp8_checkpoint import DequantizedCheckpoint
from nanovllm.models.loader import expected_tensors
from nanovllm.models.model_config import ModelConfig
from nanovllm.parallel.tensor_parallel import TensorParallel

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
        ("mlp_only_layers", [-1], "mlp_only_layers must be between 0 and .*, got -1"),
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
    model = ModelConfig.from_hf(config, Family("", ""))
    assert [model.is_sparse(index) for index in range(6)] == [False, True, *[False] * 3, True]


def test_new_weights_by_their_names_in_checkpoints(path, tmp_path):
    save_model(tmp_path, seed=99, **FAMILIES["qwen3-moe"])
    with tiny_engine(tmp_path) as other, tiny_engine(path) as llm:
        before, expected = (generate(e, PROMPTS, greedy(5)) for e in (llm, other))
        assert before != expected
        weights = load_file(tmp_path / "model.safetensors")
        assert "model.layers.0.mlp.experts.5.up_proj.weight" in weights
        assert llm.load_weights(weights) == weights.keys()
        assert generate(llm, PROMPTS, greedy(5)) == expected


def sparse_mlp(path, fp8_scales, keeps_fp8, rank=0, size=1):
    """The first layer's, with its part of the weights."""
    config = Config(str(path)).model_config
    device = torch.device("cpu")
    ops = select_ops("torch", device, torch.float32, config.head_dim, False)
    ops.has_fp8_products = keeps_fp8
    tp = TensorParallel(rank, size)
    mlp = qwen3_moe.sparse_mlp(
        config, ModelContext(ops, tp, torch.float32, device, fp8_scales=fp8_scales)
    )
    expected = expected_tensors(mlp)
    prefix = "model.layers.0.mlp."
    checkpoint = DequantizedCheckpoint(
        SafetensorsCheckpoint(str(path)), {prefix + name for name in expected}
    )
    for name, [(parameter, shard)] in expected.items():
        parameter.fill(shard, checkpoint.read(prefix + name, shard.source))
    return mlp


def check_sum_of_ranks(mlps, path) -> None:
    """Against transformers with the weights of `path`."""
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model.layers[0].mlp
    x = torch.randn(50, reference.gate.weight.shape[1])
    with torch.inference_mode():
        got = sum(mlp(x).term for mlp in mlps)
        torch.testing.assert_close(got, reference(x[None])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keeps_fp8", [False, True])
def test_fp8_rounds_the_rows_of_every_expert(path, tmp_path, keeps_fp8):
    """And not the router's. Down's rows of 40 are not multiplied in fp8, so neither are gate's."""
    mlp = sparse_mlp(path, "rows", keeps_fp8)
    assert mlp.experts.gate_up_proj.weight_scale is None
    assert mlp.experts.down_proj.weight_scale is None
    check_sum_of_ranks([mlp], save_rounded(path, tmp_path / "rows", through_rows))


@pytest.mark.parametrize(("size", "in_fp8"), [(256, {1, 2}), (192, set())])
def test_fp8_checkpoint(tmp_path, size, in_fp8):
    """Experts stay in fp8 where each, and each rank's part of it, has blocks of its own."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": size, "num_hidden_layers": 1}
    settings = FAMILIES["qwen3-moe"] | sizes | {"mlp_only_layers": []}
    model_dir = save_model(tmp_path / "model", **settings)
    fp8_dir = save_fp8(model_dir, tmp_path / "fp8")
    blocks_dir = save_rounded(model_dir, tmp_path / "blocks", through_blocks)
    for keeps_fp8 in (False, True):
        for num_ranks in (1, 2):
            ranks = range(num_ranks)
            mlps = [sparse_mlp(fp8_dir, "blocks", keeps_fp8, rank, num_ranks) for rank in ranks]
            dtype = FP8_DTYPE if keeps_fp8 and num_ranks in in_fp8 else torch.float32
            for mlp in mlps:
                assert mlp.experts.gate_up_proj.weight.dtype == dtype
                assert mlp.experts.down_proj.weight.dtype == dtype
            check_sum_of_ranks(mlps, blocks_dir)
