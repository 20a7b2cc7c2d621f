"""What is compiled ahead of a start, against what steps of other sizes launch, by Triton's keys."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs

from nanovllm import ArgumentError
from nanovllm import warmup as command
from nanovllm.config import Config
from nanovllm.engine import graph_capture, kernel_variants
from nanovllm.engine.backend import choose_ops
from nanovllm.engine.dry_runner import META, DryRunner
from nanovllm.engine.dry_shapes import ShapesAlone
from nanovllm.engine.kernel_variants import record_variants, token_counts
from nanovllm.engine.sequence import Wants
from nanovllm.engine.step_plan import StepPlan
from nanovllm.features.warmup import warm_up
from nanovllm.kernels.device import KNOWN_GPUS, meta_stands_for
from nanovllm.kernels.triton import compilation
from nanovllm.kernels.triton.compilation import (
    Variant,
    as_argument,
    cached_alone,
    compile_all,
    compiling_for,
)
from nanovllm.kernels.triton.launcher import recording
from nanovllm.sampling.batch import edited_width

HOPPER, ADA = KNOWN_GPUS[9, 0], KNOWN_GPUS[8, 9]
DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 500,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,  # one more than kinds of them
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
MIXTURE = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 6,  # logits whose rows are no multiple of 16 bytes
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "num_hidden_layers": 2,
}
WINDOWED = DENSE | {
    "num_hidden_layers": 4,
    "use_sliding_window": True,
    "sliding_window": 300,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
}
LARGER = DENSE | {"hidden_size": 1024, "num_attention_heads": 16}  # for `Ops.layer_end`
SIZES = {"max_model_len": 2048, "max_num_batched_tokens": 2048, "max_num_seqs": 140}
CASES = {
    "dense": (DENSE, HOPPER, {}),
    "windows, fp8 cache": (WINDOWED, ADA, {"kv_cache_dtype": "fp8"}),
    "experts of two ranks": (MIXTURE, HOPPER, {"tensor_parallel_size": 2}),
    "4 bits, adapters": (
        DENSE,
        ADA,
        {"quantization": "int4", "enable_lora": True, "max_loras": 3, "max_lora_rank": 100},
    ),
    "4 bits, Hopper": (LARGER, HOPPER, {"quantization": "int4"}),
    "fp8": (DENSE, HOPPER, {"quantization": "fp8"}),
    "fp8 cache": (DENSE | {"head_dim": 128}, HOPPER, {"kv_cache_dtype": "fp8"}),
}
Keys = set[tuple[str, str]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A function that gives the directory of a config.json, and nothing else."""

    def write(raw: dict) -> str:
        path = tmp_path_factory.mktemp("model")
        (path / "config.json").write_text(json.dumps(raw))
        return str(path)

    return write


@pytest.fixture(scope="module")
def for_ada(directory) -> list[Variant]:
    """All variants of DENSE."""
    return list(record_variants(Config.from_kwargs(directory(DENSE), SIZES), ADA))


@contextmanager
def keys_of_launches(capability: tuple[int, int]) -> Iterator[Keys]:
    """By which Triton would look for compiled kernels of the launches of dry runs."""
    keys: Keys = set()

    def note(*, key, fn, **other) -> bool:
        keys.add((fn.name, key))
        return True  # not to be compiled

    def launch(kernel, args, options) -> None:
        kernel.run(*map(as_argument, args), **{**options, "warmup": True})

    with pytest.MonkeyPatch.context() as patch, compiling_for(capability), recording(launch):
        patch.setattr(knobs.runtime, "jit_cache_hook", note)
        yield keys


def keys_of(variants, capability: tuple[int, int]) -> Keys:
    with keys_of_launches(capability) as keys:
        for variant in variants:
            variant.compile()
    return keys


def run_prefill(runner: DryRunner, lengths: list[int], starts: int, want: int) -> None:
    size = len(lengths)
    plan = StepPlan(
        is_prefill=True,
        rows=np.arange(size, dtype=np.int32),
        updates=np.zeros((3, 2), dtype=np.int32),
        wants=np.full(size, want, dtype=np.int32),
        token_ids=np.zeros(sum(lengths), dtype=np.int32),
        starts=np.full(size, starts, dtype=np.int32),
        lengths=np.array(lengths, dtype=np.int32),
        shared=np.zeros(size, dtype=np.int32),
        is_last=np.arange(size, dtype=np.int32) % 3 != 1,
    )
    runner.execute(plan)


