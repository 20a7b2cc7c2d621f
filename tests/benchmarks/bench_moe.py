"""Micro-benchmark of the sparse MLP, run by hand: python tests/benchmarks/bench_moe.py

Random tokens through the layers of Qwen3-30B-A3B (router, experts, sum), distinct weights for each
layer, in a CUDA graph. TB/s counts the weights of the experts that tokens asked for, TFLOP/s what
these computed. `--sweep` tries tiles for each number of tokens; `TILES` in kernels/triton/moe.py
follows from it. Few tokens have other kernels on Hopper, hopper_experts.py's, whatever tiles the
first line of a number of tokens names. With `--skew 0.7` 131 tokens ask for 105 of the 128 experts,
and many of them for the same, as they do in a whole model of random weights.
"""

import argparse

import torch
import triton
from graph_timing import microseconds

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton.linear import linear
from nanovllm.kernels.triton.moe import Tile, Tiles, choose_tiles, experts
from nanovllm.kernels.triton.norm import add_rms_norm
from nanovllm.kernels.types import FP8_BLOCK, FP8_DTYPE, PackedWeight

HIDDEN_SIZE, SIZE, NUM_EXPERTS, TOP_K = 2048, 768, 128, 8
GROUP_SIZE = 128  # of packed weights
NUM_LAYERS = 4  # 4.8 GB: none of it stays in a cache
# block_n, block_k, num_warps, num_stages of the first and of the second product.
FEW_PAIRS = (
    (
        *((16, 256, 4, 3), (32, 128, 4, 4), (32, 128, 4, 6), (32, 256, 4, 3), (64, 64, 4, 4)),
        *((64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 8, 3), (128, 64, 4, 4), (128, 64, 8, 4)),
    ),
    (
        *((32, 256, 4, 3), (64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 4, 6), (64, 256, 4, 3)),
        *((128, 64, 4, 4), (128, 64, 4, 6), (128, 128, 4, 3), (128, 128, 8, 3), (256, 64, 8, 4)),
    ),
)
MANY_PAIRS = (
    ((64, 64, 4, 4), (64, 64, 8, 4), (128, 64, 8, 3), (128, 64, 8, 4), (64, 128, 8, 3)),
    ((128, 64, 4, 4), (128, 64, 8, 4), (256, 64, 8, 3), (256, 64, 8, 4), (128, 128, 8, 3)),
)


