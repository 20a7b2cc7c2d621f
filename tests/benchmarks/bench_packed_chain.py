"""Micro-benchmark of a layer's products with 4-bit weights and what stands around; run by hand:

    python tests/benchmarks/bench_packed_chain.py

Qwen3-8B's shapes, groups of 128, bfloat16, on Hopper. First every kernel of packed_rows.py is
checked: against the dequantised product in float32, and against the kernels that the layers choose.
Then both run through 32 layers of distinct weights in a CUDA graph, attention left out: norm and
QKV, O and the sum with the residual, norm, gate and up and SiLU, down and the sum. Microseconds of
a layer, and in % what its packed weights are of what an H200 reads in that time.

The tiles are found product by product: each in turn gets the fastest one of the chain, while the
others keep theirs. With more than two tokens O and down may come in parts of K, or from the kernel
that the layers choose, and a norm adds the parts up; with more than eight all products may.
"""

import argparse
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from bench_packed_linear import BANDWIDTH, DTYPE, SHAPES, inputs, num_bytes, packed_weight
from graph_timing import microseconds

from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton.activation import silu_and_mul
from nanovllm.kernels.triton.norm import add_rms_norm, rms_norm
from nanovllm.kernels.triton.packed_linear import packed_linear
from nanovllm.kernels.triton.packed_rows import RowsTile, packed_rows
from nanovllm.kernels.types import LinearOutput, PackedWeight, PartialSums, summed

NUM_LAYERS = 32
NUM_TIMES = 4  # of which the best counts, in the end
EPS = 1e-6
MAX_ERROR = 6e-3  # of a norm, relative; rounding to bfloat16 alone is 1.7e-3
MAX_ERROR_OF_SUMS = 1e-4


