"""Micro-benchmark of the kernels on one GPU, run by hand: python tests/benchmarks/bench_kernels.py

Qwen3-0.6B's shapes in bfloat16. Decode steps are timed inside a CUDA graph of 28 calls that cycle
over caches larger than the L2 cache. The options sweep the tunables; `--only` picks sections and
`--set triton_sampling.CHUNK=2048,4096` overrides modules' constants.
"""

import argparse
import importlib.util
import itertools
import re
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch

from nanovllm.kernels import row_state
from nanovllm.kernels.ops import Ops
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.triton import decode_attention as decode_kernel
from nanovllm.kernels.triton import prefill_attention as prefill_kernel
from nanovllm.kernels.types import FP8_DTYPE, DecodeMetadata, KVCache, PrefillMetadata

NUM_LAYERS = 28
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 16, 8, 128, 256
HIDDEN, INTERMEDIATE, VOCAB = 1024, 3072, 151_936
DTYPE = torch.bfloat16
SCALE = HEAD_DIM**-0.5
NO_SLOTS = torch.empty(0, dtype=torch.int64)  # attention only reads the cache
PREFILL_LENGTHS = ((4096,) * 4, (2117, 3861, 2946, 3990, 3433), (512,) * 32)
DECODE_SHAPES = (
    *("1x128", "1x1100", "8x300", "8x1100", "16x1100", "32x128", "32x400", "64x1100", "128x1100"),
    *("256x850", "64x2000r", "128x2000r", "256x1600r", "8x32768", "256x1048c1000"),
)


def randn(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="cuda", dtype=DTYPE).normal_()


def seconds_per_call(calls: list[partial], use_graph: bool = True) -> float:
    """Mean time of the calls, made back to back in one CUDA graph (or eagerly)."""
    calls[0]()  # compiles
    torch.cuda.synchronize()

    def run() -> None:
        for call in calls:
            call()

    replay: Callable[[], None] = run
    if use_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay
    for _ in range(3):
        replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats = 10
    begin.record()
    for _ in range(repeats):
        replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats / len(calls)


