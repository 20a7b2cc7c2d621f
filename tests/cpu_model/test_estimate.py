"""What a dry run says of the memory, against models and engines that are there."""

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from nanovllm import LLM, ArgumentError, estimate
from nanovllm.config import Config
from nanovllm.engine.startup import choose_ops
from nanovllm.features.estimate import LiveMemory, dry_run, parse_bytes
from nanovllm.layers.context import ModelContext
from nanovllm.models.families import new_model
from nanovllm.parallel.tensor_parallel import TensorParallel

CPU = torch.device("cpu")
GIB = 1 << 30
HOPPER, ADA = (9, 0), (8, 9)
DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 500,  # padded to a multiple of 64 on each rank
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
MIXTURE = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
WINDOWED = DENSE | {
    "use_sliding_window": True,
    "sliding_window": 300,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """A function that gives the directory of a config.json, and nothing else."""

    def write(raw: dict) -> str:
        directory: Path = tmp_path_factory.mktemp("model")
        (directory / "config.json").write_text(json.dumps(raw))
        return str(directory)

    return write


@pytest.fixture(scope="module")
def dense(write) -> str:
    return write(DENSE)


def built_weights(config: Config, rank: int = 0, keeps_fp8: bool = False) -> int:
    """Bytes of the parameters of one rank's model, built on the CPU."""
    ops = choose_ops(config, CPU)
    ops.has_fp8_products = keeps_fp8
    context = ModelContext(
        ops,
        TensorParallel(rank, config.tensor_parallel_size),
        config.resolve_dtype(),
        CPU,
        config.max_model_len,
        config.fp8_scales,
    )
    return sum(parameter.nbytes for parameter in new_model(config, context).parameters())


@pytest.mark.parametrize(
    ("raw", "kwargs", "capability"),
    [
        (DENSE, {"tensor_parallel_size": 2}, ADA),
        (DENSE, {"quantization": "fp8"}, HOPPER),
        (DENSE, {"quantization": "fp8"}, ADA),  # which keeps the model's dtype
        (MIXTURE, {"dtype": "float32"}, ADA),
        (MIXTURE, {"quantization": "fp8", "tensor_parallel_size": 2}, HOPPER),
    ],
    ids=["tied-ranks", "tied-fp8", "tied-rounded", "mixture", "mixture-fp8-ranks"],
)
def test_weights_are_those_of_a_model_that_is_built(write, raw, kwargs, capability):
    config = Config.from_kwargs(write(raw), kwargs)
    found = dry_run(config, 4 * GIB, capability)
    is_fp8 = "quantization" in kwargs and capability == HOPPER
    assert ("fp8" in found.weights) == is_fp8
    for rank in range(config.tensor_parallel_size):
        assert found.weight_bytes == built_weights(config, rank, is_fp8)


@pytest.mark.parametrize(
    ("raw", "kv_cache_dtype"), [(DENSE, "auto"), (WINDOWED, "fp8")], ids=["full", "windows-fp8"]
)
def test_kv_blocks_are_those_of_an_engine_with_the_same_memory(write, raw, kv_cache_dtype):
    options = {"kv_cache_dtype": kv_cache_dtype, "max_num_seqs": 4}
    directory = write(raw)
    found = dry_run(Config.from_kwargs(directory, options), int(1.9 * GIB), ADA)
    with LLM(
        directory,
        kv_cache_memory_bytes=found.kv_cache,
        device="cpu",
        load_format="dummy",
        skip_tokenizer_init=True,
        **options,
    ) as llm:
        runner = llm.model_runner
        assert llm.config.num_kvcache_blocks == found.num_kvcache_blocks
        scales = 0 if runner.kv_scales is None else runner.kv_scales.nbytes
        assert runner.kv_cache.nbytes + scales == found.kv_cache
        weights = {p.data_ptr(): p.nbytes for p in runner.model.parameters()}
        assert sum(weights.values()) == found.weight_bytes
    # One more block would not have fitted.
    share = int(0.9 * int(1.9 * GIB))
    assert found.kv_cache < share - found.weight_bytes - found.activations
    more = {"num_kvcache_blocks": found.num_kvcache_blocks, **options}
    again = dry_run(Config.from_kwargs(directory, more), int(1.9 * GIB), ADA)
    assert (again.kv_cache, again.problem) == (found.kv_cache, None)


@pytest.mark.parametrize(
    ("capability", "num_hidden", "num_inner"), [(ADA, 4, 3), (HOPPER, 5, 1)], ids=["8.9", "9.0"]
)
def test_activations_are_those_of_the_widest_place(write, capability, num_hidden, num_inner):
    """In the MLP: gate and up, their product, and four rows of the hidden size.

    These are the residual, the MLP's input, and what attention and the layer before gave. Hopper's
    kernel gives the product alone: there the MLP's output is beside it.
    """
    tokens = 8192
    options = {"max_num_batched_tokens": tokens, "max_num_seqs": 4}
    hidden, inner = 640, 4096
    wide = {"num_hidden_layers": 3, "hidden_size": hidden, "intermediate_size": inner}
    config = Config.from_kwargs(write(DENSE | wide), options)
    expected = 2 * tokens * (num_hidden * hidden + num_inner * inner)
    inputs = tokens * (4 + 4 + 8)  # ids, positions, slots
    found = dry_run(config, 4 * GIB, capability).prefill_activations
    assert 0 <= found - expected - inputs < 8192


def test_an_unknown_gpu_is_like_the_next_lower_one(dense):
    config = Config.from_kwargs(dense, {})
    known, unknown = (dry_run(config, 4 * GIB, capability) for capability in (ADA, (8, 10)))
    assert unknown.activations == known.activations


def test_half_the_tokens_of_a_step_take_half_the_activations(dense):
    found = [
        dry_run(Config.from_kwargs(dense, {"max_num_batched_tokens": n}), GIB, ADA)
        for n in (16384, 8192)
    ]
    assert found[0].prefill_activations == pytest.approx(2 * found[1].prefill_activations, rel=0.02)
    assert found[0].decode_activations == found[1].decode_activations
    logits = 512 * 512 * 2
    assert found[0].tables > logits


def test_advice_names_parameters_and_what_they_bring(dense):
    found = LLM.estimate(dense, "8GiB", compute_capability="8.9")
    assert found.fits and found.longest_context == 2048
    assert found.largest_batch(1 << 20) == found.num_kvcache_blocks // 4096
    assert found.largest_batch(256) == 1024
    names = set()
    for advice in found.advice:
        words, tokens = re.fullmatch(
            r"(\S+(?:, \S+)*) (?:frees|makes) .* ([\d,]+) tokens.*", advice
        ).groups()
        change = eval(f"dict({words})")
        names |= set(change)
        again = dry_run(Config.from_kwargs(dense, change), 8 * GIB, ADA)
        assert f"{again.kv_tokens:,}" == tokens
    assert {"kv_cache_dtype", "gpu_memory_utilization"} <= names
    lines = str(found).splitlines()
    assert any(line.startswith("weights, bf16") for line in lines)
    assert f"It fits: {found.kv_tokens:,} tokens of KV cache." in lines


def test_advice_is_of_several_parameters_where_one_is_not_enough(write):
    wide = {"hidden_size": 2048, "intermediate_size": 16384, "vocab_size": 100_000}
    options = {"dtype": "float32", "max_num_seqs": 8}
    found = LLM.estimate(write(DENSE | wide), "3GiB", compute_capability="8.9", **options)
    assert not found.fits
    together, *others = found.advice
    assert together.startswith('dtype="bfloat16", max_num_batched_tokens=4096 frees ')
    assert "tokens of KV cache" in together
    assert others and all(advice.endswith("still not enough") for advice in others)
    assert others[-1].startswith("tensor_parallel_size=2")


def test_the_command_prints_and_exits_with_whether_it_fits(dense, capsys):
    assert estimate.main([dense, "--gpu-memory", "1.9GiB", "--max-num-seqs", "8"]) == 0
    assert "It fits" in capsys.readouterr().out
    assert estimate.main([dense, "--gpu-memory", "1.2 GiB", "--max-num-seqs", "8"]) == 1
    assert "It does not fit: no room for the KV cache" in capsys.readouterr().out
    assert estimate.main([dense, "--gpu-memory", "much"]) == 2
    assert "gpu_memory must be a number of bytes" in capsys.readouterr().err


def test_what_cannot_be_said_is_refused_by_name(dense, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for message, kwargs in {
        "there is no GPU here": {"gpu_memory": None},
        "device='cpu'": {"device": "cpu"},
        "attention_backend 'torch'": {"attention_backend": "torch"},
        "cpu_offload_gb .2. is not estimated": {"cpu_offload_gb": 2},
        "runs on transformers' own module": {"model_impl": "transformers"},
        "compute_capability must be like": {"compute_capability": "new"},
        "kv_cache_dtype is 'fp8'": {"kv_cache_dtype": "fp8", "compute_capability": (8, 6)},
        "max_num_seqs must be": {"max_num_seqs": 0},
    }.items():
        with pytest.raises(ArgumentError, match=message):
            LLM.estimate(dense, **({"gpu_memory": GIB} | kwargs))
    with pytest.raises(TypeError, match="max_num_sequence"):
        LLM.estimate(dense, GIB, max_num_sequence=3)


def test_blocks_that_are_asked_for_may_not_fit(dense):
    found = dry_run(Config.from_kwargs(dense, {"num_kvcache_blocks": 100_000}), 4 * GIB, ADA)
    assert not found.fits and "GiB more than there are" in found.problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GiB", 8 * GIB), ("8 gb", 8 * 10**9), ("8G", 8 * GIB), ("1.5g", 3 * GIB // 2), (7, 7)],
)
def test_bytes_are_read(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-8GiB", "8 GiBs", 0, True, 1.5, "1e9", "9" * 30])
def test_other_bytes_are_refused(text):
    with pytest.raises(ArgumentError, match="gpu_memory"):
        parse_bytes(text)


def test_memory_counts_while_anything_shows_it():
    with LiveMemory() as live:
        x = torch.empty(100, 3, device="meta")  # 1200 bytes
        view = x[:10]
        assert (live.bytes, live.peak) == (1536, 1536)
        del x
        y = view + 1
        assert (live.bytes, live.peak) == (1536 + 512, 1536 + 512)
        del view
        assert live.bytes == 512
        y += 1
        torch.empty(1000)  # on the CPU
        assert (live.bytes, live.peak) == (512, 1536 + 512)
