"""Qwen3.5 beyond what all families share: its state, its checkpoints, its config's limits."""

import pytest
import torch
from engine_checks import (
    check_nothing_is_held,
    drain,
    generate,
    greedy,
    random_prompts,
    tiny_engine,
)
from fp8_models import quantize_blocks, save_fp8, save_rounded, through_blocks, through_rows
from quick_reference import quick_reference
from qwen3_5_shapes import SHAPES, write_config
from safetensors.torch import load_file, save_file
from tiny_models import (
    DELTA_NET,
    FAMILIES,
    VOCAB_SIZE,
    edit_config,
    greedy_tokens,
    reference_greedy,
    save_family,
    save_model,
    save_tokenizer,
)
from transformers import AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from nanovllm import ArgumentError, SamplingParams
from nanovllm.config import Config
from nanovllm.engine import startup
from nanovllm.engine.state_cache import allocate, row_bytes
from nanovllm.kernels.torch_ops import TorchOps
from nanovllm.kernels.types import StateSpec
from nanovllm.models.hybrid import gates_first
from nanovllm.models.size import num_weights

PROMPTS = random_prompts((5, 60, 130, 1, 300), seed=4)
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("models") / "qwen3.5", "qwen3.5")


@pytest.fixture(scope="module")
def reference(path):
    return quick_reference(path, PROMPTS, MAX_TOKENS)


def test_a_row_starts_anew_whatever_an_aborted_request_left_in_it(path, reference):
    with tiny_engine(path, max_num_seqs=2, num_kvcache_blocks=8) as llm:
        for buffer in llm.model_runner.states:
            buffer.fill_(torch.nan)
        ids = [llm.add_request(prompt, greedy(500)) for prompt in random_prompts((40, 7))]
        for _ in range(5):
            llm.step()
        llm.abort_request(ids)
        assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference
        check_nothing_is_held(llm)


def test_a_preempted_sequence_is_computed_again(path):
    """Two sequences that outgrow the blocks that there are."""
    prompts = random_prompts((250, 240), seed=5)
    with tiny_engine(path, num_kvcache_blocks=3, watermark=0) as llm:
        for prompt in prompts:
            llm.add_request(prompt, greedy(30))
        completions, _ = drain(llm)
        assert llm.scheduler.num_preemptions > 0
    found = [completions[i] for i in sorted(completions)]
    assert found == reference_greedy(path, prompts, 30, found)


@pytest.mark.parametrize("mode", ["abort", "keep"])
def test_sleep(path, reference, mode):
    with tiny_engine(path) as llm:
        for prompt in PROMPTS:
            llm.add_request(prompt, greedy(MAX_TOKENS))
        for _ in range(3):
            llm.step()
        llm.sleep(level=1, mode=mode)
        assert all(buffer.untyped_storage().nbytes() == 0 for buffer in llm.model_runner.states)
        llm.wake_up()
        if mode == "keep":
            completions, _ = drain(llm)
            assert [completions[i] for i in sorted(completions)] == reference
        assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference


def test_new_weights_by_their_names_in_checkpoints(path, tmp_path):
    save_model(tmp_path, seed=99, **FAMILIES["qwen3.5"])
    weights = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.linear_attn.in_proj_qkv.weight" in weights
    with tiny_engine(path) as llm:
        assert llm.load_weights(weights) == weights.keys()
        found = generate(llm, PROMPTS, greedy(MAX_TOKENS))
        assert found == reference_greedy(tmp_path, PROMPTS, MAX_TOKENS, found)


def test_logprobs_of_prompts_in_chunks_are_those_of_transformers(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = PROMPTS[2]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 50}
    with tiny_engine(path, **chunks) as llm:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        [output] = llm.generate([prompt], params, use_tqdm=False)
    entries = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
    got = [entry[token].logprob for token, entry in entries]
    wanted = expected[torch.arange(len(prompt) - 1), prompt[1:]]
    torch.testing.assert_close(torch.tensor(got), wanted, atol=2e-4, rtol=2e-4)


def test_the_text_part_of_a_multimodal_checkpoint(tmp_path):
    """Its images' encoder and its predictor of further tokens are left out."""
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "initializer_range": 0.2,
        "max_position_embeddings": 2048,
        "eos_token_id": 2,
        "mamba_ssm_dtype": "float32",
        **DELTA_NET,
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 16}
    config = Qwen3_5Config(
        text_config=text, vision_config=vision, tie_word_embeddings=True, dtype="float32"
    )
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("model.visual.") for name in weights)
    assert "model.language_model.layers.0.linear_attn.A_log" in weights
    reference = greedy_tokens(model, PROMPTS, MAX_TOKENS)
    weights["mtp.fc.weight"] = torch.zeros(64, 128)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with tiny_engine(tmp_path) as llm:
        assert llm.config.model_config.architectures == ("Qwen3_5ForCausalLM",)
        assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference


