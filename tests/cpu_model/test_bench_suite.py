"""tests/bench_suite.py on a tiny model: it runs, and counts what hand and step loop count."""

import json
import math
from types import SimpleNamespace

import bench_suite
import pytest
import torch
from bench_suite import Hardware, ModelCost, Row, Workload
from engine_checks import tiny_engine

SCALE = 0.05  # the least that leaves every row but prefill a decode step
HARDWARE = Hardware(bandwidth=1e3, matrix_rate=1e4)
CONFIG = SimpleNamespace(
    hidden_size=3,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=5,
    intermediate_size=7,
    vocab_size=11,
)
# Products of one layer: q 3 x 20, k and v 3 x 10 each, o 20 x 3; gate, up and down 3 x 7 each.
LAYER_PARAMS = 2 * (60 + 30 + 30 + 60 + 3 * 21)
COST = ModelCost(
    layer_params=LAYER_PARAMS,
    head_params=33,
    pair_flops=2 * 4 * 20,
    kv_bytes=2 * 2 * 10 * 4,
    weight_bytes=(LAYER_PARAMS + 33) * 4,
)


def test_all_rows_and_the_json_line(tiny_dir, capsys):
    arguments = ["--model", str(tiny_dir), "--load-format", "dummy", "--device", "cpu"]
    bench_suite.main([*arguments, "--scale", str(SCALE), "--repeat", "1", "--enforce-eager"])
    *table, last_line = capsys.readouterr().out.splitlines()
    assert max(map(len, table)) <= 100
    summary = json.loads(last_line)
    assert summary["arguments"]["scale"] == SCALE
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["device"].startswith("CPU")
    assert all(0 < summary["hardware"][k] < math.inf for k in ("bandwidth", "matrix_rate"))

    rows = {row["name"]: row for row in summary["rows"]}
    names = ["start-cold", "start-warm", *(row.name for row in bench_suite.ROWS)]
    assert list(rows) == names
    assert [line.split()[0] for line in table[1:]] == names
    for name, row in rows.items():
        assert row.pop("all_seconds") == [row["seconds"]]
        assert row.pop("preemptions", 0) == 0
        if name == "prefill":  # the first token ends every request
            decode_keys = ("mean_decode_batch", "decode_steps", "kv_bytes_read")
            assert [row.pop(key) for key in (*decode_keys, "kv_bytes_per_second")] == [0] * 4
        numbers = {key: value for key, value in row.items() if not isinstance(value, str)}
        assert all(0 < value < math.inf for value in numbers.values()), row
    assert rows["prefill"]["unit"] == "prompt"


def step_counts(llm, workload: Workload) -> list[int]:
    for prompt, params in zip(workload.prompts, workload.sampling_params, strict=True):
        llm.add_request(prompt, params)
    counts = []
    while not llm.is_finished():
        counts.append(llm.step()[1])
    return counts


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_steps_equal_those_of_a_step_loop(tiny_dir, async_scheduling):
    row = Row("small", 7, (3, 40), (2, 12), seed=3)
    settings = {"async_scheduling": async_scheduling, "max_num_seqs": 4, "enforce_eager": True}
    draws = bench_suite.workloads(row, vocab_size=384)
    with tiny_engine(tiny_dir, **settings) as llm:
        result = bench_suite.measure_row(llm, row, 1, COST, HARDWARE)
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
    assert sum(decodes) == workload.num_output_tokens - len(workload.prompts)


def test_contexts_equal_those_of_the_sequences(tiny_dir):
    row = Row("small", 5, (3, 40), (1, 12), shared_prefix_len=10)
    workload = next(bench_suite.workloads(row, vocab_size=384))
    contexts = 0
    with tiny_engine(tiny_dir, async_scheduling=False, enforce_eager=True) as llm:
        launch = llm.model_runner.launch

        def counting_launch(seqs, is_prefill):
            nonlocal contexts
            contexts += 0 if is_prefill else sum(seq.num_computed_tokens for seq in seqs)
            return launch(seqs, is_prefill)

        llm.model_runner.launch = counting_launch
        step_counts(llm, workload)
    assert bench_suite.count_decode_contexts(workload) == contexts > 0


