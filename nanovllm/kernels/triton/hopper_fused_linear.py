"""Products of many tokens for Hopper, in Gluon, together with what follows them.

The product of gate and up with SiLU, and that of queries, keys and values with the heads' norm, the
rotary embedding and the K/V store: what `activation` and `rope` do takes no pass through memory. As
many programs as there are multiprocessors take tiles of the product in turn, 128 tokens by 256
weight rows. One warp copies tiles of x and of the weights into a ring of shared memory, two
warpgroups multiply. When a tile is summed up, they round it to the dtype, which halves its
registers, and begin the next tile. What follows the product is cut into parts, and behind each of
the first steps of the next tile comes a part: it is computed while the tensor cores multiply.

Of eight neighbouring columns of a matrix instruction's result a thread has two. So the rows of the
weights lie in shared memory in an order by which a thread has eight neighbours of the product, 16
bytes. It keeps two numbers of the dtype in an int32, and one instruction computes with both.

Barriers are as in `hopper_prefill`. The rounding is that of the separate kernels.
"""

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia import hopper

from nanovllm.kernels.triton.hopper_prefill import start_copy
from nanovllm.kernels.triton.launch import cdiv, is_hopper, num_multiprocessors, with_dry_runs
from nanovllm.kernels.triton.weight_tiles import COLUMNS, tile_layout
from nanovllm.kernels.types import KVCache, Product

BLOCK_M = 128  # tokens of a tile
BLOCK_N = 256  # weight rows of a tile
BLOCK_K = COLUMNS  # of a step
NUM_STAGES = 4  # steps in the ring
RUN = 32  # neighbouring columns of a tile that four threads have
GROUP_M = 16  # tiles of x that are multiplied side by side with the same weights
NUM_WARPS = 8  # that compute
COPYING_REGISTERS = 24  # of a thread; the computing ones get 240
HEAD_DIM = 128
MIN_TOKENS = 2048  # fewer leave too many multiprocessors idle
MIN_COLUMNS = 9 * BLOCK_K  # a step for each part of what follows
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
SIGNS = gl.constexpr(-0x7FFF8000)  # the sign bits of two numbers


@gluon.constexpr_function
def _packed_layout() -> Any:
    """Of packed numbers [64, RUN / 2]: 16 bytes of a row for each thread."""
    return gl.BlockedLayout([1, 4], [8, 4], [NUM_WARPS, 1], [1, 0])


@gluon.constexpr_function
def _float_layout() -> Any:
    """Of the same numbers as float32 [64, RUN]."""
    return gl.BlockedLayout([1, 8], [8, 4], [NUM_WARPS, 1], [1, 0])


@gluon.constexpr_function
def _type_of_two(dtype: Any) -> str:
    """PTX's name of two numbers in one register."""
    return "bf16x2" if dtype == gl.bfloat16 else "f16x2"


@gluon.jit
def _pack(low, high, dtype: gl.constexpr):
    """Two float32, rounded to the dtype, in one int32."""
    asm: gl.constexpr = "cvt.rn." + _type_of_two(dtype) + ".f32 $0, $2, $1;"
    # Where it stands: a tile's sums must not stay in registers until they are needed.
    return gl.inline_asm_elementwise(asm, "=r,f,f", [low, high], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _unpack(x, dtype: gl.constexpr):
    """The two numbers of an int32 as float32."""
    if dtype == gl.bfloat16:
        low = (x << 16).to(gl.float32, bitcast=True)
        high = (x & -65536).to(gl.float32, bitcast=True)
    else:
        low = x.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        high = (x >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    return low, high


@gluon.jit
def _on_both(NAME: gl.constexpr, x, y, dtype: gl.constexpr):
    """An instruction on both numbers of packed x and y.

    A product or sum of two numbers of the dtype is, rounded to it, what float32 would give: no
    result that float32 has to round lies near the middle of two numbers of the dtype.
    """
    asm: gl.constexpr = NAME + ".rn." + _type_of_two(dtype) + " $0, $1, $2;"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [x, y], gl.int32, is_pure=True, pack=1)


@gluon.jit
def _pairs():
    """The packed columns of a run."""
    return gl.arange(0, 16, layout=gl.SliceLayout(0, _packed_layout()))


@gluon.jit
def _rows(m, half: gl.constexpr):
    """The product's rows of a half of a tile: of each 16 the first 8, or the last."""
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, _packed_layout()))
    return m * 128 + row // 8 * 16 + half * 8 + row % 8


