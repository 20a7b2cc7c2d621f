"""Products of few tokens without parts, by hand: python tests/benchmarks/bench_narrow_linear.py

Each kernel of kernels/triton/narrow_linear.py is compared with float64 and with the kernels that
the library has. Then a layer of Qwen3-0.6B, 28 layers of distinct weights in a CUDA graph, is timed
with these and with the narrow ones: without its attention, and with it (`--context`). At last each
of the four products gets the way that is best for it beside the others.

`--dry` goes through all of it on a machine without a GPU, up to the compiler.
"""

import argparse
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from graph_timing import microseconds

from nanovllm.kernels.device import KNOWN_GPUS, meta_stands_for
from nanovllm.kernels.ops import Ops
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.triton.compilation import Variants, compile_all
from nanovllm.kernels.triton.narrow_linear import Way, add_linear, normed_linear
from nanovllm.kernels.types import DecodeMetadata, HeadInputs, KVCache, summed

HOPPER = (9, 0)
EPS = 1e-6
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 1024, 16, 8, 128, 3072
SHAPES = {  # weight [N, K]
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD_DIM),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}
BLOCK_SIZE = 256  # of the cache
Ways = dict[str, Way]  # by product


def ways_of_all(way: Way, **others: Way) -> Ways:
    return dict.fromkeys(SHAPES, way) | others


# With limits of registers two kernels of the first kind, and three of the second, run at a time.
VARIANTS: dict[str, Ways] = {
    "registers, 8 warps": ways_of_all(Way(False, 8)),
    "registers, 8 warps, limits": ways_of_all(
        Way(False, 8), gate_up=Way(False, 8, 0, 160), down=Way(False, 8, 0, 96)
    ),
    "registers, 4 warps": ways_of_all(Way(False, 4)),
    "registers, 16 warps": ways_of_all(Way(False, 16)),
    "copies, 8 warps": ways_of_all(Way(True, 8)),
    "copies, 8 warps, limits": ways_of_all(
        Way(True, 8), qkv=Way(True, 8, 0, 80), gate_up=Way(True, 8, 1, 96)
    ),
    "copies, 8 warps, limits, on all multiprocessors": ways_of_all(
        Way(True, 8, fills_device=True),
        qkv=Way(True, 8, 0, 80, True),
        gate_up=Way(True, 8, 1, 96, True),
    ),
    "copies, 8 warps, a tile ahead": ways_of_all(Way(True, 8, 1)),
    "copies, 8 warps, all ahead": ways_of_all(Way(True, 8, 3)),
    "copies, 4 warps": ways_of_all(Way(True, 4)),
    "copies, 16 warps": ways_of_all(Way(True, 16)),
    "copies, but O and down in registers": ways_of_all(
        Way(True, 8, 1, 96), o=Way(False, 8, 0, 72), down=Way(False, 8, 0, 96)
    ),
    "registers, but gate and up by copies": ways_of_all(
        Way(False, 8), gate_up=Way(True, 8, 1, 96), down=Way(False, 8, 0, 96)
    ),
}


def variants_of(dtype: torch.dtype) -> dict[str, Ways]:
    """Those that are checked in a dtype."""
    if dtype == torch.bfloat16:
        return VARIANTS
    return {name: VARIANTS[name] for name in ("registers, 8 warps", "copies, 8 warps")}


