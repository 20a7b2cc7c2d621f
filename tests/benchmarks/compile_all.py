"""Compiles the Triton kernels for GPUs that are not there, and prints what they need.

    python tests/benchmarks/compile_all.py                         # every variant, every capability
    python tests/benchmarks/compile_all.py --capabilities 8.6 --quick --stage allocated

A row is a kernel with the most that any of its variants takes: bytes of shared memory, registers of
a thread, bytes that a thread spills. Exits 1 if one of them cannot run, and names it.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kernel_compilation as compilation
import kernel_launches as launches
import torch
from kernel_launches import Shape

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 80, 96, 128, 256)
ATTENTION = (launches.decode, launches.prefill, launches.rope)
STAGES = {
    "allocated": compilation.allocated,
    "ptx": compilation.to_ptx,
    "cubin": compilation.assembled,
}
Job = tuple[str, Shape]  # the name of a function of `kernel_launches`, and its argument


def variants() -> Iterator[Job]:
    """All kernels in every dtype, with attention in all the forms that models have."""
    for dtype in DTYPES:
        for launch in launches.ALL:
            if launch not in ATTENTION:
                yield launch.__name__, replace(launches.SHAPE, dtype=dtype)
                yield launch.__name__, replace(launches.FEW, dtype=dtype)
        for head_dim, is_fp8_cache in product(HEAD_DIMS, (False, True)):
            shape = Shape(dtype=dtype, head_dim=head_dim, is_fp8_cache=is_fp8_cache)
            yield "rope", shape
            for rows in (8, 512):
                yield "decode", replace(shape, rows=rows)
            yield "prefill", shape
            with_all = replace(shape, window=1024, softcap=50.0, has_sinks=True)
            yield "decode", with_all
            yield "prefill", with_all
    for dtype, has_blocks in product(DTYPES[:2], (False, True)):
        shape = Shape(dtype=dtype, is_fp8_weight=True, has_blocks=has_blocks)
        for tokens in (8, 256, 2048):
            yield "experts", replace(shape, tokens=tokens)
        yield "fp8_products", shape
    for tokens, dtype in product((1, 64, 256, 512), DTYPES):
        yield "experts", Shape(dtype=dtype, tokens=tokens)
    for dtype, bits, has_zeros in product(DTYPES, (4, 8), (False, True)):
        shape = Shape(dtype=dtype, bits=bits, has_zeros=has_zeros)
        yield "packed_products", shape
        for tokens in (1, 64, 2048):
            yield "packed_experts", replace(shape, tokens=tokens)
    yield "other_activations", launches.SHAPE
    yield "sums_over_ranks", replace(launches.SHAPE, num_ranks=8)


def run(
    capability: compilation.Capability, stage: str, job: Job, cache: str
) -> compilation.Launches:
    name, shape = job
    with compilation.compiling_for(capability, Path(cache), STAGES[stage]) as result:
        launches.launch(getattr(launches, name), shape)
    return result


def distinct(found: list[compilation.Compiled]) -> list[compilation.Compiled]:
    """Each variant once, the launch that compiled it."""
    slowest_first = sorted(found, key=lambda one: -one.seconds)
    keys = [(one.kernel, one.capability, one.shared, str(one.constants)) for one in slowest_first]
    return list(dict(reversed(list(zip(keys, slowest_first, strict=True)))).values())


def show(found: list[compilation.Compiled]) -> None:
    print("| kernel | capability | variants | shared | registers | spilled | CPU seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    groups: dict[tuple[str, compilation.Capability], list[compilation.Compiled]] = {}
    for one in found:
        groups.setdefault((one.kernel, one.capability), []).append(one)
    for (kernel, capability), group in sorted(groups.items()):
        shared = max(one.shared for one in group)
        registers = max(one.registers or 0 for one in group)
        spilled = max(one.spilled or 0 for one in group)
        seconds = sum(one.seconds for one in group)
        print(
            f"| {kernel} | {capability[0]}.{capability[1]} | {len(group)} | {shared:,} | "
            f"{registers or ''} | {spilled if registers else ''} | {seconds:.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--capabilities", nargs="+", help="such as 8.6; default: all")
    parser.add_argument("--stage", choices=STAGES, default="cubin", help="how far to compile")
    parser.add_argument("--quick", action="store_true", help="each kernel once, as the test does")
    parser.add_argument("--only", nargs="+", help="functions of kernel_launches")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    capabilities = compilation.CAPABILITIES
    if args.capabilities:
        capabilities = [tuple(map(int, text.split("."))) for text in args.capabilities]
    jobs = list(dict.fromkeys(variants()))
    if args.quick:
        jobs = [(launch.__name__, launches.SHAPE) for launch in launches.ALL]
    jobs = [job for job in jobs if not args.only or job[0] in args.only]
    found: list[compilation.Compiled] = []
    problems: list[str] = []
    begin = time.perf_counter()
    with (
        TemporaryDirectory() as cache,
        ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool,
    ):
        tasks = [
            pool.submit(run, capability, args.stage, job, cache)
            for capability, job in product(capabilities, jobs)
        ]
        for number, task in enumerate(tasks):
            result = task.result()
            found += result.compiled
            problems += result.problems()
            progress = [f"{number + 1} of {len(tasks)}", *result.problems()]
            print("\n".join(progress), file=sys.stderr, flush=True)
    found = distinct(found)
    show(found)
    print(f"\n{len(found)} variants in {time.perf_counter() - begin:.0f} s")
    print("\n".join(problems) or "all of them fit")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
