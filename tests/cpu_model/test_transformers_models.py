"""Transformers' own modules on the paged cache: each architecture, tiny, in float32."""

import itertools
import json
import re
import types
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from engine_checks import check_nothing_is_held, greedy
from test_fp8_engine import attention_over_fp8
from tiny_models import edit_config, reference_greedy, save_family
from tiny_transformers import (
    ENGINE,
    MAX_TOKENS,
    architectures,
    best_tokens,
    outcome,
    prompts,
    tiny_config,
    tiny_model,
)
from transformers import AttentionInterface
from transformers_page import README, documented, documented_limits, sentence

from nanovllm import LLM
from nanovllm.engine import graph_capture
from nanovllm.engine.graph_capture import new_graphs
from nanovllm.errors import ArgumentError
from nanovllm.models.host_reads import HostReads, described
from nanovllm.models.transformers_attention import Mask, window_of


@pytest.fixture(autouse=True)
def _distributions_check_their_values():
    """As in a new process: torch.compile ends it for good. Gemma 3n waits for the device there."""
    torch.distributions.Distribution.set_default_validate_args(True)


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


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Makes a model of SAMPLE once: its directory and transformers' module."""
    folder = tmp_path_factory.mktemp("sample")
    return cache(lambda name: (folder / name, saved(folder / name, name)))


def tokens_of(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(prompts(), greedy(MAX_TOKENS), use_tqdm=False)
    return [output["token_ids"] for output in outputs]


@pytest.mark.parametrize("name", sorted(architectures()))
def test_tokens_are_transformers_own_or_the_model_is_refused(name):
    kind, reason, num_preemptions, eager_reason, has_plan = outcome(name)
    assert kind != "different"
    if IS_DOCUMENTED:
        eager, alone = documented_limits()
        assert name in documented()[kind], "run: python tests/transformers_page.py"
        assert (name in eager) == (eager_reason is not None)
        assert (name in alone) == (kind == "equal" and not has_plan)
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


@pytest.mark.parametrize(
    ("name", "caching", "overlap"),
    # Each switch on and off with each; over the models, both in all combinations.
    [
        (name, caching, caching == bool(number % 2))
        for number, name in enumerate(SAMPLE)
        for caching in (True, False)
    ],
)
def test_switches_change_no_token(sample, name, caching, overlap):
    directory, model = sample(name)
    llm = engine(
        directory,
        enable_prefix_caching=caching,
        async_scheduling=overlap,
        enable_chunked_prefill=False,
        max_num_batched_tokens=None,
        num_kvcache_blocks=16,
    )
    found = tokens_of(llm)
    assert found == best_tokens(model, found)
    assert tokens_of(llm) == found  # now from what is cached
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
    model = saved(tmp_path, "OlmoForCausalLM")
    llm = engine(tmp_path)
    llm.sleep(2)
    llm.wake_up()
    llm.reload_weights()
    found = tokens_of(llm)
    assert found == best_tokens(model, found)
    other = tiny_model(tiny_config("olmo", "OlmoForCausalLM"), "OlmoForCausalLM", seed=1)
    llm.load_weights(other.state_dict())
    found_of_other = tokens_of(llm)
    assert found_of_other == best_tokens(other, found_of_other) != found
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
        ({"quantization": "fp8"}, "quantization 'fp8' is not supported for OlmoForCausalLM"),
        ({"attention_backend": "flash-attn"}, "attention_backend 'flash-attn' is not supported"),
        ({"attention_backend": "triton"}, "attention_backend is 'triton', which needs a CUDA"),
        ({"hf_overrides": {"hidden_size": 0}}, "hidden_size must be"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path, values, message):
    saved(tmp_path, "OlmoForCausalLM")
    with pytest.raises(ArgumentError, match=message):
        engine(tmp_path, **values)


def test_ranks_need_a_plan(tmp_path):
    saved(tmp_path, "GPT2LMHeadModel")
    with pytest.raises(ArgumentError, match="must be 1 for GPT2LMHeadModel.* no tp_plan"):
        engine(tmp_path, tensor_parallel_size=2)


def test_a_family_of_ours_that_lacks_a_feature_names_the_other_way(tmp_path):
    directory = save_family(tmp_path / "model", "llama3")
    edit_config(directory, hidden_act="gelu")
    with pytest.raises(ArgumentError, match="is not supported.*; model_impl='transformers' may"):
        engine(directory, model_impl="auto")
    with pytest.raises(ArgumentError, match="supported: silu$"):
        engine(directory, model_impl="nanovllm")
    engine(directory, model_impl="transformers").exit()
    edit_config(directory, quantization_config={"quant_method": "hqq"})
    with pytest.raises(ArgumentError, match="'hqq' is not supported"):
        engine(directory, model_impl="auto")


def test_quantised_checkpoints_are_refused(tmp_path):
    saved(tmp_path, "OlmoForCausalLM")
    edit_config(tmp_path, quantization_config={"quant_method": "hqq"})
    with pytest.raises(ArgumentError, match="quantization_config is not supported"):
        engine(tmp_path)


def test_a_model_that_is_no_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["BertModel"], "model_type": "bert"})
    )
    with pytest.raises(ArgumentError, match="is no causal language model of transformers"):
        engine(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Lfm2ForCausalLM", "mixes tokens by other means"),
        ("MoshiForCausalLM", "forgets tokens that its mask shows"),
        ("DeepseekV32ForCausalLM", "a mask of its own"),
        ("BloomForCausalLM", "do not call an attention function"),
    ],
)
def test_why_a_model_is_refused(name, message):
    assert re.match(f"{name} does not run.*{message}", outcome(name).reason)


