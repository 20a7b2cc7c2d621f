"""Copies of K/V within the cache: what a new block shares with the beginning of another one."""

import torch
import triton.language as tl

from nanovllm.kernels.cache_units import COPY_UNIT
from nanovllm.kernels.torch_ops import copy_scales
from nanovllm.kernels.triton.launch import await_previous, cdiv, jit, overlap_options
from nanovllm.kernels.types import KVCache

BLOCK = 4096  # int16 words of K and as many of V that one program copies


# The pairs are a part of one packed buffer: no recompilation for their alignment.
@jit(do_not_specialize_on_alignment=["copies"])
def _copy_units_kernel(
    key,  # [units, UNIT_WORDS] int16
    value,
    copies,  # [C, 2] int32, (target, source)
    UNIT_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    await_previous(OVERLAP)
    target = tl.load(copies + 2 * tl.program_id(0)).to(tl.int64)
    source = tl.load(copies + 2 * tl.program_id(0) + 1).to(tl.int64)
    if target == source:
        return
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_unit = word < UNIT_WORDS
    keys = tl.load(key + source * UNIT_WORDS + word, mask=in_unit)
    values = tl.load(value + source * UNIT_WORDS + word, mask=in_unit)
    tl.store(key + target * UNIT_WORDS + word, keys, mask=in_unit)
    tl.store(value + target * UNIT_WORDS + word, values, mask=in_unit)


def copy_units(cache: KVCache, copies: torch.Tensor) -> None:
    """See `Ops.copy_units`."""
    if len(copies) == 0:
        return
    key, value = cache.key.view(torch.int16), cache.value.view(torch.int16)
    unit_words = COPY_UNIT * key[0, 0].numel()
    _copy_units_kernel[(len(copies), cdiv(unit_words, BLOCK))](
        key,
        value,
        copies,
        UNIT_WORDS=unit_words,
        BLOCK=BLOCK,
        num_warps=4,
        **overlap_options(key.device),
    )
    copy_scales(cache, copies)
