"""Micro-benchmark of the request sampler; run by hand:

    python tests/benchmarks/bench_logits_sampler.py

A steady decode batch whose requests all have the same parameters. "step" is the device's time for
sampling a step, "launch" what the host spends on it, "new batch" the host's time when it changes.
"""

import argparse
from time import perf_counter
from typing import Any

import torch

from nanovllm import SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels.select import select_ops
from nanovllm.sampling.logits_sampler import LogitsSampler

PENALTIES = {"repetition_penalty": 1.1, "frequency_penalty": 0.2}
CASES: dict[str, dict[str, Any]] = {
    "top_k, top_p": {"top_k": 20, "top_p": 0.95},
    "penalties": PENALTIES,
    "penalties, top_k, top_p": {"top_k": 20, "top_p": 0.95, **PENALTIES},
    "min_tokens, logit_bias": {"min_tokens": 64, "logit_bias": {5: 1.0}},
    "1000 allowed ids": {"allowed_token_ids": list(range(1000, 2000))},
    "bad words": {"bad_words": ["some"]},
    "logprobs 0": {"logprobs": 0},
    "logprobs 5": {"logprobs": 5},
}


def milliseconds(device: torch.device, run: Any, repeats: int) -> tuple[float, float]:
    """Mean device and host time of `run()`."""
    run()
    if device.type != "cuda":
        start = perf_counter()
        for _ in range(repeats):
            run()
        mean = (perf_counter() - start) / repeats * 1e3
        return mean, mean
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    start = perf_counter()
    for _ in range(repeats):
        run()
    host = perf_counter() - start
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats, host / repeats * 1e3


def measure(
    device: torch.device, params: dict[str, Any], num_seqs: int, vocab_size: int, length: int
) -> str:
    """A line of the table."""
    seqs = []
    for row in range(num_seqs):
        prompt = torch.randint(vocab_size, (length,)).tolist()
        seq = Sequence(prompt[: length // 2], SamplingParams(**params), seed=row)
        seq.token_ids = prompt
        seq.row, seq.num_computed_tokens = row, length
        seq.end_token_ids = frozenset((1, 2))
        if params.get("bad_words"):
            seq.features.bad_word_ids = [[i, i + 1] for i in range(20)]
        seqs.append(seq)
    ops = select_ops("auto", device, torch.bfloat16, 128, compile_torch_ops=False)
    sampler = LogitsSampler(ops, device, vocab_size, num_seqs, 2 * length)
    sampler.begin(seqs)
    logits = torch.randn(num_seqs, vocab_size, device=device).bfloat16()
    positions = torch.full((num_seqs,), length - 1, dtype=torch.int32, device=device)
    step, launch = milliseconds(device, lambda: sampler.sample(logits, seqs, positions), 20)

    def new_batch() -> None:
        sampler._batch = None
        sampler.sample(logits, seqs, positions)

    _, launch_new = milliseconds(device, new_batch, 20)
    return f"{step:8.3f} ms {launch:8.3f} ms {launch_new - launch:8.3f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[8, 256])
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--length", type=int, default=1000, help="tokens of each sequence")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{'':32}{'step':>11} {'launch':>11} {'new batch':>11}")
    for num_seqs in options.num_seqs:
        for name, params in CASES.items():
            line = measure(device, params, num_seqs, options.vocab_size, options.length)
            print(f"{num_seqs:4} x {name:25}{line}")


if __name__ == "__main__":
    main()
