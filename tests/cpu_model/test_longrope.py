"""LongRoPE: which factors an engine takes, against transformers, which takes them by the length."""

import pytest
from engine_checks import check_varied, generate, greedy, random_prompts, tiny_engine
from tiny_models import LONGROPE, reference_greedy, save_model

MAX_TOKENS = 10
ORIGINAL = 128


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(
        tmp_path_factory.mktemp("models") / "phi4-mini",
        architecture="Phi3ForCausalLM",
        hidden_size=128,
        rope_parameters=LONGROPE | {"partial_rotary_factor": 0.75},
        original_max_position_embeddings=ORIGINAL,
    )


def with_long_factors(config):
    """As docs/models.md has it."""
    config.rope_parameters["short_factor"] = config.rope_parameters["long_factor"]
    return config


def test_up_to_the_original_length_tokens_are_those_of_transformers(path):
    prompts = random_prompts((3, 50, ORIGINAL - MAX_TOKENS), seed=4)
    expected = reference_greedy(path, prompts, MAX_TOKENS)
    check_varied(expected)
    with tiny_engine(path, max_model_len=ORIGINAL) as llm:
        assert generate(llm, prompts, greedy(MAX_TOKENS)) == expected
    with tiny_engine(path, max_model_len=ORIGINAL, hf_overrides=with_long_factors) as llm:
        assert generate(llm, prompts, greedy(MAX_TOKENS)) != expected


def test_longer_prompts_have_those_of_transformers_with_the_long_factors(path):
    prompts = random_prompts((ORIGINAL + 1, 300), seed=5)
    with tiny_engine(path, max_model_len=400, hf_overrides=with_long_factors) as llm:
        tokens = generate(llm, prompts, greedy(MAX_TOKENS))
    assert tokens == reference_greedy(path, prompts, MAX_TOKENS)
