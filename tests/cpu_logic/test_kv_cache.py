"""Sizes of the KV cache: shapes, bytes of a block, how many blocks fit, with and without fp8."""

import json
import math

import pytest
import torch

from nanovllm import ArgumentError
from nanovllm.config import Config
from nanovllm.engine import kv_cache, startup
from nanovllm.kernels.types import FP8_DTYPE, KVCacheSpec
from nanovllm.models.decoder import kv_cache_spec

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


def specs_of(config: Config, tp_size: int = 1) -> list[KVCacheSpec]:
    spec = kv_cache_spec(config.model_config, tp_size, config.resolve_kv_cache_dtype(), 0)
    return [spec] * LAYERS


def block_bytes(config: Config, tp_size: int = 1) -> int:
    return kv_cache.block_bytes(specs_of(config, tp_size), config.kvcache_block_size)


def test_block_bytes_of_qwen3_0_6b(model):
    """2 * 28 layers * 256 tokens * 8 heads * 128 * 2 bytes; half for each of two ranks."""
    config = Config(model)
    assert block_bytes(config, 1) == 29_360_128
    assert block_bytes(config, 2) == 14_680_064


@pytest.mark.parametrize("tp_size", (1, 2, 16))
@pytest.mark.parametrize("block_size", (256, 512))
def test_block_bytes_are_those_that_are_allocated(model, tp_size, block_size):
    heads = max(1, KV_HEADS // tp_size)
    per_head = {"auto": 2 * HEAD_DIM, "fp8": HEAD_DIM + 4}
    for kv_cache_dtype, head_bytes in per_head.items():
        config = Config(model, kv_cache_dtype=kv_cache_dtype, kvcache_block_size=block_size)
        expected = 2 * LAYERS * block_size * heads * head_bytes
        assert block_bytes(config, tp_size) == expected
        specs = specs_of(config, tp_size)
        caches, memory, scales = kv_cache.allocate(specs, [3] * LAYERS, block_size, CPU)
        assert len(caches) == LAYERS
        num_bytes = memory.nbytes
        for cache in caches:
            assert cache.key.shape == cache.value.shape == (3, block_size, heads, HEAD_DIM)
            assert cache.key.dtype == cache.value.dtype == config.resolve_kv_cache_dtype()
            if kv_cache_dtype == "fp8":
                assert cache.key_scales.shape == cache.value_scales.shape == (3, heads, block_size)
                assert cache.key_scales.dtype == cache.value_scales.dtype == torch.float32
            else:
                assert cache.key_scales is cache.value_scales is None
        if scales is not None:
            num_bytes += scales.nbytes
        assert num_bytes == 3 * expected


@pytest.mark.parametrize("dtype", (torch.float16, FP8_DTYPE))
def test_layers_of_several_shapes_share_the_memory_without_overlap(dtype):
    specs = [KVCacheSpec(2, 16, dtype), KVCacheSpec(1, 64, dtype), KVCacheSpec(4, 8, dtype)]
    caches, memory, scales = kv_cache.allocate(specs, [3] * 3, 16, CPU)
    pieces = [tensor for cache in caches for tensor in cache[:2]]
    assert [piece.shape for piece in pieces[::2]] == [(3, 16, 2, 16), (3, 16, 1, 64), (3, 16, 4, 8)]
    if dtype == FP8_DTYPE:
        assert [cache.key_scales.shape for cache in caches] == [(3, 2, 16), (3, 1, 16), (3, 4, 16)]
        for number, cache in enumerate(caches):
            cache.key_scales.fill_(number)
            cache.value_scales.fill_(10 + number)
        sizes = [3 * heads * 16 for heads in (2, 2, 1, 1, 4, 4)]
        assert [part.unique().tolist() for part in scales.split(sizes)] == [
            [number] for number in (0, 10, 1, 11, 2, 12)
        ]
    else:
        assert scales is None
    for number, piece in enumerate(pieces):
        piece.fill_(number)
    assert all((piece.float() == number).all() for number, piece in enumerate(pieces))
    assert memory.numel() == sum(piece.numel() for piece in pieces)


def test_fp8_about_doubles_the_blocks(model):
    for kwargs, gpu_bytes in (({"kv_cache_memory_bytes": 10 << 30}, None), ({}, 120 << 30)):
        plain, fp8 = (
            startup.decide_num_blocks(config, [block_bytes(config)], gpu_bytes)
            for config in (Config(model, kv_cache_dtype=kind, **kwargs) for kind in ("auto", "fp8"))
        )
        assert math.isclose(fp8 / plain, 2 * HEAD_DIM / (HEAD_DIM + 4), rel_tol=0.01)  # 1.94


def test_precedence_and_refusal(model):
    fp8 = {"kv_cache_dtype": "fp8"}
    per_block = block_bytes(Config(model, **fp8))
    for given, gpu_bytes, expected in (
        ({"num_kvcache_blocks": 5, "kv_cache_memory_bytes": 1}, 0, 5),
        ({"kv_cache_memory_bytes": per_block}, 0, 1),
        ({"kv_cache_memory_bytes": 2 * per_block - 1}, None, 1),
        ({}, 7 * per_block, 7),
        ({"max_num_seqs": 1, "max_model_len": 300}, None, 2),
        ({}, None, startup.MAX_CPU_CACHE_BYTES // per_block),
    ):
        config = Config(model, **fp8, **given)
        assert startup.decide_num_blocks(config, [per_block], gpu_bytes) == expected
    config = Config(model, **fp8, kv_cache_memory_bytes=per_block - 1)
    with pytest.raises(ArgumentError, match=r"one block takes 14\.4 MiB; raise kv_cache_memory"):
        startup.decide_num_blocks(config, [per_block], None)