class Way(NamedTuple):
    """How a product is computed: in `num_parts` of K; without a tile as the layers choose.

    Parts that are joined are added to the residual by the last program of their rows.
    """

    tile: RowsTile | None
    num_parts: int = 1
    is_joined: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether norm, SiLU or sum are part of it."""
        return self.tile is not None and (self.num_parts == 1 or self.is_joined)

    def __str__(self) -> str:
        if self.tile is None:
            return "as the layers choose"
        text = "{} x {} rows, {} warps, {} steps, {} stages".format(*self.tile)
        if self.tile.max_registers:
            text += f", {self.tile.max_registers} registers"
        if self.num_parts > 1:
            text += f", {self.num_parts} parts" + ", joined" * self.is_joined
        return text


Ways = dict[str, Way]
Layer = dict[str, PackedWeight]

# Of a product passes, rows, warps, steps, stages. The search begins with the best of the first,
# the second and the third ones: with room for three kernels, for two, and for two of 16 warps.
FEW: dict[str, tuple[tuple[int, ...], ...]] = {
    "gate_up": (
        *((6, 32, 8, 1, 3), (6, 32, 8, 1, 5), (6, 32, 16, 1, 2), (6, 32, 8, 1, 4)),
        *((6, 32, 8, 2, 2), (6, 32, 16, 1, 3), (6, 32, 4, 2, 3), (6, 32, 4, 2, 5)),
        *((12, 16, 8, 2, 3), (12, 16, 16, 1, 4), (6, 32, 8, 2, 4)),
    ),
    "down": (
        *((1, 32, 8, 1, 2), (1, 32, 8, 1, 4), (1, 32, 16, 1, 2), (1, 32, 8, 1, 3)),
        *((1, 32, 8, 1, 5), (1, 32, 8, 2, 2), (1, 32, 16, 1, 3), (1, 32, 4, 2, 3)),
        *((1, 32, 4, 2, 5), (1, 16, 8, 1, 4), (1, 32, 8, 2, 4)),
    ),
    "qkv": (
        *((3, 16, 8, 2, 3), (3, 16, 8, 4, 2), (3, 16, 16, 1, 4), (3, 16, 8, 4, 3)),
        *((3, 16, 16, 2, 3), (2, 32, 8, 1, 4), (2, 32, 8, 2, 3), (1, 32, 8, 1, 4)),
        *((3, 16, 4, 2, 6),),
    ),
    "o": (
        *((1, 32, 8, 1, 3), (1, 32, 8, 1, 4), (1, 32, 16, 1, 2), (1, 32, 4, 2, 4)),
        *((1, 16, 8, 2, 2), (1, 32, 8, 2, 2)),
    ),
}
# With 4 or 8 tokens x takes most of the room: less of it is left for the ring.
MANY: dict[str, tuple[tuple[int, ...], ...]] = {
    "gate_up": (
        *((6, 32, 8, 1, 2, 128), (6, 32, 8, 1, 3, 128), (6, 32, 8, 1, 5, 128)),
        *((12, 16, 8, 1, 4, 128), (6, 32, 16, 1, 2, 64), (6, 32, 16, 1, 3)),
    ),
    "down": ((1, 32, 8, 1, 3), (1, 32, 8, 1, 4), (1, 32, 16, 1, 2)),
    "qkv": (
        *((3, 16, 8, 1, 4, 128), (3, 16, 8, 1, 6, 128), (2, 32, 8, 1, 2, 128)),
        *((2, 32, 8, 1, 3, 128), (3, 16, 16, 1, 3, 64)),
    ),
    "o": ((1, 32, 8, 1, 2), (1, 32, 8, 1, 3), (1, 32, 8, 1, 4), (1, 32, 16, 1, 2)),
}
# In parts of K less of x is in a program: tile and number of parts. Up to 8 tokens O and down may
# come so, with more all products; those of O and down joined or not.
FEW_IN_PARTS: dict[str, tuple[tuple[tuple[int, ...], int], ...]] = {
    "down": (((4, 32, 8, 1, 3), 4), ((4, 32, 8, 1, 5), 4), ((2, 32, 8, 1, 4), 2)),
    "o": (((4, 32, 8, 1, 3), 4), ((2, 32, 8, 1, 3), 2)),
}
MANY_IN_PARTS: dict[str, tuple[tuple[tuple[int, ...], int], ...]] = {
    "gate_up": (((24, 32, 8, 1, 3), 4), ((24, 32, 8, 1, 5), 4), ((12, 32, 8, 1, 3), 2)),
    "down": (((8, 32, 8, 1, 3), 6), ((4, 32, 8, 1, 3), 4), ((4, 32, 8, 1, 3), 6)),
    "qkv": (((6, 32, 8, 1, 3), 4), ((6, 32, 8, 1, 5), 4), ((3, 32, 8, 1, 3), 2)),
    "o": (((4, 32, 8, 1, 3), 4), ((2, 32, 8, 1, 3), 2), ((2, 32, 8, 1, 3), 4)),
}


def candidates(name: str, num_tokens: int) -> list[Way]:
    """Ways for a product of so many tokens."""
    if num_tokens > 8:
        parts = MANY_IN_PARTS[name]
        ways = []
    else:
        parts = FEW_IN_PARTS.get(name, ()) if num_tokens > 2 else ()
        tiles = (FEW if num_tokens <= 2 else MANY)[name]
        ways = [Way(RowsTile(*tile)) for tile in tiles if name != "down" or num_tokens <= 4]
    if name in ("o", "down"):
        ways += [Way(RowsTile(*tile), num_parts, True) for tile, num_parts in parts]
    ways += [Way(RowsTile(*tile), num_parts) for tile, num_parts in parts]
    if num_tokens > 8 or parts:
        ways.append(Way(None))
    return ways


# The layer


def run_layer(
    layer: Layer, ways: Ways, y: LinearOutput, residual: torch.Tensor, heads: torch.Tensor
) -> LinearOutput:
    """The layer's products; what it takes and gives is the last product, if not summed up yet."""
    product_of("qkv", layer, ways["qkv"], *input_of(ways["down"], y, residual))
    y = product_of("o", layer, ways["o"], heads, residual=residual)
    act = product_of("gate_up", layer, ways["gate_up"], *input_of(ways["o"], y, residual))
    assert isinstance(act, torch.Tensor)
    return product_of("down", layer, ways["down"], act, residual=residual)


def input_of(
    way: Way, y: LinearOutput, residual: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, float] | None]:
    """What the product behind `way`'s takes, and the norm that is left to it."""
    norm = NORMS[residual.device], EPS
    if way.is_whole:
        return residual, norm
    return add_rms_norm(y, residual, *norm)[0], None


def product_of(
    name: str,
    layer: Layer,
    way: Way,
    x: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None = None,
    residual: torch.Tensor | None = None,
) -> LinearOutput:
    """The product with what is ahead of it, SiLU, and the sum with the residual if it is whole."""
    if way.is_whole:
        assert way.tile
        return packed_rows(
            x, layer[name], way.tile, norm, name == "gate_up", residual, way.num_parts, COUNTERS[0]
        )
    if norm:
        x = rms_norm(x, *norm)
    if way.tile is None:
        product = packed_linear(x, layer[name])
    else:
        product = packed_rows(x, layer[name], way.tile, num_parts=way.num_parts)
    return silu_and_mul(product) if name == "gate_up" else product


