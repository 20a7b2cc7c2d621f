"""The dry run's numbers against engines on a GPU that are held to the memory of small cards.

A card of 8 GiB is a share of the GPU, and a cap of torch's allocator at what CUDA's context would
leave of it. `-s` prints what was measured beside what was estimated.
"""

import gc
import json
import random
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nanovllm import LLM, ArgumentError, SamplingParams
from nanovllm.config import Config
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.startup import choose_ops, run_largest_decode, run_largest_prefill
from nanovllm.features.estimate import CONTEXT_BYTES, GIB, MIB, WORKSPACE_BYTES
from nanovllm.parallel.tensor_parallel import TensorParallel

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
}
SHAPES = {
    "0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "4B": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}
TOLERANCE = 0.03  # of the card's memory


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A directory with a config.json for each of SHAPES."""
    found = {}
    for name, shape in SHAPES.items():
        directory: Path = tmp_path_factory.mktemp("model")
        (directory / "config.json").write_text(json.dumps(QWEN3 | shape))
        found[name] = str(directory)
    return found


def used_bytes() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(0)
    return total - free


def graph_bytes() -> int:
    """Memory of captured graphs: torch counts it as reserved, not as allocated."""
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


@pytest.fixture(scope="module")
def baseline() -> int:
    """What the GPU's context and other processes hold, before any engine of this file."""
    torch.zeros(1, device="cuda")
    gc.collect()
    torch.cuda.empty_cache()
    return used_bytes()


@contextmanager
def card_of(num_bytes: int):
    """Within it torch's allocator has no more than a card of so many bytes would leave it.

    Gives the engine's `gpu_memory_utilization` that is 0.9 of such a card.
    """
    total = torch.cuda.mem_get_info(0)[1]
    torch.cuda.set_per_process_memory_fraction((num_bytes - CONTEXT_BYTES) / total)
    try:
        yield 0.9 * num_bytes / total
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()


def taken(model: str, options: dict) -> dict:
    """The options; skipped if one is not known here."""
    try:
        config = Config.from_kwargs(model, options)
        choose_ops(config, torch.device("cuda", 0))
    except ArgumentError as error:
        pytest.skip(str(error))
    return options | {"load_format": "dummy", "skip_tokenizer_init": True}


def random_prompts(lengths) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(10000) for _ in range(length)] for length in lengths]


CASES = [
    ("0.6B", 8, {}),
    ("0.6B", 12, {"max_num_batched_tokens": 8192, "max_num_seqs": 128}),
    ("4B", 12, {}),
    ("4B", 16, {"kv_cache_dtype": "fp8"}),
    ("4B", 8, {"quantization": "fp8", "kv_cache_dtype": "fp8"}),
    ("4B", 8, {"quantization": "int4", "kv_cache_dtype": "fp8"}),
    ("4B", 24, {"quantization": "int4"}),
]