class DecodeShape(NamedTuple):
    """A decode batch.

    Ragged: contexts from 1 to `length`, the longest first, as in the engine. With common tokens
    all tables begin with the same blocks, and every context is `length`.
    """

    batch_size: int
    length: int
    is_ragged: bool
    num_common_tokens: int

    @classmethod
    def parse(cls, text: str) -> "DecodeShape":
        """64x1100; 64x2000r: ragged; 256x1048c1000: with 1,000 common tokens."""
        match = re.fullmatch(r"(\d+)x(\d+)(r?)(?:c(\d+))?", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is no shape")
        batch_size, length, ragged, num_common = match.groups()
        return cls(int(batch_size), int(length), ragged == "r", int(num_common or 0))

    def context_lens(self) -> torch.Tensor:
        first = 1 if self.is_ragged else self.length
        return torch.linspace(self.length, first, self.batch_size, device="cuda").int()

    def __str__(self) -> str:
        common = f" ({self.num_common_tokens} common tokens)" if self.num_common_tokens else ""
        return f"{self.batch_size} x {'<=' if self.is_ragged else ''}{self.length}{common}"


def load_version(path: str) -> ModuleType:
    """Another version of a file of kernels/."""
    spec = importlib.util.spec_from_file_location("version", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bench_decode(
    shape: DecodeShape, is_fp8: bool, backends: dict[str, Ops], options: argparse.Namespace
) -> None:
    """Time of a layer: a step of one plan and 28 layers, divided by 28."""
    num_heads, num_kv_heads = options.heads
    batch_size = shape.batch_size
    used = -(-shape.length // BLOCK_SIZE)
    num_blocks = batch_size * used
    token_bytes = 2 * num_kv_heads * (HEAD_DIM + 4 if is_fp8 else 2 * HEAD_DIM)
    num_caches = 2**31 // (num_blocks * BLOCK_SIZE * token_bytes)
    num_caches = max(2, min(NUM_LAYERS, num_caches))
    caches = randn(num_caches, 2, num_blocks, BLOCK_SIZE, num_kv_heads, HEAD_DIM)
    scales = []
    if is_fp8:
        caches = caches.to(FP8_DTYPE)
        scales = list(torch.ones(2, num_blocks, num_kv_heads, BLOCK_SIZE, device="cuda"))
    width = max(used, options.max_model_len // BLOCK_SIZE)
    tables = torch.zeros(batch_size, width, dtype=torch.int32, device="cuda")
    tables[:, :used] = torch.randperm(num_blocks, device="cuda").view(batch_size, used)
    num_shared = shape.num_common_tokens // BLOCK_SIZE
    tables[:, :num_shared] = tables[:1, :num_shared].clone()
    num_common_tokens = torch.tensor([shape.num_common_tokens], device="cuda", dtype=torch.int32)
    lens = shape.context_lens()
    layers = [KVCache(*caches[i % num_caches], *scales) for i in range(NUM_LAYERS)]
    query = randn(batch_size, num_heads, HEAD_DIM)
    num_spared = (batch_size - 1) * shape.num_common_tokens
    num_bytes = (int(lens.sum()) - num_spared) * token_bytes

    def report(
        name: str,
        decode: Callable[..., torch.Tensor],
        make_plan: Callable[[], decode_kernel.DecodePlan] | None = None,
        **tunables: object,
    ) -> None:
        def step() -> None:
            plan = make_plan() if make_plan else None
            metadata = DecodeMetadata(NO_SLOTS, tables, lens, plan)
            for cache in layers:
                decode(query, cache, metadata, SCALE, **tunables)

        seconds = seconds_per_call([partial(step)]) / NUM_LAYERS
        label = f"{shape} {'fp8 ' * is_fp8}{name}"
        print(f"{label:62} {seconds * 1e6:7.1f}  {num_bytes / seconds / 1e12:6.2f}", flush=True)

    if options.baseline and not is_fp8:
        report("baseline", load_version(options.baseline).decode_attention)
    plan_names = ("tile", "programs_per_sm", "min_split")
    launch_names = ("num_warps", "num_stages")
    sweep = itertools.product(
        [None, num_common_tokens] if shape.num_common_tokens else [None],
        options.tile,
        options.programs_per_sm,
        options.min_split,
        options.warps,
        options.stages,
    )
    for common, *values in sweep:
        names = (*plan_names, *launch_names)
        chosen = {name: value for name, value in zip(names, values, strict=True) if value}
        plan_options = {name: value for name, value in chosen.items() if name in plan_names}
        make_plan = partial(
            decode_kernel.plan_decode, layers[0], tables, lens, common, **plan_options
        )
        tunables = {name: value for name, value in chosen.items() if name in launch_names}
        label = " ".join(f"{name.removeprefix('num_')}={v}" for name, v in chosen.items())
        report(
            f"{'each row' if common is None else 'cascade'} {label}",
            decode_kernel.decode_attention,
            make_plan,
            **tunables,
        )
    if "flash-attn" in backends and not is_fp8:
        report("flash-attn", backends["flash-attn"].attend)


def bench_prefill(
    lengths: tuple[int, ...], backends: dict[str, Ops], options: argparse.Namespace
) -> None:
    """Whole prompts; FLOP of the causal half only."""
    num_heads, num_kv_heads = options.heads
    label = f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)}"
    print(f"\nprefill attention, {label:40} ms  TFLOP/s")
    num_pages = [-(-length // BLOCK_SIZE) for length in lengths]
    cache = KVCache(*randn(2, sum(num_pages), BLOCK_SIZE, num_kv_heads, HEAD_DIM))
    tables = torch.zeros(len(lengths), max(num_pages), device="cuda").int()
    pages = torch.randperm(sum(num_pages), device="cuda").int().split(num_pages)
    for table, own in zip(tables, pages, strict=True):
        table[: len(own)] = own
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    query = randn(sum(lengths), num_heads, HEAD_DIM)
    longest = max(lengths)
    metadata = PrefillMetadata(NO_SLOTS, tables, cu_seqlens, cu_seqlens, longest, longest)
    args = query, cache, metadata, SCALE
    flop = 2 * num_heads * HEAD_DIM * sum(length * length for length in lengths)

    def report(name: str, prefill: Callable[..., torch.Tensor], **tunables: object) -> None:
        calls = [partial(prefill, *args, **tunables)] * 4
        seconds = seconds_per_call(calls, use_graph=name != "flash-attn")
        print(f"{name:58} {seconds * 1e3:6.3f}  {flop / seconds / 1e12:7.1f}", flush=True)

    versions = {"triton": prefill_kernel}
    versions |= {path[-38:]: load_version(path) for path in options.prefill_versions}
    for name, version in versions.items():
        for config in options.prefill_config or [None]:
            report(f"{name} {config or ''}", version.prefill_attention, config=config)
    if "flash-attn" in backends:
        report("flash-attn", backends["flash-attn"].attend)


def bench_sample(ops: Ops) -> None:
    print(f"\nsample {VOCAB} logits{'':20}     us")
    for batch_size in (1, 32, 256):
        logits = randn(batch_size, VOCAB)
        words = torch.randint(2**31, (batch_size, 2), device="cuda").int()
        positions = words[:, 0].clone() % 4096
        for temperature in (0.0, 0.6):
            temperatures = torch.full((batch_size,), temperature, device="cuda")
            args = logits, temperatures, words, positions, 0, VOCAB
            seconds = seconds_per_call([partial(ops.sample, *args)] * 4)
            label = f"batch {batch_size}, temperature {temperature}"
            print(f"{label:40} {seconds * 1e6:6.1f}", flush=True)


def bench_elementwise(ops: Ops, tokens: list[int]) -> None:
    heads = NUM_HEADS + 2 * NUM_KV_HEADS
    print(f"\nelementwise{'':29}     us    TB/s")
    cos_sin = torch.rand(40960, HEAD_DIM, device="cuda")
    weight, head_weight = randn(HIDDEN), randn(HEAD_DIM)
    for num_tokens in tokens:
        x, residual = randn(2, num_tokens, HIDDEN)
        gate_up = randn(num_tokens, 2 * INTERMEDIATE)
        qkv = randn(num_tokens, heads * HEAD_DIM)
        caches = randn(2, 64, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
        positions = torch.arange(num_tokens, device="cuda", dtype=torch.int32)
        slots = torch.randperm(64 * BLOCK_SIZE, device="cuda")[:num_tokens]
        rope_args = qkv, head_weight, head_weight, 1e-6, cos_sin, positions, KVCache(*caches), slots
        cases: dict[str, tuple[partial, int]] = {
            "rms_norm": (partial(ops.rms_norm, x, weight, 1e-6), 4 * HIDDEN),
            "add_rms_norm": (
                partial(ops.add_rms_norm, x, residual, weight, 1e-6),
                8 * HIDDEN,
            ),
            "silu_and_mul": (partial(ops.silu_and_mul, gate_up), 6 * INTERMEDIATE),
            "qk_norm_rope_store": (
                partial(ops.qk_norm_rope_store, *rope_args),
                4 * heads * HEAD_DIM,
            ),
        }
        if num_tokens <= 256:
            table = torch.zeros(num_tokens + 1, row_state.BLOCK_TABLE + 160, device="cuda").int()
            cases["gather_decode_inputs"] = (
                partial(ops.gather_decode_inputs, table, positions, BLOCK_SIZE),
                8 * 160,
            )
            cases["write_back"] = (
                partial(ops.write_back, table, positions, positions, positions),
                20,
            )
        for name, (call, token_bytes) in cases.items():
            seconds = seconds_per_call([call] * NUM_LAYERS)
            bandwidth = num_tokens * token_bytes / seconds / 1e12
            label = f"{name} T={num_tokens}"
            print(f"{label:40} {seconds * 1e6:6.1f}  {bandwidth:6.2f}", flush=True)


def int_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.replace("x", ",").split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sections = ("decode", "prefill", "sample", "elementwise")
    parser.add_argument("--only", nargs="+", choices=sections, default=sections)
    parser.add_argument(
        "--decode-shapes",
        nargs="+",
        default=DECODE_SHAPES,
        help="64x1100; ragged: 64x2000r; with common tokens: 256x1048c1000",
    )
    parser.add_argument(
        "--heads", nargs=2, type=int, default=(NUM_HEADS, NUM_KV_HEADS), metavar=("Q", "KV")
    )
    parser.add_argument("--fp8", action="store_true", help="decode from an fp8 cache too")
    parser.add_argument("--baseline", help="another version's triton_decode_attention.py")
    parser.add_argument("--max-model-len", type=int, default=4096, help="width of block tables")
    for name in ("tile", "warps", "stages", "programs-per-sm", "min-split"):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=[0], help="0: the default")
    parser.add_argument(
        "--prefill-versions", nargs="+", default=[], help="other triton_prefill_attention.py"
    )
    parser.add_argument(
        "--prefill-config", nargs="+", type=int_tuple, help="BLOCK_M,BLOCK_N,warps,stages"
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=(1, 32, 256, 16384), help="elementwise kernels'"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="MODULE.NAME=INT[,INT...]",
        help="modules' constants; the sections run once for every combination",
    )
    options = parser.parse_args()

    device = torch.device("cuda", torch.cuda.current_device())
    backends: dict[str, Ops] = {}
    for backend in ("triton", "flash-attn"):
        try:
            backends[backend] = select_ops(backend, device, DTYPE, HEAD_DIM, False)
        except ValueError as error:
            print(f"{backend} is left out: {error}")
    print(torch.cuda.get_device_name(device))
    targets = [assignment.split("=")[0] for assignment in options.set]
    values = [int_tuple(assignment.split("=")[1]) for assignment in options.set]
    for combination in itertools.product(*values):
        for target, value in zip(targets, combination, strict=True):
            module, name = target.split(".")
            setattr(importlib.import_module(f"nanovllm.kernels.{module}"), name, value)
            print(f"\n{target}={value}", end="")
        if "decode" in options.only:
            print(f"\ndecode attention{'':46} us/layer    TB/s")
            for shape in map(DecodeShape.parse, options.decode_shapes):
                for is_fp8 in (False, True) if options.fp8 else (False,):
                    bench_decode(shape, is_fp8, backends, options)
        if "prefill" in options.only:
            for lengths in PREFILL_LENGTHS:
                bench_prefill(lengths, backends, options)
        if "sample" in options.only:
            bench_sample(backends["triton"])
        if "elementwise" in options.only:
            bench_elementwise(backends["triton"], options.tokens)


if __name__ == "__main__":
    main()