def run_many_sizes(runner: DryRunner) -> None:
    """Steps as batches of any requests make them."""
    lengths = ([5], [9, 1, 6], [7] * 21, [61] * 3, [250], [1] * 110, [1500])
    for i, each in enumerate(lengths):
        starts = (0, 500) if i % 2 else (500, 0)
        run_prefill(runner, each, starts[0], 0)
        run_prefill(runner, each, starts[1], Wants.PROMPT)
    ops, vocab_size = runner.ops, runner.config.model_config.vocab_size
    for size in (1, 3, 5, 6, 12, 23, 57, 100, 130):
        for has_common_blocks in {False, runner.reads_common_blocks_once}:
            runner.decode(runner.decode_rows[:size], has_common_blocks)
        # Inputs lie anywhere in a packed buffer.
        packed = torch.empty(9 * size + 9, device=META)
        floats = packed[1 : 4 * size + 1].view(4, size)
        integers = packed.view(torch.int32)[3 : size + 3]
        seeds = packed.view(torch.int32)[5 : 2 * size + 5].view(size, 2)
        widths = {edited_width(vocab_size): torch.float32}
        widths[runner.tp.size * runner.decode_logits.shape[1]] = torch.bfloat16
        for width, dtype in widths.items():
            logits = torch.empty(size, width, dtype=dtype, device=META)
            limits = ops.filter_thresholds(
                logits, floats[0], integers, floats[1], floats[2], vocab_size
            )
            for thresholds in (None, limits):
                ops.sample(logits, floats[0], seeds, integers, 0, vocab_size, thresholds)
        ops.write_back(runner.row_table, integers, integers, integers)


@pytest.mark.parametrize("case", CASES)
def test_no_step_needs_a_kernel_that_is_not_compiled_ahead(case, directory, monkeypatch):
    raw, limits, options = CASES[case]
    config = Config.from_kwargs(directory(raw), SIZES | options)
    capability = limits.capability
    compiled = keys_of(record_variants(config, limits), capability)
    # A runner of all layers, and the peers' memory of the one that was recorded.
    with meta_stands_for(limits):
        ops = choose_ops(config, META, capability)
        peers = kernel_variants.new_peers(config, 0) if config.tensor_parallel_size > 1 else None
        runner = DryRunner(config, ops, 0, peers)
        runner.allocate_kv_cache(1)
        runner.use_adapters()
        with torch.inference_mode(), keys_of_launches(capability) as launched:
            run_many_sizes(runner)
        assert len(launched) > 20
        assert launched <= compiled, {name for name, _ in launched - compiled}
    monkeypatch.setattr(kernel_variants, "token_counts", lambda *args: [1])
    of_one_size = keys_of(record_variants(config, limits), capability)
    assert not launched <= of_one_size, "this test cannot fail"


def test_filters_are_compiled_once_for_all_batches(for_ada):
    """For each dtype of logits: the first pass, the second, the others."""
    names = [variant.kernel.fn.__name__ for variant in for_ada]
    assert names.count("_pass_kernel") == 2 * 3
    assert names.count("_start_kernel") == names.count("_finish_kernel") == 2


def test_sizes_are_the_ends_of_ranges_and_multiples_of_16():
    assert token_counts(9) == [1, 2, 3, 4, 5, 8, 9]
    assert token_counts(1) == [1]
    counts = token_counts(20000, [1237])
    assert counts == sorted(set(counts)) and counts[-1] == 20000
    assert {1232, 1237, 1238} <= set(counts)
    for power in range(14):
        assert {2**power, 2**power + 1} <= set(counts)


