"""CPU seconds of one thread that this engine and transformers' `generate` take, side by side.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/cpu_speed.py nanovllm/assets/austen-7m

Seconds of the process, not of the clock, so that other processes matter little. Both generate
greedily in turns, and the shortest of each one's runs counts. transformers gets prompts of ragged
lengths padded on the left, with `sdpa`. Prefill is a run with one token, decode is what a run of
all tokens takes beyond it. Of a folder with a config.json alone the weights are random.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nanovllm import LLM, SamplingParams

Generate = Callable[[list[list[int]], int], list[list[int]]]


def with_weights(source: Path, layers: int | None, directory: Path) -> Path:
    """`source`, or a copy of its configuration with random weights, of so many layers."""
    if layers is None and list(source.glob("*.safetensors")):
        return source
    fields = json.loads((source / "config.json").read_text("utf-8"))
    if layers is not None:
        fields["num_hidden_layers"] = layers
        fields.pop("layer_types", None)
    target = directory / source.name
    target.mkdir()
    (target / "config.json").write_text(json.dumps(fields), "utf-8")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target))
    model.to(torch.bfloat16).save_pretrained(target)
    for file in source.glob("token*"):
        shutil.copy(file, target)
    return target


def transformers_generate(path: Path, dtype: str) -> Generate:
    """transformers' own, of a batch padded on the left."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            pad_token_id=0,
        )
        return out[:, width:].tolist()

    return generate


def engine_generate(path: Path, dtype: str, args: argparse.Namespace, **settings: Any) -> Generate:
    """The engine's."""
    length = args.prompt[1] + args.tokens
    llm = LLM(
        str(path),
        device="cpu",
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=length,
        max_num_seqs=max(args.batches),
        num_kvcache_blocks=max(args.batches) * (-(-length // 256) + 1),
        enable_prefix_caching=False,
        **settings,
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        return [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)]

    return generate


def timed(
    generate: Generate, prompts: list[list[int]], num_tokens: int
) -> tuple[float, list[list[int]]]:
    """The seconds of all threads of the process that one call takes, and the tokens."""
    start = time.process_time()
    outputs = generate(prompts, num_tokens)
    return time.process_time() - start, outputs


def measure(engines: list[Generate], prompts: list[list[int]], args: argparse.Namespace) -> None:
    """A line for a batch: prompt tokens/s and decoded tokens/s of each engine, ours first."""
    seconds: list[list[list[float]]] = [[[], []] for _ in engines]
    for _ in range(args.repeat):
        outputs = []
        for generate, (first, whole) in zip(engines, seconds, strict=True):
            first.append(timed(generate, prompts, 1)[0])
            whole_seconds, tokens = timed(generate, prompts, args.tokens)
            whole.append(whole_seconds)
            outputs.append(tokens)
    num_prompt_tokens = sum(map(len, prompts))
    line = f"{len(prompts):6}"
    for rates in (
        [num_prompt_tokens / min(first) for first, _ in seconds],
        [len(prompts) * (args.tokens - 1) / (min(whole) - min(first)) for first, whole in seconds],
        [len(prompts) * args.tokens / min(whole) for _, whole in seconds],
    ):
        line += "".join(f"{rate:10,.1f}" for rate in rates)
        line += f"{rates[0] / rates[-1]:7.2f}"
    equal = sum(ours == theirs for ours, theirs in zip(outputs[0], outputs[-1], strict=True))
    print(f"{line}   {equal} of {len(prompts)} equal", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--layers", type=int, help="so many layers of random weights")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, nargs=2, default=[100, 300], help="shortest, longest")
    parser.add_argument("--tokens", type=int, default=64, help="of a completion")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        path = with_weights(args.model, args.layers, Path(directory))
        vocab_size = AutoConfig.from_pretrained(path).vocab_size
        for dtype in args.dtypes:
            engines = [engine_generate(path, dtype, args), transformers_generate(path, dtype)]
            print(f"{dtype}: tokens/s of prefill, of decode, of all, here and transformers")
            for batch in args.batches:
                rng = random.Random(batch)
                lengths = [rng.randint(*args.prompt) for _ in range(batch)]
                prompts = [[rng.randrange(3, vocab_size) for _ in range(n)] for n in lengths]
                measure(engines, prompts, args)


if __name__ == "__main__":
    main()
