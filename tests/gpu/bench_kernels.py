"""Micro-benchmark of the kernels on one GPU, run by hand: python tests/gpu/bench_kernels.py

Qwen3-0.6B's shapes in bfloat16. Decode steps are timed inside a CUDA graph of 28 calls that cycle
over caches larger than the L2 cache. The options sweep the tunables; `--only` picks sections and
`--set triton_sampling.CHUNK=4096` overrides a module's constant.
"""

import argparse
import importlib
import itertools
from collections.abc import Callable
from functools import partial

import torch

from nanovllm.kernels import row_state
from nanovllm.kernels import triton_decode_attention as decode_kernel
from nanovllm.kernels import triton_prefill_attention as prefill_kernel
from nanovllm.kernels.ops import Ops, select_ops

NUM_LAYERS = 28
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 16, 8, 128, 256
HIDDEN, INTERMEDIATE, VOCAB = 1024, 3072, 151_936
DTYPE = torch.bfloat16
SCALE = HEAD_DIM**-0.5
DECODE_SHAPES = ((256, 850), (128, 1100), (64, 1100), (16, 1100), (1, 1100), (8, 32768))


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


def bench_decode(
    batch_size: int, length: int, backends: dict[str, Ops], options: argparse.Namespace
) -> None:
    used = -(-length // BLOCK_SIZE)
    num_blocks = batch_size * used
    layer_bytes = 2 * num_blocks * BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM * 2
    num_caches = max(2, min(NUM_LAYERS, 2**31 // layer_bytes))
    caches = randn(num_caches, 2, num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    width = max(used, options.max_model_len // BLOCK_SIZE)
    tables = torch.zeros(batch_size, width, dtype=torch.int32, device="cuda")
    tables[:, :used] = torch.randperm(num_blocks, device="cuda").view(batch_size, used)
    lens = torch.full((batch_size,), length, dtype=torch.int32, device="cuda")
    if options.ragged:
        lens = torch.linspace(1, used * BLOCK_SIZE, batch_size, device="cuda").int()
        lens = lens[torch.randperm(batch_size, device="cuda")]
    query = randn(batch_size, NUM_HEADS, HEAD_DIM)
    bytes_read = 2 * int(lens.sum()) * NUM_KV_HEADS * HEAD_DIM * 2

    def report(name: str, decode: Callable[..., torch.Tensor], **tunables: int) -> None:
        calls = []
        for layer in range(NUM_LAYERS):
            key_cache, value_cache = caches[layer % num_caches]
            args = query, key_cache, value_cache, tables, lens, SCALE
            calls.append(partial(decode, *args, **tunables))
        seconds = seconds_per_call(calls)
        label = f"{batch_size} x {length} {name}"
        print(f"{label:55} {seconds * 1e6:7.1f}  {bytes_read / seconds / 1e12:6.2f}", flush=True)

    sweep = itertools.product(options.tile, options.warps, options.stages, options.splits)
    for values in sweep:
        names = ("tile", "num_warps", "num_stages", "num_splits")
        tunables = {name: value for name, value in zip(names, values, strict=True) if value}
        label = " ".join(f"{name.removeprefix('num_')}={v}" for name, v in tunables.items())
        report(f"triton {label}", decode_kernel.decode_attention, **tunables)
    if "flash-attn" in backends:
        report("flash-attn", backends["flash-attn"].decode_attention)


def bench_prefill(backends: dict[str, Ops], options: argparse.Namespace) -> None:
    num_seqs, length = 4, 4096
    print(f"\nprefill attention {num_seqs} x {length}{'':20} ms  TFLOP/s")
    num_blocks = num_seqs * length // BLOCK_SIZE
    key_cache, value_cache = randn(2, num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    tables = torch.randperm(num_blocks, device="cuda").int().view(num_seqs, -1)
    cu_seqlens = torch.arange(num_seqs + 1, device="cuda", dtype=torch.int32) * length
    query = randn(num_seqs * length, NUM_HEADS, HEAD_DIM)
    args = query, key_cache, value_cache, tables, cu_seqlens, cu_seqlens, length, length, SCALE
    flop = 4 * num_seqs * NUM_HEADS * HEAD_DIM * length * length / 2

    def report(name: str, prefill: Callable[..., torch.Tensor], **tunables: object) -> None:
        calls = [partial(prefill, *args, **tunables)] * 4
        seconds = seconds_per_call(calls, use_graph=False)
        print(f"{name:38} {seconds * 1e3:6.3f}  {flop / seconds / 1e12:7.1f}", flush=True)

    for config in options.prefill_config or [None]:
        report(f"triton {config or ''}", prefill_kernel.prefill_attention, config=config)
    if "flash-attn" in backends:
        report("flash-attn", backends["flash-attn"].prefill_attention)


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


def bench_elementwise(ops: Ops) -> None:
    heads = NUM_HEADS + 2 * NUM_KV_HEADS
    print(f"\nelementwise{'':29}     us    TB/s")
    cos_sin = torch.rand(40960, HEAD_DIM, device="cuda")
    weight, head_weight = randn(HIDDEN), randn(HEAD_DIM)
    for num_tokens in (1, 32, 256, 16384):
        x, residual = randn(2, num_tokens, HIDDEN)
        gate_up = randn(num_tokens, 2 * INTERMEDIATE)
        qkv = randn(num_tokens, heads * HEAD_DIM)
        caches = randn(2, 64, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
        positions = torch.arange(num_tokens, device="cuda", dtype=torch.int32)
        slots = torch.randperm(64 * BLOCK_SIZE, device="cuda")[:num_tokens]
        rope_args = qkv, head_weight, head_weight, 1e-6, cos_sin, positions, *caches, slots
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
    parser.add_argument("--decode-shapes", nargs="+", type=int_tuple, default=DECODE_SHAPES)
    parser.add_argument("--ragged", action="store_true", help="contexts from 1 to the length")
    parser.add_argument("--max-model-len", type=int, default=4096, help="width of block tables")
    for name in ("tile", "warps", "stages", "splits"):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=[0], help="0: the default")
    parser.add_argument(
        "--prefill-config", nargs="+", type=int_tuple, help="BLOCK_M,BLOCK_N,warps,stages"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="MODULE.NAME=INT")
    options = parser.parse_args()
    for assignment in options.set:
        target, value = assignment.split("=")
        module, name = target.split(".")
        setattr(importlib.import_module(f"nanovllm.kernels.{module}"), name, int(value))

    device = torch.device("cuda", torch.cuda.current_device())
    backends: dict[str, Ops] = {}
    for backend in ("triton", "flash-attn"):
        try:
            backends[backend] = select_ops(backend, device, DTYPE, HEAD_DIM, False)
        except ValueError as error:
            print(f"{backend} is left out: {error}")
    print(torch.cuda.get_device_name(device))
    if "decode" in options.only:
        print(f"\ndecode attention{'':40} us/layer    TB/s")
        for batch_size, length in options.decode_shapes:
            bench_decode(batch_size, length, backends, options)
    if "prefill" in options.only:
        bench_prefill(backends, options)
    if "sample" in options.only:
        bench_sample(backends["triton"])
    if "elementwise" in options.only:
        bench_elementwise(backends["triton"])


if __name__ == "__main__":
    main()
