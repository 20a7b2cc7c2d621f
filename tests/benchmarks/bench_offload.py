"""What cpu_offload_gb costs: tokens/s with a share of the weights in host memory; by hand:

    python tests/benchmarks/bench_offload.py --model DIR --load-format dummy

DIR needs config.json alone, then. Requests are those of bench.py but for their lengths, which are
shorter: each step costs the same, whatever the length. Bytes/s are those of the copies alone, with
nothing beside them, and of whole decode steps.
"""

import argparse
import time
from dataclasses import replace
from typing import Any

import torch
from engine_options import add_engine_options, engine_settings
from timing import recorded_steps
from workloads import ROWS, Row, workloads

from nanovllm import LLM


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_options(parser)
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.25, 0.5],
                        help="of the weights; 0 comes first, as it tells their bytes")  # fmt: skip
    parser.add_argument("--output-len", type=int, default=48)
    return parser.parse_args()


def copy_seconds(llm: LLM, repeat: int = 3) -> float:
    """Seconds in which a step's copies run with nothing beside them: the best of `repeat`."""
    offload, best = llm.model_runner.offload, float("inf")
    assert offload is not None
    for _ in range(repeat):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for layer in offload.layers:
            layer.buffer.copy_(layer.memory, non_blocking=True)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def run_row(llm: LLM, row: Row) -> tuple[float, float]:
    """Tokens/s of the row, and seconds of the median decode step."""
    draws = workloads(row, llm.config.hf_config.vocab_size)
    workload = next(draws)
    with recorded_steps(llm) as steps:
        start = time.perf_counter()
        llm.generate(workload.prompts, workload.sampling_params, use_tqdm=False)
        seconds = time.perf_counter() - start
    decodes = sorted(step.seconds for step in steps if step.num_tokens < 0)
    return workload.num_output_tokens / seconds, decodes[len(decodes) // 2]


def main() -> None:
    args = parse_arguments()
    length = args.output_len
    bench = replace(ROWS[0], output_len=(length, length))
    one = Row("1 request", 1, (128, 128), (length, length), seed=1)
    settings: dict[str, Any] = {"max_num_seqs": 256, "skip_tokenizer_init": True}
    settings |= engine_settings(args)
    weight_bytes = 0
    for share in args.shares:
        start = time.perf_counter()
        gib = share * weight_bytes / 2**30
        with LLM(args.model, cpu_offload_gb=gib, **settings) as llm:
            started = time.perf_counter() - start
            runner, offload = llm.model_runner, llm.model_runner.offload
            weight_bytes = sum(parameter.nbytes for parameter in runner.model.parameters())
            host_bytes = offload.num_bytes if offload else 0
            print(
                f"cpu_offload_gb {gib:.2f} of {weight_bytes / 2**30:.2f}: {host_bytes / 2**30:.2f} "
                f"GiB in {len(offload.layers) if offload else 0} layers on the host, "
                f"{llm.config.num_kvcache_blocks} KV blocks, started in {started:.1f} s"
            )
            if offload:
                print(f"  copies alone: {host_bytes / copy_seconds(llm) / 1e9:.1f} GB/s")
            run_row(llm, replace(one, output_len=(4, 4)))  # warm
            for row in (one, bench):
                speed, step = run_row(llm, row)
                rate = f", {host_bytes / step / 1e9:.1f} GB/s" if offload else ""
                print(f"  {row.name}: {speed:.1f} tok/s, decode step {step * 1e3:.2f} ms{rate}")


if __name__ == "__main__":
    main()
