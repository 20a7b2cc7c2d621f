"""Greedy completions equal those of transformers in float32, for every shape of model we accept."""

import shutil

import pytest
import torch
from engine_checks import (
    check_nothing_is_held,
    check_varied,
    generate,
    greedy,
    random_prompts,
    tiny_engine,
)
from tiny_models import VOCAB_SIZE, edit_config, reference_greedy, save_model
from transformers import Qwen3ForCausalLM

MAX_TOKENS = 16
LENGTHS = (1, 2, 31, 255, 256, 257, 511, 512, 513)
FEW_LENGTHS = (1, 31, 250, 257)  # for shapes of models: with a prompt that grows into a block
DEFAULT_THETA = {"rope_theta": 10000.0, "rope_type": "default"}

VARIANTS = {
    "tied embeddings": {},
    "untied embeddings": {"tie_word_embeddings": False},
    "head_dim 24": {"head_dim": 24, "num_attention_heads": 4, "num_key_value_heads": 2},
    "head_dim 128": {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    "hidden_size 72": {"hidden_size": 72},
    "group 1": {"num_key_value_heads": 8},
    "group 4": {"num_key_value_heads": 2},
    "group 8": {"num_key_value_heads": 1},
    "12 heads in groups of 3": {"num_attention_heads": 12, "num_key_value_heads": 4},
    "attention_bias": {"attention_bias": True},
    "untied with attention_bias": {"attention_bias": True, "tie_word_embeddings": False},
    "odd vocabulary": {"vocab_size": VOCAB_SIZE + 5},
    "odd vocabulary, untied": {"vocab_size": VOCAB_SIZE + 5, "tie_word_embeddings": False},
    "rope_theta 500": {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    "rms_norm_eps 0.1": {"rms_norm_eps": 0.1},
    "one layer": {"num_hidden_layers": 1},
    "sharded": {"max_shard_size": "100KB", "tie_word_embeddings": False},
}


def check_equals_transformers(model_dir, reference_dir=None, lengths=FEW_LENGTHS):
    prompts = random_prompts(lengths)
    with tiny_engine(model_dir) as llm:
        found = generate(llm, prompts, greedy(MAX_TOKENS))
        check_nothing_is_held(llm)
    reference = reference_greedy(reference_dir or model_dir, prompts, MAX_TOKENS, found)
    assert found == reference
    check_varied(reference)
    return reference


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_equals_transformers(tmp_path, name):
    settings = {"num_hidden_layers": 2} | VARIANTS[name]
    model_dir = save_model(tmp_path / "m", seed=len(name), **settings)
    is_sharded = (model_dir / "model.safetensors.index.json").exists()
    assert is_sharded == ("max_shard_size" in VARIANTS[name])
    lengths = FEW_LENGTHS if VARIANTS[name] else LENGTHS
    check_equals_transformers(model_dir, lengths=lengths)


@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_old_style_config_equals_transformers_with_the_new_style(tmp_path, theta):
    rope = {"rope_theta": theta, "rope_type": "default"}
    new = save_model(tmp_path / "new", rope_parameters=rope)
    old = tmp_path / "old"
    shutil.copytree(new, old)
    edit_config(
        old,
        rope_parameters=None,
        dtype=None,
        rope_theta=theta,
        rope_scaling=None,
        torch_dtype="float32",
    )
    reference = check_equals_transformers(old, reference_dir=new)
    if theta != 10000.0:  # the setting matters
        other = save_model(tmp_path / "other", rope_parameters=DEFAULT_THETA)
        last = random_prompts(FEW_LENGTHS)[-1:]
        assert reference_greedy(other, last, MAX_TOKENS) != reference[-1:]


def test_a_tied_model_that_repeats_its_embedding_as_lm_head(tmp_path):
    from safetensors.torch import load_file, save_file

    model_dir = save_model(tmp_path / "m")
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    reference_dir = tmp_path / "reference"
    shutil.copytree(model_dir, reference_dir)
    save_file(tensors, path, metadata={"format": "pt"})
    check_equals_transformers(model_dir, reference_dir)


def test_dtype_of_a_config_without_one_is_bfloat16(tiny_dir, tmp_path):
    model_dir = tmp_path / "m"
    shutil.copytree(tiny_dir, model_dir)
    edit_config(model_dir, dtype=None)
    with tiny_engine(model_dir) as llm:
        assert llm.config.resolve_dtype() is torch.bfloat16
        assert len(generate(llm, [[1, 2, 3]], greedy(5))[0]) == 5


@torch.inference_mode()
def reference_logits(model_dir, prompts, dtype):
    """Logits after each prompt; all are beginnings of the last one, which is run."""
    assert all(prompt == prompts[-1][: len(prompt)] for prompt in prompts)
    model = Qwen3ForCausalLM.from_pretrained(model_dir, dtype=dtype)
    logits = model(torch.tensor([prompts[-1]])).logits[0].float()
    return logits[[len(prompt) - 1 for prompt in prompts]]


@pytest.fixture(scope="module")
def truth(tiny_dir):
    """Prompts, and transformers' logits in float32."""
    [longest] = random_prompts([274], seed=2)
    prompts = [longest[: 1 + 7 * i] for i in range(40)]
    return prompts, reference_logits(tiny_dir, prompts, torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_are_as_close_to_the_truth_as_those_of_transformers(tiny_dir, truth, dtype):
    prompts, truth = truth
    rounded = truth  # in float32 transformers' run is the truth itself
    if dtype != "float32":
        rounded = reference_logits(tiny_dir, prompts, getattr(torch, dtype))
    captured = []
    with tiny_engine(tiny_dir, dtype=dtype) as llm:
        assert llm.model_runner.kv_cache.dtype is getattr(torch, dtype)
        llm.model_runner.model.lm_head.register_forward_hook(
            lambda module, args, out: captured.append(out.clone())  # the engine reuses it
        )
        tokens = [completion[0] for completion in generate(llm, prompts, greedy(1))]
    logits = torch.cat(captured)[:, :VOCAB_SIZE]
    assert logits.shape == truth.shape
    error = (logits - truth).square().mean().sqrt()
    # 1e-4 is far above fp32 rounding.
    assert error <= 1.5 * (rounded - truth).square().mean().sqrt() + 1e-4
    best = truth.topk(2).values
    # Seven times what the difference of two logits is off in the mean. How far off bfloat16 is, and
    # so how many prompts are clear, depends on the CPU's instructions.
    is_clear = best[:, 0] - best[:, 1] > 10 * error
    assert is_clear.sum() >= 10
    expected = truth.argmax(-1)
    clear = is_clear.nonzero().flatten().tolist()
    assert [tokens[i] for i in clear] == [int(expected[i]) for i in clear]


def test_logits_of_decode_steps_equal_those_of_one_long_prefill(tiny_dir):
    prompt = random_prompts([250], seed=4)[0]
    captured = []
    with tiny_engine(tiny_dir) as llm:
        llm.model_runner.model.lm_head.register_forward_hook(
            lambda module, args, out: captured.append(out.clone())  # the engine reuses it
        )
        completion = generate(llm, [prompt], greedy(MAX_TOKENS))[0]
    with torch.inference_mode():
        model = Qwen3ForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
        truth = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    torch.testing.assert_close(torch.cat(captured)[:, :VOCAB_SIZE], truth, atol=1e-4, rtol=1e-4)