def packed(weight: torch.Tensor, bits: int) -> PackedWeight:
    n, k = weight.shape
    numbers = torch.randint(0, 256, (n, k * bits // 8), device="cuda", dtype=torch.uint8)
    scales = torch.full((n, k // GROUP_SIZE), 4 / 2**bits / k**0.5, device="cuda")
    return PackedWeight(numbers, scales.to(weight.dtype), None, None, bits, GROUP_SIZE)


class Layers:
    """Weights of several sparse MLPs of one rank."""

    def __init__(self, num_ranks: int, fp8: str | None, bits: int | None, skew: float) -> None:
        self.size = SIZE // num_ranks
        shapes = (2 * self.size, HIDDEN_SIZE), (HIDDEN_SIZE, self.size)
        self.weights = []
        for _ in range(NUM_LAYERS):
            router = torch.randn(NUM_EXPERTS, HIDDEN_SIZE, device="cuda", dtype=torch.bfloat16)
            router[:, 0] *= skew * HIDDEN_SIZE**0.5  # meets a 1 in every token
            matrices = [
                torch.randn(NUM_EXPERTS * n, k, device="cuda", dtype=torch.bfloat16) / k**0.5
                for n, k in shapes
            ]
            if bits:  # any numbers do
                matrices = [packed(matrix, bits) for matrix in matrices]
            scales: list[torch.Tensor] = []
            if fp8:
                quantized = [torch_ops.quantize(matrix) for matrix in matrices]
                matrices, scales = map(list, zip(*quantized, strict=True))
            if fp8 == "blocks":
                scales = [
                    scale.mean().expand(-(-n // FP8_BLOCK), -(-k // FP8_BLOCK)).contiguous()
                    for scale, (n, k) in zip(scales, (m.shape for m in matrices), strict=True)
                ]
            self.weights.append((router, matrices, scales))
        self.norm = torch.ones(HIDDEN_SIZE, device="cuda", dtype=torch.bfloat16)
        element = (bits / 8 + 2 / GROUP_SIZE) if bits else 1 if fp8 else 2
        self.bytes_of_expert = sum(n * k for n, k in shapes) * element

    def microseconds(self, num_tokens: int, tiles: Tiles | None) -> tuple[float, float]:
        """Of one layer, and the mean number of experts that its tokens asked for."""
        x = torch.randn(num_tokens, HIDDEN_SIZE, device="cuda", dtype=torch.bfloat16)
        x[:, 0] = 1
        residual = torch.zeros_like(x)

        def forward() -> None:
            for router, (gate_up, down), scales in self.weights:
                logits = linear(x, router)
                y = experts(x, logits, gate_up, down, TOP_K, True, *scales, tiles=tiles)
                add_rms_norm(y, residual, self.norm, 1e-6)

        num_active = sum(
            (x @ router.t()).topk(TOP_K).indices.unique().numel() for router, _, _ in self.weights
        )
        return microseconds(forward, NUM_LAYERS), num_active / NUM_LAYERS


def candidates(num_tokens: int, dtype: torch.dtype) -> list[Tiles]:
    """Tiles near the ones that are chosen, changed in one product at a time."""
    chosen = choose_tiles(num_tokens * TOP_K, NUM_EXPERTS, dtype)
    found = []
    for block_m in (16, 32, 64) if num_tokens <= 512 else (64, 128):
        base = Tiles(*(tile._replace(block_m=block_m) for tile in chosen))
        gate_up, down = FEW_PAIRS if block_m < 128 else MANY_PAIRS
        found += [base._replace(gate_up=Tile(block_m, *rest)) for rest in gate_up]
        found += [base._replace(down=Tile(block_m, *rest)) for rest in down]
    return found


def report(layers: Layers, num_tokens: int, tiles: Tiles | None, what: str) -> None:
    try:
        us, num_active = layers.microseconds(num_tokens, tiles)
    except (RuntimeError, triton.runtime.errors.OutOfResources) as error:
        print(f"T={num_tokens:<6} {what}: {str(error).splitlines()[0]}", flush=True)
        return
    flop = 6 * num_tokens * TOP_K * layers.size * HIDDEN_SIZE
    rate = num_active * layers.bytes_of_expert / us / 1e6
    print(
        f"T={num_tokens:<6} {us:9.1f} us  {num_active:5.1f} experts  {rate:5.2f} TB/s  "
        f"{flop / us / 1e6:6.1f} TFLOP/s  {what}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256, 512, 2048, 16384]
    )
    parser.add_argument("--ranks", type=int, default=1, help="a rank's slice of the experts")
    parser.add_argument(
        "--skew", type=float, default=0.0, help="of the tokens' preferences, the share in common"
    )
    parser.add_argument(
        "--fp8", nargs="?", const="rows", choices=("rows", "blocks"), help="scales of fp8 weights"
    )
    parser.add_argument("--bits", type=int, choices=(4, 8), help="of packed weights")
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.uint8 if args.bits else FP8_DTYPE if args.fp8 else torch.bfloat16
    layers = Layers(args.ranks, args.fp8, args.bits, args.skew)
    print(torch.cuda.get_device_name(), "one sparse MLP with its router and the norm after it")
    for num_tokens in args.tokens:
        chosen = choose_tiles(num_tokens * TOP_K, NUM_EXPERTS, dtype)
        report(layers, num_tokens, None, f"chosen: {tuple(chosen.gate_up)} {tuple(chosen.down)}")
        for tiles in candidates(num_tokens, dtype) if args.sweep else []:
            report(layers, num_tokens, tiles, f"{tuple(tiles.gate_up)} {tuple(tiles.down)}")


if __name__ == "__main__":
    main()
