"""What the engine needs of a model directory beside weights, and memory it cannot have."""

import json
import shutil
from pathlib import Path

import pytest
from engine_checks import greedy, tiny_engine
from tiny_models import VOCAB_SIZE, edit_config

from nanovllm import LLM, ArgumentError, SamplingParams, StructuredOutputsParams


@pytest.fixture
def model_dir(tiny_dir, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


@pytest.mark.parametrize("text", ['{"eos_token_id": [2, 0', "[]", '{"eos_token_id": "x"}'])
def test_a_damaged_generation_config_is_named(model_dir, text):
    (model_dir / "generation_config.json").write_text(text)
    with pytest.raises(ArgumentError, match=r"generation_config\.json"):
        tiny_engine(model_dir)


@pytest.mark.parametrize("text", ['{"eos_token_id": [2, 0]}', '{"eos_token_id": 0}', "{}"])
def test_eos_ids_of_tokenizer_and_generation_config_are_united(model_dir, text):
    (model_dir / "generation_config.json").write_text(text)
    with tiny_engine(model_dir) as llm:
        assert llm.config.eos_token_ids == ({2} if text == "{}" else {0, 2})


def test_eos_ids_that_the_model_does_not_have_are_left_out(model_dir):
    """They are never sampled, and min_tokens must not forbid them in the logits of others."""
    text = json.dumps({"eos_token_id": [2, VOCAB_SIZE, VOCAB_SIZE + 500, -1]})
    (model_dir / "generation_config.json").write_text(text)
    with tiny_engine(model_dir) as llm:
        assert llm.config.eos_token_ids == {2}
        params = SamplingParams(temperature=0, max_tokens=4, min_tokens=4)
        assert len(llm.generate([[5]], params, use_tqdm=False)[0]["token_ids"]) == 4


def test_structured_outputs_with_an_eos_id_that_the_tokenizer_does_not_have(model_dir):
    pytest.importorskip("llguidance")
    (model_dir / "generation_config.json").write_text(f'{{"eos_token_id": [{VOCAB_SIZE - 1}]}}')
    with tiny_engine(model_dir) as llm:
        assert len(llm.tokenizer) < VOCAB_SIZE
        params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["the dog"]))
        [output] = llm.generate([[5]], params, use_tqdm=False)
    assert output["text"].startswith("the dog")


def test_without_other_eos_ids_those_of_the_config_end_a_completion(model_dir):
    """As in transformers, whose generation config is then made of config.json."""
    (model_dir / "generation_config.json").unlink(missing_ok=True)
    edit_config(model_dir, eos_token_id=7)
    with tiny_engine(model_dir, skip_tokenizer_init=True) as llm:
        assert llm.config.eos_token_ids == {7}
        params = SamplingParams(temperature=0, max_tokens=5, logit_bias={7: 100.0})
        [output] = llm.generate([[5]], params, use_tqdm=False)
        assert output["token_ids"] == [7] and output.outputs[0].finish_reason == "stop"


def test_a_directory_without_a_tokenizer_is_refused(model_dir):
    for path in model_dir.glob("token*"):
        path.unlink()
    with pytest.raises(ArgumentError, match="tokenizer"):
        tiny_engine(model_dir)


def test_a_broken_tokenizer_is_refused_with_the_directory(model_dir):
    (model_dir / "tokenizer.json").write_text("{")
    with pytest.raises(ArgumentError, match=str(model_dir)):
        tiny_engine(model_dir)


def test_more_blocks_than_memory_name_the_parameter(tiny_dir):
    with pytest.raises(ArgumentError, match="lower num_kvcache_blocks"):
        LLM(str(tiny_dir), device="cpu", num_kvcache_blocks=10**10)


def test_bytes_for_no_block_are_refused_before_any_rank_starts(tiny_dir, monkeypatch):
    monkeypatch.setattr("nanovllm.engine.llm_engine.WorkerGroup", None)
    with pytest.raises(ArgumentError, match="raise kv_cache_memory_bytes"):
        LLM(str(tiny_dir), device="cpu", kv_cache_memory_bytes=1, tensor_parallel_size=2)


def test_the_progress_bar_shows_rates_that_the_run_can_have(tiny_dir):
    lines = []

    class Bar:
        def __init__(self, **kwargs):
            pass

        def update(self, n):
            pass

        def set_postfix(self, rates):
            lines.append(rates)

        def close(self):
            pass

    with tiny_engine(tiny_dir) as llm:
        launch, slow = llm.model_runner.launch, 0.02

        def slow_launch(seqs, is_prefill):
            launched = launch(seqs, is_prefill)
            launched.seconds = slow
            return launched

        llm.model_runner.launch = slow_launch
        llm.generate([[1, 2, 3]] * 4, greedy(10), use_tqdm=Bar)
    decode = int(lines[-1]["Decode"].removesuffix("tok/s"))
    assert 0 < decode <= 4 / slow  # four sequences a step


def test_results_of_add_request_end_with_the_engine(tiny_dir):
    llm = tiny_engine(tiny_dir)
    llm.add_request([1, 2], greedy(2))
    llm.generate([[3, 4]], greedy(9), use_tqdm=False)
    assert not llm.is_finished()
    llm.exit()
    assert llm.is_finished()
