"""What follows attention in a layer with 4-bit weights, for a few tokens, as one Hopper kernel.

Its phases are O and the sum with the residual; norm, gate and up, and SiLU; down and the sum; and
the next layer's norm and QKV. Each needs all of the one before, so programs, one a multiprocessor,
wait for each other in between. A copying warp does not wait: words and scales of the next phases
come by bulk copies into a ring in shared memory, from before the wait for the kernel ahead on.

A program has some rows of each weight. Each of its warps multiplies all of these rows with its own
blocks of columns, so x's fragments are loaded once a block. Sums over warps are taken at the end of
a phase. Down may come in parts of K, which another phase adds up: then a program needs less of x.

A number's bits alone are a bfloat16 that is the number times 2^-133, see hopper_packed.py. What is
to be taken off each number, times x, is the same for all rows: sums begin with it. A norm's factor
multiplies a token's sums.
"""

from math import gcd
from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanovllm.kernels.device import device_limits
from nanovllm.kernels.triton.hopper_packed import (
    COLUMNS,
    HIGH_X_FACTOR,
    MIDDLE,
    SUMS_FACTOR,
    WORDS,
    X_FACTOR,
    bits_along,
    reinterpret,
    unpacked,
)
from nanovllm.kernels.triton.hopper_prefill import start_copy
from nanovllm.kernels.triton.launch import (
    cdiv,
    is_hopper,
    next_power_of_2,
    num_multiprocessors,
    overlap_options,
    with_dry_runs,
)
from nanovllm.kernels.types import FinishedLayer, LayerEnd, PackedWeight

MAX_TOKENS = 8
# Triton 3.9 has another name for it than 3.6.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
NUM_WARPS = 8  # that multiply
W = gl.constexpr(NUM_WARPS)
TURN = gl.constexpr(NUM_WARPS * COLUMNS.value)  # columns that warps have one block each of
MAX_SEGMENT = 8192  # numbers of x, of all tokens, that become shared at a time
MAX_LOADED = gl.constexpr(32768)  # that are loaded at a time
MAX_STAGES = 12
TALL = 2  # tokens up to which a stage has 64 rows
MAX_REGISTERS = 168


@gluon.constexpr_function
def _places(tokens: int, rows: int) -> list[list[list[int]]]:
    """Bases of registers, lanes and warps for [tokens, rows]: neighbouring rows in a warp."""
    bases = bits_along(rows, 1, 1, 2) + bits_along(tokens, 1, 0, 2)
    num_bits = len(bits_along(W, 1, 0, 1))
    bases += [[0, 0]] * max(0, 5 + num_bits - len(bases))
    return [bases[5 + num_bits :], bases[:5], bases[5 : 5 + num_bits]]


@gluon.constexpr_function
def _layout_of_results(tokens: int, rows: int) -> Any:
    """Of [tokens, rows]."""
    return gl.DistributedLinearLayout(*_places(tokens, rows), [], [tokens, rows])


