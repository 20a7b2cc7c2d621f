"""Micro-benchmark of linear layers with fp8 weights, by hand: python tests/gpu/bench_fp8_linear.py

Microseconds of a product at Qwen3-8B's shapes, several distinct weights in a CUDA graph: bfloat16
against fp8 with scales of rows and of blocks, each as the layers choose and by each kernel alone.
The constants in kernels/triton_fp8_linear.py follow from these tables.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench_linear import microseconds

from nanovllm.kernels import triton_fp8_linear, triton_linear
from nanovllm.kernels.ops import FP8_BLOCK, PartialSums, Product
from nanovllm.kernels.torch_ops import quantize

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (24576, 4096),
    "down": (4096, 12288),
}
NUM_WEIGHTS = 4  # 100 to 400 MB of fp8 pass, more than the L2 cache holds
TILES = ((64, 256), (64, 512), (128, 256), (128, 512))
MAX_TILE_TOKENS = 32


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


def time_products(product: Callable[..., Product], weights: list) -> float:
    """Microseconds of a product and of the sum of its parts, as the next kernel adds them up."""

    def run() -> None:
        for weight in weights:
            out = product(*weight) if isinstance(weight, tuple) else product(weight)
            if isinstance(out, PartialSums):
                out.parts.sum(0)

    return microseconds(run, len(weights))


def tiled(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> Product:
    values, x_scales = triton_fp8_linear.quantize_rows(x, FP8_BLOCK if scales.dim() == 2 else None)
    return triton_fp8_linear.tiled_fp8_linear(values, x_scales, weight, scales, None, x.dtype)


def scaled_mm(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> Product:
    values, x_scales = triton_fp8_linear.quantize_rows(x)
    return triton_fp8_linear.scaled_mm(values, x_scales, weight, scales, None, x.dtype)


def scaled_mm_of_blocks(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> Product:
    """torch's product, which takes the scales of activations column by column."""
    values, x_scales = triton_fp8_linear.quantize_rows(x, FP8_BLOCK)
    return F.scaled_mm(
        values,
        weight.t(),
        x_scales.t().contiguous().t(),
        F.ScalingType.BlockWise1x128,
        scales.t(),
        F.ScalingType.BlockWise128x128,
    )


def attempt(product: Callable[..., Product], weights: list) -> str:
    try:
        return f"{time_products(product, weights):8.1f}"
    except (RuntimeError, ValueError) as error:
        print(f"    refused: {str(error).splitlines()[0][:120]}")
        return f"{'-':>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128, 256, 512, 2048, 8192]
    )
    parser.add_argument("--tiles", action="store_true", help="compare SPLIT_TILES instead")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "us a product, activations' quantisation included")
    for name, (n, k) in SHAPES.items():
        weights = Weights(n, k)
        if not args.tiles:
            print(f"{name:<8}    bf16 | rows:   chosen   split   tiled   torch | blocks: the same")
        for num_tokens in args.tokens:
            x = torch.randn(num_tokens, k, device="cuda", dtype=torch.bfloat16)
            few = num_tokens <= MAX_TILE_TOKENS
            if args.tiles:
                if few:
                    compare_tiles(name, x, weights)
                continue
            plain = attempt(lambda w, x=x: triton_linear.linear(x, w), weights.plain)
            line = f"T={num_tokens:<5} {plain} |"
            for scaled, of_torch in (
                (weights.rows, scaled_mm),
                (weights.blocks, scaled_mm_of_blocks),
            ):
                products = [triton_fp8_linear.fp8_linear, split if few else None, tiled, of_torch]
                for product in products:
                    line += (
                        attempt(lambda w, s, x=x, p=product: p(x, w, s), scaled)
                        if product
                        else f"{'-':>8}"
                    )
                line += " |"
            print(line, flush=True)


def split(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> Product:
    return triton_fp8_linear.split_fp8_linear(x, weight, scales, None)


def compare_tiles(name: str, x: torch.Tensor, weights: Weights) -> None:
    """Times of `split_fp8_linear` with each of TILES, and of 4 and 8 warps."""
    line = f"{name:<8} T={len(x):<3}"
    for scaled in (weights.rows, weights.blocks):
        for tile in TILES:
            for num_warps in (4, 8):
                triton_fp8_linear.SPLIT_TILES = (tile, tile)
                triton_fp8_linear.SPLIT_WARPS = num_warps
                time = attempt(lambda w, s: split(x, w, s), scaled)
                line += f" {tile[0]}x{tile[1]}/{num_warps}{time}"
        line += " |"
    print(line, flush=True)


if __name__ == "__main__":
    main()
