"""bench_suite.py on a tiny model: it runs, and counts what hand and step loop count."""

import dataclasses
import functools
import json
import math
import pkgutil
import sys
import types

import bench_suite
import compare
import limits
import pytest
import starts
import timing
import torch
import transformers
from engine_checks import tiny_engine
from engine_options import engine_settings
from limits import Hardware, ModelCost
from safetensors.torch import load_file
from tiny_models import FAMILIES, save_family, save_model
from variants import VARIANTS, Variant, constants_set, settings_of
from workloads import DEFAULT_ROWS, ROWS, Row, Workload, check_fits, workloads

from nanovllm.config import Config
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.types import FP8_DTYPE
from nanovllm.layers.context import ModelContext
from nanovllm.layers.weight_format import WeightFormat
from nanovllm.models.families import model_class
from nanovllm.models.family import Family
from nanovllm.models.model_config import ModelConfig
from nanovllm.parallel.tensor_parallel import TensorParallel

SCALE = 0.05  # the least that leaves every row but prefill a decode step
HARDWARE = Hardware(bandwidth=1e3, matrix_rate=1e4, fp8_matrix_rate=2e4)
LAYER_PARAMS = 486
COST = ModelCost(
    layer_params=LAYER_PARAMS,
    head_params=33,
    pair_flops=160,
    kv_bytes=160,
    weight_bytes=(LAYER_PARAMS + 33) * 4,
)


def test_all_rows_and_the_json_line(tiny_dir, capsys):
    arguments = ["--model", str(tiny_dir), "--load-format", "dummy", "--device", "cpu"]
    bench_suite.main([*arguments, "--scale", str(SCALE), "--repeat", "1", "--variant", "no-graphs"])
    *table, last_line = capsys.readouterr().out.splitlines()
    assert max(map(len, table)) <= 100
    summary = json.loads(last_line)
    assert summary["arguments"]["scale"] == SCALE
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["device"].startswith("CPU")
    assert all(0 < summary["hardware"][k] < math.inf for k in ("bandwidth", "matrix_rate"))

    rows = {row["name"]: row for row in summary["rows"]}
    names = ["start-cold", "start-warm", *DEFAULT_ROWS]
    assert list(rows) == names
    assert [line.split()[0] for line in table[1:]] == names
    for name, row in rows.items():
        assert row.pop("all_seconds") == [row["seconds"]]
        phases = row.pop("phase_seconds", {"all": row["seconds"]})
        assert sum(phases.values()) == pytest.approx(row["seconds"])
        assert row.pop("preemptions", 0) == 0
        if name == "prefill":  # the first token ends every request
            decode_keys = ("mean_decode_batch", "decode_steps", "decode_seconds", "kv_bytes_read")
            assert [row.pop(key) for key in (*decode_keys, "kv_bytes_per_second")] == [0] * 5
        numbers = {key: value for key, value in row.items() if not isinstance(value, str)}
        assert all(0 < value < math.inf for value in numbers.values()), row
    assert rows["prefill"]["unit"] == "prompt"


def step_counts(llm, workload: Workload) -> list[int]:
    llm.enqueue(workload.prompts, workload.sampling_params, use_tqdm=False)
    counts = []
    while not llm.is_finished():
        counts.append(llm.step()[1])
    return counts


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_steps_equal_those_of_a_step_loop(tiny_dir, async_scheduling):
    row = Row("small", 7, (3, 40), (2, 12), seed=3)
    settings = {"async_scheduling": async_scheduling, "max_num_seqs": 4, "enforce_eager": True}
    draws = workloads(row, vocab_size=384)
    with tiny_engine(tiny_dir, **settings) as llm:
        cost = dataclasses.replace(COST, expert_bytes=10**6, expert_share=0.25)
        result = timing.measure_row(llm, row, 1, cost, HARDWARE)
        assert "_commit" not in vars(llm)
        workload = next(draws)
        # Another repetition: new ids, or the cache could serve them, of the same lengths.
        repetition = next(draws)
        counts = step_counts(llm, repetition)
    assert repetition.prompts != workload.prompts
    prefills = [count for count in counts if count > 0]
    decodes = [-count for count in counts if count < 0]
    assert len(prefills) > 1
    assert (result.prefill_steps, result.decode_steps) == (len(prefills), len(decodes))
    assert result.computed_prompt_tokens == sum(prefills) == workload.num_prompt_tokens
    assert result.mean_decode_batch == sum(decodes) / len(decodes)
    assert len(set(decodes)) > 1
    assert result.limit_seconds == limits.limit_seconds(workload, cost, HARDWARE, decodes)
    assert 0 < result.prefill_seconds < result.seconds
    assert result.prefill_seconds + result.decode_seconds <= result.seconds
    assert sum(decodes) == workload.num_output_tokens - len(workload.prompts)


