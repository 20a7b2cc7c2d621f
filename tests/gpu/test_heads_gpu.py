"""Classification heads and pooling types on CUDA: float32 and bfloat16 against transformers."""

import json
import random

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, edit_config, reference_greedy, save_model
from transformers import AutoModel

from nanovllm import LLM, PoolingParams, SamplingParams

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "initializer_range": 0.04,
}
CHUNKED = {"enable_chunked_prefill": True, "max_num_batched_tokens": 300}
LOGITS = PoolingParams(use_activation=False)
TAG = 5


def random_prompts(lengths):
    rng = random.Random(0)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


PROMPTS = random_prompts((1, 3, 60, 255, 256, 257, 700, *[20] * 60))
PROMPTS = [[*prompt, TAG] for prompt in PROMPTS]


def small_engine(model_dir, **kwargs):
    settings = {"max_model_len": 1024, "max_num_seqs": 32, "num_kvcache_blocks": 64}
    return LLM(str(model_dir), **(settings | kwargs))


def save_reward_model(path):
    """The layout of Qwen2.5-Math-PRM."""
    save_model(path, architecture="Qwen2ForCausalLM", **(SHAPE | {"head_dim": 64}))
    tensors = load_file(path / "model.safetensors")
    size = SHAPE["hidden_size"]
    shapes = {"0.weight": (size, size), "0.bias": (size,), "2.weight": (2, size), "2.bias": (2,)}
    for name, shape in shapes.items():
        tensors[f"score.{name}"] = 0.04 * torch.randn(shape)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    edit_config(path, architectures=["Qwen2ForProcessRewardModel"])


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "embedding", **SHAPE)
    for kind in ("Sequence", "Token"):
        architecture = f"Qwen3For{kind}Classification"
        save_model(folder / kind, architecture=architecture, num_labels=3, **SHAPE)
    save_reward_model(folder / "reward")
    return folder


@torch.inference_mode()
def states_of_transformers(path):
    model = AutoModel.from_pretrained(path, dtype=torch.float32).to("cuda")
    inputs = [torch.tensor([ids], device="cuda") for ids in PROMPTS]
    return [model(ids).last_hidden_state[0].cpu() for ids in inputs]


@torch.inference_mode()
def logits_of_transformers(path):
    [name] = json.loads((path / "config.json").read_text())["architectures"]
    model = getattr(transformers, name).from_pretrained(path, dtype=torch.float32).to("cuda")
    return [model(torch.tensor([ids], device="cuda")).logits[0].cpu() for ids in PROMPTS]


def check_close(found, expected, tolerance=3e-4):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * float(other.abs().max() + 1))


def data(llm, task, params=None):
    outputs = llm.encode(PROMPTS, params, pooling_task=task, use_tqdm=False)
    return [output.outputs.data for output in outputs]


@pytest.mark.parametrize("overlap", [True, False])
def test_sequence_classification(model_dirs, overlap):
    path = model_dirs / "Sequence"
    expected = logits_of_transformers(path)
    with small_engine(path, async_scheduling=overlap, **CHUNKED) as llm:
        assert llm.model_runner.graphs is None
        for _ in range(2):  # the second time with a warm prefix cache
            check_close(data(llm, "classify", LOGITS), expected)
    with small_engine(path, dtype="bfloat16") as llm:
        outputs = llm.classify(PROMPTS, use_tqdm=False)
        check_close([o.outputs.probs for o in outputs], [r.softmax(0) for r in expected], 0.05)


@pytest.mark.parametrize("overlap", [True, False])
def test_token_classification(model_dirs, overlap):
    expected = logits_of_transformers(model_dirs / "Token")
    with small_engine(model_dirs / "Token", async_scheduling=overlap, **CHUNKED) as llm:
        for _ in range(2):
            check_close(data(llm, "token_classify", LOGITS), expected)


def test_process_rewards(model_dirs):
    path = model_dirs / "reward"
    w = load_file(path / "model.safetensors")
    where = [[i for i, token in enumerate(ids) if token == TAG] for ids in PROMPTS]
    expected = [
        (states[i] @ w["score.0.weight"].T + w["score.0.bias"]).relu() @ w["score.2.weight"].T
        + w["score.2.bias"]
        for states, i in zip(states_of_transformers(path), where, strict=True)
    ]
    with small_engine(path, pooler_config={"step_tag_id": TAG}, **CHUNKED) as llm:
        check_close(data(llm, "token_classify", LOGITS), expected)
        outputs = llm.reward(PROMPTS, use_tqdm=False)
        check_close([o.outputs.data for o in outputs], [rows.softmax(1) for rows in expected])


@pytest.mark.parametrize("overlap", [True, False])
def test_means_beside_requests_that_generate(model_dirs, overlap):
    path = model_dirs / "embedding"
    expected = [states.mean(0) for states in states_of_transformers(path)]
    reference = reference_greedy(path, PROMPTS[2:5], 20)
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    config = {"pooling_type": "MEAN", "normalize": False}
    with small_engine(path, async_scheduling=overlap, pooler_config=config, **CHUNKED) as llm:
        ids = [llm.add_request(prompt, greedy) for prompt in PROMPTS[2:5]]
        for _ in range(2):
            check_close(data(llm, "embed"), expected)
        completions = {}
        while not llm.is_finished():
            completions.update(llm.step()[0])
    assert [completions[i] for i in ids] == reference


@pytest.mark.two_gpus
def test_two_ranks(model_dirs):
    for kind, task in (("Sequence", "classify"), ("Token", "token_classify")):
        expected = logits_of_transformers(model_dirs / kind)
        with small_engine(model_dirs / kind, tensor_parallel_size=2, **CHUNKED) as llm:
            check_close(data(llm, task, LOGITS), expected)
