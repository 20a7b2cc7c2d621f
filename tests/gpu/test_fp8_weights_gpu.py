"""fp8 weights on Hopper: products against float64, and engines against bfloat16's."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fp8_models import save_fp8
from tiny_models import FAMILIES, save_model

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import torch_ops
from nanovllm.kernels.triton import fp8_linear as triton_fp8_linear
from nanovllm.kernels.triton.launch import has_bulk_copies
from nanovllm.kernels.triton.tiled_linear import tiled_linear
from nanovllm.kernels.types import FP8_BLOCK, FP8_DTYPE, LinearOutput, PartialSums

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
    reason="products with fp8 weights are for compute capability 9.x",
)
# (N, K): Qwen3-0.6B's, and such that the last tile and block are cut off.
SHAPES = ((4096, 1024), (1024, 3072), (6144, 256), (2576, 1616), (64, 128), (80, 16))
PROMPT = "It is a truth universally acknowledged, that a single man"
AUSTEN = Path(__file__).resolve().parents[2] / "nanovllm/assets/austen-7m"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def summed(product: LinearOutput) -> torch.Tensor:
    return product.parts.sum(0) if isinstance(product, PartialSums) else product


def fp8_weight(n: int, k: int, by_blocks: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Random numbers, and scales over two orders of magnitude."""
    shape = (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK)) if by_blocks else (n,)
    scales = torch.empty(shape, device="cuda").uniform_(0.01, 1.0) / k**0.5
    return torch.randn(n, k, device="cuda").to(FP8_DTYPE), scales


def check(product: LinearOutput, exact: torch.Tensor, tolerance: float) -> None:
    """Errors against the deviation of a row: `tolerance` on average, nowhere 20 times that."""
    out = summed(product)
    assert out.shape == exact.shape and out.isfinite().all()
    error = (out.double() - exact).abs() / exact.std(dim=1, keepdim=True)
    assert error.mean() < tolerance and error.max() < 20 * tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 17, 32, 33, 64, 65, 128, 200, 511, 513, 4096])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products(n, k, num_tokens, by_blocks, dtype) -> None:
    """The exact product of the activations as `quantize_rows` rounds them."""
    weight, scales = fp8_weight(n, k, by_blocks)
    dequantized = torch_ops.dequantize_weight(weight, scales).double()
    x = torch.randn(num_tokens, k, device="cuda").to(dtype)
    group = FP8_BLOCK if by_blocks else None
    values, x_scales = triton_fp8_linear.quantize_rows(x, group)
    rounded = values.double() * x_scales.double().repeat_interleave(group or k, 1)[:, :k]
    for bias in (None, torch.randn(n, device="cuda").to(dtype)):
        exact = F.linear(rounded, dequantized, None if bias is None else bias.double())
        check(triton_fp8_linear.fp8_linear(x, weight, scales, bias), exact, 4e-3)
        tile = triton_fp8_linear.RAGGED_TILE
        tiled = tiled_linear(values, weight, bias, tile, dtype, num_tokens, x_scales, scales)
        check(tiled, exact, 4e-3)


@pytest.mark.parametrize("by_blocks", [False, True])
def test_every_tile(by_blocks) -> None:
    """Also those for weights of more rows than the other tests have."""
    table = triton_fp8_linear.TILES_OF_BLOCKS if by_blocks else triton_fp8_linear.TILES
    group = FP8_BLOCK if by_blocks else None
    n, k = 400, 1424
    weight, scales = fp8_weight(n, k, by_blocks)
    dequantized = torch_ops.dequantize_weight(weight, scales).double()
    for num_tokens, tile in {pair for tiles in table.values() for pair in tiles.items()}:
        x = torch.randn(num_tokens - 1, k, device="cuda").bfloat16()
        values, x_scales = triton_fp8_linear.quantize_rows(x, group)
        rounded = values.double() * x_scales.double().repeat_interleave(group or k, 1)[:, :k]
        exact = F.linear(rounded, dequantized)
        tiled = tiled_linear(values, weight, None, tile, x.dtype, len(x), x_scales, scales)
        check(tiled, exact, 4e-3)


