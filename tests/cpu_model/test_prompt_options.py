"""Chat, tokenizer options and changes to the model's configuration, through a whole engine."""

import os

import pytest
from engine_checks import check_nothing_is_held, greedy, tiny_engine, token_ids
from tiny_models import YARN, edit_config, reference_greedy, save_model, save_tokenizer
from transformers import AutoTokenizer

from nanovllm import ArgumentError

CONVERSATIONS = [
    [{"role": "user", "content": "the quick fox"}],
    [{"role": "system", "content": "a cache"}, {"role": "user", "content": "of blocks"}],
]
TEMPLATE = "{% for message in messages %}{{ message.content }};{% endfor %}"


@pytest.fixture(scope="module")
def llm(tiny_dir, tmp_path_factory):
    file = tmp_path_factory.mktemp("template") / "template.jinja"
    file.write_text(TEMPLATE)
    with tiny_engine(tiny_dir, chat_template=str(file)) as llm:
        yield llm


def test_chat_is_generate_on_rendered_prompts(llm, tiny_dir):
    params = greedy(6)
    outputs = llm.chat(CONVERSATIONS, params, False)
    assert [output.prompt for output in outputs] == ["the quick fox;", "a cache;of blocks;"]
    prompts = [llm.get_tokenizer().encode(output.prompt) for output in outputs]
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert token_ids(outputs) == reference_greedy(tiny_dir, prompts, 6)
    own = llm.get_tokenizer().chat_template
    [output] = llm.chat(CONVERSATIONS[0], params, use_tqdm=False, chat_template=own)
    assert output.prompt == "<|im_start|>user\nthe quick fox<|im_end|>\n<|im_start|>assistant\n"


def test_enqueued_conversations_wait_for_completion(llm):
    params = [greedy(3), greedy(5)]
    ids = llm.enqueue_chat(CONVERSATIONS, params, use_tqdm=False)
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == ids
    assert outputs == llm.chat(CONVERSATIONS, params, use_tqdm=False)


def test_refused_conversations_queue_nothing(llm):
    wrong = [CONVERSATIONS[0], [{"role": "user"}]]
    for call in (llm.chat, llm.enqueue_chat):
        with pytest.raises(ArgumentError, match=r"conversations\[1\]: a message of role 'user'"):
            call(wrong, greedy(1), use_tqdm=False)
        with pytest.raises(ArgumentError, match="lora_request must be a LoRARequest"):
            call(CONVERSATIONS, greedy(1), use_tqdm=False, lora_request="adapter")
        with pytest.raises(ArgumentError, match=r"lengths of prompts \(2\) and params \(1\)"):
            call(CONVERSATIONS, [greedy(1)], use_tqdm=False)
    check_nothing_is_held(llm)


def test_prompt_text_is_kept_and_tokenization_kwargs_are_used(llm):
    prompts = ["the quick fox", [5, 6], {"prompt": "kept", "prompt_token_ids": [7]}]
    outputs = llm.generate(prompts, greedy(1), False, tokenization_kwargs={"max_length": 2})
    assert [output.prompt for output in outputs] == ["the quick fox", None, "kept"]
    two = llm.tokenizer.encode("the quick fox")[:2]
    assert [output.prompt_token_ids for output in outputs] == [two, [5, 6], [7]]


def test_an_engine_without_a_tokenizer_takes_ids_and_gives_no_text(tiny_dir, llm):
    with tiny_engine(tiny_dir, skip_tokenizer_init=True) as bare:
        [output] = bare.generate([[5, 6, 7]], greedy(4), use_tqdm=False)
        [same] = llm.generate([[5, 6, 7]], greedy(4), use_tqdm=False)
        assert output == {"text": "", "token_ids": same["token_ids"]}
        assert bare.tokenizer is None
        with pytest.raises(ArgumentError, match="needs the tokenizer that skip_tokenizer_init"):
            bare.generate("text", greedy(1))
        with pytest.raises(ArgumentError, match="needs the tokenizer that skip_tokenizer_init"):
            bare.chat(CONVERSATIONS)
        with pytest.raises(ArgumentError, match="skip_tokenizer_init=True left it out"):
            bare.get_tokenizer()
        check_nothing_is_held(bare)


def test_tokenizer_from_another_directory_or_given_as_an_object(tmp_path):
    model_dir = save_model(tmp_path / "model", num_hidden_layers=1)
    for path in model_dir.glob("token*"):
        path.unlink()
    save_tokenizer(tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for tokenizer in (tmp_path / "tokenizer", os.fspath(tmp_path / "tokenizer"), loaded):
        with tiny_engine(model_dir, tokenizer=tokenizer) as llm:
            assert llm.get_tokenizer().get_vocab() == loaded.get_vocab()
            assert (llm.get_tokenizer() is loaded) is (tokenizer is loaded)
    for wrong, message in (
        ("Qwen/Qwen3-0.6B", "tokenizer must be an existing local directory, got 'Qwen/Qwen3-0.6B'"),
        (str(model_dir), f"tokenizer directory '{model_dir}' holds no tokenizer"),
        (5, "or an object with encode and decode, got 5"),
        (None, f"model directory '{model_dir}' holds no tokenizer"),
    ):
        with pytest.raises(ArgumentError, match=message):
            tiny_engine(model_dir, tokenizer=wrong)


def test_a_chat_template_that_cannot_be_read_is_refused_at_once(tiny_dir):
    with pytest.raises(ArgumentError, match="chat_template 'nowhere' is no Jinja template"):
        tiny_engine(tiny_dir, chat_template="nowhere")


@pytest.mark.parametrize(
    ("overrides", "rope"),
    [
        ({"rope_scaling": None}, {"rope_type": "default"}),
        (
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
            {"rope_type": "linear", "factor": 8.0},
        ),
    ],
)
def test_replaced_rope_scaling_computes_what_transformers_does(overrides, rope, tmp_path):
    scaled = save_model(tmp_path / "scaled", rope_parameters=YARN)
    changed = save_model(tmp_path / "changed", rope_parameters=rope | {"rope_theta": 500.0})
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12] * 4]
    expected = reference_greedy(changed, prompts, 8)
    assert expected != reference_greedy(scaled, prompts, 8)
    with tiny_engine(scaled, hf_overrides=overrides) as llm:
        assert token_ids(llm.generate(prompts, greedy(8), use_tqdm=False)) == expected


def test_overridden_model_computes_what_transformers_does(tiny_dir, tmp_path):
    changed = save_model(tmp_path / "changed")  # the same weights
    edit_config(changed, rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12] * 4]
    expected = reference_greedy(changed, prompts, 8)
    assert expected != reference_greedy(tiny_dir, prompts, 8)
    with tiny_engine(tiny_dir, hf_overrides={"rope_theta": 50.0}) as llm:
        assert token_ids(llm.generate(prompts, greedy(8), use_tqdm=False)) == expected
    with tiny_engine(tiny_dir, hf_overrides={"num_hidden_layers": 1}, load_format="dummy") as llm:
        assert len(llm.model_runner.model.model.layers) == 1
