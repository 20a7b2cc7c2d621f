"""K/V copied between blocks: prompts that come together compute what they have in common once."""

import pytest
from engine_checks import check_nothing_is_held, generate, greedy, random_prompts, tiny_engine
from tiny_models import reference_greedy

MAX_TOKENS = 6
STEM, *ENDS = random_prompts([470, 30, 50, 3, 60], seed=77)
# 470 tokens: a whole block, and 26 units of 8 of the next one.
PROMPTS = [STEM + end for end in ENDS]


@pytest.fixture(scope="module")
def reference(tiny_dir):
    return reference_greedy(tiny_dir, PROMPTS, MAX_TOKENS)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 90},
        {"num_kvcache_blocks": 5, "watermark": 0},
        {"kvcache_block_size": 512},
        {"model_impl": "transformers"},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_tokens_are_those_without_copies(tiny_dir, reference, settings):
    with tiny_engine(tiny_dir, **settings) as llm:
        for _ in range(2):  # the second time from cached blocks
            outputs = llm.generate(PROMPTS, greedy(MAX_TOKENS), use_tqdm=False)
            assert [output["token_ids"] for output in outputs] == reference
            assert min(output.num_cached_tokens for output in outputs[1:]) >= 464
        check_nothing_is_held(llm)


def test_scales_of_an_fp8_cache_are_copied(tiny_dir):
    with tiny_engine(tiny_dir, kv_cache_dtype="fp8", enable_prefix_caching=False) as llm:
        expected = generate(llm, PROMPTS, greedy(MAX_TOKENS))
    with tiny_engine(tiny_dir, kv_cache_dtype="fp8") as llm:
        assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == expected
        assert llm.scheduler.stats.num_prefix_cache_hits == 3 * 464


def test_a_conversation_goes_on_with_what_was_computed(tiny_dir):
    """Each turn computes what the user adds, up to 8 tokens of the turn before, and its newest."""
    added = random_prompts([290, 40, 3, 21], seed=5)
    with tiny_engine(tiny_dir) as llm:
        for _ in range(2):  # the second time the first turn is known, too
            text: list[int] = []
            for turn, ids in enumerate(added):
                num_known = len(text) - 1
                text += ids
                [output] = llm.generate([text], greedy(9), use_tqdm=False)
                assert [output["token_ids"]] == reference_greedy(tiny_dir, [text], 9)
                if turn:
                    assert num_known - 8 < output.num_cached_tokens <= num_known
                text += output["token_ids"]
        check_nothing_is_held(llm)
