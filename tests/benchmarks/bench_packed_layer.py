"""Micro-benchmark of what follows attention in a layer with 4-bit weights; run by hand on Hopper:

    python tests/benchmarks/bench_packed_layer.py

Qwen3-8B's shapes, groups of 128, bfloat16: O and the sum with the residual; norm, gate and up, and
SiLU; down and the sum; the next layer's norm and QKV. They run for 32 layers of distinct weights in
a CUDA graph, attention left out, as one kernel (packed_layer.py) and as a kernel for each step.
Microseconds of a layer, and in % what its packed weights are of what an H200 reads in that time.
"""

import argparse
import multiprocessing
from collections.abc import Callable

import torch
from bench_packed_linear import BANDWIDTH, DTYPE, SHAPES, inputs, num_bytes, packed_weight
from graph_timing import microseconds

from nanovllm.kernels.triton.activation import silu_and_mul
from nanovllm.kernels.triton.norm import add_rms_norm
from nanovllm.kernels.triton.packed_layer import layer_end
from nanovllm.kernels.triton.packed_linear import packed_linear
from nanovllm.kernels.types import LayerEnd, PackedWeight

Layer = Callable[[torch.Tensor, torch.Tensor, LayerEnd], object]
NUM_LAYERS = 32
NUM_TIMES = 4  # of which the best counts
EPS = 1e-6


def make_layer(counters: torch.Tensor) -> LayerEnd:
    o, gate_up, down, qkv = (
        packed_weight(*SHAPES[name], 4, False) for name in ("o", "gate_up", "down", "qkv")
    )
    norms = [torch.rand(len(o.numbers), device="cuda").to(DTYPE) + 0.5 for _ in range(2)]
    return LayerEnd(o, norms[0], gate_up, down, norms[1], qkv, EPS, counters)


def make_layers(count: int = NUM_LAYERS) -> list[LayerEnd]:
    counters = torch.zeros(4, device="cuda", dtype=torch.int32)
    return [make_layer(counters) for _ in range(count)]


def run_in_kernels(heads: torch.Tensor, residual: torch.Tensor, end: LayerEnd) -> None:
    """The same by a kernel for each step, as other layers do it."""
    assert end.qkv is not None and end.next_norm is not None
    y, _ = add_rms_norm(packed_linear(heads, end.o), residual, end.mlp_norm, EPS)
    y = silu_and_mul(packed_linear(y, end.gate_up))
    y, _ = add_rms_norm(packed_linear(y, end.down), residual, end.next_norm, EPS)
    packed_linear(y, end.qkv)


def time_layers(function: Layer, num_tokens: int, layers: list[LayerEnd]) -> float:
    heads, residual = inputs(num_tokens, SHAPES["o"][1]), inputs(num_tokens, SHAPES["o"][0])

    def run() -> None:
        for end in layers:
            function(heads, residual, end)

    return min(microseconds(run, len(layers)) for _ in range(NUM_TIMES))


def share(us: float, end: LayerEnd) -> str:
    weights = [weight for weight in end if isinstance(weight, PackedWeight)]
    num = sum(num_bytes(weight) for weight in weights)
    return f"{us:6.1f} us {num / BANDWIDTH / us:4.0%}"


def build(num_tokens: int) -> None:
    """Compiles a kernel into the cache on disk."""
    layers = make_layers(1)
    time_layers(layer_end, num_tokens, layers)
    time_layers(run_in_kernels, num_tokens, layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(len(args.tokens)) as pool:
        pool.map(build, args.tokens, chunksize=1)
    print(torch.cuda.get_device_name())
    layers = make_layers()
    for num_tokens in args.tokens:
        apart, at_once = (
            time_layers(function, num_tokens, layers) for function in (run_in_kernels, layer_end)
        )
        print(
            f"{num_tokens:>3} tokens: a kernel for each {share(apart, layers[0])}, "
            f"one kernel {share(at_once, layers[0])}",
            flush=True,
        )


if __name__ == "__main__":
    main()