def run_present_layer(
    layer: Layer, y: torch.Tensor, residual: torch.Tensor, heads: torch.Tensor
) -> torch.Tensor:
    """The same by the kernels that the layers choose: y is the normed residual, also what comes."""
    norm = NORMS[residual.device]
    packed_linear(y, layer["qkv"])
    y, _ = add_rms_norm(packed_linear(heads, layer["o"]), residual, norm, EPS)
    y = silu_and_mul(packed_linear(y, layer["gate_up"]))
    return add_rms_norm(packed_linear(y, layer["down"]), residual, norm, EPS)[0]


NORMS: dict[torch.device, torch.Tensor] = {}
COUNTERS: list[torch.Tensor] = []  # one for every 16 rows of O and down


def prepare() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    NORMS[device] = torch.rand(4096, device=device).to(DTYPE) + 0.5
    COUNTERS[:] = [torch.zeros(256, device=device, dtype=torch.int32)]


def make_layer() -> Layer:
    return {name: packed_weight(*shape, 4, False) for name, shape in SHAPES.items()}


# Checks


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (result.double() - expected.double()).norm()
    return float(difference / expected.double().norm())


def expected_of(
    name: str, x: torch.Tensor, values: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """What a whole way gives, in float32 from the dequantised weight; rounded where kernels do."""
    if name in ("qkv", "gate_up"):
        x = rms_norm(x, NORMS[x.device], EPS)
    product = x.float() @ values.T
    if name == "gate_up":
        gate, up = product.to(DTYPE).float().chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).to(DTYPE).float() * up
    if name in ("o", "down"):
        return residual.float() + product.to(DTYPE).float()
    return product


