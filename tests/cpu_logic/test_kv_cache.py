"""Sizes of the KV cache: shapes, bytes of a block, how many blocks fit, with and without fp8."""

import json
import math

import pytest
import torch

from nanovllm import ArgumentError
from nanovllm.config import Config
from nanovllm.engine import kv_cache
from nanovllm.kernels.ops import FP8_DTYPE

CPU = torch.device("cpu")
LAYERS, KV_HEADS, HEAD_DIM = 28, 8, 128


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The config.json of a model of Qwen3-0.6B's shape."""
    directory = tmp_path_factory.mktemp("model")
    raw = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(raw))
    return str(directory)


def test_dtype_follows_the_model_or_is_fp8(model):
    def dtype(**kwargs):
        return Config(model, **kwargs).resolve_kv_cache_dtype()

    assert dtype() == torch.bfloat16
    assert dtype(dtype="float16") == torch.float16
    assert dtype(kv_cache_dtype="fp8") == FP8_DTYPE == torch.float8_e4m3fn
    assert dtype(kv_cache_dtype="fp8_e4m3", dtype="float32") == FP8_DTYPE


def test_block_bytes_of_qwen3_0_6b(model):
    """2 * 28 layers * 256 tokens * 8 heads * 128 * 2 bytes; half for each of two ranks."""
    config = Config(model)
    assert kv_cache.block_bytes(config, 1) == 29_360_128
    assert kv_cache.block_bytes(config, 2) == 14_680_064


@pytest.mark.parametrize("tp_size", (1, 2, 16))
@pytest.mark.parametrize("block_size", (256, 512))
def test_block_bytes_are_those_that_are_allocated(model, tp_size, block_size):
    heads = max(1, KV_HEADS // tp_size)
    per_head = {"auto": 2 * HEAD_DIM, "fp8": HEAD_DIM + 4}
    for kv_cache_dtype, head_bytes in per_head.items():
        config = Config(model, kv_cache_dtype=kv_cache_dtype, kvcache_block_size=block_size)
        expected = 2 * LAYERS * block_size * heads * head_bytes
        assert kv_cache.block_bytes(config, tp_size) == expected
        cache, scales = kv_cache.allocate(config, tp_size, 3, CPU)
        assert cache.shape == (2, LAYERS, 3, block_size, heads, HEAD_DIM)
        assert cache.dtype == config.resolve_kv_cache_dtype()
        num_bytes = cache.nbytes
        if kv_cache_dtype == "fp8":
            assert scales.shape == (2, LAYERS, 3, heads, block_size)
            assert scales.dtype == torch.float32
            num_bytes += scales.nbytes
        else:
            assert scales is None
        assert num_bytes == 3 * expected


def test_fp8_about_doubles_the_blocks(model):
    for kwargs, gpu_bytes in (({"kv_cache_memory_bytes": 10 << 30}, None), ({}, 120 << 30)):
        plain, fp8 = (
            kv_cache.decide_num_blocks(Config(model, kv_cache_dtype=kind, **kwargs), 1, gpu_bytes)
            for kind in ("auto", "fp8")
        )
        assert math.isclose(fp8 / plain, 2 * HEAD_DIM / (HEAD_DIM + 4), rel_tol=0.01)  # 1.94


def test_precedence_and_refusal(model):
    fp8 = {"kv_cache_dtype": "fp8"}
    per_block = kv_cache.block_bytes(Config(model, **fp8), 1)
    for given, gpu_bytes, expected in (
        ({"num_kvcache_blocks": 5, "kv_cache_memory_bytes": 1}, 0, 5),
        ({"kv_cache_memory_bytes": per_block}, 0, 1),
        ({"kv_cache_memory_bytes": 2 * per_block - 1}, None, 1),
        ({}, 7 * per_block, 7),
        ({"max_num_seqs": 1, "max_model_len": 300}, None, 2),
        ({}, None, kv_cache.MAX_CPU_CACHE_BYTES // per_block),
    ):
        assert kv_cache.decide_num_blocks(Config(model, **fp8, **given), 1, gpu_bytes) == expected
    config = Config(model, **fp8, kv_cache_memory_bytes=per_block - 1)
    with pytest.raises(ArgumentError, match=r"one block takes 14\.4 MiB; raise kv_cache_memory"):
        kv_cache.decide_num_blocks(config, 1, None)
