"""Micro-benchmark of linear layers with fp8 weights; run by hand:

    python tests/benchmarks/bench_fp8_linear.py

Microseconds of a product at Qwen3-8B's shapes, several distinct weights in a CUDA graph: bfloat16
against fp8 with scales of rows and of blocks, as the layers choose and by torch's product.
`TILES` in kernels/triton/fp8_linear.py follows from these tables.
"""

import argparse
from collections.abc import Callable

import torch
from graph_timing import microseconds

from nanovllm.kernels.torch_ops import quantize
from nanovllm.kernels.triton import fp8_linear as triton_fp8_linear
from nanovllm.kernels.triton import linear as triton_linear
from nanovllm.kernels.triton.fp8_linear import quantize_rows
from nanovllm.kernels.triton.tiled_linear import LinearTile, tiled_linear
from nanovllm.kernels.types import FP8_BLOCK, LinearOutput, PartialSums

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (24576, 4096),
    "down": (4096, 12288),
    "gate_up of Llama-3.1-8B": (28672, 4096),
}
NUM_WEIGHTS = 4  # 100 to 400 MB of fp8 pass, more than the L2 cache holds
# With --tiles: block_n, block_k, num_warps, num_stages, programs_per_sm; scales of blocks need 128.
CANDIDATES = (
    *((64, 128, 4, stages, programs) for stages in (4, 6, 8) for programs in (1, 2, 3)),
    *((64, 256, 4, stages, programs) for stages in (2, 3, 4, 5) for programs in (1, 2, 3)),
    *((128, 128, 4, stages, programs) for stages in (4, 6) for programs in (1, 2)),
    *((64, 512, 4, 2, 2), (64, 512, 4, 3, 1), (128, 256, 4, 3, 1), (128, 256, 8, 4, 1)),
)


class Weights:
    """One shape's weights: bfloat16, and fp8 with scales of rows and of blocks."""

    def __init__(self, n: int, k: int) -> None:
        self.plain = [
            torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5
            for _ in range(NUM_WEIGHTS)
        ]
        self.rows = [quantize(weight) for weight in self.plain]
        blocks = n // FP8_BLOCK, k // FP8_BLOCK
        self.blocks = [
            (values, scales.mean().expand(blocks).contiguous()) for values, scales in self.rows
        ]


def time_products(product: Callable[..., LinearOutput], weights: list) -> float:
    """Microseconds of a product and of the sum of its parts, as the next kernel adds them up."""

    def run() -> None:
        for weight in weights:
            out = product(*weight) if isinstance(weight, tuple) else product(weight)
            if isinstance(out, PartialSums):
                out.parts.sum(0)

    return microseconds(run, len(weights))


def tiled(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, tile: LinearTile
) -> LinearOutput:
    group = FP8_BLOCK if scales.dim() == 2 else None
    values, x_scales = quantize_rows(x, group, tile.block_m)
    return tiled_linear(values, weight, None, tile, x.dtype, len(x), x_scales, scales)


def scaled_mm(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> LinearOutput:
    values, x_scales = quantize_rows(x, FP8_BLOCK if scales.dim() == 2 else None)
    return triton_fp8_linear.scaled_mm(values, x_scales, weight, scales, None, x.dtype)


def attempt(product: Callable[..., LinearOutput], weights: list) -> str:
    try:
        return f"{time_products(product, weights):8.1f}"
    except (RuntimeError, ValueError) as error:
        print(f"    refused: {str(error).splitlines()[0][:120]}")
        return f"{'-':>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128, 192, 256, 512, 2048, 8192]
    )
    parser.add_argument("--tiles", action="store_true", help="compare tiles instead")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "us a product, activations' quantisation included")
    for name, (n, k) in SHAPES.items():
        weights = Weights(n, k)
        if not args.tiles:
            print(f"{name:<8}    bf16 | rows:   chosen   torch | blocks: the same")
        for num_tokens in args.tokens:
            x = torch.randn(num_tokens, k, device="cuda", dtype=torch.bfloat16)
            if args.tiles:
                compare_tiles(name, x, weights)
                continue
            plain = attempt(lambda w, x=x: triton_linear.linear(x, w), weights.plain)
            line = f"T={num_tokens:<5} {plain} |"
            for scaled in (weights.rows, weights.blocks):
                for product in (triton_fp8_linear.fp8_linear, scaled_mm):
                    line += attempt(lambda w, s, x=x, p=product: p(x, w, s), scaled)
                line += " |"
            print(line, flush=True)


def compare_tiles(name: str, x: torch.Tensor, weights: Weights) -> None:
    """Times of `tiled_linear` with each of CANDIDATES, the best first."""
    block_m = min(128, max(16, 1 << (len(x) - 1).bit_length()))
    for what, scaled in (("rows", weights.rows), ("blocks", weights.blocks)):
        times = []
        for rest in CANDIDATES:
            tile = LinearTile(block_m, *rest)
            if what == "rows" or tile.block_k == FP8_BLOCK:
                time = attempt(lambda w, s, t=tile: tiled(x, w, s, t), scaled)
                times.append((time, str(tuple(tile)).replace(" ", "")))
        print(name, f"T={len(x)}", what, *(f"{time} {tile}" for time, tile in sorted(times)))


if __name__ == "__main__":
    main()