def present_of(name: str, layer: Layer, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The same by the kernels that the layers choose."""
    if name in ("qkv", "gate_up"):
        x = rms_norm(x, NORMS[x.device], EPS)
    product = packed_linear(x, layer[name])
    if name == "gate_up":
        return silu_and_mul(product)
    return summed(product) + residual if name in ("o", "down") else summed(product)


def check(num_tokens: int, ways: dict[str, list[Way]]) -> int:
    """Prints what is wrong, and removes it from the ways; the number of ways that are right."""
    torch.backends.cuda.matmul.allow_tf32 = False
    layer = make_layer()
    num_right = 0
    for name, (n, k) in SHAPES.items():
        values = torch_ops.dequantize_packed(layer[name], torch.float32)
        x, residual = inputs(num_tokens, k), inputs(num_tokens, n)
        norm = (NORMS[x.device], EPS) if name in ("qkv", "gate_up") else None
        expected = expected_of(name, x, values, residual)
        present = present_of(name, layer, x, residual)
        product = (rms_norm(x, *norm) if norm else x).double() @ values.double().T
        for way in list(ways[name]):
            if way.tile is None:
                continue
            try:
                added = residual.clone() if name in ("o", "down") else None
                result = product_of(name, layer, way, x, norm, added)
                if isinstance(result, PartialSums):
                    errors = error(result.parts.double().sum(0), product), 0.0
                    is_right = errors[0] < MAX_ERROR_OF_SUMS
                else:
                    errors = error(result, expected), error(result, present)
                    is_right = max(errors) < MAX_ERROR
                problem = "" if is_right else f"errors {errors[0]:.1e} {errors[1]:.1e}"
            except Exception as failure:
                problem = f"{type(failure).__name__}: {str(failure)[:200]}"
            if problem:
                print(f"T={num_tokens} {name} {way}: {problem}", flush=True)
                ways[name].remove(way)
            num_right += not problem
    return num_right


def check_chain(num_tokens: int, ways: Ways) -> str:
    """Two layers by both: how far the residuals are apart."""
    layers = [make_layer() for _ in range(2)]
    start, heads = inputs(num_tokens, 4096), inputs(num_tokens, 4096)
    residual, present = start.clone(), start.clone()
    y: LinearOutput = torch.zeros_like(start)
    y_present = rms_norm(start, NORMS[start.device], EPS)
    for layer in layers:
        y = run_layer(layer, ways, y, residual, heads)
        y_present = run_present_layer(layer, y_present, present, heads)
    input_of(ways["down"], y, residual)
    distance = error(residual, present)
    return f"{distance:.1e}" + ("" if distance < 2 * MAX_ERROR else " WRONG")


# Times


def time_chain(run_one: Callable[[Layer], None], layers: list[Layer], num_times: int = 1) -> float:
    """Microseconds of a layer, the best of so many times; infinity if it cannot run."""

    def run() -> None:
        for layer in layers:
            run_one(layer)

    try:
        return min(microseconds(run, len(layers)) for _ in range(num_times))
    except Exception as failure:
        print(f"{type(failure).__name__}: {str(failure)[:200]}", flush=True)
        return math.inf


def time_ways(num_tokens: int, ways: Ways, layers: list[Layer], num_times: int = 1) -> float:
    residual, heads = inputs(num_tokens, 4096), inputs(num_tokens, 4096)
    last: list[LinearOutput] = [torch.zeros_like(residual)]

    def run_one(layer: Layer) -> None:
        last[0] = run_layer(layer, ways, last[0], residual, heads)

    return time_chain(run_one, layers, num_times)


def time_present(num_tokens: int, layers: list[Layer]) -> float:
    residual, heads = inputs(num_tokens, 4096), inputs(num_tokens, 4096)
    last = [torch.zeros_like(residual)]

    def run_one(layer: Layer) -> None:
        last[0] = run_present_layer(layer, last[0], residual, heads)

    return time_chain(run_one, layers, NUM_TIMES)


def time_alone(name: str, num_tokens: int, way: Way, layers: list[Layer]) -> float:
    """One product after the other, without the others."""
    n, k = SHAPES[name]
    x, residual = inputs(num_tokens, k), inputs(num_tokens, n)
    norm = (NORMS[x.device], EPS) if name in ("qkv", "gate_up") and way.is_whole else None
    added = residual if name in ("o", "down") else None

    def run_one(layer: Layer) -> None:
        product_of(name, layer, way, x, norm, added)

    return time_chain(run_one, layers)


def share(us: float, layer: Layer, *names: str) -> str:
    num = sum(num_bytes(layer[name]) for name in names or layer)
    return f"{us:6.1f} us {num / BANDWIDTH / us:4.0%}"


def search(num_tokens: int, ways: dict[str, list[Way]], layers: list[Layer]) -> Ways:
    """The fastest ways in the chain, product by product."""
    starts = [{name: found[i % len(found)] for name, found in ways.items()} for i in range(3)]
    best = min(starts, key=lambda start: time_ways(num_tokens, start, layers))
    for name in ("gate_up", "down", "qkv", "o"):
        times = sorted(
            (time_ways(num_tokens, best | {name: way}, layers), number)
            for number, way in enumerate(ways[name])
        )
        for us, number in times:
            print(f"T={num_tokens} {name:<7} {share(us, layers[0])}  {ways[name][number]}")
        best[name] = ways[name][times[0][1]]
    return best


# Compilation ahead


def build(work: list[tuple[int, str, Way]]) -> None:
    """Compiles kernels into the cache on disk; what fails will fail again, and is told then."""
    prepare()
    for num_tokens, name, way in work:
        layer = {name: packed_weight(*SHAPES[name], 4, False)}
        x, residual = inputs(num_tokens, SHAPES[name][1]), inputs(num_tokens, SHAPES[name][0])
        added = residual if name in ("o", "down") else None
        try:
            if name in ("qkv", "gate_up"):
                product_of(name, layer, way, x, (NORMS[x.device], EPS))
            else:
                product_of(name, layer, way, x, None, added)
            if name == "qkv" and num_tokens > 2:  # also behind parts
                product_of(name, layer, way, x, None, added)
        except Exception:
            continue


def jobs(tokens: list[int]) -> Iterator[tuple[int, str, Way]]:
    for num_tokens in tokens:
        for name in SHAPES:
            for way in candidates(name, num_tokens):
                yield num_tokens, name, way


def build_all(tokens: list[int], num_processes: int) -> None:
    work = list(jobs(tokens))
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        pool.map(build, [work[i::num_processes] for i in range(num_processes)], chunksize=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--processes", type=int, default=14, help="that compile")
    args = parser.parse_args()
    begin = time.perf_counter()
    build_all(args.tokens, args.processes)
    print(torch.cuda.get_device_name(), f"compiled in {time.perf_counter() - begin:.0f} s")
    prepare()
    layers = [make_layer() for _ in range(NUM_LAYERS)]
    for num_tokens in args.tokens:
        ways = {name: candidates(name, num_tokens) for name in SHAPES}
        print(f"T={num_tokens}: {check(num_tokens, ways)} ways are right", flush=True)
        if not all(ways.values()):
            print(f"T={num_tokens}: no way for a product")
            continue
        present = time_present(num_tokens, layers)
        best = search(num_tokens, ways, layers)
        for name, way in best.items():
            us = time_alone(name, num_tokens, way, layers)
            print(f"T={num_tokens} {name:<7} alone {share(us, layers[0], name)}  {way}")
        us = time_ways(num_tokens, best, layers, NUM_TIMES)
        print(
            f"T={num_tokens} a layer: present {share(present, layers[0])}, "
            f"now {share(us, layers[0])}, residuals apart {check_chain(num_tokens, best)}, "
            f"{time.perf_counter() - begin:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