@gluon.jit
def _pieces(acc, dtype: gl.constexpr):
    """A tile [128, 256] as 16 packed pieces [64, RUN / 2]: of each run of columns both halves."""
    low, high = gl.split(acc.reshape([128, 128, 2]))
    x = _pack(low, high, dtype)
    # Of rows: warp, half, row. Of columns: three bits of the run, two neighbours' place in a
    # thread, the thread. The weights' order makes the latter two change places.
    x = x.reshape([8, 2, 8, 2, 2, 2, 4, 4]).permute(0, 2, 7, 6, 1, 5, 4, 3)
    return _halves(x, 4)


@gluon.jit
def _halves(x, TIMES: gl.constexpr):
    """x [8, 8, 4, 4, 2, ...] cut in two along the last dimension, and again; each [64, 16]."""
    if TIMES == 0:
        return (gl.convert_layout(x.reshape([64, 16]), _packed_layout(), assert_trivial=True),)
    else:
        first, second = gl.split(x)
        return _halves(first, TIMES - 1) + _halves(second, TIMES - 1)


@gluon.jit
def _place(tile, num_row_tiles, N_TILES: gl.constexpr, GROUP_M: gl.constexpr):
    """The row and the column of tiles of a tile: groups of GROUP_M rows, column after column."""
    first = tile // (GROUP_M * N_TILES) * GROUP_M
    num_rows = gl.minimum(num_row_tiles - first, GROUP_M)
    within = tile - first * N_TILES
    return first + within % num_rows, within // num_rows