def test_layers_of_one_kind_are_run_once(directory):
    config = Config.from_kwargs(directory(WINDOWED), SIZES)
    with meta_stands_for(HOPPER):
        runner = DryRunner(config, choose_ops(config, META, HOPPER.capability))
        layers = runner.model.model.layers
        kinds = list(kernel_variants.kinds_of_layers(layers))
    assert kinds == [layers[0], layers[2], layers[3]]


@pytest.mark.parametrize("is_uniform", [True, False])
def test_before_a_capture_one_layer_of_a_kind_is_run(directory, monkeypatch, is_uniform):
    monkeypatch.setattr(graph_capture, "DecodeGraphs", lambda *args: args)
    config = Config.from_kwargs(directory(DENSE), SIZES)
    with meta_stands_for(HOPPER):
        model = DryRunner(config, choose_ops(config, META, HOPPER.capability)).model
    layers, seen = model.model.layers, []

    def decode(rows: torch.Tensor, has_common_blocks: bool) -> torch.Tensor:
        seen.append((list(model.model.layers), has_common_blocks))
        return rows if rows.any() else rows[10]

    rows = torch.ones(3)
    *args, rehearse = graph_capture.new_graphs(model, 4, rows, decode, is_uniform)
    assert args == [4, rows, decode]
    if not is_uniform:
        assert rehearse is None
        return
    assert rehearse(rows, True) is rows
    assert seen == [([layers[0], layers[2]], True)] and model.model.layers is layers
    with pytest.raises(IndexError):
        rehearse(0 * rows, False)
    assert model.model.layers is layers


def test_kernels_are_compiled_into_the_cache_once(
    tmp_path, directory, for_ada, monkeypatch, capsys
):
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    path = directory(DENSE)
    few = [v for v in for_ada if v.kernel.fn.__name__ in ("_gather_kernel", "_write_back_kernel")]
    assert len(few) == 3
    first = compile_all(few, ADA.capability, None)
    assert (first.num_kernels, first.num_compiled, first.errors) == (3, 3, [])
    assert first.cache == str(tmp_path)
    assert len(list(tmp_path.rglob("*.cubin"))) == 3
    for variant in few:
        variant.kernel.device_caches.clear()
    monkeypatch.setattr(kernel_variants, "record_variants", lambda *args: few)
    assert command.main([path, "--capability", "8.9", "--max-num-seqs", "8"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("3 kernels for compute capability 8.9 in ")
    assert "0 of them compiled" in printed and str(tmp_path) in printed


def test_a_kernel_is_compiled_again_if_threads_got_in_each_others_way(for_ada, monkeypatch):
    few = [v for v in for_ada if v.kernel.fn.__name__ == "_write_back_kernel"]
    calls, compile_variant = [], Variant.compile

    def fails_at_first(self):
        calls.append(self)
        if len(calls) == 1:
            raise SystemError("AST constructor recursion depth mismatch (before=48, after=143)")
        return compile_variant(self)

    monkeypatch.setattr(Variant, "compile", fails_at_first)
    monkeypatch.setattr(compilation, "may_fork", lambda: False)
    assert compile_all(few, ADA.capability, None).errors == []
    assert len(calls) == len(few) + 1


@pytest.fixture
def few_small(tmp_path, for_ada, monkeypatch):
    """Three variants, as yet in no cache, for processes to compile."""
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "cache"))
    # Of test runners' threads none holds what a compilation needs.
    monkeypatch.setattr(compilation, "may_fork", lambda: True)
    monkeypatch.setattr(compilation, "num_cores", lambda: 2)
    few = [v for v in for_ada if v.kernel.fn.__name__ in ("_gather_kernel", "_write_back_kernel")]
    for variant in few:
        variant.kernel.device_caches.clear()
    return few


def test_processes_compile_and_this_one_reads(few_small, monkeypatch):
    here, compile_variant = os.getpid(), Variant.compile

    def in_a_copy(self):
        with cached_alone() if os.getpid() == here else nullcontext():
            return compile_variant(self)

    monkeypatch.setattr(Variant, "compile", in_a_copy)
    result = compile_all(few_small, ADA.capability, None)
    assert (result.num_kernels, result.num_compiled, result.errors) == (3, 3, [])