def test_contexts_equal_those_of_the_sequences(tiny_dir):
    row = Row("small", 5, (3, 40), (1, 12), shared_prefix_len=10)
    workload = next(workloads(row, vocab_size=384))
    contexts = 0
    with tiny_engine(tiny_dir, async_scheduling=False, enforce_eager=True) as llm:
        launch = llm.executor.launch

        def counting_launch(seqs, is_prefill):
            nonlocal contexts
            contexts += 0 if is_prefill else sum(seq.num_computed_tokens for seq in seqs)
            return launch(seqs, is_prefill)

        llm.executor.launch = counting_launch
        step_counts(llm, workload)
    assert limits.count_decode_contexts(workload) == contexts > 0


def test_conversations_go_on_from_what_was_said(tiny_dir):
    row = Row("small", 3, (3, 20), (2, 9), seed=3, num_turns=3, added_len=(1, 7))
    workload = next(workloads(row, vocab_size=384))
    prompts, contexts = [], 0
    with tiny_engine(tiny_dir, enforce_eager=True) as llm:
        process, launch = llm.input_processor.process, llm.executor.launch

        def noting_process(given, *args):
            prompts.append(given)
            return process(given, *args)

        def counting_launch(seqs, is_prefill):
            nonlocal contexts
            contexts += 0 if is_prefill else sum(seq.num_computed_tokens for seq in seqs)
            return launch(seqs, is_prefill)

        llm.input_processor.process, llm.executor.launch = noting_process, counting_launch
        completions = workload.generate(llm, workload.sampling_params)
    assert list(map(len, completions)) == workload.output_lens
    expected = [workload.prompts]
    for turn, added in enumerate(workload.added):
        said = completions[3 * turn : 3 * turn + 3]
        expected.append([a + b + c for a, b, c in zip(expected[-1], said, added, strict=True)])
    assert prompts == expected and len(prompts) == 3
    assert workload.prompt_lens == [len(prompt) for turn in prompts for prompt in turn]
    assert max(map(len, prompts[-1])) < row.max_len == 20 + 3 * 9 + 2 * 7
    assert limits.count_decode_contexts(workload) == contexts
    said = [a + b for a, b in zip(prompts[0] + prompts[1], completions[:6], strict=True)]
    assert workload.known_lens == [0, 0, 0, *(len(ids) - 1 for ids in said)]


# ---- what a model costs -------------------------------------------------------------------------

SIZES = {
    "vocab_size": 128,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
}
DENSE: dict = {}
MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "mlp_only_layers": [1],
}
# Products of one layer: q 128 x 256, k and v 128 x 128 each, o 256 x 128; gate, up and down.
ATTENTION = 2 * 128 * 256 + 2 * 128 * 128
MLP = 3 * 128 * 256
ROUTER, EXPERT = 8 * 128, 3 * 128 * 128
HEAD = 128 * 128
DENSE_PARAMS = 3 * (ATTENTION + MLP)
# Layers 0 and 2 have experts.
MOE_LINEARS = 3 * ATTENTION + MLP + 2 * ROUTER
MOE_PARAMS = MOE_LINEARS + 2 * 2 * EXPERT