def test_costs_of_a_small_config():
    assert ModelCost.of(CONFIG, itemsize=4) == COST


def test_counts_of_two_requests():
    workload = Workload([[1, 2], [3, 4, 5]], [3, 1], shared_prefix_len=0)
    assert bench_suite.count_decode_contexts(workload) == 3 + 4
    pairs = (1 + 2) + (1 + 2 + 3)
    flops = 2 * LAYER_PARAMS * 5 + 2 * 33 * 2 + 160 * pairs
    assert bench_suite.count_prefill_flops(workload, COST) == flops
    read_bytes = 7 * COST.kv_bytes + 2 * COST.weight_bytes
    seconds = bench_suite.limit_seconds(workload, COST, HARDWARE, num_decode_steps=2)
    assert seconds == pytest.approx(read_bytes / 1e3 + flops / 1e4)
    two_devices = Hardware(bandwidth=1e3, matrix_rate=1e4, num_devices=2)
    halved = bench_suite.limit_seconds(workload, COST, two_devices, num_decode_steps=2)
    assert halved == pytest.approx(seconds / 2)


def test_a_shared_prefix_is_computed_once_and_read_once_a_step():
    workload = Workload([[7, 8, 1], [7, 8, 2, 3]], [3, 2], shared_prefix_len=2)
    assert bench_suite.count_decode_contexts(workload) == (4 + 5) + 5
    # Two steps: 7, 8 twice; of their own 2 and 3 tokens of the first, 3 of the second.
    assert bench_suite.count_distinct_contexts(workload, num_decode_steps=2) == 2 * 2 + 2 + 3 + 3
    pairs = (1 + 2) + 3 + (3 + 4)
    flops = 2 * LAYER_PARAMS * (2 + 1 + 2) + 2 * 33 * 2 + 160 * pairs
    assert bench_suite.count_prefill_flops(workload, COST) == flops


def test_the_first_repetition_of_bench_is_that_of_bench_py():
    """The sums that design and test of bench.py know."""
    workload = next(bench_suite.workloads(bench_suite.ROWS[0], vocab_size=151936))
    assert workload.num_prompt_tokens == 142827
    assert workload.num_output_tokens == 133966


def test_each_repetition_draws_new_ids_and_lengths_stay():
    for row in bench_suite.ROWS:
        draws = bench_suite.workloads(row.scaled(0.05), vocab_size=151936)
        first, second = next(draws), next(draws)
        assert first.output_lens == second.output_lens
        for before, after in zip(first.prompts, second.prompts, strict=True):
            assert len(before) == len(after)
            assert before != after
            prefix_len = first.shared_prefix_len
            assert before[:prefix_len] == first.prompts[0][:prefix_len]
    assert len({row.seed for row in bench_suite.ROWS}) == len(bench_suite.ROWS)


def test_a_row_that_cannot_fit_is_refused_by_name():
    with pytest.raises(SystemExit, match=r"'prefill' draws .* 4001 tokens.* 2048"):
        bench_suite.check_fits(bench_suite.ROWS, 2048)


def test_a_prompt_served_by_the_prefix_cache_is_an_error(tiny_dir):
    workload = next(bench_suite.workloads(Row("long", 1, (600, 600), (2, 2)), vocab_size=384))
    with tiny_engine(tiny_dir, enforce_eager=True) as llm:
        bench_suite.time_workload(llm, workload)
        with pytest.raises(RuntimeError, match="88 prompt tokens were computed, not 600"):
            bench_suite.time_workload(llm, workload)


def test_switches_reach_the_engine():
    arguments = (
        "--model m --no-async-scheduling --enforce-eager --attention-backend torch "
        "--no-prefix-caching --dtype float32 --tensor-parallel-size 2 --max-num-seqs 3 "
        "--kvcache-block-size 512 --device cpu"
    )
    assert bench_suite.engine_settings(bench_suite.parse_arguments(arguments.split())) == {
        "load_format": "auto",
        "async_scheduling": False,
        "enforce_eager": True,
        "attention_backend": "torch",
        "enable_prefix_caching": False,
        "dtype": "float32",
        "tensor_parallel_size": 2,
        "max_num_seqs": 3,
        "kvcache_block_size": 512,
        "device": "cpu",
    }