def test_prefixes_are_not_cached(path):
    assert Config(str(path)).enable_prefix_caching is False
    with pytest.raises(ArgumentError, match="enable_prefix_caching=True is not supported for Qwen"):
        Config(str(path), enable_prefix_caching=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "last layer must have"),
        ({"layer_types": ["linear_attention"] * 4}, "last layer must have full attention"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types .* is not supported"),
        ({"linear_num_value_heads": 3}, r"linear_num_value_heads \(3\) must be a multiple"),
        ({"linear_num_key_heads": 0}, "linear_num_key_heads must be an integer >= 1|must be >= 1"),
        ({"linear_conv_kernel_dim": "4"}, "linear_conv_kernel_dim must be an integer"),
    ],
)
def test_what_no_model_can_have_is_refused(changes, message, tmp_path):
    save_family(tmp_path, "qwen3.5")
    edit_config(tmp_path, **changes)
    with pytest.raises(ArgumentError, match=message):
        Config(str(tmp_path))


def test_layers_follow_the_interval_where_the_file_does_not_name_them(tmp_path):
    save_family(tmp_path, "qwen3.5")
    edit_config(tmp_path, layer_types=None, full_attention_interval=2)
    model = Config(str(tmp_path)).model_config
    assert [model.is_delta_net(index) for index in range(4)] == [True, False, True, False]


def test_ranks_must_divide_the_heads_of_both_kinds_of_layers(path):
    with pytest.raises(ArgumentError, match=r"\(4\) must divide .*linear_num_key_heads \(2\)"):
        Config(str(path), tensor_parallel_size=4)


def test_states_count_as_memory(path, monkeypatch):
    spec = StateSpec(96, 4, 4, 16, 8, torch.float32)
    assert row_bytes([spec] * 3) == 3 * 4 * (96 * 3 + 4 * 16 * 8)
    monkeypatch.setattr(startup, "device_memory", lambda device: 2**20)
    config = Config(str(path), max_num_seqs=200, max_model_len=256)
    with pytest.raises(ArgumentError, match=r"max_num_seqs must be <= \d+, which takes all"):
        startup.check_fits(config, torch.device("cpu"))
    with pytest.raises(ArgumentError, match=r"states of max_num_seqs \(1000000000\) sequences"):
        allocate([spec], 10**9, torch.device("cpu"))


def test_rows_of_queries_and_gates():
    """Two heads of three features, whose queries are loaded in another order."""
    assert gates_first(2, (2, 0, 1)) == (3, 4, 5, 9, 10, 11, 2, 0, 1, 8, 6, 7)


def test_experts_in_one_tensor_each(tmp_path):
    """As published: gate_up_proj [E, 2I, H] and down_proj [E, H, I] of a layer."""
    save_family(tmp_path, "qwen3.5-moe")
    reference = reference_greedy(tmp_path, PROMPTS, MAX_TOKENS)
    weights = load_file(tmp_path / "model.safetensors")
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([weights.pop(f"{prefix}.{i}.{name}_proj.weight") for i in range(6)])
            for name in ("gate", "up", "down")
        )
        weights[f"{prefix}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        weights[f"{prefix}.down_proj"] = down
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with tiny_engine(tmp_path) as llm:
        assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference


@pytest.mark.parametrize("keeps_fp8", [False, True])
def test_fp8_weights(tmp_path, keeps_fp8, monkeypatch):
    """On load, and in a checkpoint; the product in front of a gated delta net's gates is not."""
    monkeypatch.setattr(TorchOps, "has_fp8_products", keeps_fp8)
    sizes = {"hidden_size": 160, "intermediate_size": 288, "linear_value_head_dim": 48}
    model = save_model(tmp_path / "model", seed=3, **FAMILIES["qwen3.5"] | sizes)
    rows = save_rounded(model, tmp_path / "rows", through_rows)
    with tiny_engine(model, quantization="fp8") as llm:
        found = generate(llm, PROMPTS, greedy(MAX_TOKENS))
        assert found == reference_greedy(rows, PROMPTS, MAX_TOKENS, found)
    blocks = save_rounded(model, tmp_path / "blocks", through_blocks)
    fp8 = save_fp8(model, tmp_path / "fp8")
    rounded, stored = (load_file(path / "model.safetensors") for path in (blocks, fp8))
    for name in [name for name in stored if name.endswith(("_qkv.weight", "_z.weight"))]:
        stored[name], stored[f"{name}_scale_inv"] = quantize_blocks(rounded[name])
        rounded[name] = through_blocks(rounded[name])
    save_file(rounded, blocks / "model.safetensors", {"format": "pt"})
    save_file(stored, fp8 / "model.safetensors", {"format": "pt"})
    with tiny_engine(fp8) as llm:
        found = generate(llm, PROMPTS, greedy(MAX_TOKENS))
        assert found == reference_greedy(blocks, PROMPTS, MAX_TOKENS, found)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_benchmarks_are_models(name, tmp_path):
    write_config(name, tmp_path)
    config = Config(str(tmp_path), load_format="dummy", max_model_len=None)
    assert config.max_model_len == 262144
    model, billions = config.model_config, float(name.removesuffix("B"))
    head = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    assert 0.9 * billions < (num_weights(model) + head) / 1e9 < 1.1 * billions
