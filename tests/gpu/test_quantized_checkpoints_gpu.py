"""Quantised checkpoints on a GPU: transformers' tokens in float32, on one rank and on two."""

from pathlib import Path

import pytest
import torch
from quantized_models import save_quantized
from tiny_models import FAMILIES, reference_greedy, save_model

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.types import FP8_DTYPE, PackedWeight

PROMPTS = [[5, 6, 7], list(range(3, 60))]
MAX_TOKENS = 12
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model", seed=3, **SIZES)


def new_engine(directory: Path, **kwargs) -> LLM:
    settings = {"max_num_seqs": 8, "num_kvcache_blocks": 64, "max_model_len": 256}
    return LLM(str(directory), **(settings | kwargs))


def generate(llm: LLM) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    return [output["token_ids"] for output in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.mark.parametrize(
    ("num_ranks", "form"),
    [
        *((1, form) for form in ("awq", "gptq-order", "gptq-8-v2", "w8a8", "nf4-nested")),
        *(pytest.param(2, form, marks=pytest.mark.two_gpus) for form in ("awq", "gptq-order")),
    ],
)
def test_float32_gives_the_tokens_of_transformers(form, num_ranks, model_dir, tmp_path) -> None:
    quantized, exact = save_quantized(model_dir, tmp_path, form)
    with new_engine(quantized, dtype="float32", tensor_parallel_size=num_ranks) as llm:
        assert generate(llm) == reference_greedy(exact, PROMPTS, MAX_TOKENS)
        qkv = llm.model_runner.model.model.layers[0].self_attn.qkv_proj.weight
        assert isinstance(qkv, PackedWeight) == (form != "nf4-nested")


def test_experts_give_the_tokens_of_transformers(tmp_path) -> None:
    settings = FAMILIES["qwen3-moe-steps"] | SIZES | {"moe_intermediate_size": 64}
    source = save_model(tmp_path / "model", **settings)
    quantized, exact = save_quantized(source, tmp_path, "gptq")
    with new_engine(quantized, dtype="float32") as llm:
        assert generate(llm) == reference_greedy(exact, PROMPTS, MAX_TOKENS)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
    reason="products with fp8 weights are for compute capability 9.x",
)
def test_fp8_rows_are_multiplied_as_those_that_are_quantised_on_load(model_dir, tmp_path) -> None:
    """Rounding weights that fp8 rows can hold gives the same numbers and scales."""
    quantized, exact = save_quantized(model_dir, tmp_path, "fp8-channels")
    with new_engine(quantized, dtype="bfloat16") as llm:
        found = generate(llm)
        qkv = llm.model_runner.model.model.layers[0].self_attn.qkv_proj
        assert qkv.weight.dtype == FP8_DTYPE and qkv.weight_scale.shape == qkv.weight.shape[:1]
    with new_engine(exact, dtype="bfloat16", quantization="fp8") as llm:
        assert generate(llm) == found
