"""Micro-benchmark of logits, run by hand: python tests/benchmarks/bench_lm_head.py

A step's end in bfloat16 in a CUDA graph: norm, logits of a vocabulary, sampler. cuBLAS against the
kernels that stream the vocabulary, checked against it first.
"""

import traceback

import torch
from graph_timing import microseconds

from nanovllm.kernels.triton.norm import add_rms_norm
from nanovllm.kernels.triton.sampling import sample
from nanovllm.kernels.triton.vocab_linear import vocab_linear
from nanovllm.kernels.triton.wide_linear import WideTile, wide_linear

V, H = 151936, 1024


def randn(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_()


def main() -> None:
    torch.manual_seed(0)
    weight, norm = randn(V, H).div_(H**0.5), randn(H)
    for num_tokens in (8, 32, 1, 16, 24, 64, 128):
        x, residual = randn(num_tokens, H), randn(num_tokens, H)
        out = torch.empty(num_tokens, V, device="cuda", dtype=torch.bfloat16)
        temperatures = torch.full((num_tokens,), 0.6, device="cuda")
        seeds = torch.randint(0, 2**31 - 1, (num_tokens, 2), device="cuda", dtype=torch.int32)
        positions = torch.arange(num_tokens, device="cuda", dtype=torch.int32)

        def cublas(x: torch.Tensor) -> torch.Tensor:
            return torch.mm(x, weight.T, out=out)

        ways = {"cuBLAS": cublas}
        if num_tokens <= 32:
            for stages in (16, 12, 8, 6):
                if num_tokens <= 16 or stages < 20:
                    ways[f"stays, {stages} stages"] = lambda x, s=stages: vocab_linear(
                        x, weight, out, num_stages=s
                    )
        tokens = max(8, 1 << (num_tokens - 1).bit_length())
        for stages in (4, 6, 8):
            tile = WideTile(tokens, 1, stages)
            ways[f"wide, {stages} stages"] = lambda x, t=tile: wide_linear(
                x, weight, None, 1, tile=t
            )
        reference = (x.float() @ weight.float().T).to(torch.bfloat16)
        for name, way in ways.items():
            try:
                got = way(x).clone()
                torch.cuda.synchronize()
                distance = (got.float() - reference.float()).abs().max().item()

                def run() -> None:
                    y = add_rms_norm(x, residual, norm, 1e-6)[0]
                    sample(way(y), temperatures, seeds, positions, 0, V)

                def alone() -> None:
                    way(x)

                print(
                    f"T={num_tokens:<4} {name:18} step's end {microseconds(run):7.2f} us  alone"
                    f" {microseconds(alone):7.2f}  {2 * V * H / microseconds(alone) / 1e6:5.2f} TB/s"
                    f"  off by {distance:.4f}",
                    flush=True,
                )
            except Exception:
                print(f"T={num_tokens} {name}", traceback.format_exc(limit=2)[-600:], flush=True)


if __name__ == "__main__":
    main()
