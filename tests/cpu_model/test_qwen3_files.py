"""Qwen3-0.6B's own tokenizer and configs, with random weights and few small layers."""

import json
import shutil

import pytest
from engine_checks import (
    SHARED,
    check_nothing_is_held,
    generate,
    greedy,
    scripted_step,
    tiny_engine,
)
from tiny_models import edit_config

from nanovllm import SamplingParams

FILES = SHARED / "qwen3-0.6b"
pytestmark = pytest.mark.skipif(
    not FILES.is_dir(), reason="the files of Qwen3-0.6B are not beside this checkout"
)
IM_END, END_OF_TEXT = 151645, 151643
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SMALL_EXPERTS = {"num_experts": 12, "moe_intermediate_size": 32}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("qwen3") / "m"
    shutil.copytree(FILES, model_dir, copy_function=shutil.copyfile)
    model_dir.chmod(0o755)
    edit_config(model_dir, **SMALL)
    with tiny_engine(model_dir, load_format="dummy") as llm:
        yield llm


def test_eos_ids_of_tokenizer_and_generation_config(llm):
    assert llm.tokenizer.eos_token_id == IM_END
    assert llm.config.eos_token_ids == {IM_END, END_OF_TEXT}


@pytest.mark.parametrize("eos", [IM_END, END_OF_TEXT])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_both_eos_ids_end_a_completion(llm, monkeypatch, eos, ignore_eos):

    word = llm.tokenizer.encode("Hello")
    script = iter([*word, eos, *word])

    def execute(plan, seqs=()):
        return scripted_step(plan, seqs, [next(script)])

    monkeypatch.setattr(llm.model_runner, "execute", execute)
    params = greedy(2 * len(word) + 1, ignore_eos)
    [output] = llm.generate(["Hi"], params, use_tqdm=False)
    end = {IM_END: "<|im_end|>", END_OF_TEXT: "<|endoftext|>"}[eos]
    assert output["text"] == f"Hello{end}" + "Hello" * ignore_eos
    check_nothing_is_held(llm)


def test_the_chat_prompt(llm):
    rendered = llm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "introduce yourself"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert rendered == "<|im_start|>user\nintroduce yourself<|im_end|>\n<|im_start|>assistant\n"
    ids = llm.tokenizer.encode(rendered)
    assert ids[0] == 151644  # one token, and nothing before it
    assert generate(llm, [rendered], greedy(5)) == generate(llm, [ids], greedy(5))


def test_ids_beyond_the_tokenizer_decode_to_nothing(llm):
    vocab_size = llm.config.hf_config.vocab_size
    assert len(llm.tokenizer) < vocab_size == 151936
    for token in (len(llm.tokenizer), vocab_size - 1):
        assert llm.tokenizer.decode([token]) == ""
        [output] = llm.generate([[token]], greedy(3), use_tqdm=False)
        assert output["text"] == llm.tokenizer.decode(output["token_ids"])


@pytest.mark.parametrize(
    "text", ["为什么天空是蓝色的", "URGENCY🌶️", "ပုံပြင်လေးပြောပြပါ", "👩‍👩‍👧‍👦", "naïve\r\n\ttext"]
)
def test_unicode_round_trip(llm, monkeypatch, text):
    ids = llm.tokenizer.encode(text)
    script = iter(ids)
    monkeypatch.setattr(
        llm.model_runner,
        "execute",
        lambda plan, seqs: scripted_step(plan, seqs, [next(script)]),
    )
    [output] = llm.generate([text], greedy(len(ids)), use_tqdm=False)
    assert output == {"text": text, "token_ids": ids}


def test_sampling_over_the_whole_vocabulary(llm):
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
    outputs = generate(llm, [[1, 2, 3]] * 20, params)
    tokens = [token for completion in outputs for token in completion]
    assert max(tokens) < 151936
    assert len(set(tokens)) > 140  # the logits of random weights are nearly flat


@pytest.mark.parametrize(
    "name", ["qwen3-4b", "qwen3-8b", "qwen3-32b", "qwen3-30b-a3b", "llama-3.1-8b"]
)
def test_configs_of_larger_models(llm, tmp_path, name):
    path = SHARED / "configs" / name / "config.json"
    if not path.is_file():
        pytest.skip(f"the config of {name} is not beside this checkout")
    config = json.loads(path.read_text())
    small = SMALL | (SMALL_EXPERTS if "num_experts" in config else {})
    (tmp_path / "config.json").write_text(json.dumps(config | small))
    settings = {"load_format": "dummy", "tokenizer": llm.get_tokenizer()}
    with tiny_engine(tmp_path, **settings) as other:
        assert bool(other.config.hf_config.tie_word_embeddings) == config["tie_word_embeddings"]
        assert len(generate(other, ["Hello"], greedy(4))[0]) == 4