@gluon.jit
def _copy(
    x_tiles,
    weight_tiles,
    ring,  # x, weights, full, free
    num_row_tiles,
    K: gl.constexpr,
    N_TILES: gl.constexpr,
    IS_GATED: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """The copying warp: x and weights of all of this program's tiles."""
    xs, weights, full, free = ring
    STAGES: gl.constexpr = xs.shape[0]
    BLOCK_M: gl.constexpr = xs.shape[1]
    BLOCK_K: gl.constexpr = xs.shape[2]
    RUNS: gl.constexpr = weight_tiles.block_shape[0]  # of a copy
    steps = 0
    for tile in range(gl.program_id(0), num_row_tiles * N_TILES, gl.num_programs(0)):
        m, n = _place(tile, num_row_tiles, N_TILES, GROUP_M)
        for k in range(K // BLOCK_K):
            stage = steps % STAGES
            barrier = full.index(stage)
            mbarrier.wait(free.index(stage), (steps // STAGES + 1) & 1)
            steps += 1
            mbarrier.expect(barrier, 2 * (BLOCK_M + weights.shape[1]) * BLOCK_K)
            column = k * BLOCK_K
            start_copy(x_tiles, [m * BLOCK_M, column], barrier, xs.index(stage))
            runs = weights.index(stage).reshape([8, 4, 4, 2, BLOCK_K])
            for part in gl.static_range(2 if IS_GATED else 1):
                run = (part * N_TILES + n) * RUNS
                to = runs.slice(part * RUNS, RUNS)
                start_copy(weight_tiles, [run, 0, 0, 0, column], barrier, to)


@gluon.jit
def _start_step(acc, ring, step, use_acc):
    """acc + the product of BLOCK_K columns, which goes on meanwhile."""
    xs, weights, full, _free = ring
    STAGES: gl.constexpr = xs.shape[0]
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    weight = weights.index(stage).permute((1, 0))
    return warpgroup_mma(xs.index(stage), weight, acc, use_acc=use_acc, is_async=True)


@gluon.jit
def _end_step(acc, ring, step, NUM_GOING_ON: gl.constexpr):
    """Wait until all steps but the last ones are done, of which `step` is the last."""
    xs, _weights, _full, free = ring
    acc = warpgroup_mma_wait(NUM_GOING_ON, [acc])
    mbarrier.arrive(free.index(step % xs.shape[0]))
    return acc


@gluon.jit
def _compute(
    follows,  # the arguments of what follows
    ring,
    num_tokens,
    num_row_tiles,
    K: gl.constexpr,
    N_TILES: gl.constexpr,
    IS_GATED: gl.constexpr,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """The computing warps: all of this program's tiles."""
    xs = ring[0]
    BLOCK_K: gl.constexpr = xs.shape[2]
    STEPS: gl.constexpr = K // BLOCK_K
    PARTS: gl.constexpr = 8 if IS_GATED else 9
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, 256, 16])
    acc = gl.zeros([128, 256], gl.float32, layout)
    # There is no tile yet: its rows are out of range.
    pieces = _pieces(acc, xs.dtype)
    m = num_row_tiles
    n = 0
    steps = 0
    for tile in range(gl.program_id(0), num_row_tiles * N_TILES, gl.num_programs(0)):
        state = ()
        for k in gl.static_range(PARTS):
            acc = _start_step(acc, ring, steps + k, k > 0)
            state = _part(
                follows, pieces, state, m, n, num_tokens, k, N_TILES, IS_GATED, NUM_Q_HEADS,
                NUM_KV_HEADS,
            )  # fmt: skip
            if k > 0:
                acc = _end_step(acc, ring, steps + k - 1, 1)
        for k in range(PARTS, STEPS):
            acc = _start_step(acc, ring, steps + k, True)
            acc = _end_step(acc, ring, steps + k - 1, 1)
        steps += STEPS
        acc = _end_step(acc, ring, steps - 1, 0)
        pieces = _pieces(acc, xs.dtype)
        m, n = _place(tile, num_row_tiles, N_TILES, GROUP_M)
    state = ()
    for k in gl.static_range(PARTS):
        state = _part(
            follows, pieces, state, m, n, num_tokens, k, N_TILES, IS_GATED, NUM_Q_HEADS,
            NUM_KV_HEADS,
        )  # fmt: skip


@gluon.jit
def _part(
    follows, pieces, state, m, n, num_tokens, PART: gl.constexpr, N_TILES: gl.constexpr,
    IS_GATED: gl.constexpr, NUM_Q_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
):  # fmt: skip
    """One of the parts of what follows the tile (m, n); what it leaves for the next part."""
    if IS_GATED:
        _silu_part(follows, pieces, m, n, num_tokens, PART, N_TILES)
        return state
    elif PART == 0:
        return _begin_heads(follows, pieces, m, num_tokens)
    else:
        return _heads_part(follows, pieces, state, n, PART - 1, NUM_Q_HEADS, NUM_KV_HEADS)


@gluon.jit
def _silu_part(out, pieces, m, n, num_tokens, PART: gl.constexpr, N_TILES: gl.constexpr):
    """silu(gate) * up of half the rows of a run of columns."""
    dtype: gl.constexpr = out.dtype.element_ty
    low, high = _unpack(pieces[PART], dtype)
    low = low / (1 + gl.exp(-low))
    high = high / (1 + gl.exp(-high))
    product = _on_both("mul", _pack(low, high, dtype), pieces[PART + 8], dtype)
    row = _rows(m, PART % 2)
    pair = n * 64 + PART // 2 * 16 + _pairs()
    pairs = out.to(gl.pointer_type(gl.int32), bitcast=True)
    pointers = pairs + (row.to(gl.int64) * (N_TILES * 64))[:, None] + pair[None, :]
    gl.store(pointers, product, mask=(row < num_tokens)[:, None])


@gluon.constexpr_function
def _unpacking(dtype: Any) -> str:
    """PTX that unpacks $1 to x and y."""
    if dtype == gl.bfloat16:
        return "prmt.b32 x, $1, 0, 0x1044; prmt.b32 y, $1, 0, 0x3244;"
    return ".reg .b16 a, b; mov.b32 {a, b}, $1; cvt.f32.f16 x, a; cvt.f32.f16 y, b;"


@gluon.jit
def _squares(x, dtype: gl.constexpr):
    """The sum of both numbers' squares, float32.

    By other instructions than `_unpack`: what they have in common would stay in registers.
    """
    sum_up: gl.constexpr = " mul.f32 x, x, x; fma.rn.f32 $0, y, y, x; }"
    asm: gl.constexpr = "{ .reg .f32 x, y; " + _unpacking(dtype) + sum_up
    return gl.inline_asm_elementwise(asm, "=f,r", [x], gl.float32, is_pure=False, pack=1)


@gluon.jit
def _inverse_rms(pieces, eps, HEAD: gl.constexpr, half: gl.constexpr, dtype: gl.constexpr):
    """Of one half of one head [64]."""
    squares = _squares(pieces[HEAD * 8 + half], dtype)
    for run in gl.static_range(1, 4):
        squares += _squares(pieces[HEAD * 8 + run * 2 + half], dtype)
    return gl.rsqrt(gl.sum(squares, axis=1) / 128 + eps)


@gluon.jit
def _normed(x, inverse_rms, weight, column, dtype: gl.constexpr):
    """Packed x [64, 16], columns of a head from `column` on, normalised."""
    low, high = _unpack(x, dtype)
    normed = _pack(low * inverse_rms[:, None], high * inverse_rms[:, None], dtype)
    pairs = weight.to(gl.pointer_type(gl.int32), bitcast=True)
    weights = gl.load(pairs + column // 2 + _pairs())[None, :]
    return _on_both("mul", normed, gl.broadcast(weights, normed)[0], dtype)


@gluon.jit
def _finite(x, dtype: gl.constexpr):
    """Packed numbers, with 0 for those that are not finite."""
    # Times 0 is 0 or, all bits but the sign set, the only NaN that such an instruction gives.
    return x & (~_on_both("mul", x, gl.full_like(x, 0), dtype) | SIGNS)


@gluon.jit
def _angles(cos_sin, position, run: gl.constexpr):
    """The cosines and the sines of a run of columns of each half of a head, [64, RUN] each."""
    layout: gl.constexpr = gl.SliceLayout(1, _float_layout())
    row = gl.convert_layout(position * 128, layout, assert_trivial=True)
    column = run * 32 + gl.arange(0, 32, layout=gl.SliceLayout(0, _float_layout()))
    pointers = cos_sin + row[:, None] + column[None, :]
    return gl.load(pointers), gl.load(pointers + 64)


@gluon.jit
def _packed(x, dtype: gl.constexpr):
    """float32 [64, RUN], rounded to the dtype and packed."""
    low, high = gl.split(x.reshape([64, 16, 2]))
    return gl.convert_layout(_pack(low, high, dtype), _packed_layout(), assert_trivial=True)


@gluon.jit
def _token(m, half: gl.constexpr, num_tokens, positions, slot_mapping):
    """The rows of a half of a tile, whether they are in range, their positions and slots."""
    row = _rows(m, half)
    in_range = row < num_tokens
    position = gl.load(positions + row, mask=in_range, other=0)
    slot = gl.load(slot_mapping + row, mask=in_range, other=-1).to(gl.int32)
    return row, in_range, position, slot


@gluon.jit
def _begin_heads(follows, pieces, m, num_tokens):
    """What both heads' parts need: tokens, 1 / rms of each half of each head, the first angles."""
    heads, cos_sin, positions, slot_mapping, eps = follows
    dtype: gl.constexpr = heads[0].dtype.element_ty
    HAS_NORMS: gl.constexpr = heads[1] is not None
    tokens = (
        _token(m, 0, num_tokens, positions, slot_mapping),
        _token(m, 1, num_tokens, positions, slot_mapping),
    )
    angles = _angles(cos_sin, tokens[0][2], 0)
    if HAS_NORMS:
        inverse_rms = (
            _inverse_rms(pieces, eps, 0, 0, dtype),
            _inverse_rms(pieces, eps, 0, 1, dtype),
            _inverse_rms(pieces, eps, 1, 0, dtype),
            _inverse_rms(pieces, eps, 1, 1, dtype),
        )
        return tokens, inverse_rms, angles
    else:
        return tokens, (), angles


@gluon.jit
def _heads_part(
    follows, pieces, state, n, PART: gl.constexpr, NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
):  # fmt: skip
    """Norm, rotation and store of half the rows of two runs, which are rotated with each other.

    The two heads of the tile take turns, as they need the same angles. Those of the next two parts
    are on their way while the next step begins.
    """
    heads, cos_sin, _positions, _slot_mapping, _eps = follows
    query, q_weight, k_weight, key_cache, value_cache = heads
    tokens, inverse_rms, angles = state
    dtype: gl.constexpr = query.dtype.element_ty
    HAS_NORMS: gl.constexpr = q_weight is not None
    HEAD: gl.constexpr = PART % 2
    half: gl.constexpr = PART // 2 % 2
    run: gl.constexpr = PART // 4
    if HEAD == 0:
        angles = (_packed(angles[0], dtype), _packed(angles[1], dtype))
    cos, sin = angles
    row, in_range, _position, slot = tokens[half]
    head = 2 * n + HEAD
    is_q = head < NUM_Q_HEADS
    is_v = head >= NUM_Q_HEADS + NUM_KV_HEADS
    raw1 = pieces[HEAD * 8 + run * 2 + half]
    raw2 = pieces[HEAD * 8 + run * 2 + 4 + half]
    if is_v:
        x1 = _finite(raw1, dtype)
        x2 = _finite(raw2, dtype)
    else:
        x1 = raw1
        x2 = raw2
        if HAS_NORMS:
            weight = gl.where(is_q, q_weight, k_weight)
            x1 = _normed(x1, inverse_rms[HEAD * 2 + half], weight, run * 32, dtype)
            x2 = _normed(x2, inverse_rms[HEAD * 2 + half], weight, run * 32 + 64, dtype)
        x1_cos = _on_both("mul", x1, cos, dtype)
        x1_sin = _on_both("mul", x1, sin, dtype)
        x1 = _on_both("sub", x1_cos, _on_both("mul", x2, sin, dtype), dtype)
        x2 = _on_both("add", _on_both("mul", x2, cos, dtype), x1_sin, dtype)
    kv_head = head - gl.where(is_v, NUM_Q_HEADS + NUM_KV_HEADS, NUM_Q_HEADS)
    q_row = row.to(gl.int64) * (NUM_Q_HEADS * 64) + head * 64
    kv_row = slot.to(gl.int64) * (NUM_KV_HEADS * 64) + kv_head * 64
    offset = gl.multiple_of(gl.where(is_q, q_row, kv_row), 16)
    base = gl.where(is_q, query, gl.where(is_v, value_cache, key_cache))
    pairs = gl.multiple_of(base.to(gl.pointer_type(gl.int32), bitcast=True), 16)
    pointers = pairs + offset[:, None] + (run * 16 + _pairs())[None, :]
    mask = (in_range & (is_q | (slot >= 0)))[:, None]
    gl.store(pointers, x1, mask=mask)
    gl.store(pointers + 32, x2, mask=mask)
    if HEAD == 1 and PART < 7:
        angles = _angles(cos_sin, tokens[1 - half][2], (PART + 1) // 4)
    return tokens, inverse_rms, angles


# Per-token inputs may be slices of one packed buffer: no recompilation for their alignment.
@with_dry_runs
@gluon.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=["positions", "slot_mapping"],
)
def _hopper_fused_linear_kernel(
    out,  # [T, N / 2] if IS_GATED, else query [T, Hq, D]
    x_tiles,  # x [T, K], tensor descriptor of [BLOCK_M, BLOCK_K]
    weight_tiles,  # weight [N, K], see `_weight_tiles`
    num_tokens,
    q_norm_weight,  # [D] or None; from here on all are None or 0 if IS_GATED
    k_norm_weight,  # the same
    cos_sin,  # [max_position, D] float32
    positions,  # [T] int32
    key_cache,  # [num_slots, Hkv, D]
    value_cache,
    slot_mapping,  # [T] int64
    eps,
    K: gl.constexpr,
    N_TILES: gl.constexpr,  # of weight rows
    IS_GATED: gl.constexpr,
    NUM_Q_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    COPYING_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = x_tiles.dtype
    BLOCK_M: gl.constexpr = x_tiles.block_shape[0]
    BLOCK_K: gl.constexpr = x_tiles.block_shape[1]
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    swizzled: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_K, 16, 2)
    xs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], swizzled)
    weights = gl.allocate_shared_memory(dtype, [STAGES, 256, BLOCK_K], swizzled)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    ring = (xs, weights, full, free)
    num_row_tiles = gl.cdiv(num_tokens, BLOCK_M)
    if IS_GATED:
        follows = out
    else:
        heads = (out, q_norm_weight, k_norm_weight, key_cache, value_cache)
        follows = (heads, cos_sin, positions, slot_mapping, eps)
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    follows, ring, num_tokens, num_row_tiles, K, N_TILES, IS_GATED, NUM_Q_HEADS,
                    NUM_KV_HEADS, GROUP_M,
                ),
            ),
            (_copy, (x_tiles, weight_tiles, ring, num_row_tiles, K, N_TILES, IS_GATED, GROUP_M)),
        ],
        [1],  # warps of the second
        [COPYING_REGISTERS],
    )  # fmt: skip


