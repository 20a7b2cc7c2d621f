"""Kernels compiled for GPUs that are not there: what they ask for is what those GPUs have.

Every kernel is compiled for 8.6, which has the least shared memory, up to where that is allocated.
Those whose tiles, instructions or kinds of memory depend on the GPU are compiled for the others as
well. The script tests/benchmarks/compile_all.py compiles all variants for all GPUs, to the end.
"""

import itertools

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import kernel_launches as launches
import torch
from kernel_compilation import (
    CAPABILITIES,
    SHARED_MEMORY,
    Compiled,
    Launches,
    compiling_for,
    kernels,
    uncovered,
)
from kernel_launches import Shape, launch

from nanovllm.kernels.device import DeviceLimits
from nanovllm.kernels.triton import decode_attention, moe, packed_linear, prefill_attention

FP8_CACHE = Shape(is_fp8_cache=True)
LARGEST_TILES = Shape(torch.float32, head_dim=256)
LARGEST_FP8_CACHE = Shape(torch.float32, head_dim=256, is_fp8_cache=True)
FP8_BLOCKS = Shape(is_fp8_weight=True, has_blocks=True)
ATTENTION = (launches.decode, launches.SHAPE), (launches.prefill, launches.SHAPE)
PLAN = {
    (8, 0): [(launches.decode, launches.SHAPE)],
    (8, 6): [(function, launches.SHAPE) for function in launches.ALL]
    + [(launches.decode, LARGEST_TILES)],
    (8, 9): [(launches.decode, FP8_CACHE), (launches.decode, LARGEST_FP8_CACHE)],
    (9, 0): [
        *ATTENTION,
        (launches.attention_of_new_tokens, FP8_CACHE),
        (launches.attention_of_new_tokens, launches.SHAPE),
        (launches.prefill, Shape(softcap=50.0)),
        (launches.products, launches.SHAPE),
        (launches.gated_products, launches.SHAPE),
        (launches.products_of_heads, launches.SHAPE),
        (launches.fp8_products, launches.SHAPE),
        (launches.packed_products, launches.SHAPE),
        (launches.layer_ends, launches.SHAPE),
        (launches.experts, FP8_BLOCKS),
    ],
    (10, 0): [*ATTENTION, (launches.experts, launches.SHAPE)],
    (12, 0): [*ATTENTION],
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Launches:
    all_of_them = Launches()
    for capability, calls in PLAN.items():
        with compiling_for(capability, tmp_path_factory.mktemp("triton")) as found:
            for function, shape in calls:
                launch(function, shape)
        all_of_them.compiled += found.compiled
        all_of_them.failures += found.failures
    return all_of_them


def test_the_kernels_fit_every_gpu(compiled):
    assert not compiled.problems(), "\n".join(compiled.problems())
    assert {one.capability for one in compiled.compiled} == set(CAPABILITIES)


def test_no_kernel_is_left_out(compiled):
    """A new kernel gets a line in tests/kernel_launches.py."""
    names = {one.kernel for one in compiled.compiled}
    assert uncovered(names) == set()
    assert uncovered(names - {"norm._rms_norm_kernel"}) == {"norm._rms_norm_kernel"}
    assert "launch.await_previous" in kernels(), "functions that kernels call count"


def test_launches_overlap_from_hopper_on(compiled):
    for one in compiled.compiled:
        if "OVERLAP" in one.constants:
            assert one.constants["OVERLAP"] == (one.capability >= (9, 0)), one


def test_decode_attention_takes_what_it_expects_to(compiled):
    found = [one for one in compiled.compiled if one.kernel == "decode_attention._decode_kernel"]
    assert len(found) > len(CAPABILITIES)
    for one in found:
        constants = one.constants
        is_fp8 = one.capability == (8, 9)
        itemsize = 4 if constants["HEAD_DIM"] == 256 else 2
        expected = decode_attention.shared_bytes(
            constants["TILE"],
            constants["num_stages"],
            constants["PADDED_GROUP"],
            constants["PADDED_DIM"],
            itemsize,
            1 if is_fp8 else itemsize,
        )
        assert expected - decode_attention.OTHER_SHARED_BYTES <= one.shared <= expected


def test_a_tile_that_is_too_large_is_named(tmp_path, monkeypatch):
    hopper = prefill_attention.HOPPER_CONFIGS
    monkeypatch.setattr(prefill_attention, "HALF_CONFIGS", hopper)
    with compiling_for((8, 6), tmp_path) as found:
        launch(launches.prefill)
    [problem] = found.problems()
    assert problem.startswith("prefill_attention._prefill_kernel on 8.6")
    assert "bytes of shared memory, there are 101,376" in problem


def test_what_cannot_be_compiled_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(prefill_attention, "HALF_CONFIGS", {128: (96, 64, 8, 3)})  # no power of 2
    with compiling_for((8, 6), tmp_path) as found:
        launch(launches.prefill)
    [problem] = found.problems()
    assert problem.startswith("prefill_attention._prefill_kernel on 8.6: ")


def test_tensor_memory_has_a_limit():
    fits = Compiled("a.kernel", (10, 0), {}, 4, shared=1000, tensor_memory=512)
    assert fits.problem() is None
    larger = Compiled("a.kernel", (10, 0), {}, 4, shared=1000, tensor_memory=513)
    assert "a.kernel on 10.0" in str(larger.problem())


ITEMSIZES = ((2, 2), (4, 4), (2, 1), (4, 1))  # of queries and of the cache
SIZES = list(itertools.product((16, 32, 64, 128), (16, 32), (16, 64, 128, 256), ITEMSIZES))


def choose(size, shared_memory):
    tile, group, dim, itemsizes = size
    return decode_attention.choose_tile_and_stages(tile, group, dim, *itemsizes, shared_memory)


def test_decode_attention_keeps_its_tiles_where_there_is_room():
    """As they were tuned: so many bytes of keys and values in flight, and no other limit."""
    for size in SIZES:
        tile, group, dim, itemsizes = size
        itemsize = itemsizes[1]
        if tile == 128 and itemsize > 1:
            continue  # in half precision a row alone has them, where two fit
        if (tile, group, dim, itemsizes) == (128, 32, 256, (4, 1)):
            continue  # has room for half of it
        stages = max(2, min(6, 6 * 32768 // (2 * tile * dim * itemsize)))
        assert choose(size, SHARED_MEMORY[9, 0]) == (tile, stages)


def test_packed_weights_fit_tensor_memory():
    """Where there is one: what was compiled with every tile stays the same elsewhere."""
    blackwell, hopper = (DeviceLimits((major, 0), 132, SHARED_MEMORY[9, 0]) for major in (10, 9))
    for most, tile in packed_linear.TILES.items():
        assert packed_linear.choose_tile(most, torch.bfloat16, hopper) == tile
        smaller = packed_linear.choose_tile(most, torch.bfloat16, blackwell)
        assert smaller == tile._replace(block_n=min(tile.block_n, 64))
    many = 128 * 1000
    assert moe.choose_tiles(many, 128, torch.uint8, hopper).down.block_m == 128
    assert moe.choose_tiles(many, 128, torch.uint8, blackwell).down.block_m == 64
    assert moe.choose_tiles(many, 128, torch.bfloat16, blackwell).down.block_m == 128


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_decode_attention_fits_with_every_head(capability):
    most = SHARED_MEMORY[capability]
    for size in SIZES:
        tile, stages = choose(size, most)
        assert decode_attention.shared_bytes(tile, stages, *size[1:3], *size[3]) <= most
        assert size[0] % tile == 0 and stages >= 2
