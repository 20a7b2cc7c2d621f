"""fp8 weights: the tokens of transformers with the values that fp8 gives the weights."""

from copy import deepcopy

import pytest
import torch
from engine_checks import check_varied, generate, greedy, random_prompts, tiny_engine
from fp8_models import save_fp8, save_rounded, through_blocks, through_rows
from safetensors.torch import load_file
from tiny_models import reference_greedy, save_model

from nanovllm import ArgumentError
from nanovllm.kernels.torch_ops import TorchOps
from nanovllm.kernels.types import FP8_DTYPE

MAX_TOKENS = 12
PROMPTS = random_prompts((1, 40, 300), seed=8)
# Several blocks in each direction, the last of them cut off; biases in every layer.
SIZES = {"hidden_size": 160, "intermediate_size": 288, "head_dim": 32, "attention_bias": True}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A model, another, the model as an fp8 checkpoint, and what fp8 makes of each."""
    root = tmp_path_factory.mktemp("fp8")
    model = save_model(root / "model", seed=3, num_hidden_layers=2, **SIZES)
    other = save_model(root / "other", seed=4, num_hidden_layers=2, **SIZES)
    return {
        "model": model,
        "other": other,
        "fp8": save_fp8(model, root / "fp8"),
        "blocks": save_rounded(model, root / "blocks", through_blocks),
        "rows": save_rounded(model, root / "rows", through_rows),
        "other rows": save_rounded(other, root / "other_rows", through_rows),
    }


@pytest.fixture(scope="module")
def references(directories):
    names = ("model", "blocks", "rows", "other rows")
    completions = {name: reference_greedy(directories[name], PROMPTS, MAX_TOKENS) for name in names}
    check_varied(completions["rows"])
    assert len({str(tokens) for tokens in completions.values()}) == len(names)
    return completions


@pytest.fixture(params=[False, True], ids=["dequantized", "in fp8"])
def keeps_fp8(request, monkeypatch):
    """Weights in the model's dtype, as on any CPU; or fp8 numbers and scales, as on Hopper."""
    monkeypatch.setattr(TorchOps, "has_fp8_products", request.param)
    return request.param


def check(llm, expected, keeps_fp8) -> None:
    assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == expected
    layer = llm.model_runner.model.model.layers[0]
    weights = [
        layer.self_attn.qkv_proj.weight,
        layer.self_attn.o_proj.weight,
        layer.mlp.down_proj.weight,
    ]
    dtypes = {weight.dtype for weight in weights}
    assert dtypes == {FP8_DTYPE if keeps_fp8 else torch.float32}
    assert llm.model_runner.model.model.embed_tokens.weight.dtype == torch.float32


def test_fp8_checkpoint(directories, references, keeps_fp8):
    with tiny_engine(directories["fp8"]) as llm:
        check(llm, references["blocks"], keeps_fp8)
        llm.sleep(level=2)
        llm.wake_up()
        llm.reload_weights()
        check(llm, references["blocks"], keeps_fp8)
        with pytest.raises(ArgumentError, match="new weights for a checkpoint that is quantised"):
            llm.load_weights(load_file(directories["other"] / "model.safetensors"))


def test_quantized_on_load(directories, references, keeps_fp8):
    with tiny_engine(directories["model"], quantization="fp8") as llm:
        check(llm, references["rows"], keeps_fp8)
        llm.sleep(level=1)
        llm.wake_up()
        check(llm, references["rows"], keeps_fp8)
        llm.load_weights(load_file(directories["other"] / "model.safetensors"))
        check(llm, references["other rows"], keeps_fp8)


@pytest.mark.usefixtures("ranks_are_threads")
def test_new_weights_of_two_ranks_are_rounded_once(directories):
    """float32 weights in a bfloat16 model give what loading them from the directory gave."""
    settings = {"quantization": "fp8", "dtype": "bfloat16", "tensor_parallel_size": 2}
    with tiny_engine(directories["model"], **settings) as llm:
        loaded = deepcopy(llm.apply_model(torch.nn.Module.state_dict))
        llm.load_weights(load_file(directories["model"] / "model.safetensors"))
        for old, new in zip(loaded, llm.apply_model(torch.nn.Module.state_dict), strict=True):
            assert all(torch.equal(old[name], new[name]) for name in old)


def test_random_weights(directories, keeps_fp8):
    with tiny_engine(directories["fp8"], load_format="dummy") as llm:
        assert len(generate(llm, PROMPTS, greedy(2))) == len(PROMPTS)


def test_quantization_of_an_fp8_checkpoint_is_its_own(directories, references):
    with tiny_engine(directories["fp8"], quantization="fp8") as llm:
        check(llm, references["blocks"], keeps_fp8=False)