@pytest.mark.parametrize("end", [lambda: os._exit(0), lambda: os.kill(os.getpid(), 9)])
def test_what_processes_leave_undone_is_compiled_here(few_small, monkeypatch, end):
    here, compile_variant = os.getpid(), Variant.compile

    def not_in_a_copy(self):
        if os.getpid() != here:
            end()
        return compile_variant(self)

    monkeypatch.setattr(Variant, "compile", not_in_a_copy)
    result = compile_all(few_small, ADA.capability, None)
    assert (result.num_kernels, result.num_compiled, result.errors) == (3, 3, [])


def test_what_processes_cannot_compile_is_said(few_small):
    first, *others = few_small
    broken = first._replace(options=first.options | {"num_warps": 3})
    result = compile_all([broken, *others], ADA.capability, None)
    assert (result.num_kernels, result.num_compiled, len(result.errors)) == (2, 2, 1)


def test_a_part_of_a_cache_is_read(few_small):
    assert compile_all(few_small[:1], ADA.capability, None).num_compiled == 1
    for variant in few_small:
        variant.kernel.device_caches.clear()
    result = compile_all(few_small, ADA.capability, None)
    assert (result.num_kernels, result.num_compiled, result.errors) == (3, 2, [])


def test_what_cannot_be_compiled_is_said(directory, few_small, monkeypatch, capsys):
    path = directory(DENSE)
    [variant, *_] = few_small
    broken = variant._replace(options=variant.options | {"num_warps": 3})
    monkeypatch.setattr(kernel_variants, "record_variants", lambda *args: [broken])
    assert command.main([path, "--capability", "8.9"]) == 1
    assert "not compiled: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_capability": "8.7"}, "compute_capability 8.7 is not one"),
        ({"compute_capability": "9"}, "compute_capability must be like"),
        ({"compute_capability": "7.5"}, "computes without Triton's kernels"),
        ({"compute_capability": "9.0", "max_num_seqs": 0}, "max_num_seqs must be"),
        (
            {"compute_capability": "9.0", "attention_backend": "torch"},
            "computes without Triton's kernels",
        ),
    ],
)
def test_wrong_arguments_are_named(directory, options, message):
    with pytest.raises(ArgumentError, match=message):
        warm_up(directory(DENSE), **options)


def test_without_a_gpu_its_capability_is_asked_for(directory, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match="say compute_capability"):
        warm_up(directory(DENSE))


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, n: torch.nn.functional.linear(x, x),
        lambda x, n: torch.nn.functional.linear(x[None], x, x[:, 0]),
        lambda x, n: torch.nn.functional.embedding(n, x),
        lambda x, n: torch.mm(x, x.t()),
        lambda x, n: torch.mm(x, x.t(), out=x.new_zeros(5, 5)),
        lambda x, n: torch.empty_like(n),
        lambda x, n: x.index_select(0, n[0]),
        lambda x, n: x.index_select(1, n[1]),
        lambda x, n: x.gather(1, n.long()),
        lambda x, n: x.masked_fill(x == 0, 1.0),
        lambda x, n: (torch.where(n > 1, n, 0), torch.where(n[:, :1] > 1, n, x[0, :2])),
        lambda x, n: (n + 1, n * 2.5, x + n[0, 0], n - n[:, :1], n * x[0, 0], 2 + x),
        lambda x, n: torch.repeat_interleave(n[0] + 1, n[0], output_size=2),
        lambda x, n: (n[0].diff(), n.clamp(min=1)),
        lambda x, n: (n // 2, n % 2, n.remainder(2), (n == 1) & (n >= 0), n < 2, n >= n[0]),
    ],
)
def test_dry_results_have_torchs_shapes_and_dtypes(compute):
    """The oracle is torch on the CPU."""
    x, n = torch.rand(5, 3, dtype=torch.bfloat16), torch.tensor([[0, 2], [1, 0]])
    wanted = compute(x, n)
    with ShapesAlone():
        found = compute(x.to(META), n.to(META))
    for one, other in zip(
        *((y if isinstance(y, tuple) else (y,)) for y in (found, wanted)), strict=True
    ):
        assert one.is_meta and (one.shape, one.dtype) == (other.shape, other.dtype)
