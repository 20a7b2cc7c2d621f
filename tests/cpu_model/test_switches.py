"""No switch changes a token: caching, chunking, overlap, a pool so small that it preempts."""

import itertools
import json
import random
import shutil
from collections import Counter

import pytest
import torch
from engine_checks import (
    check_nothing_is_held,
    drain,
    generate,
    greedy,
    random_prompts,
    tiny_engine,
    up_to_eos,
)
from tiny_models import VOCAB_SIZE, reference_greedy
from transformers import Qwen3ForCausalLM

from nanovllm import SamplingParams

NAMES = ("caching", "chunked", "overlap", "ample")
SWITCHES = list(itertools.product([True, False], repeat=4))
# Half of them each: any three switches in all their combinations.
EVEN = [switches for switches in SWITCHES if sum(switches) % 2 == 0]
ODD = [switches for switches in SWITCHES if sum(switches) % 2 == 1]
# Any two switches in all their combinations, and all at once with a pool that preempts.
PAIRS = [switches for switches in SWITCHES if sum(switches) in (0, 3)]


def engine_with(model_dir, caching, chunked, overlap, ample, **kwargs):
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 90} if chunked else {}
    pool = {} if ample else {"num_kvcache_blocks": 7, "watermark": 0}
    return tiny_engine(
        model_dir,
        enable_prefix_caching=caching,
        async_scheduling=overlap,
        **(chunks | pool | kwargs),
    )


@pytest.mark.parametrize(NAMES, EVEN)
def test_greedy_tokens_are_those_of_transformers(
    shallow_dir, workload, caching, chunked, overlap, ample
):
    with engine_with(shallow_dir, caching, chunked, overlap, ample) as llm:
        for _ in range(1 + caching):  # the second time with a warm prefix cache
            outputs = generate(llm, workload.prompts, greedy(workload.max_tokens))
            assert outputs == workload.reference
            check_nothing_is_held(llm)
        assert (llm.scheduler.num_preemptions > 0) == (not ample)


# ---- sampled tokens ---------------------------------------------------------------------------


