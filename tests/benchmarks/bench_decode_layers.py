"""Half layers and whole layers of decode steps with few rows, in several ways, on one Hopper GPU.

    python tests/benchmarks/bench_decode_layers.py --only products steps check
    python tests/benchmarks/bench_decode_layers.py --only half --rows 8 32
    python tests/benchmarks/bench_decode_layers.py --compile   # needs no GPU

A half layer is QKV, attention, O and norm; a whole one has the MLP as well. Layers of distinct
weights and caches are in one CUDA graph with the step's plan, launched ahead of time as in the
engine. A way is how QKV is multiplied, how attention is computed and how the plan cuts contexts;
"today" is what the library chooses. "ring 64,2,3 p2 m128" is `hopper_fused_decode` with tiles of 64
tokens, two warps and three tiles in the ring, and a plan of two programs for each multiprocessor
and splits of at least 128 tokens. All ways of a shape are timed in turns. Every kernel is compiled
first, in several processes.

Contexts are numbers of tokens, the same in all rows; "mid" is the middle of a row of the suite with
128 tokens in and 512 out, "conv" the middle of the second turn of the suite's conversations,
"ragged" from 1 to 1,000.

Every call ends within a minute if --only names one section. See --help for what it may leave out.
"""

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_linear import EPS, HEAD_DIM, MODELS
from new_tokens import new_tokens
from workloads import ROWS, workloads

from nanovllm.kernels import torch_ops
from nanovllm.kernels.attention_steps import AttentionInSteps
from nanovllm.kernels.device import KNOWN_GPUS, device_limits, meta_stands_for
from nanovllm.kernels.triton import compilation, fused_decode, hopper_fused_decode, launch
from nanovllm.kernels.triton import linear as linear_module
from nanovllm.kernels.triton.activation import gated_linear, silu_and_mul
from nanovllm.kernels.triton.decode_attention import plan_decode
from nanovllm.kernels.triton.hopper_fused_decode import DecodeTile
from nanovllm.kernels.triton.norm import add_rms_norm
from nanovllm.kernels.triton.ops import TritonOps
from nanovllm.kernels.triton.wide_linear import WideTile, wide_linear
from nanovllm.kernels.types import (
    DecodeMetadata,
    HeadInputs,
    KVCache,
    LinearOutput,
    PartialSums,
)

BLOCK_SIZE, TABLE_WIDTH = 256, 16  # 4,096 tokens, as in the suite
LONGEST = 1024
OPS = TritonOps(has_fp8_products=True)
HOPPER = KNOWN_GPUS[9, 0]
Graph = tuple[str, torch.cuda.CUDAGraph]
# (query heads, KV heads, dimension)
CHECKED_HEADS = ((16, 8, 128), (32, 8, 128), (32, 4, 128), (14, 2, 64))
EDGES = (1, 17, 0, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 512, 513, 1100)
CHECKED_LENGTHS = ([640], [1], list(EDGES), [384] * 32, [1 + 31 * row for row in range(32)])


@dataclass(frozen=True)
class Way:
    """How a layer is computed.

    Attributes:
        tile: of `hopper_fused_decode`; None: attention is what the library chooses.
        plan: keyword arguments of `plan_decode`.
        qkv, others: the tile of `wide_linear` for QKV, and for O, gate and up, and down; None: what
            the library chooses.
        merges: partial outputs that are merged at a time, see `hopper_fused_decode`.
        idle_waits: programs without a split wait for the kernel ahead.
        slots_first: see `hopper_fused_decode.SLOTS_FIRST`.
    """

    name: str
    tile: DecodeTile | None = None
    plan: dict[str, int] = field(default_factory=dict)
    qkv: WideTile | None = None
    others: WideTile | None = None
    merges: int = 2048
    idle_waits: bool = False
    slots_first: bool = True

    @contextmanager
    def constants(self) -> Iterator[None]:
        """Within it launches are of this way."""
        with ExitStack() as stack:
            patch = mock.patch.object
            stack.enter_context(patch(hopper_fused_decode, "MERGE_ELEMENTS", self.merges))
            stack.enter_context(patch(hopper_fused_decode, "SLOTS_FIRST", self.slots_first))
            stack.enter_context(patch(hopper_fused_decode, "IDLE_WAIT", self.idle_waits))
            stack.enter_context(patch(fused_decode, "IDLE_WAIT", self.idle_waits))
            if self.tile is not None:
                stack.enter_context(patch(hopper_fused_decode, "MAX_PARTS", 8))
                stack.enter_context(patch(hopper_fused_decode, "MAX_GROUP", 8))
            yield

    def attention(
        self, heads: HeadInputs, cache: KVCache, metadata: DecodeMetadata, scale: float
    ) -> torch.Tensor:
        if self.tile is None:
            return OPS.attention(heads, cache, metadata, scale)
        with mock.patch.object(hopper_fused_decode, "MIN_ROWS", 1):
            assert hopper_fused_decode.takes(heads, cache, metadata, None), "it takes no such step"
        return hopper_fused_decode.hopper_fused_decode(
            heads, cache, metadata, scale, tile=self.tile
        )