def cost_of(
    sizes, fp8_scales=None, tp_size=1, kv_dtype=torch.bfloat16, weight_format=None
) -> tuple[ModelCost, list]:
    """The cost of a model of 3 layers, and the model of each rank; fp8 as on Hopper."""
    architecture = "Qwen3Moe" if sizes else "Qwen3"
    config_class = getattr(transformers, f"{architecture}Config")
    model_config = ModelConfig.from_hf(config_class(**SIZES, **sizes), Family("", ""))
    device = torch.device("cpu")
    ops = select_ops("torch", device, torch.bfloat16, 64, compile_torch_ops=False)
    ops.has_fp8_products = True
    ranks = [
        model_class((f"{architecture}ForCausalLM",))(
            model_config,
            ModelContext(
                ops,
                TensorParallel(rank, tp_size),
                torch.bfloat16,
                device,
                fp8_scales=fp8_scales,
                weight_format=weight_format,
            ),
        )
        for rank in range(tp_size)
    ]
    return ModelCost.of(ranks[0], model_config, kv_dtype, tp_size), ranks


def test_cost_of_a_dense_model():
    assert cost_of(DENSE)[0] == ModelCost(
        layer_params=DENSE_PARAMS,
        head_params=HEAD,
        pair_flops=3 * 4 * 256,
        kv_bytes=3 * 2 * 128 * 2,
        weight_bytes=2 * (DENSE_PARAMS + HEAD),
    )


def test_cost_of_a_mixture_of_experts():
    cost, _ = cost_of(MOE)
    assert cost == ModelCost(
        layer_params=MOE_PARAMS,
        head_params=HEAD,
        pair_flops=3 * 4 * 256,
        kv_bytes=3 * 2 * 128 * 2,
        weight_bytes=2 * (MOE_LINEARS + HEAD),
        expert_bytes=2 * 2 * 8 * EXPERT,
        expert_share=0.25,
    )
    # Of 8 experts in each of two layers, 2 and then 8 - 8 * (3/4)^2 = 3.5 are read.
    for batch_size, num_experts in ((1, 2), (2, 3.5), (1000, 8)):
        read = cost.decode_weight_bytes(batch_size) - cost.weight_bytes
        assert read == pytest.approx(2 * 2 * num_experts * EXPERT)


def test_cost_of_fp8_weights_with_scales_of_rows():
    attention_rows, mlp_rows = 4 * 128 + 128, 2 * 256 + 128
    cost, _ = cost_of(DENSE, "rows")
    assert cost.layer_params == cost.fp8_params == DENSE_PARAMS
    rows = 3 * (attention_rows + mlp_rows)
    assert cost.weight_bytes == DENSE_PARAMS + 4 * rows + 2 * HEAD
    cost, _ = cost_of(MOE, "rows")
    assert (cost.layer_params, cost.fp8_params) == (MOE_PARAMS, MOE_PARAMS - 2 * ROUTER)
    rows = 3 * attention_rows + mlp_rows
    linears = MOE_LINEARS + 2 * ROUTER  # which keep 2 bytes
    assert cost.weight_bytes == linears + 4 * rows + 2 * HEAD
    assert cost.expert_bytes == 2 * 8 * (EXPERT + 4 * (2 * 128 + 128))


def test_cost_of_an_fp8_checkpoint():
    attention_blocks, mlp_blocks = 4 + 2, 4 + 2
    cost, _ = cost_of(DENSE, "blocks")
    assert cost.layer_params == cost.fp8_params == DENSE_PARAMS
    blocks = 3 * (attention_blocks + mlp_blocks)
    assert cost.weight_bytes == DENSE_PARAMS + 4 * blocks + 2 * HEAD
    cost, _ = cost_of(MOE, "blocks")
    assert (cost.layer_params, cost.fp8_params) == (MOE_PARAMS, MOE_PARAMS - 2 * ROUTER)
    assert cost.expert_bytes == 2 * 8 * (EXPERT + 4 * (2 + 1))
    # Experts that do not have blocks of their own are dequantised.
    cost, _ = cost_of(MOE | {"moe_intermediate_size": 64}, "blocks")
    assert cost.fp8_params == 3 * ATTENTION + MLP
    assert cost.expert_bytes == 2 * 2 * 8 * EXPERT // 2


