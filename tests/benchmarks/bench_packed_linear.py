"""Micro-benchmark of linear layers with weights of 4 and 8 bits; run by hand:

    python tests/benchmarks/bench_packed_linear.py

Microseconds of a product at Qwen3-8B's shapes in a CUDA graph, over distinct weights that are more
than the L2 cache holds: packed in groups of 128, bfloat16 and fp8, as the layers choose, and the
bandwidth of the packed weights, in % of what an H200 reads. Then all products of a layer with the
kernels that read them. `--many` compares the kernel with the product of a dequantised weight,
`--sweep` tiles, before it reports with the best ones: `TILES` in kernels/triton/packed_linear.py
and in hopper_packed.py follow from these.
"""

import argparse
import math
import multiprocessing
from collections.abc import Callable, Sequence

import torch
import triton
from graph_timing import microseconds

from nanovllm.kernels.torch_ops import quantize
from nanovllm.kernels.triton import hopper_packed
from nanovllm.kernels.triton import packed_linear as triton_packed
from nanovllm.kernels.triton.activation import silu_and_mul
from nanovllm.kernels.triton.fp8_linear import fp8_linear
from nanovllm.kernels.triton.hopper_packed import FewTile, ManyTile, hopper_packed_linear
from nanovllm.kernels.triton.launch import is_hopper
from nanovllm.kernels.triton.linear import linear
from nanovllm.kernels.triton.norm import add_rms_norm
from nanovllm.kernels.triton.packed_linear import PackedTile, multiply, multiply_dequantized
from nanovllm.kernels.types import LinearOutput, PackedWeight

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
GROUP_SIZE = 128
BANDWIDTH = 4.68e6  # bytes per microsecond, measured
BYTES = 400e6  # of all weights of a shape: several times the L2 cache
DTYPE = torch.bfloat16
# block_m: block_n, blocks, num_warps, num_stages, programs_per_sm, fetch_ahead.
CANDIDATES = {
    8: (
        *((32, 4, 2, 3, 6, 0), (32, 4, 2, 3, 6, 4), (32, 4, 2, 4, 4, 4), (32, 2, 2, 4, 8, 0)),
        *((32, 2, 2, 4, 8, 4), (64, 2, 2, 3, 8, 4), (64, 2, 2, 4, 6, 0), (64, 2, 2, 4, 6, 4)),
        *((64, 4, 2, 3, 4, 4), (64, 4, 4, 3, 4, 4), (64, 2, 4, 4, 4, 4)),
    ),
    16: (
        *((32, 4, 2, 3, 4, 4), (64, 2, 2, 3, 6, 4), (64, 2, 2, 4, 4, 0), (64, 2, 2, 4, 4, 4)),
        *((64, 4, 2, 3, 3, 4), (64, 4, 4, 2, 4, 4), (64, 4, 4, 3, 2, 4), (64, 2, 4, 4, 4, 4)),
        *((128, 2, 4, 3, 3, 4), (128, 4, 8, 2, 2, 4)),
    ),
    32: (
        *((64, 2, 4, 3, 3, 4), (64, 2, 4, 4, 2, 0), (128, 2, 4, 3, 2, 0), (128, 2, 4, 3, 2, 4)),
        *((128, 2, 8, 3, 2, 4), (128, 1, 8, 4, 3, 0)),
    ),
    64: (
        *((128, 1, 8, 3, 3, 0), (128, 1, 8, 4, 2, 0), (128, 2, 8, 3, 1, 0), (128, 2, 8, 2, 2, 0)),
        *((128, 1, 4, 3, 2, 0), (64, 2, 4, 3, 2, 0), (256, 1, 8, 3, 1, 0)),
    ),
}
# On Hopper with 4 bits these as well: block_m -> tiles. row_warps, column_warps, blocks:
FEW = ((4, 1, 4), (4, 1, 2), (2, 2, 4), (2, 2, 8), (4, 2, 8), (2, 4, 8), (1, 4, 8))
HOPPER_CANDIDATES: dict[int, tuple[FewTile | ManyTile, ...]] = {
    8: tuple(FewTile(8, *rest) for rest in FEW),
    16: tuple(FewTile(16, *rest) for rest in FEW),
    32: (ManyTile(64, 4),),
    64: (ManyTile(64, 4), ManyTile(128, 3)),
}
HOPPER_MANY = ManyTile(64, 4), ManyTile(128, 3), ManyTile(256, 2)
MANY = ((64, 2, 4, 3, 1, 0), (128, 2, 8, 3, 1, 0), (128, 1, 8, 4, 1, 0), (128, 1, 8, 3, 2, 0))


Tile = PackedTile | FewTile | ManyTile


