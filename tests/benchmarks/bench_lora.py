"""What LoRA adapters cost: tokens/s of bench.py's requests, without and with them; by hand:

    python tests/benchmarks/bench_lora.py --model DIR --load-format dummy

DIR needs config.json alone, then. Three engines, one after another: without `enable_lora`; with it,
but no request has an adapter; with it, and the requests take turns among random adapters. Those are
of all linear layers. Each engine runs the requests once to warm up, then `--repeat` times with new
prompts. The ratios are of the best runs.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from engine_options import add_engine_options, engine_settings
from safetensors.torch import save_file
from workloads import ONE_CALL_ROWS, ROWS, workloads

from nanovllm import LLM
from nanovllm.lora_request import LoRARequest
from nanovllm.models.loader import expected_shapes, expected_tensors

TARGETS = ("qkv_proj", "gate_up_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj")
TARGETS += ("up_proj", "down_proj")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_options(parser)
    parser.add_argument("--num-adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rows", nargs="+", default=["bench"], choices=ONE_CALL_ROWS)
    return parser.parse_args()


def save_adapters(llm: LLM, folder: Path, number: int, rank: int) -> list[LoRARequest]:
    """Random adapters of an engine's model."""
    shapes = expected_shapes(expected_tensors(llm.model_runner.model))
    requests = []
    for index in range(1, number + 1):
        generator = torch.Generator().manual_seed(index)
        tensors = {}
        for name, shape in shapes.items():
            module = name.removesuffix(".weight").removesuffix(".numbers")
            if module != name and module.endswith(TARGETS):
                key = f"base_model.model.{module}"
                a = torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5
                b = torch.randn(shape[0], rank, generator=generator) * 0.01
                tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
        path = folder / str(index)
        path.mkdir()
        save_file(tensors, path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
        (path / "adapter_config.json").write_text(json.dumps(config))
        requests.append(LoRARequest(str(index), index, str(path)))
    return requests


def best_speeds(
    llm: LLM, rows: list[str], repeat: int, adapters: list[LoRARequest] | None
) -> dict[str, float]:
    """Tokens/s of each row, by the best of its runs."""
    best = dict.fromkeys(rows, 0.0)
    for row in ROWS:
        if row.name not in rows:
            continue
        draws = workloads(row, llm.config.hf_config.vocab_size)
        for run in range(repeat + 1):
            workload = next(draws)
            number = len(workload.prompts)
            requests: list[Any] = [None] * number
            if adapters:
                requests = [adapters[i % len(adapters)] for i in range(number)]
            start = time.perf_counter()
            llm.generate(
                workload.prompts, workload.sampling_params, use_tqdm=False, lora_request=requests
            )
            speed = workload.num_counted_tokens(row.unit) / (time.perf_counter() - start)
            if run:
                best[row.name] = max(best[row.name], speed)
    return best


def main() -> None:
    args = parse_arguments()
    settings: dict[str, Any] = {"skip_tokenizer_init": True} | engine_settings(args)
    lora = {"enable_lora": True, "max_loras": args.num_adapters, "max_lora_rank": args.rank}
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for name, extra in (("without", {}), ("idle", lora), ("mixed", lora)):
            start = time.perf_counter()
            with LLM(args.model, **(settings | extra)) as llm:
                started = time.perf_counter() - start
                adapters = None
                if name == "mixed":
                    adapters = save_adapters(llm, Path(folder), args.num_adapters, args.rank)
                results[name] = best_speeds(llm, args.rows, args.repeat, adapters)
            for row, speed in results[name].items():
                share = speed / results["without"][row]
                print(f"{row}, {name}: {speed:.0f} tok/s, {share:.3f}, started in {started:.1f} s")


if __name__ == "__main__":
    main()