def test_cost_of_packed_weights():
    """128 columns share two bytes of a scale."""
    cost, _ = cost_of(DENSE, weight_format=WeightFormat(4, 128, is_on_load=True))
    assert (cost.layer_params, cost.fp8_params) == (DENSE_PARAMS, 0)
    assert cost.weight_bytes == DENSE_PARAMS // 2 + 2 * DENSE_PARAMS // 128 + 2 * HEAD


def test_an_fp8_cache_has_a_byte_an_element_and_a_scale_a_head():
    cost, _ = cost_of(DENSE, kv_dtype=FP8_DTYPE)
    assert cost.kv_bytes == 3 * 2 * 2 * (64 + 4)  # layers, K and V, heads
    assert cost.weight_bytes == 2 * (DENSE_PARAMS + HEAD)


def test_ranks_without_a_kv_head_of_their_own_hold_a_copy():
    cost, _ = cost_of(MOE, tp_size=4)
    assert cost.kv_bytes == 2 * (3 * 2 * 128 * 2)
    # k and v once more, and the routers three times.
    copies = 3 * 2 * 128 * 128 + 3 * 2 * ROUTER
    assert cost.layer_params == MOE_PARAMS + copies
    one_rank, two_ranks = cost_of(DENSE)[0], cost_of(DENSE, tp_size=2)[0]
    assert one_rank == two_ranks


@pytest.mark.parametrize("fp8_scales", [None, "rows", "blocks"])
@pytest.mark.parametrize("sizes", [DENSE, MOE], ids=["dense", "moe"])
def test_costs_of_ranks_are_those_of_all_their_matrices(sizes, fp8_scales):
    cost, ranks = cost_of(sizes, fp8_scales, tp_size=4)
    vectors = ("norm.weight", "bias", "embed_tokens.weight")
    tensors = [
        (name, p)
        for rank in ranks
        for name, p in rank.named_parameters()
        if not name.endswith(vectors)
    ]
    assert sum(p.nbytes for _, p in tensors) == cost.weight_bytes + cost.expert_bytes
    assert sum(p.nbytes for name, p in tensors if ".experts." in name) == cost.expert_bytes


@pytest.mark.parametrize("name", ["tied", "untied", "qwen2", "llama2", "qwen3-moe-steps"])
def test_costs_of_an_engine_are_those_of_its_checkpoint(tmp_path, name):
    """Also with fp8 weights asked for, which keep the model's dtype on the CPU."""
    if name in FAMILIES:
        save_family(tmp_path / "m", name)
    else:
        save_model(tmp_path / "m", tie_word_embeddings=name == "tied")
    sizes = {n: t.numel() for n, t in load_file(tmp_path / "m" / "model.safetensors").items()}
    experts = sum(n for name, n in sizes.items() if ".experts." in name)
    linears = sum(
        n
        for name, n in sizes.items()
        if name.endswith(("_proj.weight", "mlp.gate.weight")) and ".experts." not in name
    )
    settings = {"kv_cache_dtype": "fp8", "quantization": "fp8"} if name == "tied" else {}
    with tiny_engine(tmp_path / "m", enforce_eager=True, **settings) as llm:
        cost = ModelCost.of_engine(llm)
        runner = llm.model_runner
        cache_bytes = runner.kv_cache.nbytes
        if runner.kv_scales is not None:
            cache_bytes += runner.kv_scales.nbytes
    assert cost.kv_bytes * llm.config.num_kvcache_blocks * 256 == cache_bytes
    head = sizes["model.embed_tokens.weight"]
    assert (cost.head_params, cost.weight_bytes) == (head, 4 * (linears + head))
    assert (cost.expert_bytes, cost.fp8_params) == (4 * experts, 0)
    assert cost.layer_params == linears + experts * 2 // 8