def packed_weight(n: int, k: int, bits: int, has_zeros: bool) -> PackedWeight:
    shape = n, k // GROUP_SIZE
    return PackedWeight(
        torch.randint(0, 256, (n, k * bits // 8), device="cuda", dtype=torch.uint8),
        torch.rand(shape, device="cuda").to(DTYPE) / (2**bits * k**0.5),
        torch.randint(0, 2**bits, shape, device="cuda", dtype=torch.uint8) if has_zeros else None,
        None,
        bits,
        GROUP_SIZE,
    )


def num_bytes(weight: PackedWeight) -> int:
    parts = weight.numbers, weight.scales, weight.zeros
    return sum(part.nbytes for part in parts if part is not None)


def packed_weights(name: str, bits: int, has_zeros: bool) -> list[PackedWeight]:
    n, k = SHAPES[name]
    count = math.ceil(BYTES / (n * k * bits / 8))
    return [packed_weight(n, k, bits, has_zeros) for _ in range(count)]


def plain_weights(name: str) -> list[torch.Tensor]:
    n, k = SHAPES[name]
    return [
        torch.randn(n, k, device="cuda", dtype=DTYPE) / k**0.5
        for _ in range(math.ceil(BYTES / (2 * n * k)) + 1)
    ]


def inputs(num_tokens: int, k: int) -> torch.Tensor:
    return torch.randn(num_tokens, k, device="cuda", dtype=DTYPE)


def time_products(product: Callable[..., LinearOutput], weights: Sequence) -> float:
    def run() -> None:
        for weight in weights:
            product(*weight) if isinstance(weight, tuple) else product(weight)

    return microseconds(run, len(weights))


def attempt(product: Callable[..., LinearOutput], weights: Sequence) -> float:
    """Infinity if the tile does not fit."""
    try:
        return time_products(product, weights)
    except triton.runtime.errors.OutOfResources:
        return math.inf


def in_tile(x: torch.Tensor, tile: Tile) -> Callable[[PackedWeight], LinearOutput]:
    if isinstance(tile, PackedTile):
        return lambda weight: multiply(x, weight, None, tile)
    return lambda weight: hopper_packed_linear(x, weight, None, tile)


# As the layers choose


def report_products(tokens: Sequence[int], has_zeros: bool) -> None:
    print("        4 bits: us  GB/s    % | 8 bits: us  GB/s    % |  bf16    fp8")
    for name, (_, k) in SHAPES.items():
        packed = {bits: packed_weights(name, bits, has_zeros) for bits in (4, 8)}
        plain = plain_weights(name)
        fp8 = [quantize(weight) for weight in plain]
        for num_tokens in tokens:
            x = inputs(num_tokens, k)
            line = f"{name:<7} {num_tokens:<5}"
            for weights in packed.values():
                us = time_products(lambda w, x=x: triton_packed.packed_linear(x, w), weights)
                rate = num_bytes(weights[0]) / us
                line += f"{us:7.1f} {rate / 1e3:6.0f} {rate / BANDWIDTH:5.0%}|"
            line += f"{time_products(lambda w, x=x: linear(x, w), plain):7.1f}"
            line += f"{time_products(lambda w, s, x=x: fp8_linear(x, w, s), fp8):7.1f}"
            print(line, flush=True)


def report_chains(tokens: Sequence[int], has_zeros: bool) -> None:
    """All four products of a layer, each followed by what reads it; attention is left out.

    In %, what a layer's packed weights are of what an H200 reads in that time.
    """
    print("a layer without attention:  4 bits       8 bits       bf16     fp8 us")
    num_layers = 8
    weights: dict[str, list[dict[str, object]]] = {}
    for bits in (4, 8):
        weights[f"{bits} bits"] = [
            {name: packed_weight(*shape, bits, has_zeros) for name, shape in SHAPES.items()}
            for _ in range(num_layers)
        ]
    weights["bf16"] = [
        {name: torch.randn(*shape, device="cuda", dtype=DTYPE) for name, shape in SHAPES.items()}
        for _ in range(num_layers)
    ]
    weights["fp8"] = [
        {name: quantize(weight) for name, weight in layer.items()} for layer in weights["bf16"]
    ]
    norm = torch.ones(4096, device="cuda", dtype=DTYPE)

    def product(x: torch.Tensor, weight: object) -> LinearOutput:
        if isinstance(weight, PackedWeight):
            return triton_packed.packed_linear(x, weight)
        return fp8_linear(x, *weight) if isinstance(weight, tuple) else linear(x, weight)

    for num_tokens in tokens:
        x, heads = inputs(num_tokens, 4096), inputs(num_tokens, 4096)
        line = f"{num_tokens:<26}"
        for kind, layers in weights.items():
            residual = inputs(num_tokens, 4096)

            def run(layers=layers, residual=residual, x=x, heads=heads) -> None:
                y = x
                for layer in layers:
                    product(y, layer["qkv"])
                    y, _ = add_rms_norm(product(heads, layer["o"]), residual, norm, 1e-6)
                    y = silu_and_mul(product(y, layer["gate_up"]))
                    y, _ = add_rms_norm(product(y, layer["down"]), residual, norm, 1e-6)

            us = microseconds(run, num_layers)
            line += f"{us:8.1f}"
            if "bits" in kind:
                packed = [w for w in layers[0].values() if isinstance(w, PackedWeight)]
                line += f" {sum(map(num_bytes, packed)) / BANDWIDTH / us:4.0%}"
        print(line, flush=True)


# Comparisons


def tiles_of(num_tokens: int, bits: int, is_many: bool = False) -> list[Tile]:
    """Tiles for so many tokens: of CANDIDATES, or of MANY, and those for this GPU."""
    block_m = min(64, max(8, 1 << (num_tokens - 1).bit_length()))
    candidates = MANY if is_many else CANDIDATES[block_m]
    tiles: list[Tile] = [PackedTile(block_m, *rest) for rest in candidates]
    if bits == 4 and is_hopper(torch.device("cuda")):
        tiles += HOPPER_MANY if is_many else HOPPER_CANDIDATES[block_m]
    return tiles


def build(work: tuple[list[tuple[int, Tile]], int, bool]) -> None:
    """Compiles kernels into the cache on disk."""
    tiles, bits, has_zeros = work
    for n, k in SHAPES.values():
        weight = packed_weight(n, k, bits, has_zeros)
        for num_tokens, tile in tiles:
            attempt(in_tile(inputs(num_tokens, k), tile), [weight])


def build_all(tiles: list[tuple[int, Tile]], bits: int, has_zeros: bool) -> None:
    num_processes = 14
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        pool.map(build, [(tiles[i::num_processes], bits, has_zeros) for i in range(num_processes)])


def short(tile: Tile) -> str:
    return ",".join(map(str, tile))


def sweep(tokens: Sequence[int], bits: int, has_zeros: bool) -> None:
    """The best tiles of each shape, and the best for all of them, which become `TILES`."""
    build_all([(t, tile) for t in tokens for tile in tiles_of(t, bits)], bits, has_zeros)
    totals: dict[int, dict[Tile, float]] = {t: {} for t in tokens}
    for name, (_, k) in SHAPES.items():
        weights = packed_weights(name, bits, has_zeros)
        least = num_bytes(weights[0]) / BANDWIDTH
        for num_tokens in tokens:
            x = inputs(num_tokens, k)
            tiles = tiles_of(num_tokens, bits)
            times = sorted((attempt(in_tile(x, tile), weights), tile) for tile in tiles)
            for us, tile in times:
                totals[num_tokens][tile] = totals[num_tokens].get(tile, 0) + us / least
            best = [f"{us:.1f} {least / us:.0%} ({short(tile)})" for us, tile in times[:7]]
            print(f"{name} T={num_tokens}", *best, flush=True)
    for num_tokens, total in totals.items():
        ranked = sorted((4 / ratio, tile) for tile, ratio in total.items())[::-1]
        print(f"all T={num_tokens}", *(f"{share:.0%} ({short(tile)})" for share, tile in ranked))
        use(max(8, num_tokens), ranked[0][1])


def use(most_tokens: int, tile: Tile) -> None:
    """From now on the tile for so many tokens."""
    for_hopper = None if isinstance(tile, PackedTile) else tile
    if isinstance(tile, PackedTile):
        triton_packed.TILES[most_tokens] = tile
    hopper_packed.TILES = dict(sorted((hopper_packed.TILES | {most_tokens: for_hopper}).items()))


def compare_many(tokens: Sequence[int], bits: int, has_zeros: bool) -> None:
    """The kernel with some tiles, and dequantised weights."""
    build_all(
        [(t, tile) for t in tokens for tile in tiles_of(t, bits, is_many=True)], bits, has_zeros
    )
    print(
        "us in tiles of", *(short(tile) for tile in tiles_of(64, bits, True)), "dequantised, bf16"
    )
    for name, (_, k) in SHAPES.items():
        weights, plain = packed_weights(name, bits, has_zeros)[:4], plain_weights(name)[:4]
        for num_tokens in tokens:
            x = inputs(num_tokens, k)
            times = [
                attempt(in_tile(x, tile), weights) for tile in tiles_of(num_tokens, bits, True)
            ]
            times.append(time_products(lambda w, x=x: multiply_dequantized(x, w, None), weights))
            times.append(time_products(lambda w, x=x: linear(x, w), plain))
            line = f"{name:<7} {num_tokens:<5}"
            print(line, *(f"{us:7.1f}" for us in times), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8), help="of comparisons")
    parser.add_argument("--zeros", action="store_true", help="with a zero point for each group")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--many", action="store_true")
    args = parser.parse_args()
    print(torch.cuda.get_device_name())
    if args.sweep:
        sweep((1, 16, 32, 64), args.bits, args.zeros)
    if args.many:
        compare_many(args.tokens or (64, 128, 256, 512, 1024, 4096), args.bits, args.zeros)
    else:
        tokens = args.tokens or (1, 4, 8, 16, 32, 64, 128, 256, 512)
        report_products(tokens, args.zeros)
        report_chains([t for t in tokens if t <= 64], args.zeros)


if __name__ == "__main__":
    main()