@pytest.mark.parametrize(("name", "gib", "options"), CASES, ids=str)
def test_the_estimate_is_what_an_engine_takes(models, baseline, name, gib, options):
    model, limit = models[name], gib * GIB
    options = taken(model, options)
    expected = LLM.estimate(model, limit, **options)
    capability = torch.cuda.get_device_capability(0)
    assert expected.fits and expected.capability == capability
    with (
        card_of(limit) as share,
        LLM(model, gpu_memory_utilization=share, **options) as llm,
    ):
        runner, started = llm.model_runner, used_bytes()
        weights = sum(parameter.nbytes for parameter in runner.model.parameters())
        torch.cuda.reset_peak_memory_stats()
        llm.generate(
            random_prompts([512] * 40),
            SamplingParams(temperature=0, max_tokens=4, ignore_eos=True),
            use_tqdm=False,
        )
        peak = torch.cuda.max_memory_allocated()
        peaks = []
        for run in (run_largest_prefill, run_largest_decode):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run(runner)
            torch.cuda.synchronize()
            peak = max(peak, torch.cuda.max_memory_allocated())
            peaks.append(torch.cuda.max_memory_allocated() - before)
        runner.row_table.zero_()
        # What the allocator keeps beyond that is free: it gives it back where memory is short.
        kept = used_bytes() - baseline
        used = kept - torch.cuda.memory_reserved() + peak + graph_bytes()
        num_blocks = llm.config.num_kvcache_blocks
        block = runner.kv_cache.nbytes // num_blocks
        if runner.kv_scales is not None:
            block += runner.kv_scales.nbytes // num_blocks
    estimated = expected.total - CONTEXT_BYTES
    print(
        f"\n{name} {gib} GiB {options}: blocks {num_blocks} (estimate {expected.num_kvcache_blocks}"
        f", {(expected.num_kvcache_blocks - num_blocks) * block / limit:+.2%} of the card); "
        f"MiB without context: started {(started - baseline) / MIB:.0f}, used {used / MIB:.0f} "
        f"(estimate {estimated / MIB:.0f}, {(estimated - used) / limit:+.2%}), kept "
        f"{kept / MIB:.0f}; "
        f"prefill {peaks[0] / MIB:.0f} ({expected.prefill_activations / MIB:.0f}), "
        f"decode {peaks[1] / MIB:.0f} ({expected.decode_activations / MIB:.0f}); "
        f"context {baseline / MIB:.0f} ({CONTEXT_BYTES / MIB:.0f}); "
        f"graphs (estimate) {expected.graphs / MIB:.0f}"
    )
    assert weights == expected.weight_bytes
    assert abs(expected.num_kvcache_blocks - num_blocks) * block <= TOLERANCE * limit
    assert abs(estimated - used) <= TOLERANCE * limit
    assert max(used, kept) + CONTEXT_BYTES <= limit
    # The workspace of cuBLAS is there already, if these steps have one.
    slack = WORKSPACE_BYTES[capability >= (9, 0)] + 2 * MIB
    for found, of_estimate in zip(
        peaks, (expected.prefill_activations, expected.decode_activations), strict=True
    ):
        assert abs(found - of_estimate) <= 0.03 * found + slack


@pytest.mark.parametrize("quantization", [None, "fp8", "int4"])
def test_a_start_needs_no_second_copy_of_the_weights(models, quantization):
    """At most the weights and the largest tensor in float32; less, as it is loaded in pieces."""
    device = torch.device("cuda", 0)
    options = taken(models["4B"], {"quantization": quantization})
    config = Config.from_kwargs(models["4B"], options)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner = ModelRunner(config, device, TensorParallel(), choose_ops(config, device))
    torch.cuda.synchronize()
    weights = sum(parameter.nbytes for parameter in runner.model.parameters())
    beside = torch.cuda.max_memory_allocated() - before - weights
    largest = 4 * runner.model.lm_head.weight.numel()
    print(f"\n{quantization}: weights {weights / MIB:.0f} MiB, beside them {beside / MIB:.0f} MiB")
    assert beside <= largest + 64 * MIB
    assert beside <= 768 * MIB


@pytest.mark.slow
def test_a_model_of_4b_runs_the_bench_workload_in_8_gib(models, baseline):
    """256 requests of 100 to 1024 tokens in and out, as bench.py draws them, in 4 bits."""
    limit, rng = 8 * GIB, random.Random(0)
    memory = {"max_num_seqs": 64, "max_num_batched_tokens": 4096, "kv_cache_dtype": "fp8"}
    try:
        options = taken(models["4B"], {"quantization": "int4", **memory})
    except pytest.skip.Exception:  # fp8 is the smallest there is
        options = taken(models["4B"], {"quantization": "fp8", **memory})
    expected = LLM.estimate(models["4B"], limit, **options)
    assert expected.fits
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=rng.randint(100, 1024))
        for _ in prompts
    ]
    with (
        card_of(limit) as share,
        LLM(models["4B"], gpu_memory_utilization=share, **options) as llm,
    ):
        outputs = llm.generate(prompts, params, use_tqdm=False)
        used = used_bytes() - baseline
        print(
            f"\n{options}: {llm.config.num_kvcache_blocks} blocks (estimate "
            f"{expected.num_kvcache_blocks}), {used / MIB:.0f} MiB beside the context, "
            f"{llm.scheduler.num_preemptions} preemptions"
        )
    assert [len(output["token_ids"]) for output in outputs] == [p.max_tokens for p in params]
    assert used + CONTEXT_BYTES <= limit
