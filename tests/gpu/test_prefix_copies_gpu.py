"""Copies of K/V between blocks on the GPU: the kernel, and the engine with it."""

import random

import pytest
import torch
from tiny_models import VOCAB_SIZE, save_model

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import torch_ops
from nanovllm.kernels.cache_units import COPY_UNIT, MIN_COPIED_TOKENS
from nanovllm.kernels.device import device_limits
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.types import FP8_DTYPE, FP8_MIN_CAPABILITY, KVCache

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

DEVICE = torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("heads", [(8, 128), (2, 80), (3, 6)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, FP8_DTYPE])
def test_copy_units(dtype, heads):
    is_fp8 = dtype == FP8_DTYPE
    if is_fp8 and device_limits(DEVICE).capability < FP8_MIN_CAPABILITY:
        pytest.skip("the GPU does not convert fp8")
    ops = select_ops("triton", DEVICE, torch.bfloat16, 128, compile_torch_ops=False)
    torch.manual_seed(0)
    num_heads, head_dim = heads
    memory = torch.randn(2, 200, 256, num_heads, head_dim, device=DEVICE).to(dtype)
    scales = torch.randn(2, 200, num_heads, 256, device=DEVICE) if is_fp8 else ()
    units = torch.randperm(200 * 256 // COPY_UNIT, device=DEVICE).int()
    # Many copies of few units; no target is a source, but for units that stay what they are.
    copies = torch.stack([units[:600], units[600 + torch.arange(600, device=DEVICE) % 7]], 1)
    copies = torch.cat([copies, copies[:9, 1:].expand(-1, 2)])
    expected = KVCache(*memory.clone(), *(scales.clone() if is_fp8 else ()))
    torch_ops.copy_units(expected, copies)
    cache = KVCache(*memory, *scales)
    ops.copy_units(cache, copies[:0].contiguous())
    ops.copy_units(cache, copies.contiguous())
    for got, wanted in zip(cache, expected, strict=True):
        if got is not None and wanted is not None:
            assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_tokens_are_those_without_a_prefix_cache(tmp_path, kv_cache_dtype):
    if kv_cache_dtype == "fp8" and device_limits(DEVICE).capability < FP8_MIN_CAPABILITY:
        pytest.skip("the GPU does not convert fp8")
    model = str(save_model(tmp_path / "tiny"))
    rng = random.Random(7)
    stem = [rng.randrange(VOCAB_SIZE) for _ in range(470)]
    prompts = [stem + [rng.randrange(VOCAB_SIZE) for _ in range(3 + n)] for n in range(40)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    settings = {"dtype": "float32", "kv_cache_dtype": kv_cache_dtype, "num_kvcache_blocks": 256}
    results = []
    for enable_prefix_caching in (True, False):
        with LLM(
            model, max_model_len=1024, enable_prefix_caching=enable_prefix_caching, **settings
        ) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            results.append([output["token_ids"] for output in outputs])
            spared = {output.num_cached_tokens for output in outputs[1:]}
            assert spared == ({464} if enable_prefix_caching else {0})
            # The next turn goes on within a block. Its K/V are those of decode steps.
            turns = [[*p, *o["token_ids"], *p[:30]] for p, o in zip(prompts, outputs, strict=True)]
            outputs = llm.generate(turns, params, use_tqdm=False)
            if kv_cache_dtype == "auto":  # in fp8 they are rounded from other last bits
                results[-1] += [output["token_ids"] for output in outputs]
            for prompt, output in zip(prompts, outputs, strict=True):
                known = (len(prompt) + 19) // COPY_UNIT * COPY_UNIT if enable_prefix_caching else 0
                if known % 256 < MIN_COPIED_TOKENS:
                    known -= known % 256
                assert output.num_cached_tokens == known
    assert results[0] == results[1]
