"""Decoding speed of transformers' modules: its own `generate`, and here, eager and with graphs.

Beside them stands the family's own file here ("nanovllm").

    PYTHONPATH=. python tests/benchmarks/transformers_speed.py --layers 4

Random weights of the shapes of published models, of a few layers. Prompts have equal lengths, so
that `generate` pads nothing, and each batch is generated twice, the second time on the clock. A
model that fails is a line with the error.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nanovllm import LLM, SamplingParams

# hidden_size, intermediate_size, heads, KV heads, head_dim, vocab_size
SHAPES: dict[str, tuple[str, str, int, int, int, int, int, int]] = {
    "gemma-2-9b": ("gemma2", "Gemma2ForCausalLM", 3584, 14336, 16, 8, 256, 256000),
    "gemma-3-12b": ("gemma3_text", "Gemma3ForCausalLM", 3840, 15360, 16, 8, 256, 262208),
    "phi-3-mini": ("phi3", "Phi3ForCausalLM", 3072, 8192, 32, 32, 96, 32064),
    "olmo-2-7b": ("olmo2", "Olmo2ForCausalLM", 4096, 11008, 32, 32, 128, 100352),
    "glm-4-9b": ("glm4", "Glm4ForCausalLM", 4096, 13696, 32, 2, 128, 151552),
}
WAYS = ["transformers", "eager", "graphs", "fp8 cache", "nanovllm"]
TINY = 64, 128, 4, 2, 16, 512  # for a look at whether the script runs


def save_config(directory: Path, name: str, layers: int, is_tiny: bool, dtype: str) -> None:
    """config.json of the model's shape with so many layers."""
    model_type, architecture, *shape = SHAPES[name]
    hidden, inner, heads, kv_heads, head_dim, vocab = TINY if is_tiny else shape
    fields = {
        "architectures": [architecture],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "max_position_embeddings": 4096,
        **({} if model_type == "phi3" else {"head_dim": head_dim}),
        **({"attention_bias": False} if model_type == "glm4" else {}),
    }
    config = AutoConfig.for_model(
        model_type, **fields, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    config.dtype = dtype
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config.to_dict(), default=str), "utf-8")


def best_seconds(generate: Callable[[], object], is_cuda: bool) -> float:
    """Seconds of the second of two calls."""
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        generate()
        if is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds


@contextmanager
def own_module(path: Path, args: argparse.Namespace) -> Iterator[Callable[[int], object]]:
    """A function that lets transformers generate for a batch of so many prompts."""
    config = AutoConfig.from_pretrained(path)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()

    def generate(batch: int) -> object:
        ids = torch.randint(3, config.vocab_size, (batch, args.prompt), device=args.device)
        sizes = {"min_new_tokens": args.tokens, "max_new_tokens": args.tokens}
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, do_sample=False, **sizes)

    yield generate


@contextmanager
def engine(
    path: Path, args: argparse.Namespace, **settings: Any
) -> Iterator[Callable[[int], object]]:
    """The same of an engine."""
    llm = LLM(
        str(path),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=args.dtype,
        device=args.device,
        max_model_len=args.prompt + args.tokens,
        max_num_seqs=max(args.batches),
        gpu_memory_utilization=0.6,
        num_kvcache_blocks=max(args.batches) * (-(-(args.prompt + args.tokens) // 256) + 1),
        enable_prefix_caching=False,
        **({"model_impl": "transformers"} | settings),
    )
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    vocab_size = llm.config.model_config.vocab_size

    def generate(batch: int) -> object:
        prompts = torch.randint(3, vocab_size, (batch, args.prompt)).tolist()
        return llm.generate(prompts, params, use_tqdm=False)

    reason = getattr(llm.model_runner.model, "eager_reason", None)
    generate.reason = reason  # type: ignore[attr-defined]
    try:
        yield generate
    finally:
        llm.exit()


def measure(path: Path, name: str, args: argparse.Namespace) -> None:
    """A line for each way and batch size."""
    ways: list[tuple[str, Any]] = [
        ("transformers", own_module(path, args)),
        ("eager", engine(path, args, enforce_eager=True)),
        ("graphs", engine(path, args)),
        ("fp8 cache", engine(path, args, kv_cache_dtype="fp8")),
        ("nanovllm", engine(path, args, model_impl="nanovllm")),
    ]
    for way, opened in ways:
        if way not in args.ways:
            continue
        try:
            with opened as generate:
                rates = []
                for batch in args.batches:
                    seconds = best_seconds(lambda: generate(batch), args.device == "cuda")  # noqa: B023
                    rates.append(f"{batch * args.tokens / seconds:12,.0f}")
                reason = getattr(generate, "reason", None)
            print(f"{name:14}{way:14}{''.join(rates)}  {reason or ''}".rstrip(), flush=True)
        except Exception as error:
            print(f"{name:14}{way:14}  {type(error).__name__}: {error}", flush=True)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes instead")
    args = parser.parse_args()
    print(f"{'tokens/s for batches of':28}{''.join(f'{b:12}' for b in args.batches)}")
    with tempfile.TemporaryDirectory() as directory:
        for name in args.models:
            path = Path(directory) / name
            save_config(path, name, args.layers, args.tiny, args.dtype)
            measure(path, name, args)


if __name__ == "__main__":
    main()
