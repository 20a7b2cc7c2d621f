"""Embeddings and scores on CUDA: float32 and bfloat16 against transformers, beside decoding."""

import random

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, reference_greedy, save_model
from transformers import AutoModel

from nanovllm import LLM, SamplingParams

SHAPE = {  # Qwen3-Embedding-0.6B's heads and sizes, three layers of them
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "initializer_range": 0.04,
}
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def random_prompts(lengths):
    rng = random.Random(0)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


PROMPTS = random_prompts((1, 3, 60, 255, 256, 257, 700, *[20] * 60))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "embedding", **SHAPE)


@pytest.fixture(scope="module")
def expected(model_dir):
    """[prompts, hidden_size], of length 1."""
    model = AutoModel.from_pretrained(model_dir, dtype=torch.float32).to("cuda")
    with torch.inference_mode():
        states = [
            model(torch.tensor([ids], device="cuda")).last_hidden_state[0, -1] for ids in PROMPTS
        ]
    return torch.nn.functional.normalize(torch.stack(states), dim=1).cpu().numpy()


def embed(llm):
    outputs = llm.embed(PROMPTS, use_tqdm=False)
    return np.array([output.outputs.embedding for output in outputs])


def small_engine(model_dir, **kwargs):
    settings = {"max_model_len": 1024, "max_num_seqs": 32, "num_kvcache_blocks": 64}
    return LLM(str(model_dir), **(settings | kwargs))


@pytest.mark.parametrize("overlap", [True, False])
def test_float32_beside_requests_that_generate(model_dir, expected, overlap):
    reference = reference_greedy(model_dir, PROMPTS[2:5], 20)
    settings = {"enable_chunked_prefill": True, "max_num_batched_tokens": 300}
    with small_engine(model_dir, async_scheduling=overlap, **settings) as llm:
        ids = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS[2:5]]
        for _ in range(2):  # the second time with a warm prefix cache
            np.testing.assert_allclose(embed(llm), expected, atol=1e-4)
        completions = {}
        while not llm.is_finished():
            completions.update(llm.step()[0])
    assert [completions[i] for i in ids] == reference


def test_bfloat16_points_in_the_same_direction(model_dir, expected):
    with small_engine(model_dir, dtype="bfloat16") as llm:
        rows = embed(llm)
        [pair] = llm.score("the quick", "brown fox", method="embedding", use_tqdm=False)
    assert (rows * expected).sum(1).min() > 0.999
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-6)
    assert -1 <= pair.outputs.score <= 1


@pytest.mark.two_gpus
def test_two_ranks(model_dir, expected):
    with small_engine(model_dir, tensor_parallel_size=2) as llm:
        np.testing.assert_allclose(embed(llm), expected, atol=1e-4)
