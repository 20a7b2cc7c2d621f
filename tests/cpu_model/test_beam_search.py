"""Beam search against transformers' and against all continuations of a tiny vocabulary."""

import itertools

import pytest
import torch
from engine_checks import check_nothing_is_held, random_prompts, tiny_engine
from tiny_models import save_model
from transformers import AutoModelForCausalLM

from nanovllm import ArgumentError, BeamSearchOutput, BeamSearchParams

VOCABULARY, EOS = 8, 2


@pytest.fixture(scope="module")
def llm(tiny_dir):
    with tiny_engine(tiny_dir) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(llm):
    yield
    check_nothing_is_held(llm)


def test_beams_are_those_of_transformers(llm, tiny_dir):
    """Of beams that are equally long the definitions agree: the highest sums win."""
    prompts = random_prompts([5, 300], seed=3)
    params = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)
    outputs = llm.beam_search(prompts, params)
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            num_beams=3,
            num_return_sequences=3,
            max_new_tokens=5,
            do_sample=False,
            length_penalty=0.0,
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        assert isinstance(output, BeamSearchOutput)
        assert [beam.tokens for beam in output.sequences] == expected.sequences.tolist()
        sums = [beam.cum_logprob for beam in output.sequences]
        assert sums == pytest.approx(expected.sequences_scores.tolist(), abs=1e-4)
        for beam in output.sequences:
            assert (beam.finish_reason, beam.stop_reason) == ("length", None)
            assert beam.text == llm.get_tokenizer().decode(beam.tokens)
            chosen = zip(beam.tokens[len(prompt) :], beam.logprobs, strict=True)
            assert sum(c[token].logprob for token, c in chosen) == pytest.approx(beam.cum_logprob)


@pytest.mark.parametrize(
    ("length_penalty", "ignore_eos"), [(1.0, False), (0.0, False), (2.0, True)]
)
def test_a_beam_of_all_continuations_finds_the_best_of_them(
    every_continuation, length_penalty, ignore_eos
):
    llm, prompt, table = every_continuation
    width = 30
    params = BeamSearchParams(
        400, max_tokens=3, length_penalty=length_penalty, ignore_eos=ignore_eos
    )
    [output] = llm.beam_search([{"prompt_token_ids": prompt}], params)
    scores = {}
    for tokens, logprobs in table.items():
        if EOS in tokens and not ignore_eos:  # it ends there
            tokens = tokens[: tokens.index(EOS) + 1]
        length = len(prompt) + len(tokens) - (tokens[-1] == EOS)
        scores[tokens] = sum(logprobs[: len(tokens)]) / length**length_penalty
    best = sorted(scores, key=scores.get, reverse=True)
    assert len(output.sequences) == min(400, len(best))
    found = [tuple(beam.tokens[len(prompt) :]) for beam in output.sequences]
    assert set(found) <= scores.keys() and len(set(found)) == len(found)
    expected = [scores[tokens] for tokens in best[:width]]
    assert [scores[tokens] for tokens in found[:width]] == pytest.approx(expected, abs=1e-4)
    for beam, tokens in zip(output.sequences, found, strict=True):
        is_stopped = tokens[-1] == EOS and not ignore_eos
        assert beam.finish_reason == ("stop" if is_stopped else "length")
        assert beam.stop_reason == (EOS if is_stopped else None)


@pytest.fixture(scope="module")
def every_continuation(tmp_path_factory):
    """An engine, a prompt, and each continuation by 3 tokens with its log probabilities."""
    path = save_model(
        tmp_path_factory.mktemp("tiny") / "model", vocab_size=VOCABULARY, num_hidden_layers=1
    )
    prompt = [3, 1, 4]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    continuations = list(itertools.product(range(VOCABULARY), repeat=3))
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens] for tokens in continuations])).logits
    rows = logits[:, len(prompt) - 1 : -1].double().log_softmax(-1)
    chosen = rows.gather(2, torch.tensor(continuations)[..., None])[..., 0].tolist()
    with tiny_engine(path, skip_tokenizer_init=True) as engine:
        yield engine, prompt, dict(zip(continuations, chosen, strict=True))


def test_a_beam_ends_where_the_model_and_the_cache_end(tiny_dir):
    with tiny_engine(tiny_dir, max_model_len=16, num_kvcache_blocks=1) as llm:
        params = BeamSearchParams(2, max_tokens=1000, ignore_eos=True)
        first, second = llm.beam_search([[5] * 13, [6] * 15], params, concurrency_limit=1)
        assert {len(beam.tokens) for beam in first.sequences + second.sequences} == {16}
        with pytest.raises(ArgumentError, match="is longer than the maximum model length of 16"):
            llm.beam_search([[5], [6] * 16], params)
        check_nothing_is_held(llm)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": BeamSearchParams(11, 1)}, "beam_width must be <= 10, got 11: a step needs 22"),
        ({"params": None}, "params must be a BeamSearchParams, got None"),
        ({"lora_request": 1}, "lora_request must be a LoRARequest"),
        ({"concurrency_limit": 0}, "concurrency_limit must be >= 1, got 0"),
        ({"prompts": [[]]}, "Prompt cannot be empty"),
    ],
)
def test_wrong_arguments_are_refused(llm, arguments, message):
    given = {"prompts": [[1, 2]], "params": BeamSearchParams(2, 2)} | arguments
    with pytest.raises(ArgumentError, match=message):
        llm.beam_search(**given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beam_width": 0}, "beam_width must be between 1 and"),
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
        ({"length_penalty": float("nan")}, "length_penalty must be finite"),
        ({"structured_outputs": 1}, "structured_outputs is not supported for beam search"),
    ],
)
def test_wrong_parameters_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        BeamSearchParams(**({"beam_width": 2, "max_tokens": 2} | arguments))
    with pytest.raises(TypeError, match="'num_beams'; the nearest known is 'beam_width'"):
        BeamSearchParams(num_beams=2, max_tokens=2)
