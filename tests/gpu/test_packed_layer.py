"""What follows attention in one kernel, with 4-bit weights, against float32; and in an engine."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_packed_linear import packed_weight, randn
from tiny_models import save_model

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton.launch import is_hopper
from nanovllm.kernels.triton.ops import TritonKernels
from nanovllm.kernels.triton.packed_layer import layer_end
from nanovllm.kernels.types import LayerEnd, PackedWeight

EPS = 1e-6
MAX_ERROR = 6e-3  # of a norm, relative; rounding to bfloat16 alone is 1.7e-3
# Hidden size, columns of O, of down, rows of QKV.
SMALL, QWEN3_8B, QWEN3_14B = (
    (1024, 2048, 3072, 1552),  # most programs have no rows of O
    (4096, 4096, 12288, 6144),
    (5120, 5120, 17408, 7168),
)


@pytest.fixture(autouse=True)
def on_hopper() -> None:
    if not is_hopper(torch.device("cuda")):
        pytest.skip("a kernel for Hopper")


def new_end(sizes: tuple[int, ...], dtype: torch.dtype, has_qkv: bool = True) -> LayerEnd:
    hidden, heads, inner, qkv = sizes

    def weight(n: int, k: int) -> PackedWeight:
        return packed_weight(n, k, 4, 128, False, dtype)

    norms = [(torch.rand(hidden, device="cuda") + 0.5).to(dtype) for _ in range(2)]
    counters = torch.zeros(4, dtype=torch.int32, device="cuda")
    of_next = (norms[1], weight(qkv, hidden)) if has_qkv else (None, None)
    parts = weight(hidden, heads), norms[0], weight(2 * inner, hidden), weight(hidden, inner)
    return LayerEnd(*parts, *of_next, EPS, counters)


def exact(heads: torch.Tensor, residual: torch.Tensor, end: LayerEnd) -> list[torch.Tensor]:
    """The residual and QKV, in float32, rounded where modules on their own would."""
    dtype = heads.dtype

    def product(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        return F.linear(x.float(), torch_ops.dequantize_packed(weight, torch.float32)).to(dtype)

    residual = residual + product(heads, end.o)
    normed = torch_ops.rms_norm(residual, end.mlp_norm, EPS)
    residual = residual + product(torch_ops.silu_and_mul(product(normed, end.gate_up)), end.down)
    if end.qkv is None:
        return [residual]
    return [residual, product(torch_ops.rms_norm(residual, end.next_norm, EPS), end.qkv)]


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("sizes", "dtype", "num_tokens"),
    [
        *((SMALL, torch.bfloat16, n) for n in (1, 3, 8)),
        (SMALL, torch.float16, 2),
        *((QWEN3_8B, torch.bfloat16, n) for n in (1, 2, 4, 7)),
        (QWEN3_14B, torch.bfloat16, 1),
    ],
)
def test_layer_equals_float32(sizes, dtype, num_tokens) -> None:
    """Launch behind launch in a graph, with memory full of NaN; the same every time."""
    torch.manual_seed(num_tokens)
    end = new_end(sizes, dtype)
    heads = randn(num_tokens, sizes[1], dtype=dtype)
    start = residual = randn(num_tokens, sizes[0], dtype=dtype)

    def forward() -> list[torch.Tensor]:
        residual, results = start.clone(), []
        for _ in range(3):
            poison = torch.full((8, num_tokens, sizes[2]), float("nan"), device="cuda")
            del poison  # the allocator hands the same memory out again
            finished = layer_end(heads, residual, end)
            assert finished is not None and finished.qkv is not None
            results += [residual.clone(), finished.qkv]
        return results

    results = forward()
    for layer in range(3):
        expected = exact(heads, residual, end)
        residual = results[2 * layer]
        for result, right in zip(results[2 * layer :], expected, strict=False):
            assert error(result, right) < MAX_ERROR
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        in_graph = forward()
    for _ in range(10):
        graph.replay()
        for result, right in zip(in_graph, results, strict=True):
            assert torch.equal(result, right)


def test_last_layer_and_what_is_not_taken() -> None:
    end = new_end(SMALL, torch.bfloat16, has_qkv=False)
    heads, start = randn(5, 2048), randn(5, 1024)
    for _ in range(2):
        residual = start.clone()
        finished = layer_end(heads, residual, end)
        assert finished is not None and finished.qkv is None
        assert error(residual, exact(heads, start, end)[0]) < MAX_ERROR
    order = torch.arange(2048, device="cuda", dtype=torch.int32)
    others = [
        end._replace(o=replace(end.o, order=order)),
        end._replace(down=packed_weight(1024, 3072, 4, 128, True, torch.bfloat16)),
        end._replace(gate_up=packed_weight(6144, 1024, 4, 64, False, torch.bfloat16)),
        end._replace(down=packed_weight(1024, 3072, 8, 128, False, torch.bfloat16)),
    ]
    assert all(layer_end(heads, residual, other) is None for other in others)
    assert layer_end(randn(9, 2048), randn(9, 1024), end) is None
    assert layer_end(randn(0, 2048), randn(0, 1024), end) is None


def test_engine_with_and_without_it(tmp_path, monkeypatch) -> None:
    """Log-probabilities of the tokens of one request, and of seven that share steps."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3}
    save_model(tmp_path, **sizes, head_dim=64, num_attention_heads=16, num_key_value_heads=4)
    num_calls: Counter[int] = Counter()

    def counted(heads, residual, end):
        finished = layer_end(heads, residual, end)
        num_calls[len(heads)] += finished is not None
        return finished

    def logprobs() -> torch.Tensor:
        settings = {"max_num_seqs": 16, "num_kvcache_blocks": 64, "max_model_len": 256}
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0)
        prompts = [[5, 6, 7 + i] for i in range(8)]
        with LLM(str(tmp_path), quantization="int4", dtype="bfloat16", **settings) as llm:
            outputs = llm.generate(prompts[:1], params, use_tqdm=False)
            outputs += llm.generate(prompts[1:], params, use_tqdm=False)
        assert len({tuple(output["token_ids"]) for output in outputs}) > 4
        return torch.tensor([output["cumulative_logprob"] for output in outputs])

    monkeypatch.setattr(TritonKernels, "layer_end", staticmethod(counted))
    result = logprobs()
    assert num_calls[1] and num_calls[8]
    monkeypatch.setattr(TritonKernels, "layer_end", staticmethod(lambda *_: None))
    torch.testing.assert_close(result, logprobs(), rtol=0, atol=0.2)
