"""trace_summary.py: grouping and times of made-up device events, and its run on the CPU."""

import importlib
import json
import pkgutil

import pytest
import trace_summary
from engine_checks import check_nothing_is_held, tiny_engine
from trace_summary import LINEARS, LM_HEAD, OTHER, SAMPLER, DeviceEvent, Shape
from workloads import Row

from nanovllm.kernels import triton as kernels

GEMM = "nvjet_tst_64x8_64x16_4x1_v_bz_TNT"
KERNEL_GROUPS = {
    "_gather_kernel": "row table",
    "_write_back_kernel": "row table",
    "_plan_kernel": "attention",
    "_decode_kernel": "attention",
    "_common_prefix_kernel": "attention",
    "_prefill_kernel": "attention",
    "_hopper_prefill_kernel": "attention",
    "_hopper_decode_kernel": "attention",
    "_add_kernel": "adapters",
    "_copy_units_kernel": "copies",
    "void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>": (
        "attention"
    ),
    "_qk_norm_rope_store_kernel": "RoPE, KV write",
    "_rms_norm_kernel": "norms",
    "_act_and_mul_kernel": "activation",
    "_gated_rms_norm_kernel": "norms",
    "_causal_conv1d_kernel": "delta nets",
    "_gated_delta_rule_kernel": "delta nets",
    "_chunks_kernel": "delta nets",
    "_route_kernel": "experts",
    "_sort_pairs_kernel": "experts",
    "_experts_kernel": "experts",
    "_sum_experts_kernel": "experts",
    "_split_linear_kernel": LINEARS,
    "_tiled_linear_kernel": LINEARS,
    "_hopper_linear_kernel": LINEARS,
    "_quantize_kernel": "quantization",
    GEMM: LINEARS,
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas": LINEARS,
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": LINEARS,
    "_chunk_best_kernel": SAMPLER,
    "_chunk_kernel": SAMPLER,
    "_row_winner_kernel": SAMPLER,
    "_start_kernel": SAMPLER,
    "_pass_kernel": SAMPLER,
    "_finish_kernel": SAMPLER,
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "all-reduce",
    "all_reduce_kernel": "all-reduce",
    "embedding_kernel": "all-reduce",
    "argmax_kernel": "all-reduce",
    "Memcpy DtoH (Device -> Pinned)": "copies",
    "Memset (Device)": "copies",
    "void at::native::(anonymous namespace)::indexSelectSmallIndex<c10::BFloat16>": OTHER,
}


def back_to_back(names: list[str], us: float = 2.0) -> list[DeviceEvent]:
    return [DeviceEvent(name, us * i, us * (i + 1)) for i, name in enumerate(names)]


@pytest.mark.parametrize(("name", "group"), KERNEL_GROUPS.items())
def test_groups_of_known_names(name, group):
    assert trace_summary.group_of_name(name) == group


def test_every_kernel_of_the_library_has_a_group():
    """A kernel that is renamed or added must be found by a pattern."""
    triton = pytest.importorskip("triton")
    names = []
    for module_info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{module_info.name}")
        members = vars(module).values()
        names += [m.__name__ for m in members if isinstance(m, triton.JITFunction)]
    launched = {name for name in names if name.endswith("_kernel")}
    assert launched
    assert {name for name in launched if trace_summary.group_of_name(name) == OTHER} == set()


@pytest.mark.parametrize("reduction", [[], ["void cublasLt::splitKreduce_kernel<32>"]])
def test_the_product_before_the_sampler_is_the_lm_head(reduction):
    step = [GEMM, "_rms_norm_kernel", GEMM, *reduction, "_chunk_best_kernel", "_row_winner_kernel"]
    groups = trace_summary.group_events(back_to_back(step * 2))
    one_step = [LINEARS, "norms", LM_HEAD, *([LM_HEAD] * len(reduction)), SAMPLER, SAMPLER]
    assert groups == one_step * 2
    fused = [GEMM, GEMM, "_chunk_best_kernel"]  # no norm of its own before the LM head
    assert trace_summary.group_events(back_to_back(fused)) == [LINEARS, LM_HEAD, SAMPLER]
    assert trace_summary.group_events(back_to_back(["_chunk_best_kernel"])) == [SAMPLER]


def test_overlap_counts_for_the_earlier_kernel_and_gaps_for_none():
    events = [
        DeviceEvent("a", 0, 10),
        DeviceEvent("b", 4, 13),  # launched ahead, waits until 10
        DeviceEvent("c", 5, 9),  # within both
        DeviceEvent("d", 20, 21),
    ]
    assert trace_summary.own_times(events) == [10, 3, 0, 1]


