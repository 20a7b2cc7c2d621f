"""The command line's options that every benchmark passes on to `LLM`."""

import argparse
from typing import Any

import torch
from variants import VARIANTS, settings_of

TEXT_OPTIONS = ("attention_backend", "dtype", "kv_cache_dtype", "quantization", "device")
INTEGER_OPTIONS = (
    *("tensor_parallel_size", "max_num_seqs", "max_model_len", "max_num_batched_tokens"),
    *("kvcache_block_size", "num_kvcache_blocks"),
)
NUMBER_OPTIONS = ("gpu_memory_utilization", "cpu_offload_gb")


def add_engine_options(parser: argparse.ArgumentParser, model_required: bool = True) -> None:
    """The model, variants, and the parameters of `LLM` that a benchmark may change."""
    parser.add_argument("--model", required=model_required, help="model directory")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=[], metavar="NAME",
                        help=f"techniques to change, of {', '.join(VARIANTS)}")  # fmt: skip
    library = parser.add_argument_group("passed on to LLM, whose defaults hold otherwise")
    library.add_argument("--load-format", choices=["auto", "dummy"])
    for names, kind in ((TEXT_OPTIONS, str), (INTEGER_OPTIONS, int), (NUMBER_OPTIONS, float)):
        for name in names:
            library.add_argument(f"--{name.replace('_', '-')}", type=kind)


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `LLM` that the command line sets."""
    names = ("load_format", *TEXT_OPTIONS, *INTEGER_OPTIONS, *NUMBER_OPTIONS)
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return settings_of(args.variant) | given


def choose_device(args: argparse.Namespace) -> torch.device:
    """The device that `LLM` takes for rank 0."""
    has_gpu = torch.cuda.is_available() and args.device != "cpu"
    return torch.device("cuda", 0) if has_gpu else torch.device("cpu")
