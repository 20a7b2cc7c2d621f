"""Transformers' own modules on CUDA: the tokens that transformers has on the CPU, in float32."""

from contextlib import nullcontext

import pytest
import torch
from tiny_transformers import (
    ENGINE,
    MAX_TOKENS,
    architectures,
    expected_tokens,
    prompts,
    tiny_config,
    tiny_model,
)

from nanovllm import LLM, SamplingParams
from nanovllm.engine import graph_capture
from nanovllm.models import host_reads

# Windows with soft caps, sinks, keys larger than values, plain attention.
CAPTURED = """Gemma2ForCausalLM GraniteSWAForCausalLM MiniCPM3ForCausalLM OlmoForCausalLM
    Phi3ForCausalLM""".split()
# Chunks; large heads; host reads.
EAGER = "Llama4ForCausalLM Gemma4ForCausalLM Gemma3nForCausalLM".split()
# In float32 torch's grouped products wait for the device; in bfloat16 they need not.
EXPERTS = "GptOssForCausalLM DeepseekV3ForCausalLM MixtralForCausalLM".split()
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)


def saved(directory, name):
    model = tiny_model(tiny_config(architectures()[name], name), name)
    model.save_pretrained(directory)
    return model


def engine(directory, **changes):
    return LLM(str(directory), **ENGINE | {"device": "cuda"} | changes)


def tokens_of(llm):
    return [o["token_ids"] for o in llm.generate(prompts(), GREEDY, use_tqdm=False)]


@pytest.mark.parametrize("name", [*CAPTURED, *EAGER, *EXPERTS])
@pytest.mark.parametrize("overlap", [True, False])
def test_tokens_are_transformers_own(tmp_path, name, overlap):
    expected = expected_tokens(saved(tmp_path, name))
    llm = engine(tmp_path, async_scheduling=overlap)
    if name not in EXPERTS:
        assert (llm.model_runner.graphs is not None) == (name in CAPTURED)
    for _ in range(2):  # the second time from what is cached
        assert tokens_of(llm) == expected
    assert llm.get_metrics().get("num_preemptions") > 0
    llm.exit()


@pytest.mark.parametrize("changes", [{"enforce_eager": True}, {"attention_backend": "torch"}])
@pytest.mark.parametrize("name", CAPTURED)
def test_without_graphs_tokens_are_the_same(tmp_path, name, changes):
    expected = expected_tokens(saved(tmp_path, name))
    llm = engine(tmp_path, **changes)
    assert llm.model_runner.graphs is None
    assert tokens_of(llm) == expected
    llm.exit()


def test_graphs_come_back_after_sleep(tmp_path):
    expected = expected_tokens(saved(tmp_path, "Gemma2ForCausalLM"))
    llm = engine(tmp_path)
    llm.sleep(1)
    llm.wake_up()
    assert llm.model_runner.graphs is not None
    assert tokens_of(llm) == expected
    llm.exit()


@pytest.mark.parametrize("is_seen", [True, False])
def test_a_module_that_cannot_be_captured_runs_eager(tmp_path, monkeypatch, caplog, is_seen):
    """Also if nothing but the capture itself, which breaks, tells it."""
    expected = expected_tokens(saved(tmp_path, "Gemma3nForCausalLM"))
    if not is_seen:
        monkeypatch.setattr(host_reads, "_waits", lambda *args: False)
        monkeypatch.setattr(graph_capture, "errors_on_waits", nullcontext)
    stream = torch.cuda.current_stream()
    llm = engine(tmp_path)
    assert llm.model_runner.graphs is None
    assert len([r for r in caplog.records if "without CUDA graphs" in r.getMessage()]) == 1
    assert torch.cuda.current_stream() == stream
    assert tokens_of(llm) == expected
    llm.exit()
    torch.empty(2**20, device="cuda")
    torch.cuda.synchronize()
    torch.randn(4, device="cuda")  # torch's generator is not left in a capture


@pytest.mark.parametrize("name", ["Olmo2ForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("changes", [{}, {"kv_cache_dtype": "fp8"}])
def test_bfloat16_passes_the_check_of_a_model(tmp_path, name, changes):
    saved(tmp_path, name)
    llm = engine(tmp_path, dtype="bfloat16", **changes)
    assert llm.model_runner.graphs is not None
    assert all(len(ids) == MAX_TOKENS for ids in tokens_of(llm))
    llm.exit()


@pytest.mark.two_gpus
@pytest.mark.parametrize("name", ["Gemma2ForCausalLM", "Phi3ForCausalLM", "MixtralForCausalLM"])
def test_two_ranks_by_the_plan_of_the_module(tmp_path, name):
    expected = expected_tokens(saved(tmp_path, name))
    llm = engine(tmp_path, tensor_parallel_size=2)
    assert llm.model_runner.graphs is not None or name == "MixtralForCausalLM"
    assert tokens_of(llm) == expected
    llm.exit()
