"""An engine with Mistral's own tokenizer: `generate`, streams and batch files have one text.

Which tokens come is settled by `allowed_token_ids` and by random weights; the oracle is
transformers' decoding of prompt and completion.
"""

import json

import pytest
import real_tokenizers
from engine_checks import tiny_engine
from tiny_models import edit_config, save_model

from nanovllm import LLM, RequestError, SamplingParams
from nanovllm.batch.run import main
from nanovllm.sampling_params import StructuredOutputsParams

PROMPTS = ["The capital of France is", "Say Hi 😀 there:\n", "为什么", "[INST] Why? [/INST]"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "model"
    save_model(
        folder,
        architecture="MistralForCausalLM",
        vocab_size=32000,
        num_hidden_layers=1,
        sliding_window=None,
        tie_word_embeddings=False,
    )
    for path in folder.glob("token*"):
        path.unlink()
    real_tokenizers.save("mistral-v1", folder)
    edit_config(folder, eos_token_id=2, bos_token_id=1)
    return folder


@pytest.fixture(scope="module")
def llm(model_dir):
    with tiny_engine(model_dir) as llm:
        yield llm


def added(tokenizer, prompt, completion, skip=False):
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode([*prompt, *completion], skip_special_tokens=skip)
    assert whole.startswith(before)
    return whole[len(before) :]


def only(tokenizer, *tokens, **params):
    """Sampling among these tokens alone."""
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    return SamplingParams(allowed_token_ids=ids, ignore_eos=True, **params)


@pytest.mark.parametrize("skip", [False, True])
def test_generate_streams_and_transformers_agree(llm, skip):
    tokenizer = llm.get_tokenizer()
    pieces = ["▁Paris", "▁", ",", "▁the", "is", "中", "<0x0A>", "</s>", "▁▁"]
    params = only(tokenizer, *pieces, seed=1, max_tokens=20, n=2, skip_special_tokens=skip)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    streamed = {}
    for item in llm.generate_stream(PROMPTS, params):
        key = item.prompt_index, item.index
        streamed[key] = streamed.get(key, "") + item.text
    for number, output in enumerate(outputs):
        for completion in output.outputs:
            expected = added(tokenizer, output.prompt_token_ids, completion.token_ids, skip)
            assert completion.text == expected == streamed[number, completion.index]
            with_prompt = tokenizer.decode(
                [*output.prompt_token_ids, *completion.token_ids], skip_special_tokens=True
            )
            if skip:
                assert output.prompt + completion.text == with_prompt


def test_a_stop_string_with_its_space(llm):
    params = only(llm.get_tokenizer(), "▁Paris", max_tokens=5, stop=" Paris")
    [output] = llm.generate(PROMPTS[:1], params, use_tqdm=False)
    [completion] = output.outputs
    assert (completion.text, completion.stop_reason) == ("", " Paris")
    assert len(completion.token_ids) == 1
    params.include_stop_str_in_output = True
    [item] = llm.generate_stream(PROMPTS[0], params)
    assert item.text == item.output.outputs[0].text == " Paris"


def test_a_choice_with_its_space(llm):
    pytest.importorskip("llguidance")
    for choices in ([" yes"], [" yes", " no"], ["yes"]):
        wanted = StructuredOutputsParams(choice=choices)
        params = SamplingParams(structured_outputs=wanted, max_tokens=9, skip_special_tokens=True)
        [output] = llm.generate(PROMPTS[:1], params, use_tqdm=False)
        assert output.outputs[0].text in choices


def test_a_newline_that_is_forbidden(llm):
    tokenizer = llm.get_tokenizer()
    params = only(tokenizer, "<0x0A>", "▁a", max_tokens=20, seed=2, bad_words=["\n"])
    [output] = llm.generate(PROMPTS[:1], params, use_tqdm=False)
    assert output.outputs[0].text == " a" * 20


def test_logprobs_have_the_tokens_as_they_add_to_the_text(llm):
    params = only(llm.get_tokenizer(), "▁Paris", max_tokens=2, logprobs=0, prompt_logprobs=0)
    [output] = llm.generate(PROMPTS[:1], params, use_tqdm=False)
    for entries in output.outputs[0].logprobs:
        assert [entry.decoded_token for entry in entries.values()] == [" Paris"]
    prompt = [next(iter(e.values())).decoded_token for e in output.prompt_logprobs[1:]]
    assert prompt == [" The", " capital", " of", " France", " is"]


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_batch_file(llm, model_dir, tmp_path, is_chat):
    # Parts of characters, whole ones, words and a special token.
    allowed = [*range(3, 259), 302, 349, 415, 28705, 28991, 2, 1500, 2500, 3500]
    sampling = {"allowed_token_ids": allowed, "max_tokens": 20, "logprobs": 2, "ignore_eos": True}
    lines = []
    for number, prompt in enumerate(PROMPTS):
        text = (
            {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
        )
        lines.append({"custom_id": str(number), "sampling_params": sampling, **text})
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    template = tmp_path / "template.jinja"
    template.write_text("{{ bos_token }}[INST] {{ messages[0].content }} [/INST]")
    options = ["--device", "cpu", "--num-kvcache-blocks", "32", "--no-progress", "--seed", "5"]
    options += ["--chat-template", str(template), "--return-token-ids"]
    assert main([str(source), str(target), "--model", str(model_dir), *options]) == 0
    tokenizer = llm.get_tokenizer()
    for record in map(json.loads, target.read_text().splitlines()):
        body = record["response"]["body"]
        [choice] = body["choices"]
        text = choice["message"]["content"] if is_chat else choice["text"]
        check_logprobs(tokenizer, choice, text, is_chat)


def check_logprobs(tokenizer, choice, text, is_chat):
    logprobs = choice["logprobs"]
    if is_chat:
        shown = [
            bytes(entry["bytes"])
            for entry, token_id in zip(logprobs["content"], choice["token_ids"], strict=True)
            if token_id not in tokenizer.all_special_ids
        ]
        whole = b"".join(shown).decode("utf-8", "replace")
        assert whole.replace("\ufffd", "") == text.replace("\ufffd", "")
        return
    for token_id, name, offset in zip(
        choice["token_ids"], logprobs["tokens"], logprobs["text_offset"], strict=True
    ):
        if token_id not in tokenizer.all_special_ids and not name.startswith("bytes:"):
            assert text[offset : offset + len(name)] == name
    assert "\ufffd" not in "".join(logprobs["tokens"])
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert token in top


def test_a_tokenizer_that_fails_is_named_by_its_own_error(model_dir):
    """An object of another make, with `encode` and `decode` alone."""

    class Failing:
        def encode(self, text):
            return [ord(character) for character in text]

        def decode(self, token_ids):
            if 5000 in token_ids:
                raise KeyError("no such id")
            return "".join(map(chr, token_ids))

    with LLM(str(model_dir), device="cpu", num_kvcache_blocks=16, tokenizer=Failing()) as llm:
        params = SamplingParams(allowed_token_ids=[98], max_tokens=3)
        assert llm.generate("a", params, use_tqdm=False)[0]["text"] == "bbb"
        params = SamplingParams(allowed_token_ids=[5000], max_tokens=3)
        with pytest.raises(RequestError, match="KeyError: 'no such id'"):
            llm.generate("a", params, use_tqdm=False)