def test_a_model_that_sees_what_follows_is_refused(tmp_path):
    name = "BertLMHeadModel"
    saved(tmp_path, name, is_decoder=False)
    with pytest.raises(ArgumentError, match=f"{name} does not run.*mixes tokens by other means"):
        engine(tmp_path)


def test_rotations_that_follow_the_batch_end_where_they_begin_to(tmp_path):
    saved(tmp_path, "OlmoForCausalLM")
    rope = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 128}
    llm = engine(tmp_path, hf_overrides={"rope_parameters": {"rope_theta": 1e4, **rope}})
    assert llm.config.max_model_len == 128
    llm.exit()


# ---- which attention goes to kernels, and what can be captured -----------------------------------


@pytest.mark.parametrize("length", [1, 7, 300, 3000])
@pytest.mark.parametrize(
    ("function", "window"),
    [
        (lambda b, h, q, k: k <= q, None),
        (lambda b, h, q, k: q >= 0, None),  # `Mask` is causal itself
        (lambda b, h, q, k: k > q - 5, 5),
        (lambda b, h, q, k: (k > q - 2048) & (k <= q), 2048),
    ],
)
def test_windows_are_read_off_masks(function, window, length):
    found = window_of(Mask(function), length, torch.device("cpu"))
    assert found == min(window or length, length)


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, q, k: k // 512 == q // 512,  # chunks
        lambda b, h, q, k: k // 3000 == q // 3000,
        lambda b, h, q, k: (k > q - 5) | (k < 1),  # a token that all see
        lambda b, h, q, k: (k > q - 4096) & (k != 17),
        lambda b, h, q, k: (q - k) % 2 == 0,
        lambda b, h, q, k: k < q,
    ],
)
def test_other_masks_are_no_windows(function):
    assert window_of(Mask(function), 8192, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Gemma2ForCausalLM", None),  # windows and soft caps
        ("GptOssForCausalLM", None),  # sinks, experts
        ("DeepseekV3ForCausalLM", None),  # keys larger than values
        ("Llama4ForCausalLM", "Llama4TextAttention: its mask is neither causal nor a sliding wind"),
        ("Gemma4ForCausalLM", "Gemma4TextAttention: its heads have 512 elements"),
        ("Gemma3nForCausalLM", "the host waits for aten::_local_scalar_dense in _gaussian_topk"),
        ("LongcatFlashForCausalLM", "the host waits for aten::nonzero in forward"),
    ],
)
def test_what_speaks_against_cuda_graphs(name, reason):
    found = outcome(name).eager_reason
    assert found is None if reason is None else reason in found