SAMPLED = SamplingParams(temperature=0.8, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def sampled(shallow_dir, workload):
    with tiny_engine(shallow_dir) as llm:
        outputs = generate(llm, workload.prompts, SAMPLED)
    assert outputs != workload.reference
    return outputs


@pytest.mark.parametrize(NAMES, PAIRS)
def test_sampled_tokens_are_the_same(
    shallow_dir, workload, sampled, caching, chunked, overlap, ample
):
    with engine_with(shallow_dir, caching, chunked, overlap, ample) as llm:
        assert generate(llm, workload.prompts, SAMPLED) == sampled
        assert (llm.scheduler.num_preemptions > 0) == (not ample)
        check_nothing_is_held(llm)


@pytest.mark.parametrize("number", [0, 3, 11])
def test_a_request_alone_is_sampled_as_in_a_batch(shallow_dir, workload, sampled, number):
    with tiny_engine(shallow_dir) as llm:
        generate(llm, [[1]] * number, greedy(1))  # requests 0 to number - 1
        assert generate(llm, [workload.prompts[number]], SAMPLED) == [sampled[number]]


def test_sampling_differs_between_requests_engine_seeds_and_repetitions(
    shallow_dir, workload, sampled
):
    prompt = workload.prompts[8]
    with tiny_engine(shallow_dir, seed=1) as llm:
        other_seed = generate(llm, workload.prompts, SAMPLED)
        repeated = generate(llm, workload.prompts, SAMPLED)
        same_prompt = generate(llm, [prompt] * 20, SAMPLED)
    with tiny_engine(shallow_dir, seed=1) as llm:
        assert generate(llm, workload.prompts, SAMPLED) == other_seed
    num = len(sampled)
    assert sum(a != b for a, b in zip(sampled, other_seed, strict=True)) > 0.9 * num
    assert sum(a != b for a, b in zip(repeated, other_seed, strict=True)) > 0.9 * num
    assert len({tuple(completion) for completion in same_prompt}) > 15


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_extreme_engine_seeds(shallow_dir, seed):
    with tiny_engine(shallow_dir, seed=seed) as llm:
        assert len(generate(llm, [[1, 2]], SAMPLED)[0]) == 16


def test_mixed_temperatures_in_one_batch(shallow_dir, workload, sampled):
    params = [SAMPLED if i % 2 else greedy(16) for i in range(len(workload.prompts))]
    expected = [sampled[i] if i % 2 else workload.reference[i] for i in range(len(params))]
    with tiny_engine(shallow_dir) as llm:
        assert generate(llm, workload.prompts, params) == expected


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_frequencies_are_the_softmax_of_the_logits_of_transformers(shallow_dir, temperature):
    """The first token comes from a prefill step, the second from a decode step."""
    prompt, num_draws = [7, 100, 23], 3000
    with torch.inference_mode():
        model = Qwen3ForCausalLM.from_pretrained(shallow_dir, dtype=torch.float32)

        def probabilities(sequences):
            return (model(torch.tensor(sequences)).logits[:, -1] / temperature).softmax(-1)

        first = probabilities([prompt])[0]
        second = first @ probabilities([[*prompt, token] for token in range(VOCAB_SIZE)])
    params = SamplingParams(temperature=temperature, max_tokens=2, ignore_eos=True)
    with tiny_engine(shallow_dir, max_num_seqs=512, num_kvcache_blocks=600) as llm:
        outputs = generate(llm, [prompt] * num_draws, params)
    for position, expected in enumerate((first, second)):
        drawn = torch.tensor([completion[position] for completion in outputs])
        frequency = torch.bincount(drawn, minlength=VOCAB_SIZE) / num_draws
        sigma = (expected * (1 - expected) / num_draws).sqrt()
        assert ((frequency - expected).abs() <= 5 * sigma + 5 / num_draws).all()
        assert (frequency > 0).sum() >= 3  # it is a draw, not the argmax


# ---- ends that nobody knows in advance --------------------------------------------------------


@pytest.fixture(scope="module")
def eos_dir(shallow_dir, workload, tmp_path_factory):
    """The tiny model with several EOS ids in generation_config.json, which the reference emits."""
    counts = Counter(token for completion in workload.reference for token in completion[1:])
    eos = [token for token, _ in counts.most_common(6)][1::2]
    model_dir = tmp_path_factory.mktemp("eos") / "m"
    shutil.copytree(shallow_dir, model_dir)
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return model_dir, {*eos, 2}


@pytest.mark.parametrize(NAMES, ODD)
def test_late_eos(eos_dir, workload, caching, chunked, overlap, ample):
    model_dir, eos = eos_dir
    rng = random.Random(3)
    limits = [rng.randint(1, workload.max_tokens) for _ in workload.prompts]
    expected = [
        up_to_eos(completion, eos)[:limit]
        for completion, limit in zip(workload.reference, limits, strict=True)
    ]
    ends = Counter("eos" if completion[-1] in eos else "length" for completion in expected)
    assert min(ends["eos"], ends["length"]) >= 3
    assert len({len(completion) for completion in expected}) >= 5
    with engine_with(model_dir, caching, chunked, overlap, ample, max_num_seqs=6) as llm:
        assert llm.config.eos_token_ids == eos
        params = [greedy(limit, ignore_eos=False) for limit in limits]
        assert generate(llm, workload.prompts, params) == expected
        check_nothing_is_held(llm)


@pytest.mark.parametrize("max_num_seqs", [1, 3])
def test_a_step_whose_sequences_have_all_ended_is_not_returned(eos_dir, workload, max_num_seqs):
    model_dir, _ = eos_dir
    with tiny_engine(model_dir, max_num_seqs=max_num_seqs) as llm:
        for prompt in workload.prompts:
            llm.add_request(prompt, greedy(workload.max_tokens, ignore_eos=False))
        assert all(drain(llm)[1])  # every step computed something for somebody


@pytest.mark.parametrize("overlap", [True, False])
def test_ignore_eos_goes_on_past_every_eos(eos_dir, workload, overlap):
    model_dir, _ = eos_dir
    with tiny_engine(model_dir, async_scheduling=overlap) as llm:
        assert generate(llm, workload.prompts, greedy(16)) == workload.reference


def test_a_config_without_generation_config_stops_at_the_eos_of_the_tokenizer(
    shallow_dir, tmp_path
):
    model_dir = tmp_path / "m"
    shutil.copytree(shallow_dir, model_dir)
    (model_dir / "generation_config.json").unlink(missing_ok=True)
    with tiny_engine(model_dir) as llm:
        assert llm.config.eos_token_ids == {llm.tokenizer.eos_token_id} == {2}


# ---- how much the prefix cache spares -----------------------------------------------------------


def prefilled_tokens(llm, prompt, max_tokens):
    """The completion and the prompt tokens computed for it."""
    request_id = llm.add_request(prompt, greedy(max_tokens))
    completions, counts = drain(llm)
    return completions[request_id], sum(count for count in counts if count > 0)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_repeated_prompt_computes_what_is_not_cached(shallow_dir, overlap):
    num_warm = {
        600: 88,
        513: 1,
        512: 1,  # all blocks are found: the last token is computed all the same
        511: 7,  # the second block became full: 31 of its units are copied
        257: 1,
        256: 1,
        255: 7,
    }
    prompts = [random_prompts([length], seed=length)[0] for length in num_warm]
    references = reference_greedy(shallow_dir, prompts, 8)
    with tiny_engine(shallow_dir, async_scheduling=overlap) as llm:
        for prompt, reference in zip(prompts, references, strict=True):
            warm = reference, num_warm[len(prompt)]
            assert prefilled_tokens(llm, prompt, 8) == (reference, len(prompt))
            assert prefilled_tokens(llm, prompt, 8) == warm
            assert prefilled_tokens(llm, prompt, 8) == warm


@pytest.mark.parametrize("length", [256, 512])
def test_shared_blocks_are_not_written_again(shallow_dir, length):
    """The last token of a prompt that is cached as a whole is computed, and not stored."""
    [prompt] = random_prompts([length], seed=length)
    with tiny_engine(shallow_dir) as llm:
        prefilled_tokens(llm, prompt, 1)
        llm.model_runner.kv_cache.fill_(0.5)
        assert prefilled_tokens(llm, prompt, 1)[1] == 1
        assert (llm.model_runner.kv_cache == 0.5).all()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("num_generated", "num_cached"), [(30, 528), (12, 504), (13, 512)])