def wide(tokens: int, stages: int = 8, registers: int | None = 64) -> WideTile:
    return WideTile(tokens, 1, stages, registers)


TODAY = Way("today", merges=0, idle_waits=True, slots_first=False)
# Beside a program of QKV (98 KiB with 32 rows) one of these rings fits on a multiprocessor, or two
# of the other kind; O's programs of as many bytes then fit beside them, too.
LONG, SHORT = DecodeTile(64, 2, 3), DecodeTile(32, 2, 3)
RING = Way("ring 64,2,3 p2", LONG, {"tile": 64, "programs_per_sm": 2})
SHORT_RING = Way("ring 32,2,3 p2", SHORT, {"tile": 32, "programs_per_sm": 2})
WIDE = replace(RING, name="ring 64,2,3 p2, QKV whole", qkv=wide(32))
SHORT_WIDE = replace(SHORT_RING, name="ring 32,2,3 p2, QKV whole", qkv=wide(32))


def planned(way: Way, name: str, **plan: int) -> Way:
    """With another plan."""
    return replace(way, name=name, plan=way.plan | plan)


# The most promising first.
WAYS = (
    TODAY,
    SHORT_RING,
    RING,
    SHORT_WIDE,
    WIDE,
    planned(SHORT_RING, "ring 32,2,3 p3 m128", programs_per_sm=3, min_split=128),
    planned(SHORT_RING, "ring 32,2,3 p4 m128", programs_per_sm=4, min_split=128),
    planned(RING, "ring 64,2,3 p3 m128", programs_per_sm=3, min_split=128),
    planned(RING, "ring 64,2,3 p1", programs_per_sm=1),
    replace(RING, name="ring 64,2,2 p2", tile=DecodeTile(64, 2, 2)),
    replace(SHORT_RING, name="ring 32,2,4 p2", tile=DecodeTile(32, 2, 4)),
    replace(SHORT_RING, name="ring 32,4,4 p2", tile=DecodeTile(32, 4, 4)),
    replace(SHORT_RING, name="ring 32,2,6 p2", tile=DecodeTile(32, 2, 6)),
    planned(replace(SHORT_RING, tile=DecodeTile(32, 1, 3)), "ring 32,1,3 p4 m128",
            programs_per_sm=4, min_split=128),
    replace(RING, name="ring 64,4,3 p2", tile=DecodeTile(64, 4, 3)),
    planned(replace(RING, tile=DecodeTile(128, 4, 1)), "ring 128,4,1 p2", tile=128),
    # What of the kernel is new, one after the other left out of "ring 32,2,3 p2".
    replace(SHORT_RING, name="ring 32,2,3, merge by one", merges=0),
    replace(SHORT_RING, name="ring 32,2,3, idle wait", idle_waits=True),
    replace(SHORT_RING, name="ring 32,2,3, slot by slot", slots_first=False),
    Way("ring 32,2,3, nothing new", SHORT, merges=0, idle_waits=True, slots_first=False),
    Way("ring 32,2,3, today's plan", SHORT),
    replace(SHORT_WIDE, name="ring 32,2,3 p2, QKV whole of 16", qkv=wide(32, 16)),
    replace(TODAY, name="today, QKV whole", qkv=wide(32)),
    replace(TODAY, name="today, idle leave", idle_waits=False),
    planned(TODAY, "today p3", programs_per_sm=3),
    planned(TODAY, "today p2", programs_per_sm=2),
)  # fmt: skip
# Whole layers: products by `wide_linear` in several tiles.
LAYER_WAYS = (
    TODAY,
    SHORT_RING,
    RING,
    SHORT_WIDE,
    replace(SHORT_WIDE, name="ring 32,2,3 p2, all wide", others=wide(32)),
    replace(SHORT_WIDE, name="ring 32,2,3 p2, all wide of 5", qkv=wide(32, 5), others=wide(32, 5)),
    replace(
        SHORT_WIDE,
        name="ring 32,2,3 p2, all wide, 255 regs",
        qkv=wide(32, 8, None),
        others=wide(32, 8, None),
    ),
    replace(SHORT_RING, name="ring 32,2,3 p2, others wide", others=wide(32)),
    replace(WIDE, name="ring 64,2,3 p2, all wide", others=wide(32)),
    replace(TODAY, name="today, all wide", qkv=wide(32), others=wide(32)),
    replace(TODAY, name="today, all wide of 16", qkv=wide(32, 16), others=wide(32, 16)),
    replace(TODAY, name="today, others wide", others=wide(32)),
    replace(TODAY, name="today, idle leave", idle_waits=False),
)
# Of 33 to 128 rows, whose products the library's `wide_linear` gives all registers of a
# multiprocessor, and shared memory for one program: of 64 tokens a stage is 16 KiB, of 128 24.
MANY_WAYS = (
    TODAY,
    replace(TODAY, name="6 stages, 64 regs", qkv=wide(64, 6), others=wide(64, 6)),
    replace(TODAY, name="5 stages, 64 regs", qkv=wide(64, 5), others=wide(64, 5)),
    replace(TODAY, name="4 stages, 64 regs", qkv=wide(64, 4), others=wide(64, 4)),
    replace(TODAY, name="8 stages, 64 regs", qkv=wide(64, 8), others=wide(64, 8)),
    replace(TODAY, name="5 stages, 96 regs", qkv=wide(64, 5, 96), others=wide(64, 5, 96)),
    replace(TODAY, name="5 stages, all regs", qkv=wide(64, 5, None), others=wide(64, 5, None)),
    replace(TODAY, name="QKV of 5 stages, 64 regs", qkv=wide(64, 5)),
    replace(TODAY, name="others of 5 stages, 64 regs", others=wide(64, 5)),
    replace(TODAY, name="new merge, slots, idle leave", merges=2048, idle_waits=False,
            slots_first=True),
    replace(TODAY, name="these and 5 stages, 64 regs", merges=2048, idle_waits=False,
            slots_first=True, qkv=wide(64, 5), others=wide(64, 5)),
)  # fmt: skip
HEADS_WAYS = (
    TODAY,
    RING,
    SHORT_RING,
    planned(RING, "ring 64,2,3 p1", programs_per_sm=1),
    planned(RING, "ring 64,2,3 p3 m128", programs_per_sm=3, min_split=128),
    replace(RING, name="ring 64,4,3 p2", tile=DecodeTile(64, 4, 3)),
    replace(SHORT_RING, name="ring 32,4,6 p2", tile=DecodeTile(32, 4, 6)),
    replace(TODAY, name="today, idle leave", idle_waits=False),
)
# One warp and 64 tokens, or two and 128, do not fit in registers.
RINGS = (
    *((32, 2, 3), (64, 2, 3), (64, 4, 3), (32, 2, 4), (32, 4, 4), (32, 4, 3), (64, 2, 2)),
    *((64, 4, 2), (64, 2, 4), (32, 1, 3), (32, 1, 4), (32, 2, 2), (32, 2, 6), (32, 4, 6)),
    *((128, 4, 1), (128, 4, 2)),
)
PLANS = ((1, 64), (1, 512), (2, 64), (2, 128), (2, 256), (2, 512), (3, 128), (3, 256), (4, 64),
         (4, 128), (4, 256), (6, 128))  # fmt: skip


