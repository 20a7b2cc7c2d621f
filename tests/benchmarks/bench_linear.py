"""Micro-benchmark of the linear layers, run by hand: python tests/benchmarks/bench_linear.py

One decode step's products in bfloat16, layers of distinct weights in a CUDA graph, each with the
kernel that reads its result: cuBLAS, `hopper_linear` or `split_linear`, and `tiled_linear` or
`wide_linear` where one of these is chosen. Then the whole chain of a layer without its attention,
at last with SiLU in the product of gate and up where that has a kernel. The choices in
kernels/triton/linear.py follow from this table; `--tiles` compares tiles of `tiled_linear`.
"""

import argparse
import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from graph_timing import microseconds

from nanovllm.kernels.triton import linear as triton_linear
from nanovllm.kernels.triton.activation import gated_linear, silu_and_mul
from nanovllm.kernels.triton.hopper_linear import hopper_linear
from nanovllm.kernels.triton.launch import num_multiprocessors
from nanovllm.kernels.triton.norm import add_rms_norm
from nanovllm.kernels.triton.rope import qk_norm_rope_store
from nanovllm.kernels.triton.tiled_linear import LinearTile, tiled_linear
from nanovllm.kernels.types import KVCache, LinearOutput

DTYPE = torch.bfloat16
EPS = 1e-6
HEAD_DIM = 128
# model -> hidden size, query heads, KV heads, intermediate size
MODELS = {
    "0.6b": (1024, 16, 8, 3072),
    "4b": (2560, 32, 8, 9728),
    "8b": (4096, 32, 8, 12288),
    "30b-a3b": (2048, 32, 4, 6144),  # with a dense MLP
    "32b": (5120, 64, 8, 25600),
}
# block_n, block_k, num_warps, num_stages, programs_per_sm.
CANDIDATES = (
    *((64, 128, 4, 4, 2), (64, 128, 4, 5, 2), (64, 128, 4, 6, 2), (64, 128, 4, 4, 3)),
    *((64, 256, 4, 3, 2), (64, 256, 4, 3, 1), (64, 256, 4, 4, 1), (128, 64, 4, 6, 2)),
    *((128, 128, 4, 3, 1), (128, 128, 4, 4, 1), (64, 64, 4, 6, 3)),
)
Linear = Callable[[torch.Tensor, torch.Tensor], LinearOutput]


def randn(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="cuda", dtype=DTYPE).normal_()