def test_rotations_that_follow_the_longest_sequence_wait_for_it(tmp_path):
    saved(tmp_path, "OlmoForCausalLM")
    rope = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}
    llm = engine(tmp_path, hf_overrides={"rope_parameters": rope})
    assert "in dynamic_frequency_update" in llm.model_runner.model.eager_reason
    llm.exit()


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (lambda x: x.sum().item(), "aten::_local_scalar_dense"),
        (lambda x: 1 if x.any() else 2, "aten::_local_scalar_dense"),
        (lambda x: x[x > 0], "aten::index.Tensor"),
        (lambda x: torch.where(x > 0), "aten::nonzero"),
        (lambda x: x.unique(), "aten::_unique2"),
        (lambda x: x.repeat_interleave((x > 0).long()), "aten::repeat_interleave.Tensor"),
        (lambda x: x[torch.arange(2)] * x.softmax(-1)[:2], None),
        (lambda x: x.masked_fill(x > 0, 0).topk(2), None),
        (lambda x: x.clone().index_put_((x > 0,), torch.tensor(0.0)), None),
    ],
)
@pytest.mark.parametrize("inference", [True, False])
def test_waits_of_the_host_are_found(function, operation, inference):
    with torch.inference_mode(inference), HostReads() as reads:
        function(torch.tensor([1.0, -1.0, 2.0]))
    assert reads.found is None if operation is None else reads.found.startswith(operation)


def test_errors_name_the_function_of_the_module():
    def forward():
        raise RuntimeError("it waits")

    try:
        forward()
    except RuntimeError as error:
        assert re.fullmatch(r".*it waits in forward \(test_\w+\.py:\d+\)", described(error))
    try:
        Mask(None).shape  # noqa: B018
    except AttributeError as error:
        assert described(error).endswith("it makes a mask of its own out of transformers' one")


class FakeModel:
    name, eager_reason, was_captured = "SomeModel", None, False
    context = types.SimpleNamespace(tp=types.SimpleNamespace(rank=0))


def test_a_known_reason_is_logged_and_nothing_captured(caplog):
    model = FakeModel()
    model.eager_reason = "it has one"
    assert new_graphs(model, 4, torch.arange(4), None) is None
    assert [r.getMessage() for r in caplog.records] == [
        "SomeModel decodes without CUDA graphs: it has one"
    ]


def test_a_capture_that_fails_leaves_the_engine_without_graphs(caplog, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "main")
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    model = FakeModel()

    def decode(rows: torch.Tensor, has_common_blocks: bool) -> torch.Tensor:
        return rows[: rows.sum().item()]

    assert new_graphs(model, 4, torch.arange(4), decode) is None
    assert current == ["main"] and modes == ["error", 0]
    [record] = caplog.records
    assert "waits for aten::_local_scalar_dense in decode" in record.getMessage()
    assert new_graphs(model, 4, torch.arange(4), None) is None  # not tried again


def test_what_was_captured_once_is_not_checked_again(monkeypatch):
    found = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "main")
    monkeypatch.setattr(graph_capture, "DecodeGraphs", lambda *args: found.append(args) or found)
    model, rows = FakeModel(), torch.arange(4)

    def decode(rows: torch.Tensor, has_common_blocks: bool) -> torch.Tensor:
        return rows

    for _ in range(2):
        assert graph_capture.new_graphs(model, 4, rows, decode) is found
    (_, _, first), (_, _, second) = found
    assert first is not decode and second is decode


# ---- fp8 ---------------------------------------------------------------------------------------


def test_an_fp8_cache_gives_the_logprobs_of_transformers_over_quantised_keys_and_values(tmp_path):
    """Rounding may tip an element to the next fp8 number, hence the tolerance."""
    name, ids = "Olmo2ForCausalLM", prompts()[5]
    model = saved(tmp_path, name)
    llm = engine(tmp_path, kv_cache_dtype="fp8", num_kvcache_blocks=8)
    params = greedy(4)
    params.prompt_logprobs = 0
    [output] = llm.generate([ids], params, use_tqdm=False)
    assert {a.cache.key.dtype for a in llm.model_runner.attentions} == {torch.float8_e4m3fn}
    llm.exit()
    found = torch.tensor([e.logprob for p in output["prompt_logprobs"][1:] for e in p.values()])
    AttentionInterface.register("over_fp8", attention_over_fp8)
    expected = []
    for attention in ("over_fp8", "eager"):
        model.set_attn_implementation(attention)
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected.append(logprobs.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1))
    error, of_quantisation = ((found - e).square().mean().sqrt() for e in expected)
    assert error < 0.1 * of_quantisation


def test_an_fp8_cache_needs_kernels(tmp_path):
    saved(tmp_path, "Llama4ForCausalLM")
    with pytest.raises(ArgumentError, match="kv_cache_dtype 'fp8' is not supported for Llama4"):
        engine(tmp_path, kv_cache_dtype="fp8")