@gluon.constexpr_function
def _layout_of_words(rows: int) -> Any:
    """Of [W, rows, WORDS]: a thread holds a chunk's words of some rows, as fragments do."""
    registers = [[0, 0, 1], [0, 0, 2], [0, 8, 0], *bits_along(rows // 16, 16, 1, 3)]
    lanes = [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    warps = bits_along(W, 1, 0, 3)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [W, rows, WORDS])


@gluon.constexpr_function
def _layout_of_sums(tokens: int, rows: int, is_gated: bool) -> Any:
    """Of [W, tokens, rows]: a thread has the sums of all warps.

    With is_gated it has those of a row of the first half, and the same one of the second.
    """
    registers, lanes, warps = (
        [[0, *basis] for basis in bases]
        for bases in _places(tokens, rows // 2 if is_gated else rows)
    )
    if is_gated:
        registers.insert(0, [0, 0, rows // 2])
    registers = bits_along(W, 1, 0, 3) + registers
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [W, tokens, rows])


# The copying warp


@gluon.jit
def _copy_words(
    tiles,  # the descriptors of words and of scales
    ring,  # words, scales, full, free
    place,  # first row, first block
    PHASE: gl.constexpr,
):
    """A phase's words: turn by turn a block for each warp, of piece after piece of the rows."""
    word_tiles, scale_tiles = tiles
    word_ring, scale_ring, full, free = ring
    first_row, first_block = place
    STAGES: gl.constexpr = full.shape[0]
    IS_GATED: gl.constexpr = len(word_tiles.block_shape) == 4
    ROWS: gl.constexpr = PHASE.rows_of_piece
    SHARE: gl.constexpr = word_ring.shape[2] // ROWS
    words = reinterpret(word_ring, gl.int32, [SHARE * STAGES, W, ROWS, WORDS], word_ring.layout)
    scales = reinterpret(scale_ring, scale_ring.dtype, [SHARE * STAGES, ROWS, W], scale_ring.layout)
    for i in range(PHASE.turns * PHASE.pieces):
        number = PHASE.first + i
        stage = number % STAGES
        block = first_block + i // PHASE.pieces * W
        piece = i % PHASE.pieces
        mbarrier.wait(free.index(stage), (number // STAGES + 1) & 1)
        is_full = full.index(stage)
        mbarrier.expect(is_full, word_tiles.block_type.nbytes + scale_tiles.block_type.nbytes)
        slot, scale_slot = words.index(SHARE * stage), scales.index(SHARE * stage)
        if IS_GATED:
            row = first_row // 2 + piece * (ROWS // 2)
            slot = slot.reshape(word_tiles.block_shape)
            start_copy(word_tiles, [block, 0, row, 0], is_full, slot)
            scale_slot = scale_slot.reshape(scale_tiles.block_shape)
            start_copy(scale_tiles, [0, row, block], is_full, scale_slot)
        else:
            row = first_row + piece * ROWS
            start_copy(word_tiles, [block, row, 0], is_full, slot)
            start_copy(scale_tiles, [row, block], is_full, scale_slot)


@gluon.jit
def _copy_all_words(
    all_tiles, ring, OUT: gl.constexpr, GATE_UP: gl.constexpr, DOWN: gl.constexpr,
    QKV: gl.constexpr,
):  # fmt: skip
    o, gate_up, down, qkv = all_tiles
    program = gl.program_id(0)
    _copy_words(o, ring, (program * OUT.rows, 0), OUT)
    place = (program * GATE_UP.rows, 0)
    _copy_words(gate_up, ring, place, GATE_UP)
    first_block = program % DOWN.parts * (DOWN.turns * W)
    place = (program // DOWN.parts * DOWN.rows, first_block)
    _copy_words(down, ring, place, DOWN)
    if QKV is not None:
        _copy_words(qkv, ring, (program * QKV.rows, 0), QKV)


# The warps that multiply


@gluon.jit
def _load_x(
    x, column, num_tokens, stride, T: gl.constexpr, SEGMENTS: gl.constexpr, layout: gl.constexpr
):
    """x's columns in SEGMENTS pieces [T, SEGMENT]; past the tokens zeros."""
    token = gl.arange(0, T, gl.SliceLayout(1, layout))
    SEGMENT: gl.constexpr = column.shape[0]
    segments = ()
    for i in gl.static_range(SEGMENTS):
        pointers = x + token[:, None] * stride + (column + i * SEGMENT)[None, :]
        # Past the multiprocessor's cache, which other programs' writes do not reach.
        values = gl.load(pointers, (token < num_tokens)[:, None], 0.0, cache_modifier=".cg")
        segments += (values,)  # type: ignore[assignment]
    return segments


@gluon.jit
def _copies(x, COUNT: gl.constexpr):
    """x [T, N] COUNT times, a power of two: [COUNT * T, N]."""
    if COUNT == 1:
        return x
    else:
        T: gl.constexpr = x.shape[0]
        both = gl.join(x, x).permute((2, 0, 1)).reshape([2 * T, x.shape[1]])
        return _copies(both, COUNT // 2)


@gluon.jit
def _share_x(x, norm_weights, num_tokens, stride, xs, bases, layout: gl.constexpr):
    """x to shared memory, plane by plane; and what each token's sums of a block begin with.

    With the norm's weights it is x times these; returned is the sum of x's squares [T].
    """
    dtype: gl.constexpr = xs.dtype
    SEGMENTS: gl.constexpr = xs.shape[0]
    T: gl.constexpr = xs.shape[2]
    TOKENS: gl.constexpr = bases.shape[2]
    BLOCKS: gl.constexpr = bases.shape[1]  # of a segment
    SEGMENT: gl.constexpr = BLOCKS * COLUMNS
    LOADED: gl.constexpr = min(SEGMENTS, MAX_LOADED // (T * SEGMENT))
    of_column: gl.constexpr = gl.SliceLayout(0, layout)
    column = gl.arange(0, SEGMENT, of_column)
    squares = gl.zeros([T, SEGMENT], gl.float32, layout)
    for first in gl.static_range(0, SEGMENTS, LOADED):
        first_x = x + first * SEGMENT
        segments = _load_x(
            first_x, column, num_tokens, stride, T, min(LOADED, SEGMENTS - first), layout
        )
        for i in gl.static_range(min(LOADED, SEGMENTS - first)):
            values = segments[i]
            if norm_weights is not None:
                wide = values.to(gl.float32)
                squares += wide * wide
                weights = norm_weights.index(first + i).load(of_column).to(gl.float32)
                values = (wide * weights[None, :]).to(dtype)
            if dtype == gl.bfloat16:
                sums = gl.sum(values.to(gl.float32).reshape([T, BLOCKS, COLUMNS]), axis=2)
                sums *= -MIDDLE / SUMS_FACTOR
                bases.index(first + i).store(_copies(sums, TOKENS // T).permute((1, 0)))
                factor = gl.where(column // 8 % 2 == 0, X_FACTOR, HIGH_X_FACTOR).to(dtype)
                values *= factor[None, :]
            # block, chunk, plane, number -> block, plane, token, chunk, number
            values = values.reshape([T, BLOCKS, 4, 4, 8]).permute((1, 3, 0, 2, 4))
            xs.index(first + i).store(values.reshape([BLOCKS * 4, T, 32]))
    return gl.sum(squares, axis=1)


@gluon.jit
def _take(slots, number, layout: gl.constexpr):
    """A stage's words and scales, when they have come; it is free then."""
    words, scales, full, free = slots
    STAGES: gl.constexpr = full.shape[0]
    ROWS: gl.constexpr = words.shape[2]
    words_layout: gl.constexpr = _layout_of_words(ROWS)
    stage = number % STAGES
    mbarrier.wait(full.index(stage), (number // STAGES) & 1)
    slot = stage * (words.shape[0] // STAGES)
    words = words.index(slot).load(words_layout)
    scales = scales.index(slot).permute((1, 0))
    scales = scales.load(gl.SliceLayout(2, layout))
    mbarrier.arrive(free.index(stage))  # all are in registers
    return words, scales


@gluon.jit
def _multiply(
    out,  # [T, N], which IS_ADDED changes; IS_GATED: [T, N / 2]; or float32 [T, N]
    x,  # [T, columns of the program]
    norm_weights,  # shared [SEGMENTS, SEGMENT]; None: x is not normed
    shared_x,  # of x, and of what sums begin with
    ring,
    first_row,
    sizes,  # number of tokens, distance of x's rows, epsilon
    N: gl.constexpr,
    PHASE: gl.constexpr,
    X_TOKENS: gl.constexpr,  # 1, 2, 4 or 8
    IS_GATED: gl.constexpr,
    IS_ADDED: gl.constexpr,
):
    """The program's rows of a phase's weight times x."""
    num_tokens, stride, eps = sizes
    all_x, all_bases = shared_x
    word_ring, scale_ring, full, free = ring
    dtype: gl.constexpr = x.dtype.element_ty
    TOKENS: gl.constexpr = 8 if X_TOKENS < 8 else X_TOKENS  # of the matrix instruction
    STAGES: gl.constexpr = full.shape[0]
    TURNS: gl.constexpr = PHASE.turns
    PIECES: gl.constexpr = PHASE.pieces
    ROWS: gl.constexpr = PHASE.rows_of_piece
    SEGMENT: gl.constexpr = PHASE.segment
    SHARE: gl.constexpr = word_ring.shape[2] // ROWS
    SEGMENTS: gl.constexpr = TURNS * W * COLUMNS // SEGMENT
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    # A thread holds a chunk of a token: [W, plane, copy, token, chunk and number].
    COPIES: gl.constexpr = TOKENS // X_TOKENS
    fragments: gl.constexpr = gl.BlockedLayout(
        [1, 4, 1, 1, 8], [1, 1, COPIES, 8 // COPIES, 4], [W, 1, 1, 1, 1], [4, 1, 3, 2, 0]
    )
    # [W, token, row]: a thread has the sums of all warps, and gate's and up's of a row.
    shared_sums: gl.constexpr = _layout_of_sums(TOKENS, ROWS, IS_GATED)
    OUT_ROWS: gl.constexpr = ROWS // 2 if IS_GATED else ROWS  # of a piece
    WIDTH: gl.constexpr = N // 2 if IS_GATED else N
    out_layout: gl.constexpr = _layout_of_results(TOKENS, OUT_ROWS)
    row = gl.arange(0, OUT_ROWS, gl.SliceLayout(0, out_layout))
    row += first_row // 2 if IS_GATED else first_row
    token = gl.arange(0, TOKENS, gl.SliceLayout(1, out_layout))
    out_pointers = out + token[:, None] * WIDTH + row[None, :]

    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    flat_pair: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    of_turns: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    xs = reinterpret(all_x, dtype, [SEGMENTS, SEGMENT // COLUMNS * 4, X_TOKENS, 32], flat)
    bases = reinterpret(all_bases, gl.float32, [SEGMENTS, SEGMENT // COLUMNS, TOKENS], flat_pair)
    X_WARPS: gl.constexpr = min(X_TOKENS, W)
    x_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [X_WARPS, W // X_WARPS], [1, 0])
    squares = _share_x(x, norm_weights, num_tokens, stride, xs, bases, x_layout)
    K: gl.constexpr = TURNS * W * COLUMNS
    factor = gl.rsqrt(squares / K + eps)[:, None]
    factor = gl.convert_layout(_copies(factor, TOKENS // X_TOKENS), out_layout)
    if IS_ADDED:
        addends = ()
        for i in gl.static_range(PIECES):
            mask = (token < num_tokens)[:, None] & (row + i * OUT_ROWS < WIDTH)[None, :]
            addend = gl.load(out_pointers + i * OUT_ROWS, mask, 0.0, cache_modifier=".cg")
            addends += (addend,)  # type: ignore[assignment]
    xs = reinterpret(all_x, dtype, [TURNS, W, 4, 1, X_TOKENS, 32], of_turns)
    bases = reinterpret(all_bases, gl.float32, [TURNS, W, TOKENS], flat_pair)
    word_slots = reinterpret(
        word_ring, gl.int32, [SHARE * STAGES, W, ROWS, WORDS], word_ring.layout
    )
    # In Triton 3.6 a transposed view of copied memory that is not swizzled shows other elements.
    scale_slots = reinterpret(scale_ring, dtype, [SHARE * STAGES, ROWS, W], flat_pair)

    slots = (word_slots, scale_slots, full, free)
    all_sums = ()
    for _ in gl.static_range(PIECES):
        all_sums += (gl.zeros([W, ROWS, TOKENS], gl.float32, layout),)  # type: ignore[assignment]
    for turn in range(TURNS):
        x_block = xs.index(turn).load(fragments)
        x_block = x_block.broadcast_to([W, 4, COPIES, X_TOKENS, 32])
        # plane, token, chunk, word, half -> the order of the numbers
        x_block = x_block.reshape([W, 4, TOKENS, 4, 4, 2]).permute((0, 1, 4, 3, 5, 2))
        x_block = x_block.reshape([W, COLUMNS, TOKENS])
        x_block = gl.convert_layout(x_block, gl.DotOperandLayout(1, layout, 2))
        base = gl.zeros([W, ROWS, TOKENS], gl.float32, layout)
        if dtype == gl.bfloat16:
            base += bases.index(turn).load(gl.SliceLayout(1, layout))[:, None, :]
        next_sums = ()
        for piece in gl.static_range(PIECES):
            words, scales = _take(slots, PHASE.first + turn * PIECES + piece, layout)
            product = mma_v2(unpacked(words, dtype, weight_layout), x_block, base)
            sums = all_sums[piece] + product * scales.to(gl.float32)[:, :, None]
            next_sums += (sums,)  # type: ignore[assignment]
        all_sums = next_sums

    # x is done with: its memory serves for the sums of warps, of some pieces at a time. They are
    # swizzled so that neither the stores nor the loads meet in a bank.
    sums_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 64 // ROWS, ROWS // 8, [2, 1, 0])
    ROOM: gl.constexpr = all_x.shape[0] * all_x.shape[1] * 2 // (W * TOKENS * ROWS * 4)
    AT_ONCE: gl.constexpr = min(PIECES, ROOM)
    gl.static_assert(ROOM >= 1)
    sums_of_warps = reinterpret(all_x, gl.float32, [AT_ONCE, W, TOKENS, ROWS], sums_layout)
    for first in gl.static_range(0, PIECES, AT_ONCE):
        for piece in gl.static_range(first, min(PIECES, first + AT_ONCE)):
            sums_of_warps.index(piece - first).store(all_sums[piece].permute((0, 2, 1)))
        for piece in gl.static_range(first, min(PIECES, first + AT_ONCE)):
            result = gl.sum(sums_of_warps.index(piece - first).load(shared_sums), axis=0)
            if dtype == gl.bfloat16:
                result *= SUMS_FACTOR
            if norm_weights is not None:
                result *= gl.convert_layout(factor, result.type.layout)
            if IS_GATED:
                gate, up = gl.split(result.reshape([TOKENS, 2, OUT_ROWS]).permute((0, 2, 1)))
                gate = gate.to(dtype).to(gl.float32)
                act = (gate / (1 + gl.exp(-gate))).to(dtype).to(gl.float32)
                result = act * up.to(dtype).to(gl.float32)
            result = result.to(out.dtype.element_ty)
            result = gl.convert_layout(result, out_layout, assert_trivial=True)
            if IS_ADDED:
                result = (result.to(gl.float32) + addends[piece].to(gl.float32)).to(dtype)
            mask = (token < num_tokens)[:, None] & (row + piece * OUT_ROWS < WIDTH)[None, :]
            gl.store(out_pointers + piece * OUT_ROWS, result, mask=mask)


@gluon.jit
def _await_programs(counters, INDEX: gl.constexpr):
    """Wait until all programs are here, at one of the kernel's four places; the first two always.

    What they have stored is visible then. Counters are zeros at first. The first one is zeroed at
    the second place, when all have left it; the others at the next launch's first place.
    """
    if INDEX == 0:  # noqa: SIM102 (known to the compiler)
        if gl.program_id(0) == 0:
            for i in gl.static_range(1, 4):
                gl.store(counters + i, 0)
    barrier()  # all warps' results are stored
    gl.atomic_add(counters + INDEX, 1, sem="acq_rel")
    # One thread asks: with more of them the answer would come later.
    gl.inline_asm_elementwise(
        """{
        .reg .pred is_other, is_early;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.ne.u32 is_other, thread, 0;
        mov.u32 $0, 0;
        @is_other bra done;
        again: ld.acquire.gpu.global.s32 $0, [$1];
        setp.lt.s32 is_early, $0, $2;
        @is_early bra again;
        done:
        }""",
        "=&r,l,r",
        [(counters + INDEX).to(gl.int64, bitcast=True), gl.num_programs(0)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    barrier()
    if INDEX == 1:  # noqa: SIM102
        if gl.program_id(0) == 0:
            gl.store(counters, 0)


@gluon.jit
def _share_norm(weight, memory, SEGMENTS: gl.constexpr, SEGMENT: gl.constexpr):
    """A norm's weights to shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [W], [0])
    row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    weights = reinterpret(memory, memory.dtype, [SEGMENTS, SEGMENT], row)
    for i in gl.static_range(SEGMENTS):
        weights.index(i).store(gl.load(weight + i * SEGMENT + gl.arange(0, SEGMENT, layout)))
    return weights


@gluon.jit
def _add_parts(
    residual, parts, num_tokens, N: gl.constexpr, PIECES: gl.constexpr, ROWS: gl.constexpr,
    PARTS: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """Add the parts of some rows to the residual."""
    dtype: gl.constexpr = residual.dtype.element_ty
    layout: gl.constexpr = _layout_of_results(TOKENS, ROWS)
    token = gl.arange(0, TOKENS, gl.SliceLayout(1, layout))
    for piece in gl.static_range(PIECES):
        row = (gl.program_id(0) * PIECES + piece) * ROWS
        row += gl.arange(0, ROWS, gl.SliceLayout(0, layout))
        place = token[:, None] * N + row[None, :]
        mask = (token < num_tokens)[:, None] & (row < N)[None, :]
        total = gl.load(residual + place, mask, 0.0, cache_modifier=".cg").to(gl.float32)
        added = gl.zeros([TOKENS, ROWS], gl.float32, layout)
        for part in gl.static_range(PARTS):
            pointers = parts + part * num_tokens * N + place
            added += gl.load(pointers, mask, 0.0, cache_modifier=".cg")
        total = (total + added.to(dtype).to(gl.float32)).to(dtype)
        gl.store(residual + place, total, mask=mask)


@gluon.jit
def _compute_all(
    tensors,  # residual, heads, act, parts, qkv, weights of both norms, counters
    memory,  # shared: x, what sums begin with, a norm's weights
    ring,
    num_tokens,
    eps,
    HIDDEN: gl.constexpr,
    HEADS: gl.constexpr,
    INNER: gl.constexpr,
    QKV_ROWS: gl.constexpr,
    OUT: gl.constexpr,
    GATE_UP: gl.constexpr,
    DOWN: gl.constexpr,
    QKV: gl.constexpr,
    X_TOKENS: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    residual, heads, act, parts, qkv, mlp_norm, next_norm, counters = tensors
    all_x, all_bases, norm_memory = memory
    shared_x = (all_x, all_bases)
    program = gl.program_id(0)
    PARTS: gl.constexpr = DOWN.parts
    norm = _share_norm(mlp_norm, norm_memory, HIDDEN // GATE_UP.segment, GATE_UP.segment)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    _multiply(
        residual, heads, None, shared_x, ring, program * OUT.rows, (num_tokens, HEADS, eps),
        HIDDEN, OUT, X_TOKENS, False, True,
    )  # fmt: skip
    _await_programs(counters, 0)
    _multiply(
        act, residual, norm, shared_x, ring, program * GATE_UP.rows, (num_tokens, HIDDEN, eps),
        2 * INNER, GATE_UP, X_TOKENS, True, False,
    )  # fmt: skip
    if qkv is not None:
        barrier()
        norm = _share_norm(next_norm, norm_memory, HIDDEN // QKV.segment, QKV.segment)
    _await_programs(counters, 1)
    part = program % PARTS
    first_row = program // PARTS * DOWN.rows
    first_x = act + part * (DOWN.turns * W * COLUMNS)
    sizes = (num_tokens, INNER, eps)
    if PARTS == 1:
        _multiply(
            residual, first_x, None, shared_x, ring, first_row, sizes,
            HIDDEN, DOWN, X_TOKENS, False, True,
        )  # fmt: skip
    else:
        _multiply(
            parts + part * num_tokens * HIDDEN, first_x, None, shared_x, ring, first_row, sizes,
            HIDDEN, DOWN, X_TOKENS, False, False,
        )  # fmt: skip
        _await_programs(counters, 2)
        _add_parts(
            residual,
            parts,
            num_tokens,
            HIDDEN,
            OUT.pieces,
            OUT.rows_of_piece,
            PARTS,
            max(X_TOKENS, 8),
        )
    if qkv is not None:
        _await_programs(counters, 3)
        _multiply(
            qkv, residual, norm, shared_x, ring, program * QKV.rows, (num_tokens, HIDDEN, eps),
            QKV_ROWS, QKV, X_TOKENS, False, False,
        )  # fmt: skip


@with_dry_runs
@gluon.jit(do_not_specialize=["num_tokens"])
def _packed_layer_kernel(
    residual,  # [T, HIDDEN], to which O's and down's products are added
    heads,  # [T, HEADS]
    act,  # [T, INNER]
    parts,  # float32 [parts, T, HIDDEN], or None
    qkv,  # [T, QKV_ROWS], or None
    mlp_norm,  # [HIDDEN]
    next_norm,  # [HIDDEN], or None
    counters,  # int32, see `_await_programs`
    o_words,
    o_scales,
    gate_up_words,
    gate_up_scales,
    down_words,
    down_scales,
    qkv_words,
    qkv_scales,
    num_tokens,
    eps,
    HIDDEN: gl.constexpr,
    HEADS: gl.constexpr,
    INNER: gl.constexpr,
    QKV_ROWS: gl.constexpr,
    OUT: gl.constexpr,  # see `_Phase`
    GATE_UP: gl.constexpr,
    DOWN: gl.constexpr,
    QKV: gl.constexpr,
    X_TOKENS: gl.constexpr,
    MAX_COLUMNS: gl.constexpr,  # of x in a phase
    X_NUMBERS: gl.constexpr,  # that there is room for
    STAGES: gl.constexpr,
    SLOT_ROWS: gl.constexpr,  # that a stage of the ring has room for
    OVERLAP: gl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    dtype: gl.constexpr = residual.dtype.element_ty
    TOKENS: gl.constexpr = 8 if X_TOKENS < 8 else X_TOKENS
    words_in_ring: gl.constexpr = gl.NVMMASharedLayout(64, 32, 3)
    scales_in_ring: gl.constexpr = gl.NVMMASharedLayout(0, 16, 2)
    word_ring = gl.allocate_shared_memory(gl.int32, [STAGES, W, SLOT_ROWS, WORDS], words_in_ring)
    scale_ring = gl.allocate_shared_memory(dtype, [STAGES, SLOT_ROWS, W], scales_in_ring)
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    all_x = gl.allocate_shared_memory(dtype, [X_NUMBERS // TURN, TURN], row)
    all_bases = gl.allocate_shared_memory(gl.float32, [MAX_COLUMNS // COLUMNS, TOKENS], row)
    norm_memory = gl.allocate_shared_memory(dtype, [HIDDEN // TURN, TURN], row)
    ring = (word_ring, scale_ring, full, free)
    tensors = (residual, heads, act, parts, qkv, mlp_norm, next_norm, counters)
    memory = (all_x, all_bases, norm_memory)
    all_tiles = (
        (o_words, o_scales), (gate_up_words, gate_up_scales), (down_words, down_scales),
        (qkv_words, qkv_scales),
    )  # fmt: skip
    gl.warp_specialize(
        [
            (
                _compute_all,
                (
                    tensors, memory, ring, num_tokens, eps, HIDDEN, HEADS, INNER, QKV_ROWS, OUT,
                    GATE_UP, DOWN, QKV, X_TOKENS, OVERLAP,
                ),
            ),
            (_copy_all_words, (all_tiles, ring, OUT, GATE_UP, DOWN, QKV)),
        ],
        [1],
        [24],
    )  # fmt: skip


class _Phase(NamedTuple):
    """A product's place in the kernel."""

    rows: int  # of a program
    first: int  # number in the ring
    turns: int
    pieces: int
    parts: int  # of K
    segment: int  # columns of x that become shared at a time
    rows_of_piece: int


class _Plan(NamedTuple):
    """How a layer is cut up."""

    num_programs: int
    stages: int
    slot_rows: int  # of a stage
    x_tokens: int
    max_columns: int  # of x in a phase
    x_numbers: int  # that there is room for
    o: _Phase
    gate_up: _Phase
    down: _Phase
    qkv: _Phase | None


MAX_X = 57344  # numbers of x in shared memory that down may have
RESERVED = 1024  # bytes of shared memory, for barriers


def _plan(
    num_tokens: int, hidden: int, heads: int, inner: int, qkv_rows: int, device: torch.device
) -> _Plan | None:
    """None: the kernel does not take them."""
    x_tokens = next_power_of_2(num_tokens)
    slot_rows = 64 if x_tokens <= TALL else 32
    num_programs = num_multiprocessors(device)
    if any(size % TURN.value for size in (hidden, heads, inner)):
        return None
    most = max(hidden, heads, MAX_X // x_tokens)
    all_parts = (2**i for i in range(5) if inner % (2**i * TURN.value) == 0)
    parts = next((parts for parts in all_parts if inner // parts <= most), None)
    if parts is None:
        return None
    num_rows = hidden, 2 * inner, qkv_rows
    num_programs = max(cdiv(n, _rows(n, num_programs)) for n in num_rows if n)
    first = 0

    def phase(n: int, k: int, parts: int = 1) -> _Phase:
        nonlocal first
        rows = _rows(n, num_programs // parts)
        rows_of_piece = gcd(rows, slot_rows)
        columns = k // parts
        segment = min(MAX_SEGMENT // x_tokens, 4096, columns & -columns)
        result = _Phase(
            rows, first, columns // TURN.value, rows // rows_of_piece, parts, segment, rows_of_piece
        )
        first += result.turns * result.pieces
        return result

    phases = phase(hidden, heads), phase(2 * inner, hidden), phase(hidden, inner, parts)
    qkv = phase(qkv_rows, hidden) if qkv_rows else None
    max_columns = max(hidden, heads, inner // parts)
    tokens = max(8, x_tokens)
    of_sums = NUM_WARPS * tokens * slot_rows * 2  # of a piece
    x_numbers = max(max_columns * x_tokens, of_sums)
    fixed = 2 * x_numbers + max_columns // COLUMNS.value * tokens * 4 + 2 * hidden
    slot = slot_rows * NUM_WARPS * (WORDS.value * 4 + 2)
    stages = (device_limits(device).shared_memory - RESERVED - fixed) // slot
    if stages < 3:
        return None
    stages = min(stages, MAX_STAGES)
    return _Plan(num_programs, stages, slot_rows, x_tokens, max_columns, x_numbers, *phases, qkv)


def _rows(n: int, num_programs: int) -> int:
    """Of a program."""
    return cdiv(n, 16 * num_programs) * 16


def _tiles(weight: PackedWeight, rows: int, is_gated: bool) -> tuple[Any, Any]:
    """Tensor descriptors of a piece's words of a turn, and of their scales.

    With is_gated a box's rows are some of the weight's first half, and as many of its second.
    """
    n, k = weight.shape
    num_blocks = k // COLUMNS.value
    # Of the rows: their shape, their distance in rows, and how many of them are in a box.
    shape, distances, box = [n], [1], [rows]
    if is_gated:
        shape, distances, box = [2, n // 2], [n // 2, 1], [2, rows // 2]
    words = TensorDescriptor(
        weight.numbers.view(torch.int32),
        [num_blocks, *shape, WORDS.value],
        [WORDS.value, *(distance * (k // 8) for distance in distances), 1],
        [NUM_WARPS, *box, WORDS.value],
        gl.NVMMASharedLayout(64, 32, len(box) + 2),
    )
    scales = TensorDescriptor(
        weight.scales,
        [*shape, num_blocks],
        [*(distance * num_blocks for distance in distances), 1],
        [*box, NUM_WARPS],
        gl.NVMMASharedLayout(0, 16, len(box) + 1),
    )
    return words, scales


def takes(heads: torch.Tensor, residual: torch.Tensor, end: LayerEnd) -> _Plan | None:
    """How `layer_end` computes it; None: not at all."""
    weights = [weight for weight in (end.o, end.gate_up, end.down, end.qkv) if weight is not None]
    is_taken = (
        0 < len(heads) <= MAX_TOKENS
        and is_hopper(heads.device)
        and heads.dtype == end.mlp_norm.dtype
        and heads.dtype != torch.float32
        and all(_is_symmetric(weight) for weight in weights)
    )
    if not is_taken:
        return None
    (hidden, width), inner = end.o.shape, end.down.shape[1]
    num_qkv_rows = 0 if end.qkv is None else end.qkv.shape[0]
    return _plan(len(heads), hidden, width, inner, num_qkv_rows, heads.device)


def _is_symmetric(weight: PackedWeight) -> bool:
    """Of 4 bits, in groups of a block's columns, in the columns' order."""
    is_plain = weight.zeros is None and weight.order is None
    return is_plain and weight.bits == 4 and weight.group_size == COLUMNS.value


def layer_end(heads: torch.Tensor, residual: torch.Tensor, end: LayerEnd) -> FinishedLayer | None:
    """See `Ops.layer_end`."""
    plan = takes(heads, residual, end)
    if plan is None:
        return None
    num_tokens, width = heads.shape
    hidden, inner = residual.shape[1], end.down.shape[1]
    device, dtype = heads.device, heads.dtype
    assert heads.is_contiguous() and residual.is_contiguous()
    act = torch.empty(num_tokens, inner, dtype=dtype, device=device)
    parts = qkv = None
    if plan.down.parts > 1:
        shape = plan.down.parts, num_tokens, hidden
        parts = torch.empty(shape, dtype=torch.float32, device=device)
    qkv_tiles: tuple[Any, Any] = (None, None)
    if end.qkv is not None:
        assert plan.qkv
        qkv = torch.empty(num_tokens, end.qkv.shape[0], dtype=dtype, device=device)
        qkv_tiles = _tiles(end.qkv, plan.qkv.rows_of_piece, is_gated=False)
    _packed_layer_kernel[(plan.num_programs,)](
        residual,
        heads,
        act,
        parts,
        qkv,
        end.mlp_norm,
        end.next_norm,
        end.counters,
        *_tiles(end.o, plan.o.rows_of_piece, is_gated=False),
        *_tiles(end.gate_up, plan.gate_up.rows_of_piece, is_gated=True),
        *_tiles(end.down, plan.down.rows_of_piece, is_gated=False),
        *qkv_tiles,
        num_tokens,
        end.eps,
        HIDDEN=hidden,
        HEADS=width,
        INNER=inner,
        QKV_ROWS=0 if qkv is None else qkv.shape[1],
        OUT=plan.o,
        GATE_UP=plan.gate_up,
        DOWN=plan.down,
        QKV=plan.qkv,
        X_TOKENS=plan.x_tokens,
        MAX_COLUMNS=plan.max_columns,
        X_NUMBERS=plan.x_numbers,
        STAGES=plan.stages,
        SLOT_ROWS=plan.slot_rows,
        num_warps=NUM_WARPS,
        maxnreg=MAX_REGISTERS,
        launch_cooperative_grid=True,  # all programs at the same time, or none
        **overlap_options(device),
    )
    return FinishedLayer(qkv)