def _weight_tiles(weight: torch.Tensor, num_rows: int) -> Any:
    """A tensor descriptor of [num_rows, BLOCK_K] of a weight [N, K], in runs of RUN rows.

    In shared memory row 8 i + 2 q + e of a run is row 8 q + 2 i + e of the weight's.
    """
    n, k = weight.shape
    shape, strides = [n // RUN, 4, 4, 2, k], [RUN * k, 2 * k, 8 * k, k, 1]
    block = [num_rows // RUN, 4, 4, 2, BLOCK_K]
    return hopper.TensorDescriptor(weight, shape, strides, block, tile_layout(5))


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `hopper_silu_linear` computes x [T, K] and weight [N, K]."""
    (num_tokens, k), n = x.shape, weight.shape[0]
    return (
        num_tokens >= MIN_TOKENS
        and is_hopper(x.device)
        and x.dtype == weight.dtype
        and x.dtype in DTYPES
        and k % BLOCK_K == 0
        and k >= MIN_COLUMNS
        and n % BLOCK_N == 0
        and x.is_contiguous()
        and weight.is_contiguous()
    )


def takes_heads(
    qkv: Product,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    cache: KVCache,
) -> bool:
    """Whether `hopper_heads_linear` computes this."""
    norms = q_norm_weight, k_norm_weight
    dtypes = {None if weight is None else weight.dtype for weight in norms}
    return (
        takes(*qkv)
        and cache.key.shape[3] == HEAD_DIM
        and cache.key_scales is None
        and dtypes in ({None}, {qkv.x.dtype})
    )


def hopper_silu_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`Ops.gated_linear` for what `takes` allows."""
    out = torch.empty(len(x), len(weight) // 2, dtype=x.dtype, device=x.device)
    _launch(out, x, weight, BLOCK_N // 2, *[None] * 7, 0.0)
    return out


def hopper_heads_linear(
    qkv: Product,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    cache: KVCache,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """`Ops.heads_linear` for what `takes_heads` allows."""
    x, weight = qkv
    key, value = cache[:2]
    num_kv_heads = key.shape[2]
    num_q_heads = len(weight) // HEAD_DIM - 2 * num_kv_heads
    query = torch.empty(len(x), num_q_heads, HEAD_DIM, dtype=x.dtype, device=x.device)
    assert cos_sin.is_contiguous() and key.is_contiguous() and value.is_contiguous()
    rest = q_norm_weight, k_norm_weight, cos_sin, positions, key, value, slot_mapping, eps
    heads = num_q_heads, num_kv_heads
    _launch(query, x, weight, BLOCK_N, *rest, heads=heads)
    return query


def _launch(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rows_of_copy: int,
    *rest: torch.Tensor | float | None,
    heads: tuple[int, int] = (0, 0),
) -> None:
    """heads: how many query and KV heads there are; none: gate and up."""
    (num_tokens, k), n = x.shape, weight.shape[0]
    num_tiles = cdiv(num_tokens, BLOCK_M) * (n // BLOCK_N)
    _hopper_fused_linear_kernel[(min(num_multiprocessors(x.device), num_tiles),)](
        out,
        hopper.TensorDescriptor(x, [num_tokens, k], [k, 1], [BLOCK_M, BLOCK_K], tile_layout(2)),
        _weight_tiles(weight, rows_of_copy),
        num_tokens,
        *rest,
        K=k,
        N_TILES=n // BLOCK_N,
        IS_GATED=not any(heads),
        NUM_Q_HEADS=heads[0],
        NUM_KV_HEADS=heads[1],
        GROUP_M=GROUP_M,
        STAGES=NUM_STAGES,
        COPYING_REGISTERS=COPYING_REGISTERS,
        num_warps=NUM_WARPS,
    )
