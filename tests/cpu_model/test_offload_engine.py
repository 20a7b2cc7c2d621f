"""Engines whose layers' weights wait on the host, with the streams of a GPU played on the CPU."""

import pytest
from copy_streams import EarlyCopies, LateCopies, offload_on_cpu
from engine_checks import generate, greedy, random_prompts, tiny_engine
from safetensors.torch import load_file
from tiny_models import reference_greedy, save_family, save_model

from nanovllm import LLM, ArgumentError
from nanovllm.kernels.torch_ops import TorchOps

PROMPTS = random_prompts((5, 20))
ALL = 1.0  # GiB: more than any of these models has


def test_tokens_are_those_of_transformers(tiny_dir):
    """In prefills, chunks of them and decode steps; after sleep and with new weights, too."""
    prompts = random_prompts((17, 100, 240))
    reference = reference_greedy(tiny_dir, prompts, 6)
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 100}
    with offload_on_cpu(LateCopies), tiny_engine(tiny_dir, cpu_offload_gb=1e-9, **chunks) as llm:
        offload = llm.model_runner.offload
        assert offload is not None and len(offload.layers) == 3 and len(offload.buffers) == 2
        params = greedy(6)
        assert generate(llm, prompts, params) == reference
        llm.sleep(1)
        assert all(buffer.untyped_storage().nbytes() == 0 for buffer in offload.buffers)
        llm.wake_up()
        assert generate(llm, prompts, params) == reference
        state = load_file(tiny_dir / "model.safetensors")
        llm.load_weights((name, -tensor) for name, tensor in state.items() if "layers" in name)
        assert generate(llm, prompts[:1], params) != reference[:1]
        llm.load_weights(state)
        assert generate(llm, prompts[:1], params) == reference[:1]
        llm.sleep(2)
        llm.wake_up()
        assert not any(parameter.any() for parameter in llm.model_runner.model.parameters())
        llm.reload_weights()
        assert generate(llm, prompts, params) == reference


@pytest.mark.parametrize("family", ["qwen3.5", "gpt-oss", "fp8"])
def test_any_layers_tokens_are_the_same(family, tmp_path, monkeypatch):
    """Experts in 4 bits, layers of two kinds, biases and sinks, scales of fp8 weights."""
    settings = {"quantization": "int4"} if family == "gpt-oss" else {}
    if family == "fp8":
        monkeypatch.setattr(TorchOps, "has_fp8_products", True)
        settings = {"quantization": "fp8"}
        path = save_model(tmp_path, num_hidden_layers=4)
    else:
        path = save_family(tmp_path, family)
    runs = []
    for gib in (0, ALL):
        with (
            offload_on_cpu(EarlyCopies),
            tiny_engine(path, cpu_offload_gb=gib, load_format="dummy", **settings) as llm,
        ):
            runs.append(generate(llm, PROMPTS, greedy(4)))
            offload = llm.model_runner.offload
            assert (offload is None) == (gib == 0)
            if offload:
                of_layers = sum(
                    parameter.nbytes
                    for parameter in llm.model_runner.model.model.layers.parameters()
                    if parameter.dim() > 1
                )
                assert 0 <= offload.num_bytes - of_layers < 256 * len(offload.parameters())
    assert runs[0] == runs[1]


def test_what_cannot_offload_says_so(tiny_dir):
    with pytest.raises(ArgumentError, match=r"cpu_offload_gb \(1\) is for GPUs"):
        LLM(str(tiny_dir), device="cpu", cpu_offload_gb=1)
    with pytest.raises(ArgumentError, match="cpu_offload_gb 1.0 is not supported for Qwen3For"):
        LLM(str(tiny_dir), model_impl="transformers", cpu_offload_gb=1)
