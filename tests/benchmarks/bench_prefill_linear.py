"""Micro-benchmark of a prefill's products, run by hand:

    python tests/benchmarks/bench_prefill_linear.py [--model 0.6b] [--tokens 2048 16384]

In bfloat16, in a CUDA graph: cuBLAS with the kernel that reads its result, and both in one kernel,
for gate and up with SiLU and for QKV with norm, rotation and K/V store. `MIN_TOKENS` in
kernels/triton/hopper_fused_linear.py follows from this table.
"""

import argparse

import torch
import torch.nn.functional as F
from bench_linear import EPS, HEAD_DIM, MODELS, Layers
from graph_timing import microseconds

from nanovllm.kernels.triton.activation import silu_and_mul
from nanovllm.kernels.triton.hopper_fused_linear import hopper_heads_linear, hopper_silu_linear
from nanovllm.kernels.triton.rope import qk_norm_rope_store
from nanovllm.kernels.types import Product

NUM_LAYERS = 4  # of distinct weights


def times(layers: Layers) -> dict[str, tuple[float, float]]:
    """Product -> microseconds of a layer's two kernels and of one."""
    x = layers.inputs["qkv"]
    rest = (layers.head_norm, layers.head_norm, EPS, layers.cos_sin, layers.positions)
    store = layers.cache, layers.slots

    def two_heads(weight: torch.Tensor) -> None:
        qk_norm_rope_store(F.linear(x, weight), *rest, *store)

    def one_heads(weight: torch.Tensor) -> None:
        hopper_heads_linear(Product(x, weight), *rest, *store)

    def two_silu(weight: torch.Tensor) -> None:
        silu_and_mul(F.linear(x, weight))

    def one_silu(weight: torch.Tensor) -> None:
        hopper_silu_linear(x, weight)

    def timed(run, name: str) -> float:
        weights = layers.weights[name]
        return microseconds(lambda: [run(weight) for weight in weights], len(weights))

    return {
        "qkv": (timed(two_heads, "qkv"), timed(one_heads, "qkv")),
        "gate_up": (timed(two_silu, "gate_up"), timed(one_silu, "gate_up")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="0.6b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 16384])
    args = parser.parse_args()
    print("| tokens | product | two kernels, us | one | TFLOP/s of one |\n| --- |" + 4 * " --- |")
    for num_tokens in args.tokens:
        layers = Layers(args.model, NUM_LAYERS, num_tokens)
        layers.cos_sin = torch.randn(num_tokens, HEAD_DIM, device="cuda")
        for name, (two, one) in times(layers).items():
            n, k = layers.shapes[name]
            speed = 2 * num_tokens * n * k / one / 1e6
            print(f"| {num_tokens} | {name} | {two:.1f} | {one:.1f} | {speed:.0f} |", flush=True)


if __name__ == "__main__":
    main()