def randn(*shape: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    x = torch.empty(shape, device=device, dtype=dtype)
    return x if device == "meta" else x.normal_()


class Layers:
    """Weights of several layers, and a decode step's state of at most `max_tokens` rows."""

    def __init__(
        self, ops: Ops, num_layers: int, max_tokens: int, context: int, device: str,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        self.ops, self.num_layers, self.device, self.dtype = ops, num_layers, device, dtype
        self.weights = {
            name: [self.randn(n, k).div_(k**0.5) for _ in range(num_layers)]
            for name, (n, k) in SHAPES.items()
        }
        self.norm, self.head_norm = self.randn(HIDDEN), self.randn(HEAD_DIM)
        self.cos_sin = torch.empty(4096, HEAD_DIM, device=device).uniform_(-1, 1)
        self.context = context
        self.blocks_of_row = -(-context // BLOCK_SIZE)
        shape = max_tokens * self.blocks_of_row, BLOCK_SIZE, KV_HEADS, HEAD_DIM
        self.caches = [
            KVCache(self.randn(*shape), self.randn(*shape))
            for _ in range(num_layers if context else 0)
        ]
        self.states = self.randn(max_tokens, HIDDEN)
        self.inputs = {name: self.randn(max_tokens, k) for name, (_, k) in SHAPES.items()}
        self.outputs = self.randn(max_tokens, HEADS * HEAD_DIM)  # where attention is left out

    def randn(self, *shape: int) -> torch.Tensor:
        return randn(*shape, device=self.device, dtype=self.dtype)

    def begin(self, num_tokens: int) -> None:
        """A step of so many rows."""
        self.residual = self.states[:num_tokens].clone()
        self.output = self.outputs[:num_tokens]
        if self.context:
            tables = torch.arange(num_tokens * self.blocks_of_row, device=self.device)
            tables = tables.int().view(num_tokens, -1)
            lengths = torch.full((num_tokens,), self.context, device=self.device).int()
            slots = tables.long()[:, -1] * BLOCK_SIZE + (self.context - 1) % BLOCK_SIZE
            self.positions = lengths - 1
            plan = self.ops.plan_decode(self.caches[0], tables, lengths, None, None)
            self.metadata = DecodeMetadata(slots, tables, lengths, plan)

    def attend(self, layer: int, qkv: object) -> torch.Tensor:
        """What O multiplies."""
        if not self.context:
            return self.output
        norms = self.head_norm, self.head_norm
        heads = HeadInputs(qkv, *norms, EPS, self.cos_sin, self.positions)  # type: ignore[arg-type]
        scale = HEAD_DIM**-0.5
        return self.ops.attention(heads, self.caches[layer], self.metadata, scale).flatten(1)

    def run_before(self) -> torch.Tensor:
        """All layers by the library's kernels; the last norm."""
        ops, weights = self.ops, self.weights
        x = ops.rms_norm(self.residual, self.norm, EPS)
        for layer in range(self.num_layers):
            x = self.attend(layer, ops.linear(x, weights["qkv"][layer]))
            x = ops.linear(x, weights["o"][layer])
            x, self.residual = ops.add_rms_norm(x, self.residual, self.norm, EPS)
            x = ops.gated_linear(x, weights["gate_up"][layer])
            x = ops.linear(x, weights["down"][layer])
            x, self.residual = ops.add_rms_norm(x, self.residual, self.norm, EPS)
        return x

    def run(self, ways: Ways, in_turn: bool = False) -> torch.Tensor:
        """The same by the narrow kernels; in_turn: each begins when the device is idle."""
        weights, residual = self.weights, self.residual
        end = torch.cuda.synchronize if in_turn else lambda: None

        def normed(name: str, layer: int) -> torch.Tensor:
            is_gated = name == "gate_up"
            weight = weights[name][layer]
            return normed_linear(residual, self.norm, EPS, weight, is_gated, ways[name])

        for layer in range(self.num_layers):
            x = normed("qkv", layer)
            end()
            x = self.attend(layer, x)
            end()
            add_linear(x, weights["o"][layer], residual, ways["o"])
            end()
            x = normed("gate_up", layer)
            end()
            add_linear(x, weights["down"][layer], residual, ways["down"])
            end()
        return self.ops.rms_norm(residual, self.norm, EPS)

    def run_product(self, name: str, way: Way) -> None:
        """One of the four of all layers, one after another."""
        weights, residual = self.weights[name], self.residual
        inputs = self.inputs[name][: len(residual)]
        for weight in weights:
            if name in ("qkv", "gate_up"):
                normed_linear(residual, self.norm, EPS, weight, name == "gate_up", way)
            else:
                add_linear(inputs, weight, residual, way)

    def run_product_before(self, name: str) -> None:
        """The same by the library's kernels, with the norm behind O and down."""
        ops, inputs = self.ops, self.inputs[name][: len(self.residual)]
        for weight in self.weights[name]:
            if name == "qkv":
                ops.linear(inputs, weight)
            elif name == "gate_up":
                ops.gated_linear(inputs, weight)
            else:
                ops.add_rms_norm(ops.linear(inputs, weight), self.residual, self.norm, EPS)


def relative_error(x: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN where one of them is not finite."""
    return float((x.double() - expected.double()).norm() / expected.double().norm())


def check_kernels(layers: Layers, ways: Ways, num_tokens: int) -> None:
    """Each kernel against float64; AssertionError where it is further off than the library's."""
    ops = layers.ops
    residual = layers.states[:num_tokens].clone()
    x = ops.rms_norm(residual, layers.norm, EPS)
    for name, way in ways.items():
        weight = layers.weights[name][0]
        if name in ("qkv", "gate_up"):
            product = (x.double() @ weight.double().T).to(x.dtype)
            is_gated = name == "gate_up"
            expected = ops.silu_and_mul(product) if is_gated else product
            before = ops.gated_linear(x, weight) if is_gated else summed(ops.linear(x, weight))
            poison = torch.full_like(before, float("nan"))
            del poison  # its memory is the next output's
            found = normed_linear(residual, layers.norm, EPS, weight, is_gated, way)
        else:
            inputs = layers.randn(num_tokens, weight.shape[1])
            expected = (inputs.double() @ weight.double().T).to(x.dtype) + residual
            product = ops.linear(inputs, weight)
            before = ops.add_rms_norm(product, residual.clone(), layers.norm, EPS)[1]
            rows = torch.cat([residual, torch.full_like(residual[:1], float("nan"))])
            found = rows[:num_tokens]
            add_linear(inputs, weight, found, way)
            assert bool(rows[num_tokens].isnan().all()), f"{name}: wrote past the last row"
        error, error_before = relative_error(found, expected), relative_error(before, expected)
        # Sums in another order are rounded to another neighbour now and then.
        assert error <= 1.5 * error_before + 3e-4, (
            f"{name}, {way}, {num_tokens} tokens: off by {error:.1e}, before by {error_before:.1e}"
        )


def check_chain(layers: Layers, ways: Ways, num_tokens: int) -> tuple[float, float]:
    """How far all layers are off the library's kernels, and whether they are finite.

    AssertionError if a graph, whose kernels overlap, gives other bits than one after another.
    """
    layers.begin(num_tokens)
    start = layers.residual.clone()

    def result(run: Callable[[], torch.Tensor]) -> torch.Tensor:
        layers.residual.copy_(start)
        return run().clone()

    before = result(layers.run_before)
    reference = result(lambda: layers.run(ways, in_turn=True))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layers.run(ways)
    for _ in range(10):
        layers.residual.copy_(start)
        graph.replay()
        assert torch.equal(out, reference), f"{num_tokens} tokens: replays differ"
    return relative_error(reference, before), float(reference.isfinite().all())


@contextmanager
def reported(what: str) -> Iterator[None]:
    """An error inside is printed and goes no further."""
    try:
        yield
    except Exception:
        print(f"FAILED: {what}\n{traceback.format_exc(limit=-2)}", flush=True)


def compile_kernels(tokens: list[int], context: int, capability: tuple[int, int]) -> None:
    """Everything that will be launched, in several processes."""
    begin = time.perf_counter()
    variants = Variants()
    device = torch.device("meta")
    with meta_stands_for(KNOWN_GPUS[capability]), variants.recording():
        for dtype in (torch.bfloat16, torch.float16):
            ops = select_ops("auto", device, dtype, HEAD_DIM, False, capability=capability)
            layers = Layers(ops, 1, max(tokens), context, "meta", dtype)
            for num_tokens in tokens:
                layers.begin(num_tokens)
                layers.run_before()
                for ways in variants_of(dtype).values():
                    layers.run(ways)
    is_there = torch.cuda.is_available()
    done = compile_all(variants, capability, torch.device("cuda", 0) if is_there else None)
    seconds = time.perf_counter() - begin
    print(f"{done.num_kernels} kernels, {done.num_compiled} compiled, {seconds:.1f} s", flush=True)
    for error in done.errors:
        print("NOT COMPILED:", repr(error)[:300], flush=True)


def check_all(ops: Ops, tokens: list[int]) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        layers = Layers(ops, 2, max(tokens), 0, "cuda", dtype)
        for name, ways in variants_of(dtype).items():
            with reported(f"{name} {dtype}"):
                for num_tokens in tokens:
                    check_kernels(layers, ways, num_tokens)
                print(f"right: {name}, {dtype}", flush=True)


def best_of(layers: Layers, run: Callable[[], object]) -> float:
    return min(microseconds(run, layers.num_layers) for _ in range(2))


def time_all(layers: Layers, num_tokens: int, deadline: float) -> None:
    """The library's kernels, each variant, and the best way of each product beside the others."""
    what = f"T={num_tokens:<3} context {layers.context or 'without':>7}"
    layers.begin(num_tokens)
    print(f"{what} {best_of(layers, layers.run_before):7.2f} us  before", flush=True)
    times: list[tuple[float, str]] = []
    for name, ways in VARIANTS.items():
        with reported(f"{what} {name}"):
            off, is_finite = check_chain(layers, ways, num_tokens)
            layers.begin(num_tokens)
            times.append((best_of(layers, lambda ways=ways: layers.run(ways)), name))
            note = f"(off by {off:.1e} from before{'' if is_finite else ', NOT FINITE'})"
            print(f"{what} {times[-1][0]:7.2f} us  {name} {note}", flush=True)
    if not times:
        return
    fastest, name = min(times)
    mixed = dict(VARIANTS[name])
    for product in SHAPES:
        for way in {ways[product] for ways in VARIANTS.values()}:
            if time.perf_counter() > deadline:
                break
            with reported(f"{what} {product} {way}"):
                tried = mixed | {product: way}
                duration = best_of(layers, lambda tried=tried: layers.run(tried))
                if duration < fastest:
                    fastest, mixed = duration, tried
    print(f"{what} {fastest:7.2f} us  best mixture", flush=True)
    for product, way in mixed.items():
        alone = best_of(layers, lambda name=product, way=way: layers.run_product(name, way))
        before = best_of(layers, lambda name=product: layers.run_product_before(name))
        print(f"    {product:8s} {way}, alone {alone:.2f} us, before {before:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 1, 16, 4, 2])
    parser.add_argument("--context", type=int, default=384, help="tokens of a row; 0: no attention")
    parser.add_argument("--seconds", type=float, default=55, help="no new mixture after so many")
    parser.add_argument("--dry", action="store_true", help="only compile, for a Hopper GPU")
    args = parser.parse_args()
    begin = time.perf_counter()
    checked = [1, 2, 3, 5, 8, 9, 13, 16]
    compile_kernels(sorted({*checked, *args.tokens}), args.context, HOPPER)
    if args.dry:
        return
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    ops = select_ops("auto", torch.device("cuda"), torch.bfloat16, HEAD_DIM, False)
    check_all(ops, checked)
    print(f"checked after {time.perf_counter() - begin:.1f} s; us a layer:", flush=True)
    layers = Layers(ops, 28, max(args.tokens), args.context, "cuda")
    deadline = begin + args.seconds
    for context in sorted({0, args.context}):
        layers.context = context
        for num_tokens in args.tokens:
            with reported(f"T={num_tokens}"):
                time_all(layers, num_tokens, deadline)
    print(f"{time.perf_counter() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