def fitted(way: Way, rows: int) -> Way:
    """With the smallest tiles of products that hold so many rows."""
    tokens = next(tokens for tokens in (8, 16, 32, 64, 128) if rows <= tokens)

    def fit(tile: WideTile | None) -> WideTile | None:
        if tile is None:
            return None
        # Sums of 64 x 128 do not fit in 64 registers.
        registers = tile.registers and max(tile.registers, 96 if tokens > 64 else 0)
        return tile._replace(tokens=tokens, registers=registers)

    return replace(way, qkv=fit(way.qkv), others=fit(way.others))


def randn(device: torch.device, *shape: int) -> torch.Tensor:
    x = torch.empty(shape, device=device, dtype=torch.bfloat16)
    return x if x.is_meta else x.normal_()


class Layers:
    """Weights and caches of several layers, and a step's inputs; on "meta" without memory."""

    def __init__(
        self, model: str, num_layers: int, device: torch.device, has_mlp: bool, most_rows: int = 32
    ) -> None:
        hidden, num_heads, num_kv_heads, intermediate = MODELS[model]
        width = num_heads * HEAD_DIM
        shapes = {
            "qkv": (width + 2 * num_kv_heads * HEAD_DIM, hidden),
            "o": (hidden, width),
            "gate_up": (2 * intermediate, hidden),
            "down": (hidden, intermediate),
        }
        names = list(shapes) if has_mlp else ["qkv", "o"]
        self.device, self.num_layers, self.hidden = device, num_layers, hidden
        self.weights = [
            {name: randn(device, *shapes[name]).div_(shapes[name][1] ** 0.5) for name in names}
            for _ in range(num_layers)
        ]
        self.num_blocks = most_rows * LONGEST // BLOCK_SIZE
        sizes = 2, self.num_blocks, BLOCK_SIZE, num_kv_heads, HEAD_DIM
        self.caches = [KVCache(*randn(device, *sizes)) for _ in range(num_layers)]
        self.norm, self.head_norm = randn(device, hidden), randn(device, HEAD_DIM)
        self.cos_sin = torch.empty(4096, HEAD_DIM, device=device)
        if not self.cos_sin.is_meta:
            self.cos_sin.normal_()
        self.set_lengths([LONGEST])

    def set_lengths(self, lengths: list[int]) -> None:
        """The contexts of the rows, the new tokens included."""
        rows, used = len(lengths), LONGEST // BLOCK_SIZE
        tables = torch.zeros(rows, TABLE_WIDTH, dtype=torch.int32)
        tables[:, :used] = torch.randperm(self.num_blocks)[: rows * used].view(rows, used)
        positions = torch.tensor(lengths) - 1
        blocks = tables.gather(1, (positions // BLOCK_SIZE)[:, None])[:, 0].long()
        slots = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        self.positions = positions.int().to(self.device)
        lens = torch.tensor(lengths, dtype=torch.int32)
        self.metadata = DecodeMetadata(*(x.to(self.device) for x in (slots, tables, lens)))
        self.x = randn(self.device, rows, self.hidden)
        self.residual = randn(self.device, rows, self.hidden)

    def step(self, way: Way, has_mlp: bool, weights_only: bool = False) -> torch.Tensor:
        """All layers; weights_only: without attention."""
        meta, x = self.metadata, self.x
        plan = plan_decode(self.caches[0], meta.block_tables, meta.context_lens, **way.plan)
        planned = replace(meta, plan=plan)
        for weights, cache in zip(self.weights, self.caches, strict=True):
            norms = self.head_norm, self.head_norm, EPS
            qkv = multiply(x, weights["qkv"], way.qkv)
            heads = HeadInputs(qkv, *norms, self.cos_sin, self.positions)
            if weights_only:
                x = OPS.qk_norm_rope_store(*heads, cache, meta.slot_mapping)
            else:
                x = way.attention(heads, cache, planned, HEAD_DIM**-0.5)
            added = multiply(x.flatten(1), weights["o"], way.others)
            x = add_rms_norm(added, self.residual, self.norm, EPS)[0]
            if has_mlp:
                x = gated(x, weights["gate_up"], way.others)
                added = multiply(x, weights["down"], way.others)
                x = add_rms_norm(added, self.residual, self.norm, EPS)[0]
        return x


def multiply(x: torch.Tensor, weight: torch.Tensor, tile: WideTile | None) -> LinearOutput:
    """By `wide_linear` in such a tile, K in as many parts as the library's choice for 33 tokens."""
    if tile is None:
        return linear_module.linear(x, weight)
    with mock.patch.object(linear_module, "MIN_WIDE_TOKENS", 1):
        num_parts = linear_module.choose_num_parts(len(x), *weight.shape, weight.dtype)
    assert num_parts is not None, "wide_linear is not for this weight"
    return wide_linear(x, weight, None, num_parts, tile=tile)


def gated(x: torch.Tensor, weight: torch.Tensor, tile: WideTile | None) -> torch.Tensor:
    if tile is None:
        return gated_linear(x, weight)
    product = wide_linear(x, weight, None, 1, is_gated=True, tile=tile)
    assert isinstance(product, torch.Tensor)
    return product


def lengths_of(context: str, rows: int) -> list[int]:
    """The contexts that a name stands for; see the module."""
    if context == "ragged":
        return [max(1, 1000 * (row + 1) // rows) for row in reversed(range(rows))]
    if context == "conv":
        drawn = next(workloads(next(row for row in ROWS if row.name == "conversations"), 10000))
        half = len(drawn.prompts)
        second = zip(drawn.prompt_lens[half : 2 * half], drawn.output_lens[half:], strict=False)
        lengths = [prompt + output // 2 for prompt, output in second]
        return sorted((min(length, LONGEST) for length in lengths[:rows]), reverse=True)
    return [384 if context == "mid" else int(context)] * rows


# Compilation


def compile_ways(layers: Callable[[], Layers], calls: list[tuple[Way, list[int], bool]]) -> None:
    """Compile what the steps of (way, lengths, has_mlp) launch, as dry runs tell it."""
    compile_all(record(layers, calls))


def compile_all(variants: Iterable[compilation.Variant]) -> None:
    begin, variants = time.perf_counter(), list(variants)
    found = compilation.Compilation(variants, HOPPER.capability, torch.device("cuda", 0))
    for error in found.wait():
        print("does not compile:", str(error)[:300].replace("\n", " "), flush=True)
    seconds = time.perf_counter() - begin
    print(f"{len(variants)} kernels are there after {seconds:.1f} s", flush=True)


def record(
    layers: Callable[[], Layers], calls: list[tuple[Way, list[int], bool]]
) -> compilation.Variants:
    variants = compilation.Variants()
    with meta_stands_for(HOPPER), variants.recording():
        dry = layers()
        for way, lengths, has_mlp in calls:
            dry.set_lengths(lengths)
            try:
                with way.constants():
                    dry.step(fitted(way, len(lengths)), has_mlp)
            except Exception as error:
                print(f"{way.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    return variants


def show_compiled(only: str) -> None:
    """Registers, spilled bytes and shared memory of each kernel, by the assembler; needs no GPU."""
    from kernel_compilation import assembled
    from triton import knobs

    def hook(*args: object) -> tuple[str, str] | None:
        return assembled(*args) if args else ("assembled", "assembled")

    calls = [(way, [384] * rows, True) for rows in (8, 32) for way in (*WAYS, *LAYER_WAYS)]
    calls += [(way, [384] * 32, False) for way in ring_ways(fewest=True)]
    calls += [(way, [384] * rows, True) for rows in (64, 128) for way in MANY_WAYS]
    variants = [*record(lambda: Layers("0.6b", 1, torch.device("meta"), True, 128), calls)]
    for model in ("8b", "30b-a3b"):
        dry = [(way, [384] * rows, False) for rows in (8, 32) for way in HEADS_WAYS]
        variants += [*record(lambda m=model: Layers(m, 1, torch.device("meta"), False), dry)]
    seen: set[str] = set()
    with compilation.compiling_for(HOPPER.capability):
        knobs.runtime.add_stages_inspection_hook = hook
        for variant in variants:
            name = variant.kernel.fn.__name__
            shown = {key: value for key, value in variant.options.items() if key.isupper()}
            tiles = [arg.block_shape for arg in variant.args if hasattr(arg, "block_shape")][:1]
            warps, limit = variant.options["num_warps"], variant.options.get("maxnreg")
            text = f"{name} {shown} warps={warps} tile={tiles} maxnreg={limit}"
            if only not in name or text in seen:
                continue
            seen.add(text)
            try:
                metadata = variant.compile().metadata
            except Exception as error:
                print(f"{text}: {type(error).__name__} {str(error)[:300]}", flush=True)
                continue
            print(f"{metadata.registers} registers, {metadata.spilled} bytes spilled, "
                  f"{metadata.shared:,} bytes shared: {text}", flush=True)  # fmt: skip


# Checks


def dry_then(check: Callable[[torch.device], None]) -> None:
    """A check once dry, to compile what it launches, and then on the GPU."""
    variants = compilation.Variants()
    with meta_stands_for(HOPPER), variants.recording():
        check(torch.device("meta"))
    compile_all(variants)
    check(torch.device("cuda", 0))


def check_attention(device: torch.device, ways: list[Way]) -> None:
    """Outputs and K/V of each way beside the separate kernels and torch, with NaN in new memory."""
    num_checked, num_wrong = 0, 0
    for heads, dtype in itertools.product(CHECKED_HEADS, (torch.bfloat16, torch.float16)):
        is_first = heads == CHECKED_HEADS[0] and dtype == torch.bfloat16
        for lengths in CHECKED_LENGTHS if is_first else CHECKED_LENGTHS[2:3]:
            torch.manual_seed(len(lengths))
            two, cache, metadata, scale = new_tokens(
                lengths, heads, dtype, device, block_size=BLOCK_SIZE, num_parts=2
            )
            assert isinstance(two.qkv, PartialSums)
            one = two._replace(qkv=two.qkv.parts.sum(0).to(dtype))
            caches = [KVCache(*(x.clone() for x in cache[:2])) for _ in range(3)]
            in_steps = AttentionInSteps.attention(OPS, one, caches[1], metadata, scale)
            if device.type != "meta":
                expected = torch_ops.TorchOps().attention(one, caches[0], metadata, scale)
            for way, inputs in itertools.product(ways if is_first else ways[:6], (one, two)):
                for own, first in zip(caches[2][:2], cache[:2], strict=True):
                    own.copy_(first)
                num_checked += 1
                try:
                    with way.constants():
                        tables = metadata.block_tables
                        plan = plan_decode(cache, tables, metadata.context_lens, **way.plan)
                        step = replace(metadata, plan=plan)
                        results = [way.attention(inputs, caches[2], step, scale) for _ in range(3)]
                    if device.type != "meta":
                        same = [caches[1], caches[2]], [in_steps, expected]
                        compare_attention(results, *same, metadata.context_lens > 0)
                except Exception as error:
                    num_wrong += 1
                    where = f"{way.name}, {heads}, {dtype}, {len(lengths)} rows, of {max(lengths)}"
                    print("WRONG", where, f"{type(error).__name__}: {str(error)[:200]}", flush=True)
    if device.type != "meta":
        print(f"attention: {num_checked} checked, {num_wrong} wrong", flush=True)


def compare_attention(
    results: list[torch.Tensor],
    caches: list[KVCache],
    expected: list[torch.Tensor],
    live: torch.Tensor,
) -> None:
    """AssertionError if results differ from each other, from what is expected, or K/V differ."""
    for ours, other in zip(caches[0][:2], caches[1][:2], strict=True):
        assert torch.equal(ours.nan_to_num(), other.nan_to_num()), "other K/V"
    assert all(torch.equal(results[0], x) for x in results), "a race"
    assert (results[0][~live] == 0).all(), "a row without tokens"
    tolerance = 8 * torch.finfo(results[0].dtype).eps
    for other in expected:
        torch.testing.assert_close(results[0][live], other[live], rtol=tolerance, atol=tolerance)


def check_steps(ways: list[Way]) -> None:
    """Steps that follow each other in a graph, ahead of time and not: the same results."""
    calls = [(way, [384] * rows, False) for way in ways for rows in (1, 8, 32)]
    with mock.patch.object(launch, "OVERLAP_LAUNCHES", False):
        variants = [*record(lambda: Layers("0.6b", 1, torch.device("meta"), False), calls)]
    compile_all([*variants, *record(lambda: Layers("0.6b", 1, torch.device("meta"), False), calls)])
    for way, rows in itertools.product(ways, (1, 8, 32)):
        torch.manual_seed(rows)
        layers = Layers("0.6b", 3, torch.device("cuda", 0), False)
        starts = [min(235 + 21 * row, 900) for row in range(rows)]
        caches = [KVCache(*(x.clone() for x in cache[:2])) for cache in layers.caches]
        try:
            runs = [
                forty_steps(layers, caches, fitted(way, rows), starts, overlaps)
                for overlaps in (True, False)
            ]
            assert runs[0].isfinite().all(), "not finite"
            assert torch.equal(*runs), f"{(runs[0] - runs[1]).abs().max().item()} apart"
            print(f"steps of {rows} rows, {way.name}: the same", flush=True)
        except Exception as error:
            print(f"WRONG steps of {rows} rows, {way.name}: {str(error)[:200]}", flush=True)


def forty_steps(
    layers: Layers, caches: list[KVCache], way: Way, starts: list[int], overlaps: bool
) -> torch.Tensor:
    """The results of 40 steps from these caches on, one graph for all of them."""
    torch.manual_seed(len(starts))
    layers.set_lengths(starts)
    tables = layers.metadata.block_tables
    with mock.patch.object(launch, "OVERLAP_LAUNCHES", overlaps), way.constants():
        layers.step(way, False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layers.step(way, False)
    for own, first in zip(layers.caches, caches, strict=True):
        own.key.copy_(first.key)
        own.value.copy_(first.value)
    results = []
    for number in range(40):
        positions = torch.tensor([start + number for start in starts], device=tables.device)
        blocks = tables.gather(1, (positions // BLOCK_SIZE)[:, None])[:, 0].long()
        layers.positions.copy_(positions)
        layers.metadata.slot_mapping.copy_(blocks * BLOCK_SIZE + positions % BLOCK_SIZE)
        layers.metadata.context_lens.copy_(positions + 1)
        torch.manual_seed(number)
        layers.x.normal_()
        layers.residual.normal_()
        graph.replay()
        results.append(out.clone())
    return torch.stack(results)


def check_products(device: torch.device) -> None:
    """`wide_linear` in tiles of few tokens beside torch in float32, and SiLU in it."""
    num_wrong = 0
    tiles = {torch.bfloat16: (8, 16, 32), torch.float16: (32,)}
    cases = itertools.product((1, 5, 8, 9, 16, 17, 31, 32), tiles)
    for (tokens, dtype), ((n, k), num_parts) in itertools.product(
        cases, (((4096, 1024), 1), ((1024, 2048), 4), ((1024, 3072), 6))
    ):
        x = torch.randn(tokens, k).to(dtype).to(device)
        weight = torch.randn(n, k).div_(k**0.5).to(dtype).to(device)
        tolerance = 2 * torch.finfo(dtype).eps
        for fewest, stages in itertools.product(tiles[dtype], (5, 16)):
            if tokens > fewest:
                continue
            try:
                tile = wide(fewest, stages)
                got = wide_linear(x, weight, None, num_parts, tile=tile)
                act = gated(x, weight, tile) if num_parts == 1 else None
                if device.type == "meta":
                    silu_and_mul(got)
                    continue
                exact = x.float() @ weight.float().T
                total = got.parts.sum(0) if isinstance(got, PartialSums) else got.float()
                torch.testing.assert_close(total, exact, rtol=tolerance, atol=tolerance)
                if act is not None and isinstance(got, torch.Tensor):
                    # The gated product's gate is the weight's first half, its up the second.
                    assert torch.equal(act, silu_and_mul(got)), "other SiLU"
            except Exception as error:
                num_wrong += 1
                print(f"WRONG {tokens} tokens in {fewest}, {stages} stages, {n} x {k} {dtype}: "
                      f"{type(error).__name__}: {str(error)[:200]}", flush=True)  # fmt: skip
    if device.type != "meta":
        print(f"products in tiles of few tokens: {num_wrong} wrong", flush=True)


# Times


def captured(layers: Layers, way: Way, has_mlp: bool, weights_only: bool = False) -> Graph:
    fit = fitted(way, len(layers.x))
    with way.constants():
        layers.step(fit, has_mlp, weights_only)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layers.step(fit, has_mlp, weights_only)
    return way.name, graph


def time_in_turns(graphs: list[Graph], num_layers: int, rounds: int) -> dict[str, list[float]]:
    """Us a layer of each graph in each round."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: dict[str, list[float]] = {name: [] for name, _ in graphs}
    for number in range(rounds + 1):
        for name, graph in graphs:
            begin.record()
            for _ in range(8):
                graph.replay()
            end.record()
            end.synchronize()
            if number:  # the first round warms up
                times[name].append(begin.elapsed_time(end) * 1e3 / 8 / num_layers)
    return times


def report(
    label: str, layers: Layers, ways: list[Way], has_mlp: bool, args: argparse.Namespace
) -> None:
    graphs = []
    for way in ways:
        try:
            graphs.append(captured(layers, way, has_mlp, args.no_attention))
        except Exception as error:
            print(f"{label} {way.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    if not graphs:
        return
    times = time_in_turns(graphs, layers.num_layers, args.rounds)
    ordered = list(times.items())
    first = min(ordered[0][1])
    if args.best:
        ordered = [ordered[0], *sorted(ordered[1:], key=lambda item: min(item[1]))[: args.best]]
    for name, own in ordered:
        spread = sorted(own)[len(own) // 2] - min(own)
        gain = first - min(own)
        print(f"{label:20} {name:34} {min(own):7.2f} +{spread:4.2f}  {gain:+6.2f}", flush=True)


def ring_ways(fewest: bool = False) -> list[Way]:
    """Every ring with every plan; fewest: with one of them."""
    ways = []
    for ring, (programs, min_split) in itertools.product(RINGS, PLANS[:1] if fewest else PLANS):
        tile = DecodeTile(*ring)
        plan = {"tile": tile.tokens, "programs_per_sm": programs, "min_split": min_split}
        name = f"ring {','.join(map(str, ring))} p{programs} m{min_split}"
        ways.append(replace(RING, name=name, tile=tile, plan=plan))
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sections = ("products", "steps", "check", "half", "sweep", "layer", "many", "heads")
    parser.add_argument("--only", nargs="+", choices=sections, default=sections[:-2],
                        help="the first three compare results")  # fmt: skip
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 1, 4, 16, 24],
                        help='"many" is for 33 to 128')  # fmt: skip
    parser.add_argument("--contexts", nargs="+", default=["mid", "128", "640", "1000", "conv"])
    parser.add_argument("--ways", nargs="+", default=[], help="parts of names; today is always in")
    parser.add_argument("--rounds", type=int, default=4, help="of eight replays of each graph")
    parser.add_argument("--best", type=int, default=0, help="show so many of a shape, not all")
    parser.add_argument("--no-attention", action="store_true", help="layers without attention")
    parser.add_argument("--compile", nargs="?", const="", metavar="KERNEL",
                        help="only compile, and show registers; needs no GPU")  # fmt: skip
    args = parser.parse_args()
    if args.compile is not None:
        show_compiled(args.compile)
        return
    assert launch.is_hopper(torch.device("cuda", 0)), "these ways are Hopper's"
    gc.freeze()  # torch may collect garbage before each capture
    print(torch.cuda.get_device_name(), device_limits(torch.device("cuda", 0)))
    print("us a layer: the best round, the median above it, what is won over the first")

    def chosen(ways: tuple[Way, ...] | list[Way]) -> list[Way]:
        named = [way for way in ways if any(part in way.name for part in args.ways)]
        return list(ways) if not args.ways else [TODAY, *(w for w in named if w is not TODAY)]

    most_rows = max(args.rows)
    shapes = [(rows, context) for context in args.contexts for rows in args.rows]
    torch.cuda.init()
    idle = replace(TODAY, name="today, idle leave", idle_waits=False)
    if "products" in args.only:
        dry_then(check_products)
    if "steps" in args.only:
        check_steps(
            [SHORT_RING, WIDE, replace(RING, name="ring, idle wait", idle_waits=True), idle]
        )
    if "check" in args.only:
        rings = [SHORT_RING, RING, idle, *chosen(WAYS), *ring_ways(fewest=True)]
        distinct = {(way.tile, str(way.plan), way.merges, way.slots_first): way for way in rings}
        torch.use_deterministic_algorithms(True, warn_only=True)  # new memory has NaN
        dry_then(lambda device: check_attention(device, list(distinct.values())))
        torch.use_deterministic_algorithms(False)
    for section, model, has_mlp, ways in (
        ("half", "0.6b", False, chosen(WAYS)),
        ("layer", "0.6b", True, chosen(LAYER_WAYS)),
        ("many", "0.6b", True, chosen(MANY_WAYS)),
        ("sweep", "0.6b", False, chosen([TODAY, *ring_ways()])),
        ("heads", "8b", False, chosen(HEADS_WAYS)),
        ("heads", "30b-a3b", False, chosen(HEADS_WAYS)),
    ):
        if section not in args.only:
            continue
        num_layers = 28 if model == "0.6b" else 12

        def dry(model: str = model, has_mlp: bool = has_mlp) -> Layers:
            return Layers(model, 1, torch.device("meta"), has_mlp, most_rows)

        print(f"\n{section} of {model}", flush=True)
        sizes = dict.fromkeys(args.rows)
        compile_ways(dry, [(w, [384] * rows, has_mlp) for rows in sizes for w in ways])
        layers = Layers(model, num_layers, torch.device("cuda", 0), has_mlp, most_rows)
        for rows, context in shapes:
            layers.set_lengths(lengths_of(context, rows))
            report(f"{rows} x {context}", layers, ways, has_mlp, args)
        del layers
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
