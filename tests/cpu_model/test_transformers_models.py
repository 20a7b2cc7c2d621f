"""Transformers' own modules on the paged cache: each architecture, tiny, in float32."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from engine_checks import check_nothing_is_held, greedy
from tiny_models import edit_config, reference_greedy, save_family
from tiny_transformers import (
    ENGINE,
    MAX_TOKENS,
    architectures,
    expected_tokens,
    outcome,
    prompts,
    tiny_config,
    tiny_model,
)
from transformers_page import README, documented, sentence

from nanovllm import LLM
from nanovllm.errors import ArgumentError

DOCUMENTED = "5.24.0"  # the version of transformers that the lists in the documents are of
IS_DOCUMENTED = transformers.__version__ == DOCUMENTED
# Windows in some layers, sinks, soft caps, keys larger than values, shared keys, two calls a layer.
SAMPLE = """Gemma2ForCausalLM GptOssForCausalLM DeepseekV3ForCausalLM Gemma4ForCausalLM
    DiffLlamaForCausalLM""".split()


def saved(directory: Path, name: str, **changes) -> transformers.PreTrainedModel:
    config = tiny_config(architectures()[name], name)
    for field, value in changes.items():
        setattr(config, field, value)
    model = tiny_model(config, name)
    model.save_pretrained(directory)
    return model


def engine(directory: Path, **changes) -> LLM:
    return LLM(str(directory), **{**ENGINE, **changes})


def tokens_of(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(prompts(), greedy(MAX_TOKENS), use_tqdm=False)
    return [output["token_ids"] for output in outputs]


@pytest.mark.parametrize("name", sorted(architectures()))
def test_tokens_are_transformers_own_or_the_model_is_refused(name):
    kind, reason, num_preemptions = outcome(name)
    assert kind != "different"
    if IS_DOCUMENTED:
        assert name in documented()[kind], "run: python tests/transformers_page.py"
    if kind == "equal":
        assert num_preemptions > 0
    elif kind == "refused":
        assert name in reason or "model/config.json" in reason
    else:
        pytest.skip(reason)


@pytest.mark.skipif(not IS_DOCUMENTED, reason="the lists are of another version")
def test_the_documents_tell_how_many_run():
    lists = documented()
    assert sorted(itertools.chain(*lists.values())) == sorted(architectures())
    assert len(lists["equal"]) >= 97
    assert sentence(len(lists["equal"])) in " ".join(README.read_text("utf-8").split())


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_switches_change_no_token(tmp_path, name, caching, overlap):
    expected = expected_tokens(saved(tmp_path, name))
    llm = engine(
        tmp_path,
        enable_prefix_caching=caching,
        async_scheduling=overlap,
        enable_chunked_prefill=False,
        max_num_batched_tokens=None,
        num_kvcache_blocks=16,
    )
    assert tokens_of(llm) == expected
    assert tokens_of(llm) == expected  # now from what is cached
    hits = llm.get_metrics().get("prefix_cache_hits")
    assert (hits > 0) == caching
    check_nothing_is_held(llm)
    llm.exit()


def test_auto_takes_a_family_without_a_file(tmp_path):
    saved(tmp_path, "OlmoForCausalLM")
    llm = engine(tmp_path, model_impl="auto")
    assert llm.config.model_config.uses_transformers
    llm.exit()
    with pytest.raises(ArgumentError, match=r"\['OlmoForCausalLM'\] is not supported"):
        engine(tmp_path, model_impl="nanovllm")


def test_a_family_of_ours_runs_on_transformers_too(tmp_path):
    directory = save_family(tmp_path / "model", "llama3")
    given = [[5, 9, 70], [*range(40)]]
    llm = engine(directory)
    assert llm.config.model_config.uses_transformers
    outputs = llm.generate(given, greedy(8), use_tqdm=False)
    assert [o["token_ids"] for o in outputs] == reference_greedy(directory, given, 8)
    llm.exit()
    llm = engine(directory, model_impl="auto")
    assert not llm.config.model_config.uses_transformers
    llm.exit()


def test_hidden_states_and_prompt_logprobs_are_transformers_own(tmp_path):
    model = saved(tmp_path, "Gemma2ForCausalLM")
    ids = prompts()[3]
    with torch.inference_mode():
        out = model(torch.tensor([ids]), output_hidden_states=True)
    llm = engine(tmp_path, num_kvcache_blocks=8)
    [embedding] = llm.embed([ids], use_tqdm=False)
    last = out.hidden_states[-1][0, -1]
    np.testing.assert_allclose(embedding.outputs.embedding, last / last.norm(), atol=1e-5)
    params = greedy(1)
    params.prompt_logprobs = 0
    [output] = llm.generate([ids], params, use_tqdm=False)
    logprobs = out.logits[0].log_softmax(-1)
    for position in range(1, len(ids)):
        [entry] = output["prompt_logprobs"][position].values()
        assert entry.logprob == pytest.approx(
            float(logprobs[position - 1, ids[position]]), abs=1e-4
        )
    llm.exit()


def test_weights_can_sleep_and_be_replaced(tmp_path):
    expected = expected_tokens(saved(tmp_path, "OlmoForCausalLM"))
    llm = engine(tmp_path)
    llm.sleep(2)
    llm.wake_up()
    llm.reload_weights()
    assert tokens_of(llm) == expected
    other = tiny_model(tiny_config("olmo", "OlmoForCausalLM"), "OlmoForCausalLM", seed=1)
    llm.load_weights(other.state_dict())
    assert tokens_of(llm) == expected_tokens(other) != expected
    llm.exit()


def test_dummy_weights_are_the_same_each_time(tmp_path):
    saved(tmp_path, "Olmo2ForCausalLM")
    (tmp_path / "model.safetensors").unlink()
    first, second = (engine(tmp_path, load_format="dummy") for _ in range(2))
    assert tokens_of(first) == tokens_of(second)
    first.exit()
    second.exit()


def test_files_must_fit_the_config(tmp_path):
    saved(tmp_path, "OlmoForCausalLM")
    edit_config(tmp_path, num_hidden_layers=5, layer_types=None)
    with pytest.raises(ArgumentError, match=r"missing tensors: model\.layers\.4"):
        engine(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size must be 1 for OlmoForCausalLM"),
        ({"quantization": "fp8"}, "quantization 'fp8' is not supported for OlmoForCausalLM"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype 'fp8' is not supported for OlmoForCausalLM"),
        ({"attention_backend": "triton"}, "attention_backend 'triton' is not supported"),
        ({"hf_overrides": {"hidden_size": 0}}, "hidden_size must be"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path, values, message):
    saved(tmp_path, "OlmoForCausalLM")
    with pytest.raises(ArgumentError, match=message):
        engine(tmp_path, **values)


def test_quantised_checkpoints_are_refused(tmp_path):
    saved(tmp_path, "OlmoForCausalLM")
    edit_config(tmp_path, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ArgumentError, match="quantization_config is not supported"):
        engine(tmp_path)


def test_a_model_that_is_no_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["BertModel"], "model_type": "bert"})
    )
    with pytest.raises(ArgumentError, match="is no causal language model of transformers"):
        engine(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("BertLMHeadModel", {"is_decoder": False}, "mixes tokens by other means"),
        ("Lfm2ForCausalLM", {}, "mixes tokens by other means"),
        ("MoshiForCausalLM", {}, "forgets tokens that its mask shows"),
        ("DeepseekV32ForCausalLM", {}, "a mask of its own"),
        ("BloomForCausalLM", {}, "do not call an attention function"),
    ],
)
def test_why_a_model_is_refused(tmp_path, name, changes, message):
    saved(tmp_path, name, **changes)
    with pytest.raises(ArgumentError, match=f"{name} does not run.*{message}"):
        engine(tmp_path)


def test_rotations_that_follow_the_batch_end_where_they_begin_to(tmp_path):
    saved(tmp_path, "OlmoForCausalLM")
    rope = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 128}
    llm = engine(tmp_path, hf_overrides={"rope_parameters": {"rope_theta": 1e4, **rope}})
    assert llm.config.max_model_len == 128
    llm.exit()
