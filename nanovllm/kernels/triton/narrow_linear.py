"""A layer's products for a few tokens on Hopper, in Gluon: all of K in one program, no parts.

A program has few rows of the weights, 8 to 48, and all of their columns. Its warps share the
columns and add up their sums in shared memory. So no kernel has to add up parts, and what stands
around the product is part of it: the RMS norm of the residual ahead of QKV and of gate and up, SiLU
behind the latter, the sum with the residual behind O and down. About as many programs as there are
multiprocessors multiply the weights of a model like Qwen3-0.6B.

The weights are fetched before the wait for the kernel ahead. Straight into registers they need no
way through shared memory afterwards. By bulk copies into shared memory they need few registers, so
that a third kernel can fetch its weights as well while two others run.

Of a chunk of 64 columns each thread has twice 8 neighbours, 16 bytes: `_fragments`. The matrix
instruction takes 16 columns in another order, but of x and of the weights alike. Of 8 rows of
weights the thread with the places 2 i and 2 i + 1 has the rows i and i + 4: eight threads that read
shared memory at a time get rows that are swizzled into different banks.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanovllm.kernels.triton.hopper_prefill import start_copy
from nanovllm.kernels.triton.launch import num_multiprocessors, overlap_options, with_dry_runs

CHUNK = 64  # columns: 128 bytes, by which shared memory is swizzled
PIECE = 16  # chunks of a copy: a multiple of the warps
RUN = 8  # rows of gate, and behind them those of up: one thread gets both of a row
QKV_ROWS, GATED_ROWS, RESIDUAL_ROWS = 32, 48, 8  # of a program
NUM_WARPS = 8


@gluon.constexpr_function
def _fragments(num_warps: int, rows: int, is_swapped: bool) -> Any:
    """Of [warps, rows, CHUNK]: each warp has its part, a thread 16 bytes in a row and in others."""
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 32]]
    row = 8
    while row < rows:
        registers.append([0, row, 0])
        row *= 2
    places = [4, 1, 2] if is_swapped else [1, 2, 4]
    lanes = [[0, 0, 8], [0, 0, 16], *([0, place, 0] for place in places)]
    warps = [[1 << i, 0, 0] for i in range(num_warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [num_warps, rows, 64])


@gluon.constexpr_function
def _product_layout(num_warps: int) -> Any:
    """Of sums [warps, 16 n, 8 m] by the matrix instruction of a warp."""
    return gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def _rows_of(layout: Any) -> Any:
    return gl.SliceLayout(0, gl.SliceLayout(2, layout))


@gluon.constexpr_function
def _columns_of(layout: Any) -> Any:
    return gl.SliceLayout(0, gl.SliceLayout(1, layout))


@gluon.constexpr_function
def _warps_of(layout: Any) -> Any:
    return gl.SliceLayout(1, gl.SliceLayout(2, layout))


@gluon.constexpr_function
def _squares_layout(num_warps: int, tokens: int) -> Any:
    """Of [tokens, warps]: each thread has all that belongs to its tokens of `_fragments`."""
    num_bits = num_warps.bit_length() - 1
    registers = [[0, 1 << i] for i in range(num_bits)]
    token = 8
    while token < tokens:
        registers.append([token, 0])
        token *= 2
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[0, 0]] * num_bits, [], [tokens, num_warps]
    )


@gluon.jit
def _nothing():
    """An empty tuple to be extended, for the type checker of any length."""
    return ()


@gluon.jit
def _columns(layout: gl.constexpr, segment: gl.constexpr):
    """The columns [warps, 1, CHUNK] of a segment, of which each warp has a chunk."""
    NUM_WARPS: gl.constexpr = gl.num_warps()
    warp = gl.arange(0, NUM_WARPS, layout=_warps_of(layout))[:, None, None]
    column = gl.arange(0, 64, layout=_columns_of(layout))[None, None, :]
    return (segment * NUM_WARPS + warp) * 64 + column


@gluon.jit
def _row(first_row, tile: gl.constexpr, place, N: gl.constexpr, IS_GATED: gl.constexpr):
    """The weight's row at a place of a program's tile of 16."""
    if IS_GATED:
        return place // 8 * (N // 2) + first_row // 2 + tile * 8 + place % 8
    else:
        return first_row + tile * 16 + place


@gluon.jit
def _load_tile(
    weight, first_row, TILE: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
    IS_GATED: gl.constexpr,
):  # fmt: skip
    """A tile's segments [warps, ROWS, CHUNK] from memory, as `_fragments` with swapped rows."""
    NUM_WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = _fragments(NUM_WARPS, ROWS, True)
    place = gl.arange(0, ROWS, layout=_rows_of(layout))[None, :, None]
    pointers = weight + _row(first_row, TILE, place, N, IS_GATED) * K
    segments = _nothing()
    for segment in gl.static_range(K // (64 * NUM_WARPS)):
        values = gl.load(pointers + _columns(layout, segment), cache_modifier=".cg")
        segments += (values,)
    return segments


@gluon.jit
def _start_copies(
    weight_tiles, pieces, arrived, first_row, TILES: gl.constexpr, IS_GATED: gl.constexpr
):
    """Start the copies of all of a program's weights, tile after tile."""
    PIECE: gl.constexpr = pieces.shape[1]
    PIECES_OF_TILE: gl.constexpr = pieces.shape[0] // TILES
    for tile in gl.static_range(TILES):
        mbarrier.init(arrived.index(tile), count=1)
    for tile in gl.static_range(TILES):
        barrier = arrived.index(tile)
        mbarrier.expect(barrier, PIECES_OF_TILE * weight_tiles.block_type.nbytes)
        for part in gl.static_range(PIECES_OF_TILE):
            piece = pieces.index(tile * PIECES_OF_TILE + part)
            if IS_GATED:
                place = piece.reshape(weight_tiles.block_shape)
                run = first_row // 16 + tile
                start_copy(weight_tiles, [part * PIECE, run, 0, 0, 0], barrier, place)
            else:
                row = first_row + tile * 16
                start_copy(weight_tiles, [part * PIECE, row, 0], barrier, piece)


@gluon.jit
def _read_tile(pieces, arrived, TILE: gl.constexpr, K: gl.constexpr):
    """`_load_tile` from shared memory, once it has arrived."""
    NUM_WARPS: gl.constexpr = gl.num_warps()
    CHUNKS: gl.constexpr = K // 64
    PIECE: gl.constexpr = pieces.shape[1]
    layout: gl.constexpr = _fragments(NUM_WARPS, pieces.shape[2], True)
    mbarrier.wait(arrived.index(TILE), 0)
    segments = _nothing()
    for chunk in gl.static_range(0, CHUNKS, NUM_WARPS):
        piece = pieces.index((TILE * CHUNKS + chunk) // PIECE)
        segments += (piece.slice(chunk % PIECE, NUM_WARPS).load(layout),)
    return segments


@gluon.jit
def _load_x(x, num_tokens, BLOCK_M: gl.constexpr, K: gl.constexpr):
    """x [T, K] in segments [warps, BLOCK_M, CHUNK], as `_fragments`."""
    NUM_WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = _fragments(NUM_WARPS, BLOCK_M, False)
    token = gl.arange(0, BLOCK_M, layout=_rows_of(layout))[None, :, None]
    segments = _nothing()
    for segment in gl.static_range(K // (64 * NUM_WARPS)):
        pointers = x + token * K + _columns(layout, segment)
        # Past the multiprocessor's cache, which other programs' writes do not reach.
        values = gl.load(pointers, mask=token < num_tokens, other=0.0, cache_modifier=".cg")
        segments += (values,)
    return segments


@gluon.jit
def _norm(x, weights, eps, K: gl.constexpr):
    """The RMS norm of segments [warps, BLOCK_M, CHUNK], rounded as `norm` does."""
    NUM_WARPS: gl.constexpr = gl.num_warps()
    BLOCK_M: gl.constexpr = x[0].shape[1]
    dtype: gl.constexpr = x[0].dtype
    squares = x[0].to(gl.float32) * x[0].to(gl.float32)
    for segment in gl.static_range(1, len(x)):
        squares += x[segment].to(gl.float32) * x[segment].to(gl.float32)
    sums = gl.allocate_shared_memory(
        gl.float32, [BLOCK_M, NUM_WARPS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    sums.store(gl.sum(squares, axis=2).permute(1, 0))
    mean_square = gl.sum(sums.load(_squares_layout(NUM_WARPS, BLOCK_M)), axis=1) / K
    layout: gl.constexpr = _rows_of(_fragments(NUM_WARPS, BLOCK_M, False))
    inverse = gl.convert_layout(gl.rsqrt(mean_square + eps), layout, assert_trivial=True)
    normed = _nothing()
    for segment in gl.static_range(len(x)):
        values = (x[segment].to(gl.float32) * inverse[None, :, None]).to(dtype)
        normed += (values * weights[segment],)
    return normed


@gluon.jit
def _in_places(x):
    """A segment [warps, ROWS, CHUNK] with swapped rows, by their places instead."""
    W: gl.constexpr = x.shape[0]
    ROWS: gl.constexpr = x.shape[1]
    return x.reshape([W, ROWS // 8, 2, 4, 64]).permute(0, 1, 3, 2, 4).reshape([W, ROWS, 64])


@gluon.jit
def _row_of_place(place):
    """The row that has a place: of each 8 places the even ones have the first rows."""
    return place // 8 * 8 + place % 2 * 4 + place % 8 // 2


@gluon.jit
def _multiply(a, b):
    """a b^T for each warp: a [warps, M, CHUNK], b [warps, N, CHUNK]."""
    NUM_WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = _product_layout(NUM_WARPS)
    a = gl.convert_layout(a, gl.DotOperandLayout(0, layout, 8), assert_trivial=True)
    b = b.permute(0, 2, 1)
    b = gl.convert_layout(b, gl.DotOperandLayout(1, layout, 8), assert_trivial=True)
    acc = gl.zeros([NUM_WARPS, a.shape[1], b.shape[2]], gl.float32, layout)
    return mma_v2(a, b, acc)


@gluon.jit
def _multiply_tile(tile, x):
    """A tile of weights times x, all segments: [warps, 16, BLOCK_M], a sum for each warp."""
    # Sums of their own: a chain of matrix instructions takes its length in latencies.
    product = _multiply(_in_places(tile[0]), x[0])
    for segment in gl.static_range(1, len(x)):
        product += _multiply(_in_places(tile[segment]), x[segment])
    return product


@gluon.jit
def _halves(x):
    """x [warps, 16, N] -> its first and last rows, [warps, 8, N] each."""
    return gl.split(x.reshape([x.shape[0], 2, 8, x.shape[2]]).permute(0, 2, 3, 1))


@gluon.jit
def _stacked(a, b):
    """a, b [warps, ROWS, N] -> [warps, 2 ROWS, N]."""
    both = gl.join(a, b).permute(0, 3, 1, 2)
    return both.reshape([a.shape[0], 2 * a.shape[1], a.shape[2]])


@gluon.jit
def _share(products):
    """Products [warps, 32 rows, BLOCK_M] into shared memory, transposed."""
    W: gl.constexpr = products.shape[0]
    # Swizzled so that neither the stores nor the loads meet in a bank.
    layout: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [2, 1, 0])
    shared = gl.allocate_shared_memory(gl.float32, [W, products.shape[2], 32], layout)
    shared.store(products.permute(0, 2, 1))
    return shared


@gluon.constexpr_function
def _sums_layout(num_warps: int, width: int) -> Any:
    """Of products [warps, tokens, width]: a thread has those of all warps."""
    return gl.BlockedLayout(
        [num_warps, 1, 1], [1, 32 // width, width], [1, num_warps, 1], [2, 1, 0]
    )


@with_dry_runs
@gluon.jit(do_not_specialize=["num_tokens"])
def _normed_linear_kernel(
    out,  # [T, N]; IS_GATED: [T, N / 2]
    residual,  # [T, K]
    norm_weight,  # [K]
    weight,  # [N, K]; BY_COPIES: as a tensor descriptor, see `_tiles`
    num_tokens,
    eps,
    N: gl.constexpr,
    K: gl.constexpr,
    ROWS: gl.constexpr,  # of a program
    IS_GATED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    PIECE: gl.constexpr,
    BY_COPIES: gl.constexpr,
    TILES_AHEAD: gl.constexpr,  # read from shared memory while x comes
    OVERLAP: gl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    NUM_WARPS: gl.constexpr = gl.num_warps()
    TILES: gl.constexpr = ROWS // 16
    dtype: gl.constexpr = norm_weight.dtype.element_ty
    # Programs past the last one do its work again, and leave the results to it.
    program = gl.minimum(gl.program_id(0), N // ROWS - 1)
    is_own = gl.program_id(0) < N // ROWS
    # No kernel writes weights: they come before the wait.
    weights = _nothing()
    if BY_COPIES:
        PIECES: gl.constexpr = TILES * (K // 64) // PIECE
        swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3)
        pieces = gl.allocate_shared_memory(dtype, [PIECES, PIECE, 16, 64], swizzled)
        arrived = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
        _start_copies(weight, pieces, arrived, program * ROWS, TILES, IS_GATED)
    else:
        for tile in gl.static_range(TILES):
            weights += (_load_tile(weight, program * ROWS, tile, 16, N, K, IS_GATED),)
    x_layout: gl.constexpr = _fragments(NUM_WARPS, BLOCK_M, False)
    norm_weights = _nothing()
    for segment in gl.static_range(K // (64 * NUM_WARPS)):
        norm_weights += (gl.load(norm_weight + _columns(x_layout, segment)),)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    x = _load_x(residual, num_tokens, BLOCK_M, K)
    if BY_COPIES:
        for tile in gl.static_range(TILES_AHEAD):
            weights += (_read_tile(pieces, arrived, tile, K),)
    x = _norm(x, norm_weights, eps, K)
    products = _nothing()
    for tile in gl.static_range(TILES):
        if BY_COPIES and tile >= TILES_AHEAD:
            weights += (_read_tile(pieces, arrived, tile, K),)
        products += (_multiply_tile(weights[tile], x),)

    sums_layout: gl.constexpr = _sums_layout(NUM_WARPS, 32)
    token = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, gl.SliceLayout(0, sums_layout)))
    place = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(0, sums_layout)))
    row = _row_of_place(place)
    if IS_GATED:
        gl.static_assert(TILES == 3)
        gate0, up0 = _halves(products[0])
        gate1, up1 = _halves(products[1])
        gate2, up2 = _halves(products[2])
        gates = _share(_stacked(_stacked(gate0, gate1), _stacked(gate2, gate2)))
        ups = _share(_stacked(_stacked(up0, up1), _stacked(up2, up2)))
        gate = gl.sum(gates.load(sums_layout), axis=0).to(dtype).to(gl.float32)
        up = gl.sum(ups.load(sums_layout), axis=0).to(dtype).to(gl.float32)
        act = (gate / (1 + gl.exp(-gate))).to(dtype).to(gl.float32)
        values = (act * up).to(dtype)
    else:
        gl.static_assert(TILES == 2)
        shared = _share(_stacked(products[0], products[1]))
        values = gl.sum(shared.load(sums_layout), axis=0).to(dtype)
    WIDTH: gl.constexpr = N // 2 if IS_GATED else N
    COLUMNS: gl.constexpr = ROWS // 2 if IS_GATED else ROWS
    pointers = out + token[:, None] * WIDTH + (program * COLUMNS + row)[None, :]
    mask = (token < num_tokens)[:, None] & (row < COLUMNS)[None, :] & is_own
    gl.store(pointers, values, mask=mask)


@with_dry_runs
@gluon.jit(do_not_specialize=["num_tokens"])
def _add_linear_kernel(
    residual,  # [T, N], changed
    x,  # [T, K]
    weight,  # as of `_normed_linear_kernel`
    num_tokens,
    N: gl.constexpr,
    K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    PIECE: gl.constexpr,
    BY_COPIES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    ROWS: gl.constexpr = 8  # of a program
    NUM_WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = residual.dtype.element_ty
    # Programs past the last one do its work again, and leave the results to it.
    program = gl.minimum(gl.program_id(0), N // ROWS - 1)
    is_own = gl.program_id(0) < N // ROWS
    if BY_COPIES:
        swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3)
        pieces = gl.allocate_shared_memory(dtype, [K // 64 // PIECE, PIECE, ROWS, 64], swizzled)
        arrived = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        _start_copies(weight, pieces, arrived, program * ROWS, 1, False)
    else:
        weights = _load_tile(weight, program * ROWS, 0, ROWS, N, K, False)
    layout: gl.constexpr = _sums_layout(NUM_WARPS, ROWS)
    token = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, gl.SliceLayout(0, layout)))[:, None]
    place = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(0, layout)))[None, :]
    pointers = residual + token * N + program * ROWS + _row_of_place(place)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    x = _load_x(x, num_tokens, BLOCK_M, K)
    addend = gl.load(pointers, mask=token < num_tokens, other=0.0, cache_modifier=".cg")
    if BY_COPIES:
        weights = _read_tile(pieces, arrived, 0, K)
    products = _nothing()
    for segment in gl.static_range(len(x)):
        rows = x[segment]
        if BLOCK_M == 8:
            rows = _stacked(rows, gl.zeros_like(rows))
        products += (_multiply(rows, _in_places(weights[segment])),)
    # Sums of their own: a chain of matrix instructions takes its length in latencies.
    product = products[0]
    for segment in gl.static_range(1, len(x)):
        product += products[segment]
    if BLOCK_M == 8:
        product = _halves(product)[0]
    shared = gl.allocate_shared_memory(
        gl.float32, [NUM_WARPS, BLOCK_M, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    shared.store(product)
    values = gl.sum(shared.load(layout), axis=0).to(dtype).to(gl.float32)
    mask = (token < num_tokens) & is_own
    gl.store(pointers, (values + addend.to(gl.float32)).to(dtype), mask=mask)


@cache
def _layout(rank: int) -> Any:
    return gl.NVMMASharedLayout(128, 16, rank)


def _tiles(weight: torch.Tensor, rows: int, is_gated: bool) -> Any:
    """A tensor descriptor of pieces [PIECE, rows, CHUNK] of a weight [N, K], chunk by chunk.

    With is_gated RUN rows are those of the weight's first half, and RUN those of its second.
    """
    n, k = weight.shape
    if not is_gated:
        shape, strides, block = [k // CHUNK, n, CHUNK], [CHUNK, k, 1], [PIECE, rows, CHUNK]
        return TensorDescriptor(weight, shape, strides, block, _layout(3))
    shape = [k // CHUNK, n // 2 // RUN, 2, RUN, CHUNK]
    strides = [CHUNK, RUN * k, n // 2 * k, k, 1]
    return TensorDescriptor(weight, shape, strides, [PIECE, 1, 2, RUN, CHUNK], _layout(5))


class Way(NamedTuple):
    """How a product's weights come.

    Attributes:
        by_copies: through shared memory.
        num_warps: 4, 8 or 16.
        tiles_ahead: of 16 rows (8 of O and down), read from shared memory while x comes.
        max_registers: of a thread; None: as many as it takes.
        fills_device: launch as many programs as there are multiprocessors, if there are fewer, so
            that no multiprocessor has room for two of them while others have one.
    """

    by_copies: bool
    num_warps: int
    tiles_ahead: int = 0
    max_registers: int | None = None
    fills_device: bool = False

    def options(self) -> dict[str, Any]:
        """Of a launch."""
        return {"num_warps": self.num_warps, "maxnreg": self.max_registers}

    def grid(self, num_programs: int, device: torch.device) -> tuple[int]:
        """Of a launch of at least so many programs."""
        return (max(num_programs, num_multiprocessors(device) if self.fills_device else 0),)


def padded_tokens(num_tokens: int) -> int:
    """The tokens of a program: 8, 16 or 32."""
    return 8 if num_tokens <= 8 else 16 if num_tokens <= 16 else 32


def normed_linear(
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    is_gated: bool,
    way: Way,
) -> torch.Tensor:
    """norm(residual [T, K]) weight^T [T, N]; is_gated: with SiLU, [T, N / 2], as `gated_linear`.

    T is at most 32, K a multiple of 1,024; N is a multiple of 32, or of 48 if is_gated.
    """
    (num_tokens, k), n = residual.shape, weight.shape[0]
    rows = GATED_ROWS if is_gated else QKV_ROWS
    assert residual.is_contiguous() and weight.is_contiguous()
    assert n % rows == 0 and k % (PIECE * CHUNK) == 0
    width = n // 2 if is_gated else n
    out = torch.empty(num_tokens, width, dtype=residual.dtype, device=residual.device)
    _normed_linear_kernel[way.grid(n // rows, residual.device)](
        out,
        residual,
        norm_weight,
        _tiles(weight, 16, is_gated) if way.by_copies else weight,
        num_tokens,
        eps,
        N=n,
        K=k,
        ROWS=rows,
        IS_GATED=is_gated,
        BLOCK_M=padded_tokens(num_tokens),
        PIECE=PIECE,
        BY_COPIES=way.by_copies,
        TILES_AHEAD=min(way.tiles_ahead, rows // 16),
        **way.options(),
        **overlap_options(residual.device),
    )
    return out


def add_linear(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, way: Way) -> None:
    """residual [T, N] += x [T, K] weight^T, both rounded as `add_rms_norm` does.

    T is at most 32, K a multiple of 1,024, N a multiple of 8.
    """
    (num_tokens, k), n = x.shape, weight.shape[0]
    assert x.is_contiguous() and weight.is_contiguous() and residual.is_contiguous()
    assert n % RESIDUAL_ROWS == 0 and k % (PIECE * CHUNK) == 0
    _add_linear_kernel[way.grid(n // RESIDUAL_ROWS, x.device)](
        residual,
        x,
        _tiles(weight, RESIDUAL_ROWS, False) if way.by_copies else weight,
        num_tokens,
        N=n,
        K=k,
        BLOCK_M=padded_tokens(num_tokens),
        PIECE=PIECE,
        BY_COPIES=way.by_copies,
        **way.options(),
        **overlap_options(x.device),
    )
