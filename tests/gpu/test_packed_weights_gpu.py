"""Weights rounded to 4 and 8 bits on load, on a GPU: tokens of the CPU, graphs, memory, ranks."""

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, save_model

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.kernels.select import select_ops
from nanovllm.kernels.types import PackedWeight
from nanovllm.layers.context import ModelContext
from nanovllm.layers.linear_weight import LinearWeight
from nanovllm.models.families import load_weights, new_model
from nanovllm.parallel.tensor_parallel import TensorParallel

PROMPTS = [[5, 6, 7], list(range(3, 60))]
AUSTEN = Path(__file__).resolve().parents[2] / "nanovllm/assets/austen-7m"
MIB = 2**20


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Layers with an MLP and layers with experts; of two ranks each has groups of 128 as well."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 256}
    sizes |= {"head_dim": 32}
    path = tmp_path_factory.mktemp("models") / "mixture"
    return save_model(path, **FAMILIES["qwen3-moe-steps"] | sizes)


def generate(directory, prompts: list, **kwargs) -> list[list[int]]:
    settings = {"max_num_seqs": 48, "num_kvcache_blocks": 64, "max_model_len": 256}
    with LLM(str(directory), **settings | kwargs) as llm:
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("quantization", ["int4", "int8"])
@pytest.mark.parametrize("name", ["austen", "mixture"])
def test_float32_gives_the_tokens_of_the_cpu(name, quantization, mixture) -> None:
    directory = AUSTEN if name == "austen" else mixture
    kwargs = {"dtype": "float32", "quantization": quantization}
    on_cpu = generate(directory, PROMPTS, device="cpu", **kwargs)
    assert generate(directory, PROMPTS, **kwargs) == on_cpu


@pytest.mark.parametrize("name", ["austen", "mixture"])
def test_graphs_equal_eager_steps(name, mixture) -> None:
    directory = AUSTEN if name == "austen" else mixture
    prompts = [[5, 6, 7 + i] for i in range(40)]
    kwargs = {"dtype": "bfloat16", "quantization": "int4"}
    for chosen in (prompts[:1], prompts):
        eager = generate(directory, chosen, enforce_eager=True, **kwargs)
        assert generate(directory, chosen, **kwargs) == eager


@pytest.mark.parametrize(("quantization", "num_bytes"), [("int4", 0.5), ("int8", 1.0)])
def test_loading_needs_little_beside_the_packed_weights(quantization, num_bytes, tmp_path) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2}
    save_model(tmp_path, **sizes, head_dim=128, num_attention_heads=16)
    config = Config(str(tmp_path), quantization=quantization, dtype="bfloat16")
    device = torch.device("cuda", 0)
    ops = select_ops("auto", device, torch.bfloat16, 128, compile_torch_ops=False)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    context = ModelContext(
        ops,
        TensorParallel(),
        torch.bfloat16,
        device,
        max_model_len=256,
        weight_format=config.weight_format,
    )
    model = new_model(config, context)
    load_weights(model, config)
    held = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    assert peak - held < 32 * MIB  # the largest weight alone has 64 in bfloat16
    modules = [module for module in model.modules() if isinstance(module, LinearWeight)]
    assert modules and all(isinstance(module.weight, PackedWeight) for module in modules)
    num_weights = sum(n * k for n, k in (module.weight.shape for module in modules))
    others = sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if not name.endswith(("numbers", "scales"))
    )
    assert held - others < num_weights * (num_bytes + 2 / 128) * 1.01 + 8 * MIB


@pytest.mark.two_gpus
def test_two_ranks_give_the_tokens_of_one(mixture) -> None:
    """In float32. The columns of every rank are whole groups of the same size."""
    kwargs = {"dtype": "float32", "quantization": "int4"}
    one, two = (generate(mixture, PROMPTS, tensor_parallel_size=n, **kwargs) for n in (1, 2))
    assert one == two