# ---- what a workload costs ----------------------------------------------------------------------


def test_counts_of_two_requests():
    workload = Workload([[1, 2], [3, 4, 5]], [3, 1], shared_prefix_len=0)
    assert limits.count_decode_contexts(workload) == 3 + 4
    pairs = (1 + 2) + (1 + 2 + 3)
    flops = 2 * LAYER_PARAMS * 5 + 2 * 33 * 2 + 160 * pairs
    assert limits.count_prefill_flops(workload, COST) == flops
    read_bytes = 7 * COST.kv_bytes + 2 * COST.weight_bytes
    seconds = limits.limit_seconds(workload, COST, HARDWARE, decode_batches=[1, 1])
    assert seconds == pytest.approx(read_bytes / 1e3 + flops / 1e4)
    two_devices = Hardware(bandwidth=1e3, matrix_rate=1e4, num_devices=2)
    halved = limits.limit_seconds(workload, COST, two_devices, decode_batches=[1, 1])
    assert halved == pytest.approx(seconds / 2)


def test_the_limit_counts_experts_of_each_batch_and_fp8_products():
    """Half of the experts for one row, 3/4 for two; the layers' products at two rates."""
    workload = Workload([[1, 2], [3, 4, 5]], [3, 2], shared_prefix_len=0)
    cost = dataclasses.replace(COST, fp8_params=400, expert_bytes=1000, expert_share=0.5)
    assert [cost.decode_weight_bytes(n) - COST.weight_bytes for n in (1, 2)] == [500, 750]
    read_bytes = (3 + 4 + 4) * 160 + 2 * COST.weight_bytes + 750 + 500
    flops = 2 * (LAYER_PARAMS - 400) * 5 + 2 * 33 * 2 + 160 * 9
    seconds = read_bytes / 1e3 + flops / 1e4 + 2 * 400 * 5 / 2e4
    assert limits.limit_seconds(workload, cost, HARDWARE, [2, 1]) == pytest.approx(seconds)
    assert limits.count_prefill_flops(workload, cost) == flops + 2 * 400 * 5


def test_a_shared_prefix_is_computed_once_and_read_once_a_step():
    workload = Workload([[7, 8, 1], [7, 8, 2, 3]], [3, 2], shared_prefix_len=2)
    assert limits.count_decode_contexts(workload) == (4 + 5) + 5
    # Two steps: 7, 8 twice; of their own 2 and 3 tokens of the first, 3 of the second.
    assert limits.count_distinct_contexts(workload, num_decode_steps=2) == 2 * 2 + 2 + 3 + 3
    pairs = (1 + 2) + 3 + (3 + 4)
    flops = 2 * LAYER_PARAMS * (2 + 1 + 2) + 2 * 33 * 2 + 160 * pairs
    assert limits.count_prefill_flops(workload, COST) == flops


def test_the_first_repetition_of_bench_is_that_of_bench_py():
    """The sums that design and test of bench.py know."""
    workload = next(workloads(ROWS[0], vocab_size=151936))
    assert workload.num_prompt_tokens == 142827
    assert workload.num_output_tokens == 133966


def test_each_repetition_draws_new_ids_and_lengths_stay():
    for row in ROWS:
        draws = workloads(row.scaled(0.05), vocab_size=151936)
        first, second = next(draws), next(draws)
        assert first.output_lens == second.output_lens
        for before, after in zip(first.prompts, second.prompts, strict=True):
            assert len(before) == len(after)
            assert before != after
            prefix_len = first.shared_prefix_len
            assert before[:prefix_len] == first.prompts[0][:prefix_len]
    assert len({row.seed for row in ROWS}) == len(ROWS)


