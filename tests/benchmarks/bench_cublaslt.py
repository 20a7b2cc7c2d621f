"""Every algorithm of cuBLASLt, run by hand: python tests/benchmarks/bench_cublaslt.py

One decode step's products in bfloat16, distinct weights in a CUDA graph, so that none is in the L2
cache. A line has, in us, torch's product, the same with the tokens padded to the next multiples of
64, 128 and 256, the first choice of cuBLASLt's heuristic, and the best of all that it offers, some
with K split further included. The last column describes the best one: its id, tile, parts of K,
reduction, stages, cluster, swizzling, inner shape and custom option, in the numbers of cublasLt.h.
"""

import argparse
import ctypes
from collections import deque
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_linear import MODELS, randn
from graph_timing import microseconds

WORKSPACE_BYTES = 32 << 20
MAX_ALGORITHMS = 80
BYTES_OF_WEIGHTS = 256 << 20  # more than the L2 cache holds
# Numbers of cublasLt.h and library_types.h.
COMPUTE_32F, R_32F, R_16BF, TRANSPOSED = 68, 0, 14, 1
DESC_TRANSA, PREFERENCE_WORKSPACE, ALGO_PARTS, ALGO_REDUCTION = 3, 1, 2, 3
DESCRIBED = (0, 1, 2, 3, 6, 8, 4, 7, 5)  # attributes of an algorithm, in the order of the docstring
REDUCTION_IN_COMPUTE_TYPE = 2


class Algorithm(ctypes.Structure):
    _fields_ = (("data", ctypes.c_uint64 * 8),)


