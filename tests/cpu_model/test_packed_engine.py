"""Weights rounded to 4 and 8 bits on load: the tokens of transformers with these values."""

from collections import Counter

import pytest
import torch
from engine_checks import check_varied, generate, greedy, random_prompts, tiny_engine
from fp8_models import save_rounded
from packed_models import through_groups
from safetensors.torch import load_file
from tiny_models import FAMILIES, reference_greedy, save_model

from nanovllm import ArgumentError
from nanovllm.config import Config
from nanovllm.kernels import torch_ops
from nanovllm.kernels.types import FinishedLayer, LayerEnd, PackedWeight
from nanovllm.layers.linear import RowParallelLinear
from nanovllm.layers.moe import ExpertWeights

MAX_TOKENS = 12
PROMPTS = random_prompts((1, 40, 300), seed=8)
MODELS = {
    "qwen3": {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 256, "head_dim": 32},
    "qwen3-moe": FAMILIES["qwen3-moe-steps"],  # layers with an MLP and layers with experts
    "gpt-oss": FAMILIES["gpt-oss"],  # all experts in one tensor, transposed
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    return {name: save_model(root / name, seed=3, **sizes) for name, sizes in MODELS.items()}


def weights(model: torch.nn.Module) -> list:
    kinds = (RowParallelLinear, ExpertWeights)
    return [module.weight for module in model.modules() if isinstance(module, kinds)]


def check(llm, expected) -> None:
    assert all(isinstance(weight, PackedWeight) for weight in weights(llm.model_runner.model))
    assert llm.model_runner.model.model.embed_tokens.weight.dtype == torch.float32
    assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == expected


def reference(path, target, bits: int) -> list[list[int]]:
    """The tokens of transformers with the weights of `path` rounded."""
    save_rounded(path, target, lambda weight: through_groups(weight, bits))
    return reference_greedy(target, PROMPTS, MAX_TOKENS)


@pytest.mark.parametrize(("name", "bits"), [("qwen3-moe", 4), ("gpt-oss", 8)])
def test_tokens_are_those_of_the_rounded_weights(directories, name, bits, tmp_path):
    expected = reference(directories[name], tmp_path / "rounded", bits)
    check_varied(expected)
    settings = {"enable_chunked_prefill": True, "max_num_batched_tokens": 100}
    with tiny_engine(directories[name], quantization=f"int{bits}", **settings) as llm:
        check(llm, expected)
        check(llm, expected)  # with the prefix of the long prompt from the cache


def layer_end(heads, residual, end: LayerEnd) -> FinishedLayer | None:
    """Of several operations; None for the longer prompts."""
    if len(heads) > 8:
        return None
    residual += torch_ops.packed_linear(heads, end.o)
    normed = torch_ops.rms_norm(residual, end.mlp_norm, end.eps)
    act = torch_ops.silu_and_mul(torch_ops.packed_linear(normed, end.gate_up))
    residual += torch_ops.packed_linear(act, end.down)
    if end.qkv is None:
        return FinishedLayer(None)
    normed = torch_ops.rms_norm(residual, end.next_norm, end.eps)
    return FinishedLayer(torch_ops.packed_linear(normed, end.qkv))


@pytest.mark.parametrize("has_bias", [False, True])
def test_layers_are_finished_at_once(directories, has_bias, tmp_path, monkeypatch):
    """Where an operation takes all that follows attention, what passes through modules is right."""
    path = directories["qwen3"]
    if has_bias:  # on queries, keys and values: the next layer computes them itself
        path = save_model(tmp_path / "qwen2", seed=3, **FAMILIES["qwen2"])
    num_finished: Counter[bool] = Counter()

    def counted(heads, residual, end):
        finished = layer_end(heads, residual, end)
        if finished is not None:
            num_finished[finished.qkv is not None] += 1
        return finished

    monkeypatch.setattr(torch_ops.TorchOps, "layer_end", staticmethod(counted))
    expected = reference(path, tmp_path / "rounded", 4)
    with tiny_engine(path, quantization="int4") as llm:
        check(llm, expected)
    assert num_finished[False] and bool(num_finished[True]) is not has_bias


def test_random_and_new_weights_and_sleep(directories, tmp_path):
    path = directories["qwen3"]
    expected = reference(path, tmp_path / "rounded", 4)
    with tiny_engine(path, quantization="int4", load_format="dummy") as llm:
        assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) != expected
        llm.load_weights(load_file(path / "model.safetensors"))
        check(llm, expected)
        llm.sleep(level=2)
        llm.wake_up()
        llm.load_weights(load_file(path / "model.safetensors"))
        check(llm, expected)


def test_transformers_modules_are_refused(directories):
    with pytest.raises(ArgumentError, match="quantization 'int4' is not supported for Qwen3"):
        Config(str(directories["qwen3"]), quantization="int4", model_impl="transformers")