def test_a_window_of_two_steps():
    events = [
        DeviceEvent("_decode_kernel", 100, 106),
        DeviceEvent(GEMM, 104, 110),
        DeviceEvent("unheard_of", 110, 111),
        DeviceEvent("_decode_kernel", 115, 121),
        DeviceEvent(GEMM, 121, 125),
        DeviceEvent("unheard_of", 125, 140),
    ]
    window = trace_summary.summarize("w", plain_step_us=19.0, counts=[-3, -2], events=events)
    assert (window.prefill_steps, window.decode_steps, window.mean_decode_batch) == (0, 2, 2.5)
    assert window.plain_step_us == 19.0
    assert window.profiled_step_us == 20.0
    assert window.busy_share == pytest.approx(36 / 40)
    assert window.kernels_per_step == 3
    nonzero = {group: us for group, us in window.group_us.items() if us}
    assert nonzero == {"attention": 6.0, LINEARS: 4.0, OTHER: 8.0}
    assert [(k.name, k.group, k.calls_per_step, k.us_per_step) for k in window.kernels] == [
        ("unheard_of", OTHER, 1.0, 8.0),
        ("_decode_kernel", "attention", 1.0, 6.0),
        (GEMM, LINEARS, 1.0, 4.0),
    ]


def test_a_trace_without_device_events_is_an_error():
    with pytest.raises(SystemExit, match="needs a GPU"):
        trace_summary.summarize("w", 1.0, [-1], [])


def test_windows_hold_the_steps_they_name(shallow_dir, monkeypatch):
    contexts = []  # of each profiled decode step: the longest

    def record(run):
        launch = llm.executor.launch

        def counting_launch(seqs, is_prefill):
            if not is_prefill:
                contexts.append(max(seq.num_computed_tokens for seq in seqs))
            return launch(seqs, is_prefill)

        llm.executor.launch = counting_launch
        run()
        del llm.executor.launch
        return back_to_back(["_decode_kernel"])

    monkeypatch.setattr(trace_summary, "record_events", record)
    monkeypatch.setattr(trace_summary, "ROWS", [Row("8x64", 8, (20, 20), (64, 64))])
    with tiny_engine(shallow_dir, max_num_batched_tokens=1024) as llm:
        rng = trace_summary.Random(0)
        window = trace_summary.measure_decode(llm, rng, Shape.parse("3x60"), num_steps=10)
        assert (window.name, window.decode_steps, window.prefill_steps) == ("3x60", 10, 0)
        assert window.mean_decode_batch == 3
        assert sorted(contexts)[5] == 60
        check_nothing_is_held(llm)
        window = trace_summary.measure_prefill(llm, rng, Shape(5, 200))
        assert (window.decode_steps, window.prefill_steps) == (0, trace_summary.NUM_PREFILL_STEPS)
        assert window.mean_prefill_tokens == 1000
        check_nothing_is_held(llm)
        window = trace_summary.measure_row(llm, "8x64", num_steps=10)
        assert (window.decode_steps, window.mean_decode_batch) == (10, 8)
        assert contexts[-5] == pytest.approx(20 + 32, abs=10)
        check_nothing_is_held(llm)
        with pytest.raises(SystemExit, match="the KV cache is too small"):
            trace_summary.measure_decode(llm, rng, Shape(33, 60), num_steps=4)  # of 32 rows


def test_the_command(tiny_dir, monkeypatch, capsys):
    names = ["_gather_kernel", "_decode_kernel", GEMM, "_chunk_best_kernel", "mystery"]

    def record(run):
        run()
        return back_to_back(names)

    monkeypatch.setattr(trace_summary, "record_events", record)
    options = "--device cpu --num-kvcache-blocks 32 --max-model-len 1024 --steps 4 --rows --top 3"
    shapes = "--decode 1x30 2x40 --prefill 2x50"
    trace_summary.main(["--model", str(tiny_dir), *options.split(), *shapes.split()])
    *lines, last_line = capsys.readouterr().out.splitlines()
    windows = json.loads(last_line)["windows"]
    assert [window["name"] for window in windows] == ["1x30", "2x40", "prefill 2x50"]
    assert [len(window["kernels"]) for window in windows] == [5] * 3
    table = [line for line in lines if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    assert [cell.strip() for cell in table[0].split("|")[2:-1]] == ["1x30", "2x40", "prefill 2x50"]
    labels = [line.split("|")[1].strip() for line in table]
    assert labels[-5:] == ["attention", LM_HEAD, SAMPLER, "row table", OTHER]
    assert sum(line.endswith("_decode_kernel") for line in lines) == 3