class Heuristic(ctypes.Structure):
    _fields_ = (
        ("algorithm", Algorithm),
        ("workspace_bytes", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


def library() -> ctypes.CDLL:
    """The cuBLASLt that torch has loaded."""
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
    maps = Path("/proc/self/maps").read_text().splitlines()
    return ctypes.CDLL(next(line.split()[-1] for line in maps if "libcublasLt.so" in line))


class Product:
    """y [T, N] = x [T, K] @ weight [N, K].T by cuBLASLt, whose matrices have columns first."""

    def __init__(self, lt: ctypes.CDLL, num_tokens: int, n: int, k: int) -> None:
        self.lt = lt
        self.handle, self.desc = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("Create", ctypes.byref(self.handle))
        self.call("MatmulDescCreate", ctypes.byref(self.desc), COMPUTE_32F, R_32F)
        transposed = ctypes.c_int32(TRANSPOSED)
        self.set("MatmulDesc", self.desc, DESC_TRANSA, transposed)
        self.layouts = [self.layout(k, n), self.layout(k, num_tokens), self.layout(n, num_tokens)]
        self.layouts.append(self.layouts[-1])
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")

    def call(self, name: str, *args: object) -> None:
        if status := getattr(self.lt, f"cublasLt{name}")(*args):
            raise RuntimeError(f"cublasLt{name}: {status}")

    def set(
        self,
        kind: str,
        of: object,
        attribute: int,
        value: ctypes.c_int32 | ctypes.c_uint32 | ctypes.c_uint64,
    ) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self.call(f"{kind}SetAttribute", of, attribute, ctypes.byref(value), size)

    def layout(self, rows: int, columns: int) -> ctypes.c_void_p:
        found = ctypes.c_void_p()
        sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
        self.call("MatrixLayoutCreate", ctypes.byref(found), R_16BF, *sizes)
        return found

    def algorithms(self) -> list[Algorithm]:
        """Those that the heuristic offers, its best guess first, then some of them with K split."""
        preference, count = ctypes.c_void_p(), ctypes.c_int()
        self.call("MatmulPreferenceCreate", ctypes.byref(preference))
        most = ctypes.c_uint64(WORKSPACE_BYTES)
        self.set("MatmulPreference", preference, PREFERENCE_WORKSPACE, most)
        results = (Heuristic * MAX_ALGORITHMS)()
        where = self.handle, self.desc, *self.layouts, preference, MAX_ALGORITHMS, results
        self.call("MatmulAlgoGetHeuristic", *where, ctypes.byref(count))
        offered = [one.algorithm for one in results[: count.value] if one.status == 0]
        split = (self.split(one, parts) for one, parts in product(offered[:3], (2, 3, 4)))
        return offered + [one for one in split if one is not None]

    def split(self, algorithm: Algorithm, num_parts: int) -> Algorithm | None:
        """The same in so many parts of K; None: cuBLASLt refuses it."""
        changed = Algorithm.from_buffer_copy(algorithm)
        result = Heuristic()
        try:
            where = "MatmulAlgoConfig", ctypes.byref(changed)
            self.set(*where, ALGO_PARTS, ctypes.c_int32(num_parts))
            self.set(*where, ALGO_REDUCTION, ctypes.c_uint32(REDUCTION_IN_COMPUTE_TYPE))
            check = self.handle, self.desc, *self.layouts, ctypes.byref(changed)
            self.call("MatmulAlgoCheck", *check, ctypes.byref(result))
        except RuntimeError:
            return None
        return changed if result.workspace_bytes <= WORKSPACE_BYTES else None

    def run(
        self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, algorithm: Algorithm
    ) -> None:
        """On the current stream."""
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        a, b, c = (ctypes.c_void_p(matrix.data_ptr()) for matrix in (weight, x, y))
        layout_a, layout_b, layout_c, layout_d = self.layouts
        self.call(
            "Matmul",
            self.handle,
            self.desc,
            ctypes.byref(one),
            *(a, layout_a, b, layout_b),
            ctypes.byref(zero),
            *(c, layout_c, c, layout_d),
            ctypes.byref(algorithm),
            ctypes.c_void_p(self.workspace.data_ptr()),
            ctypes.c_size_t(WORKSPACE_BYTES),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )

    def describe(self, algorithm: Algorithm) -> str:
        numbers = []
        for attribute in DESCRIBED:
            value, written = ctypes.c_uint32(), ctypes.c_size_t()
            get = self.lt.cublasLtMatmulAlgoConfigGetAttribute
            # The last ones have 16 bits.
            for size in (4, 2):
                where = ctypes.byref(algorithm), attribute, ctypes.byref(value)
                if get(*where, ctypes.c_size_t(size), ctypes.byref(written)) == 0:
                    break
            numbers.append(value.value)
        return "/".join(map(str, numbers))


def time_each(run: Callable[[torch.Tensor], object], weights: list[torch.Tensor]) -> float:
    """Mean time of `run(weight)`."""
    return microseconds(lambda: deque(map(run, weights), maxlen=0), len(weights))


def compare(lt: ctypes.CDLL, name: str, num_tokens: int, weights: list[torch.Tensor]) -> str:
    """The line of one product."""
    n, k = weights[0].shape
    x, y = randn(num_tokens, k), randn(num_tokens, n)
    torch_us = time_each(lambda weight: F.linear(x, weight), weights)
    padded = []
    for multiple in (64, 128, 256):
        whole = randn(-(-num_tokens // multiple) * multiple, k)
        padded.append(time_each(lambda weight, x=whole: F.linear(x, weight), weights))
    by_lt = Product(lt, num_tokens, n, k)
    times = []
    for algorithm in by_lt.algorithms():
        try:
            us = time_each(lambda weight, a=algorithm: by_lt.run(y, x, weight, a), weights)
        except RuntimeError:
            continue
        times.append((us, by_lt.describe(algorithm)))
    best_us, best = min(times)
    return (
        f"{name:<8} T={num_tokens:<4} torch {torch_us:7.2f} padded"
        f" {' '.join(f'{us:7.2f}' for us in padded)} first {times[0][0]:7.2f}"
        f" best {best_us:7.2f} of {len(times)}: {best}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="0.6b", choices=MODELS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[80, 128, 160, 192, 256, 384, 512])
    args = parser.parse_args()
    hidden, num_heads, num_kv_heads, intermediate = MODELS[args.model]
    shapes = {
        "qkv": ((num_heads + 2 * num_kv_heads) * 128, hidden),
        "o": (hidden, num_heads * 128),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
    }
    lt = library()
    print(torch.cuda.get_device_name(), "us a product")
    for name, (n, k) in shapes.items():
        num_weights = max(2, -(-BYTES_OF_WEIGHTS // (2 * n * k)))
        weights = [randn(n, k) for _ in range(num_weights)]
        for num_tokens in args.tokens:
            print(compare(lt, name, num_tokens, weights), flush=True)


if __name__ == "__main__":
    main()