class Layers:
    """Weights of several layers, and a step's activations of `num_tokens` tokens."""

    def __init__(self, model: str, num_layers: int, num_tokens: int) -> None:
        hidden, num_heads, num_kv_heads, intermediate = MODELS[model]
        query_size = num_heads * HEAD_DIM
        self.shapes = {
            "qkv": (query_size + 2 * num_kv_heads * HEAD_DIM, hidden),
            "o": (hidden, query_size),
            "gate_up": (2 * intermediate, hidden),
            "down": (hidden, intermediate),
        }
        self.weights = {
            name: [randn(n, k).div_(k**0.5) for _ in range(num_layers)]
            for name, (n, k) in self.shapes.items()
        }
        self.num_layers = num_layers
        self.norm = randn(hidden)
        self.head_norm = randn(HEAD_DIM)
        self.cos_sin = torch.randn(4096, HEAD_DIM, device="cuda")
        shape = 2, -(-num_tokens // 256), 256, num_kv_heads, HEAD_DIM
        self.cache = KVCache(*torch.zeros(shape, device="cuda", dtype=DTYPE))
        self.set_tokens(num_tokens)

    def set_tokens(self, num_tokens: int) -> None:
        self.inputs = {name: randn(num_tokens, k) for name, (_, k) in self.shapes.items()}
        self.residual = randn(num_tokens, self.norm.shape[0])
        self.slots = torch.arange(num_tokens, device="cuda")
        self.positions = self.slots.int()

    def read(self, name: str, product: LinearOutput) -> torch.Tensor:
        """What follows the product in a layer."""
        if name == "qkv":
            return qk_norm_rope_store(
                product,
                self.head_norm,
                self.head_norm,
                EPS,
                self.cos_sin,
                self.positions,
                self.cache,
                self.slots,
            )
        if name == "gate_up":
            return silu_and_mul(product)
        return add_rms_norm(product, self.residual, self.norm, EPS)[0]

    def time_product(self, name: str, linear: Linear) -> float:
        def run() -> None:
            for weight in self.weights[name]:
                self.read(name, linear(self.inputs[name], weight))

        return microseconds(run, self.num_layers)

    def time_chain(self, linear: Linear, gated: Linear | None = None) -> float:
        """gated: computes SiLU as well."""

        def run() -> None:
            x = self.inputs["qkv"]
            for layer in range(self.num_layers):
                for name, weights in self.weights.items():
                    if name == "gate_up" and gated is not None:
                        x = gated(x, weights[layer])
                    else:
                        x = self.read(name, linear(x.flatten(1), weights[layer]))

        return microseconds(run, self.num_layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="0.6b", choices=MODELS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--tiles", action="store_true", help="compare tiles instead")
    args = parser.parse_args()
    num_layers = 28 if args.model == "0.6b" else 6
    layers = Layers(args.model, num_layers, max(args.tokens))
    print(torch.cuda.get_device_name(), "us per layer, with what reads it")
    if not args.tiles:
        print("cuBLAS, split (programs), tiled or wide; chain: cuBLAS, chosen, SiLU in the product")
    num_sms = num_multiprocessors(torch.device("cuda", 0))
    for num_tokens in args.tokens:
        layers.set_tokens(num_tokens)
        block_m = max(8, 1 << (num_tokens - 1).bit_length())
        if args.tiles:
            compare_tiles(layers, num_tokens, block_m)
            continue

        def split(x: torch.Tensor, weight: torch.Tensor, block_m: int = block_m) -> LinearOutput:
            if block_m <= triton_linear.MAX_HOPPER_TOKENS:
                return hopper_linear(x, weight, None, block_m)
            return triton_linear.split_linear(x, weight, None, block_m)

        line = f"T={num_tokens:<4}"
        for name, (n, k) in layers.shapes.items():
            programs = -(-n // triton_linear.BLOCK_N) * (k // triton_linear.BLOCK_K)
            line += f"  {name} {layers.time_product(name, F.linear):6.2f}"
            best = float("nan") if num_tokens > 128 else layers.time_product(name, split)
            line += f" {best:6.2f} ({programs})"
            tile = triton_linear.choose_tile(num_tokens, n, k, DTYPE)
            if tile:
                line += f" {layers.time_product(name, in_tiles(tile)):6.2f}"
            if triton_linear.choose_wide(num_tokens, n, k, DTYPE, num_sms):
                line += f" {layers.time_product(name, triton_linear.linear):6.2f}"
        chains = (
            layers.time_chain(F.linear),
            layers.time_chain(triton_linear.linear),
            layers.time_chain(triton_linear.linear, gated_linear),
        )
        print(f"{line}  chain", *(f"{time:7.2f}" for time in chains), flush=True)


def in_tiles(tile: LinearTile) -> Linear:
    return lambda x, weight: tiled_linear(x, weight, None, tile, x.dtype, len(x))


def compare_tiles(layers: Layers, num_tokens: int, block_m: int) -> None:
    """Times of `tiled_linear` with each of CANDIDATES that fits, the best first."""
    for name in layers.shapes:
        times = []
        for rest in CANDIDATES:
            tile = LinearTile(max(16, min(block_m, 128)), *rest)
            with contextlib.suppress(triton.runtime.errors.OutOfResources):
                times.append((layers.time_product(name, in_tiles(tile)), tuple(tile)))
        best = [f"{time:.2f} {tile}".replace(", ", ",") for time, tile in sorted(times)]
        print(f"T={num_tokens:<4} {name}", *best, flush=True)


if __name__ == "__main__":
    main()