def test_a_row_that_cannot_fit_is_refused_by_name():
    with pytest.raises(SystemExit, match=r"'prefill' draws .* 4001 tokens.* 2048"):
        check_fits(ROWS, 2048)


def test_a_prompt_served_by_the_prefix_cache_is_an_error(tiny_dir):
    workload = next(workloads(Row("long", 1, (600, 600), (2, 2)), vocab_size=384))
    with tiny_engine(tiny_dir, enforce_eager=True) as llm:
        timing.time_workload(llm, workload)
        with pytest.raises(RuntimeError, match="88 prompt tokens were computed, not 600"):
            timing.time_workload(llm, workload)


def test_options_and_variants_reach_the_engine():
    arguments = (
        "--model m --variant no-overlap no-graphs torch no-prefix-caching --dtype float32 "
        "--tensor-parallel-size 2 --max-num-seqs 3 --kvcache-block-size 512 --device cpu "
        "--gpu-memory-utilization 0.5 --load-format dummy --quantization fp8"
    )
    assert engine_settings(bench_suite.parse_arguments(arguments.split())) == {
        "load_format": "dummy",
        "async_scheduling": False,
        "enforce_eager": True,
        "attention_backend": "torch",
        "enable_prefix_caching": False,
        "dtype": "float32",
        "quantization": "fp8",
        "tensor_parallel_size": 2,
        "max_num_seqs": 3,
        "kvcache_block_size": 512,
        "device": "cpu",
        "gpu_memory_utilization": 0.5,
    }
    assert engine_settings(bench_suite.parse_arguments(["--model", "m"])) == {}


# ---- variants -----------------------------------------------------------------------------------


def test_every_variant_exists_in_the_library():
    """Constants and parameters, whether or not they can run here."""
    known = {field.name for field in dataclasses.fields(Config)}
    for name in VARIANTS:
        with constants_set([name]):
            pass
        assert settings_of([name]).keys() <= known


def test_constants_hold_inside_only_and_caches_are_cleared(monkeypatch):
    module = types.ModuleType("nanovllm.toy")
    module.LIMIT = 3
    module.twice = functools.lru_cache(lambda: 2 * module.LIMIT)
    monkeypatch.setitem(sys.modules, "nanovllm.toy", module)
    monkeypatch.setitem(VARIANTS, "low", Variant(constants={"toy.LIMIT": 1}))
    monkeypatch.setitem(VARIANTS, "typo", Variant(constants={"toy.LIMITS": 1}))
    assert module.twice() == 6
    with pytest.raises(ZeroDivisionError), constants_set(["low"]):
        assert module.twice() == 2
        raise ZeroDivisionError
    assert module.twice() == 6
    with pytest.raises(LookupError, match=r"nanovllm\.toy has no LIMITS"), constants_set(["typo"]):
        pass


@pytest.mark.parametrize("arguments", ["--compare .", "--tensor-parallel-size 2"])
def test_constants_are_refused_where_other_processes_need_them(arguments, capsys):
    command = ["--model", "m", "--variant", "no-launch-overlap", *arguments.split()]
    with pytest.raises(SystemExit):
        bench_suite.parse_arguments(command)
    assert "one process" in capsys.readouterr().err


def test_ablations(tiny_dir, capsys):
    arguments = ["--model", str(tiny_dir), "--device", "cpu", "--num-kvcache-blocks", "64"]
    names = ["no-overlap", "flash-attn", "no-prefix-caching"]
    options = ["--rows", "8x512", "1x512", "--scale", "0.02", "--repeat", "1"]
    bench_suite.main([*arguments, *options, "--ablate", *names])
    *lines, last_line = capsys.readouterr().out.splitlines()
    summary = json.loads(last_line)
    assert list(summary["variants"]) == ["base", "no-overlap", "no-prefix-caching"]
    assert "needs a CUDA device" in summary["skipped"]["flash-attn"]
    for rows in summary["variants"].values():
        assert [row["name"] for row in rows] == ["1x512", "8x512"]
    table = [line.split("|")[1:-1] for line in lines[-5:]]
    assert [row[0].strip() for row in table] == ["variant", "---", *summary["variants"]]
    base, no_overlap = (summary["variants"][name] for name in ("base", "no-overlap"))
    speeds = [rows[1]["tokens_per_second"] for rows in (base, no_overlap)]
    assert table[3][3].strip() == f"{speeds[1]:,.0f}"
    assert float(table[3][4]) == pytest.approx(speeds[1] / speeds[0], abs=1e-3)