def test_a_second_turn_finds_what_was_generated(shallow_dir, num_generated, num_cached, overlap):
    """The K/V of the last generated token was never computed: at 512 tokens 511 are there.

    What is behind the whole blocks is found in units of 8 tokens.
    """
    prompt, more = random_prompts([500, 10], seed=9)
    [reference] = reference_greedy(shallow_dir, [prompt], num_generated)
    second = prompt + reference + more
    [second_reference] = reference_greedy(shallow_dir, [second], 8)
    with tiny_engine(shallow_dir, async_scheduling=overlap) as llm:
        assert prefilled_tokens(llm, prompt, num_generated) == (reference, 500)
        assert prefilled_tokens(llm, second, 8) == (second_reference, len(second) - num_cached)


def test_equal_prompts_of_one_step_share_their_blocks(shallow_dir):
    [prompt] = random_prompts([600], seed=5)
    [reference] = reference_greedy(shallow_dir, [prompt], 8)
    with tiny_engine(shallow_dir) as llm:
        for _ in range(4):
            llm.add_request(prompt, greedy(8))
        completions, counts = drain(llm)
        # 2 blocks are shared, and 10 units of 8 tokens are copied, but not the last token.
        assert counts[0] == 600 + 3 * 8
        assert list(completions.values()) == [reference] * 4
        check_nothing_is_held(llm)


def test_nothing_is_shared_with_prefix_caching_off(shallow_dir):
    [prompt] = random_prompts([600], seed=5)
    with tiny_engine(shallow_dir, enable_prefix_caching=False) as llm:
        for _ in range(2):
            assert prefilled_tokens(llm, prompt, 2)[1] == 600
        assert not llm.scheduler.block_manager.hash_to_block_ids


def test_a_long_prompt_in_chunks(shallow_dir):
    [prompt] = random_prompts([900], seed=6)
    with tiny_engine(shallow_dir, enable_chunked_prefill=True, max_num_batched_tokens=400) as llm:
        llm.add_request(prompt, greedy(3))
        assert drain(llm)[1] == [400, 400, 100, -1, -1]


def test_random_arrivals_between_steps(shallow_dir, workload):
    """Requests come while others run; each gets its reference, whatever it was batched with."""
    rng = random.Random(8)
    for overlap, chunked in itertools.product([True, False], repeat=2):
        with engine_with(shallow_dir, True, chunked, overlap, ample=False, max_num_seqs=5) as llm:
            queue = [rng.randrange(len(workload.prompts)) for _ in range(20)]
            expected, completions = {}, {}
            while queue or not llm.is_finished():
                while queue and rng.random() < 0.3:
                    index, limit = queue.pop(), rng.randint(1, workload.max_tokens)
                    request_id = llm.add_request(workload.prompts[index], greedy(limit))
                    expected[request_id] = workload.reference[index][:limit]
                completions.update(llm.step()[0])
                assert len(llm.scheduler.running) <= 5
            assert completions == expected
            check_nothing_is_held(llm)
