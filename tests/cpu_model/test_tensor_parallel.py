"""Several ranks (gloo, on the CPU) give the tokens of transformers, and leave nothing behind."""

import gc
import math
import os
import shutil

import pytest
from engine_checks import (
    check_nothing_is_held,
    check_varied,
    drain,
    generate,
    greedy,
    is_running,
    random_prompts,
    shared_memory_files,
    tiny_engine,
    wait_until,
    worker_pids,
    worker_processes,
)
from tiny_models import VOCAB_SIZE, edit_config, reference_greedy, save_model

from nanovllm import ArgumentError, RequestError, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_workers")]
MAX_TOKENS = 16
SAMPLED = SamplingParams(temperature=0.8, max_tokens=MAX_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Untied, with biases, 2 KV heads, a vocabulary that no number of ranks divides."""
    return save_model(
        tmp_path_factory.mktemp("models") / "tp",
        seed=3,
        vocab_size=VOCAB_SIZE + 5,
        tie_word_embeddings=False,
        attention_bias=True,
        num_key_value_heads=2,
    )


@pytest.fixture(scope="module")
def prompts():
    shared = random_prompts([600], seed=41)[0]
    own = random_prompts((1, 2, 100, 255, 256, 257, 300, 511, 512, 513), seed=40)
    # Ids of every rank's part of the vocabulary, the last ones too.
    ends = list(range(0, VOCAB_SIZE + 5, 7)) + list(range(VOCAB_SIZE - 3, VOCAB_SIZE + 5))
    return [*own, ends, shared[:512], shared, shared, [*shared, 5]]


@pytest.fixture(scope="module")
def reference(model_dir, prompts):
    reference = reference_greedy(model_dir, prompts, MAX_TOKENS)
    check_varied(reference)
    return reference


@pytest.fixture(scope="module")
def two_ranks(model_dir):
    with tiny_engine(model_dir, tensor_parallel_size=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def two_ranks_short_of_blocks(model_dir, two_ranks):
    """A second engine beside the first; chunked, and with 7 blocks."""
    with tiny_engine(
        model_dir,
        tensor_parallel_size=2,
        num_kvcache_blocks=7,
        watermark=0,
        enable_chunked_prefill=True,
        max_num_batched_tokens=200,
    ) as llm:
        yield llm


def test_a_loop_written_for_nano_vllm_computes_on_both_ranks(two_ranks, prompts, reference):
    llm = two_ranks
    llm.add_request(prompts[2], greedy(3))
    while not llm.scheduler.is_finished():
        seqs, is_prefill = llm.scheduler.schedule()
        llm.scheduler.postprocess(seqs, llm.model_runner.call("run", seqs, is_prefill))
    [output] = llm.wait_for_completion(use_tqdm=False)
    assert output["token_ids"] == reference[2][:3]
    check_nothing_is_held(llm)


def test_greedy_tokens_of_two_ranks(two_ranks, prompts, reference):
    for _ in range(2):
        assert generate(two_ranks, prompts, greedy(MAX_TOKENS)) == reference
        check_nothing_is_held(two_ranks)


def test_sampled_tokens_of_two_ranks_are_those_of_one(model_dir, two_ranks, prompts):
    last_id = two_ranks.add_request([1], greedy(1))
    drain(two_ranks)
    with tiny_engine(model_dir) as llm:
        generate(llm, [[1]] * (last_id + 1), greedy(1))  # the same request numbers from here on
        expected = generate(llm, prompts, SAMPLED)
    assert generate(two_ranks, prompts, SAMPLED) == expected


def test_logits_processors_run_on_the_first_rank_alone(two_ranks, prompts, reference):
    """They see the whole vocabulary, need not be picklable, and one that fails stops no rank."""
    wanted = [VOCAB_SIZE + 4, 0, VOCAB_SIZE - 1, 7]

    def force(token_ids, logits):
        logits[wanted[len(token_ids)]] = math.inf
        return logits

    def fail(token_ids, logits):
        raise ValueError("no more")

    forced, failing = (
        SamplingParams(0, len(wanted), True, logits_processors=[p]) for p in (force, fail)
    )
    params = [greedy(MAX_TOKENS), forced, failing, greedy(MAX_TOKENS)]
    with pytest.raises(RequestError, match=r"prompts\[2\] failed: ValueError: no more") as raised:
        two_ranks.generate(prompts[:4], params, use_tqdm=False)
    expected = [reference[0], wanted, [], reference[3]]
    assert [output["token_ids"] for output in raised.value.outputs] == expected
    check_nothing_is_held(two_ranks)


def test_preemption_and_chunks_on_two_ranks(two_ranks_short_of_blocks, prompts, reference):
    llm = two_ranks_short_of_blocks
    assert generate(llm, prompts, greedy(MAX_TOKENS)) == reference
    check_nothing_is_held(llm)
    assert llm.scheduler.num_preemptions > 0


def test_requests_sampled_apart_on_two_ranks(
    model_dir, two_ranks, two_ranks_short_of_blocks, prompts
):
    """Sampling on rank 0 alone draws the tokens of one rank, with chunks and preemption too."""
    settings = [
        {"top_k": 20, "logprobs": 2},
        {"top_p": 0.8, "prompt_logprobs": 1},
        {"repetition_penalty": 1.3, "n": 2},
        {"min_tokens": MAX_TOKENS, "ignore_eos": False},
    ]
    params = [
        SamplingParams(
            **({"temperature": 0.8, "max_tokens": MAX_TOKENS, "ignore_eos": True, "seed": i} | own)
        )
        for i, own in enumerate(settings)
    ]
    prompts = prompts[4:12]
    params = [params[i % len(params)] for i in range(len(prompts))]
    num_preemptions = two_ranks_short_of_blocks.scheduler.num_preemptions
    with tiny_engine(model_dir) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    for engine in (two_ranks, two_ranks_short_of_blocks):
        outputs = engine.generate(prompts, params, use_tqdm=False)
        for output, truth in zip(outputs, expected, strict=True):
            assert [c.token_ids for c in output.outputs] == [c.token_ids for c in truth.outputs]
            if truth["logprobs"]:
                assert output["cumulative_logprob"] == pytest.approx(
                    truth["cumulative_logprob"], abs=1e-3
                )
            if truth.prompt_logprobs:
                assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
                for ours, theirs in zip(
                    output.prompt_logprobs[1:], truth.prompt_logprobs[1:], strict=True
                ):
                    own_id = next(iter(theirs))
                    assert ours[own_id].logprob == pytest.approx(theirs[own_id].logprob, abs=1e-3)
        check_nothing_is_held(engine)
    assert two_ranks_short_of_blocks.scheduler.num_preemptions > num_preemptions


def test_two_engines_step_in_turn(two_ranks, two_ranks_short_of_blocks, prompts, reference):
    engines = two_ranks, two_ranks_short_of_blocks
    ids = [[llm.add_request(prompt, greedy(MAX_TOKENS)) for prompt in prompts] for llm in engines]
    results = {}, {}
    while not all(llm.is_finished() for llm in engines):
        for llm, result in zip(engines, results, strict=True):
            result.update(llm.step()[0])
    for engine_ids, result in zip(ids, results, strict=True):
        assert [result[request_id] for request_id in engine_ids] == reference


def test_a_step_with_many_long_prompts_that_are_mostly_cached(two_ranks, prompts, reference):
    """What a step sends to the ranks does not grow with the cached part of the prompts."""
    generate(two_ranks, [prompts[12]], greedy(1))
    for _ in range(60):
        two_ranks.add_request(prompts[12], greedy(4))
    completions, counts = drain(two_ranks)
    assert list(completions.values()) == [reference[12][:4]] * 60
    # 32 run, then 28. Of the 88 tokens that the first of them computes the others copy 80.
    assert sum(count for count in counts if count > 0) == 2 * 88 + 58 * 8


def test_aborted_requests_do_not_disturb_the_ranks(two_ranks, prompts, reference):
    class Stopped(Exception):
        pass

    class Bar:
        def __init__(self, **kwargs):
            pass

        def update(self, n):
            raise Stopped

        def set_postfix(self, values):
            pass

        def close(self):
            pass

    for _ in range(2):
        with pytest.raises(Stopped):
            params = [greedy(3), *[greedy(MAX_TOKENS)] * (len(prompts) - 1)]
            two_ranks.generate(prompts, params, use_tqdm=Bar)
        check_nothing_is_held(two_ranks)
        assert generate(two_ranks, prompts, greedy(MAX_TOKENS)) == reference


def test_four_ranks_on_two_kv_heads(model_dir, prompts, reference):
    prompts, expected = prompts[5:10], [completion[:6] for completion in reference[5:10]]
    with tiny_engine(model_dir, tensor_parallel_size=4, num_kvcache_blocks=4, watermark=0) as llm:
        assert sorted(worker_pids())[-1] == 3
        assert generate(llm, prompts, greedy(6)) == expected
        assert llm.scheduler.num_preemptions > 0
        check_nothing_is_held(llm)


@pytest.mark.parametrize("way", ["exit", "drop"])
def test_nothing_is_left_of_an_engine(model_dir, prompts, reference, two_ranks, way):
    """Also: blocks of 512 tokens, whose size every rank has to know.

    `two_ranks` is there first, with the descriptors that a process opens once.
    """
    files, workers = shared_memory_files(), set(worker_processes())
    descriptors = len(os.listdir("/proc/self/fd"))
    llm = tiny_engine(model_dir, tensor_parallel_size=2, kvcache_block_size=512)
    [(_, pid)] = set(worker_processes()) - workers
    assert is_running(pid)
    assert generate(llm, prompts, greedy(MAX_TOKENS)) == reference
    if way == "exit":
        llm.add_request(prompts[0], greedy(100))
        llm.step()
        llm.exit()
        llm.exit()
    del llm
    gc.collect()
    assert not is_running(pid)
    assert set(worker_processes()) == workers
    wait_until(lambda: shared_memory_files() <= files)
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (3, {}, "num_attention_heads"),
        (9, {}, "between 1 and 8"),
        (0, {}, "between 1 and 8"),
        (8, {"num_attention_heads": 4}, "num_attention_heads"),
        (3, {"num_attention_heads": 12, "num_key_value_heads": 4}, "num_key_value_heads"),
        (2, {"intermediate_size": 97}, "intermediate_size"),
    ],
)
def test_a_wrong_number_of_ranks_starts_no_process(
    model_dir, tmp_path, monkeypatch, size, changes, message
):
    def start(*args):
        raise AssertionError("a process was started")

    monkeypatch.setattr("subprocess.Popen", start)
    shutil.copytree(model_dir, tmp_path / "m")
    edit_config(tmp_path / "m", **changes)
    with pytest.raises(ArgumentError, match=message):
        tiny_engine(tmp_path / "m", tensor_parallel_size=size)


def test_a_model_that_cannot_be_loaded_leaves_no_process(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "m")
    os.remove(tmp_path / "m" / "model.safetensors")
    workers = set(worker_processes())
    with pytest.raises(ArgumentError, match=r"safetensors"):
        tiny_engine(tmp_path / "m", tensor_parallel_size=2)
    assert set(worker_processes()) == workers