# ---- two checkouts ------------------------------------------------------------------------------

OLDER_PACKAGE = """
import pathlib, time
from types import SimpleNamespace


class SamplingParams(SimpleNamespace):
    pass


class LLM:
    config = SimpleNamespace(hf_config=SimpleNamespace(vocab_size=384))

    def __init__(self, model, load_format, gpu_memory_utilization, device):
        print("noise on stdout")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def generate(self, prompts, sampling_params, use_tqdm):
        if isinstance(sampling_params, list):
            with pathlib.Path("LOG").open("a") as log:
                print([len(prompt) for prompt in prompts], file=log)
            return [{"token_ids": [0] * params.max_tokens} for params in sampling_params]
"""


def test_comparison_with_a_checkout_that_knows_less(tiny_dir, tmp_path, capsys):
    package = tmp_path / "old" / "nanovllm"
    package.mkdir(parents=True)
    log = tmp_path / "log"
    (package / "__init__.py").write_text(OLDER_PACKAGE.replace("LOG", str(log)))
    arguments = ["--model", str(tiny_dir), "--load-format", "dummy", "--device", "cpu"]
    rows = ["--rows", "8x512", "prefill", "--scale", "0.02", "--repeat", "3"]
    bench_suite.main([*arguments, *rows, "--compare", str(tmp_path / "old")])
    _, *lines, last_line = capsys.readouterr().out.splitlines()
    summary = json.loads(last_line)
    assert (
        [line.split()[0] for line in lines]
        == ["8x512", "prefill"]
        == [row["name"] for row in summary["rows"]]
    )
    for row, line in zip(summary["rows"], lines, strict=True):
        assert len(row["old_seconds"]) == len(row["new_seconds"]) == 3
        ratio = sorted(row["old_seconds"])[1] / sorted(row["new_seconds"])[1]
        assert float(line.split()[3]) == pytest.approx(ratio, abs=1e-3)
    drawn = next(workloads(ROWS[5].scaled(0.02), vocab_size=384))
    lengths = [len(prompt) for prompt in drawn.prompts]
    assert log.read_text().splitlines()[3:] == [str(lengths)] * 3
    assert summary["rows"][1]["num_tokens"] == sum(lengths)
    assert summary["rows"][0]["num_tokens"] == max(1, round(8 * 0.02)) * 10


def test_a_folder_without_the_package_is_refused(tiny_dir, tmp_path):
    with pytest.raises(RuntimeError, match="ended with exit status 1|holds no nanovllm"):
        compare.Checkout(tmp_path, str(tiny_dir), {"device": "cpu", "num_kvcache_blocks": 4}, [])


def test_parts_of_a_start_are_functions_and_make_a_table():
    for place in starts.PARTS.values():
        assert callable(pkgutil.resolve_name(place))
    cold = {"torch": 2.0, "config.json": 0.1, "graphs": 0.15, "warm-up": 3.0}
    warm = {"torch": 1.0, "config.json": 0.1, "graphs": 0.25, "warm-up": 0.0}
    assert starts.table_of({"cold": cold, "warm": warm}).splitlines() == [
        "| part | cold | warm |",
        "| --- | --- | --- |",
        "| torch | 2.00 | 1.00 |",
        "| graphs | 0.15 | 0.25 |",
        "| warm-up | 3.00 | 0.00 |",
        "| the rest | 0.10 | 0.10 |",
        "| all | 5.25 | 1.35 |",
    ]