@pytest.mark.parametrize("group", [None, FP8_BLOCK])
@pytest.mark.parametrize("k", [16, 128, 1616, 4096, 25600])
def test_quantize_rows(k, group) -> None:
    """The nearest fp8 numbers, but for ties: `torch_ops.quantize` of each group."""
    magnitudes = torch.tensor([1e-4, 1.0, 300.0, 0.0, 1e-30, 3e38], device="cuda")
    x = (torch.rand(6, k, device="cuda") - 0.5) * magnitudes[:, None]
    values, scales = triton_fp8_linear.quantize_rows(x.bfloat16(), group)
    width = group or k
    num_different = 0
    for first in range(0, k, width):
        part = x.bfloat16()[:, first : first + width]
        expected, expected_scales = torch_ops.quantize(part)
        torch.testing.assert_close(scales[:, first // width], expected_scales)
        got = values[:, first : first + width].float()
        num_different += int((got != expected.float()).sum())
        torch.testing.assert_close(got, expected.float(), rtol=0.13, atol=2.0**-9)
    assert num_different < 0.02 * values.numel()


def test_no_tokens() -> None:
    weight, scales = fp8_weight(64, 128, by_blocks=False)
    x = torch.empty(0, 128, device="cuda", dtype=torch.bfloat16)
    assert triton_fp8_linear.fp8_linear(x, weight, scales).shape == (0, 64)
    assert has_bulk_copies(x.device)


@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("num_tokens", [8, 100, 600])
def test_chain_in_a_graph_equals_eager(num_tokens, by_blocks) -> None:
    """Products whose launches overlap, replayed with changing inputs."""
    layers = [fp8_weight(1024, 1024, by_blocks) for _ in range(6)]
    x = torch.empty(num_tokens, 1024, device="cuda", dtype=torch.bfloat16)

    def forward() -> torch.Tensor:
        y = x
        for weight, scales in layers:
            product = summed(triton_fp8_linear.fp8_linear(y, weight, scales))
            y = F.rms_norm(product.float(), (1024,)).to(x.dtype)
        return y

    x.normal_()
    forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    for _ in range(20):
        x.normal_()
        graph.replay()
        assert torch.equal(out, forward())


def generate(directory, max_tokens: int, prompts: list, **kwargs) -> list[list[int]]:
    with LLM(str(directory), max_num_seqs=48, num_kvcache_blocks=64, **kwargs) as llm:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def fp8_dir(tmp_path_factory):
    """A checkpoint with scales for blocks, of which all layers are multiplied in fp8."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    return save_fp8(save_model(root / "model", num_hidden_layers=2, **sizes), root / "fp8")


@pytest.fixture(scope="module")
def fp8_experts_dir(tmp_path_factory):
    """A checkpoint whose experts have blocks of their own."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128}
    settings = FAMILIES["qwen3-moe"] | sizes | {"head_dim": 64, "num_hidden_layers": 2}
    return save_fp8(save_model(root / "model", **settings), root / "fp8")


def test_experts_of_a_checkpoint_stay_in_fp8(fp8_experts_dir) -> None:
    with LLM(str(fp8_experts_dir), dtype="bfloat16", num_kvcache_blocks=8) as llm:
        experts = llm.model_runner.model.model.layers[0].mlp.experts
        for weights in (experts.gate_up_proj, experts.down_proj):
            assert weights.weight.dtype == FP8_DTYPE and weights.weight_scale.dim() == 2


@pytest.mark.parametrize("source", ["rows", "blocks", "experts"])
def test_graphs_equal_eager_steps(source, fp8_dir, fp8_experts_dir) -> None:
    """Batches of 1 and of 40: both kinds of kernels in decode steps."""
    directory = {"rows": AUSTEN, "blocks": fp8_dir, "experts": fp8_experts_dir}[source]
    kwargs = {"quantization": "fp8"} if source == "rows" else {}
    kwargs |= {"dtype": "bfloat16", "max_model_len": 256}
    prompts = [[5, 6, 7 + i] for i in range(40)]
    for chosen in (prompts[:1], prompts):
        eager = generate(directory, 24, chosen, enforce_eager=True, **kwargs)
        assert generate(directory, 24, chosen, **kwargs) == eager


def next_token_logprobs(directory, prompts: list[str], **kwargs) -> list[dict[int, float]]:
    """Of each prompt, the 20 most probable next tokens and their log probabilities."""
    with LLM(str(directory), dtype="bfloat16", num_kvcache_blocks=64, **kwargs) as llm:
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}
        for output in outputs
    ]


def test_a_trained_model_keeps_its_predictions() -> None:
    """austen-7m, quantised on load: the probabilities of the likely tokens change little."""
    prompts = [PROMPT[: 10 + i] for i in range(40)]
    plain = next_token_logprobs(AUSTEN, prompts)
    quantized = next_token_logprobs(AUSTEN, prompts, quantization="fp8")
    differences = [
        abs(before[token] - after[token])
        for before, after in zip(plain, quantized, strict=True)
        for token in before
        if token in after
    ]
    assert len(differences) > 0.9 * 20 * len(prompts)
    assert sum(differences) / len(differences) < 0.2
    assert sum(differences) > 0


def test_half_the_memory_for_the_layers() -> None:
    with LLM(str(AUSTEN), dtype="bfloat16", quantization="fp8", num_kvcache_blocks=8) as llm:
        model = llm.model_runner.model
        weights = [p for n, p in model.named_parameters() if n.endswith("_proj.weight")]
        assert weights and all(weight.dtype == FP8_DTYPE for weight in weights)
        assert model.model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("fixture", ["fp8_dir", "fp8_experts_dir"])
def test_float32_is_dequantized(fixture, request) -> None:
    """The same tokens as on the CPU."""
    fp8_dir = request.getfixturevalue(fixture)
    prompts = [[5, 6, 7], list(range(3, 60))]
    kwargs = {"dtype": "float32", "max_model_len": 256}
    on_cpu = generate(fp8_dir, 12, prompts, device="cpu", **kwargs)
    assert generate(fp8_dir, 12, prompts, **kwargs) == on_cpu


@pytest.mark.two_gpus
def test_two_ranks() -> None:
    """Each rank has scales of its own: near the logprobs of one rank."""
    prompts = [PROMPT, "She had never"]
    one, two = (
        next_token_logprobs(AUSTEN, prompts, quantization="fp8", tensor_parallel_size=size)
        for size in (1, 2)
    )
    for before, after in zip(one, two, strict=True):
        best = max(before, key=before.get)
        assert abs(before[best] - after[best]) < 0.3
