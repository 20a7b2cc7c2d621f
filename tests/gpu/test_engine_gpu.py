"""The engine on CUDA: the same tokens whatever the switches, memory kept to its share."""

import gc
import itertools
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import worker_without_memory
from sockets import are_on_the_loopback, listeners
from tiny_models import VOCAB_SIZE, edit_config, reference_greedy, save_model

from nanovllm import LLM, EngineDeadError, SamplingParams
from nanovllm.kernels.triton import activation, hopper_linear

MAX_TOKENS = 24
LENGTHS = (1, 2, 15, 16, 17, 31, 64, 255, 256, 257, 300, 511, 512, 513)


def random_prompts(lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def greedy(max_tokens=MAX_TOKENS, **kwargs):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **({"ignore_eos": True} | kwargs))


def token_ids(outputs):
    return [output["token_ids"] for output in outputs]


def check_all_free(llm):
    manager = llm.scheduler.block_manager
    assert manager.num_free_blocks == len(manager.blocks)
    assert all(block.ref_count == 0 for block in manager.blocks)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def prompts():
    shared = random_prompts([600], seed=1)[0]
    own = random_prompts(LENGTHS)
    return [*own, shared[:512], shared[:520], shared, shared, [*shared, 5]]


@pytest.fixture(scope="module")
def reference(model_dir, prompts):
    return reference_greedy(model_dir, prompts, MAX_TOKENS)


def small_engine(model_dir, **kwargs):
    settings = {"max_model_len": 1024, "max_num_seqs": 32, "num_kvcache_blocks": 256}
    return LLM(str(model_dir), **(settings | kwargs))


SWITCHES = list(itertools.product([True, False], repeat=5))


@pytest.mark.parametrize(("overlap", "graphs", "caching", "chunked", "ample"), SWITCHES)
def test_switches_give_the_reference_tokens(
    model_dir, prompts, reference, overlap, graphs, caching, chunked, ample
):
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 200} if chunked else {}
    with small_engine(
        model_dir,
        async_scheduling=overlap,
        enforce_eager=not graphs,
        enable_prefix_caching=caching,
        num_kvcache_blocks=256 if ample else 9,
        watermark=0,
        **chunks,
    ) as llm:
        for _ in range(2):  # the second time with a warm prefix cache
            assert token_ids(llm.generate(prompts, greedy(), use_tqdm=False)) == reference
        assert (llm.scheduler.num_preemptions > 0) != ample
        check_all_free(llm)


@pytest.mark.parametrize("overlap", [True, False])
def test_random_lengths_and_late_eos(model_dir, prompts, reference, overlap):
    rng = random.Random(3)
    limits = [rng.randint(1, MAX_TOKENS) for _ in prompts]
    with small_engine(model_dir, async_scheduling=overlap, max_num_seqs=5) as llm:
        counts = {}
        for completion in reference:
            for token in completion[2:]:
                counts[token] = counts.get(token, 0) + 1
        eos = frozenset(sorted(counts, key=counts.get)[-3:])
        llm.scheduler.eos_token_ids = eos
        params = [greedy(limit, ignore_eos=False) for limit in limits]
        outputs = token_ids(llm.generate(prompts, params, use_tqdm=False))
        check_all_free(llm)
    expected = []
    for completion, limit in zip(reference, limits, strict=True):
        end = next((i + 1 for i, token in enumerate(completion) if token in eos), limit)
        expected.append(completion[: min(end, limit)])
    assert outputs == expected
    assert any(len(out) < limit for out, limit in zip(outputs, limits, strict=True))


@pytest.mark.parametrize("max_num_seqs", [20, 700])
def test_graph_equals_eager_at_every_batch_size(model_dir, max_num_seqs):
    sizes = [n for n in (1, 3, 5, 9, 17, 20, 255, 512, 513, 700) if n <= max_num_seqs]
    prompts = random_prompts([1 + i % 40 for i in range(max_num_seqs)], seed=2)
    outputs = []
    for enforce_eager in (False, True):
        with small_engine(
            model_dir,
            max_num_seqs=max_num_seqs,
            num_kvcache_blocks=700,
            enforce_eager=enforce_eager,
        ) as llm:
            outputs.append(
                [token_ids(llm.generate(prompts[:n], greedy(8), use_tqdm=False)) for n in sizes]
            )
    assert outputs[0] == outputs[1]


def test_sampling_is_the_same_in_any_batch_and_backend(model_dir, prompts):
    params = SamplingParams(temperature=0.8, max_tokens=MAX_TOKENS, ignore_eos=True)
    outputs = []
    for settings in (
        {},
        {"enforce_eager": True, "max_num_seqs": 3},
        {"attention_backend": "torch"},
    ):
        with small_engine(model_dir, **settings) as llm:
            outputs.append(token_ids(llm.generate(prompts, params, use_tqdm=False)))
    assert outputs[0] == outputs[1]
    # Another order of summation may flip a near tie; most sequences must still agree.
    agreeing = sum(a == b for a, b in zip(outputs[0], outputs[2], strict=True))
    assert agreeing >= 0.9 * len(prompts)


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_torch_backend_gives_the_reference_tokens(model_dir, prompts, reference, enforce_eager):
    with small_engine(model_dir, attention_backend="torch", enforce_eager=enforce_eager) as llm:
        assert token_ids(llm.generate(prompts, greedy(), use_tqdm=False)) == reference


def test_batch_invariance_of_a_needle_in_fp32(model_dir):
    needle = random_prompts([100], seed=7)[0]
    with small_engine(model_dir, max_num_seqs=128, num_kvcache_blocks=400) as llm:
        alone = token_ids(llm.generate([needle], greedy(), use_tqdm=False))[0]
        rng = random.Random(11)
        for trial in range(5):
            batch = random_prompts(
                [rng.randint(1, 300) for _ in range(rng.randint(64, 128))], trial
            )
            position = rng.randrange(len(batch))
            batch[position] = needle
            assert token_ids(llm.generate(batch, greedy(), use_tqdm=False))[position] == alone


def test_flash_attn_agrees_with_triton_in_bf16(tmp_path):
    pytest.importorskip("flash_attn", reason="flash_attn is not installed")
    model_dir = save_model(
        tmp_path / "m", num_attention_heads=4, head_dim=64, initializer_range=0.1
    )
    prompts = random_prompts(LENGTHS)
    outputs = []
    for backend in ("triton", "flash-attn"):
        with small_engine(model_dir, dtype="bfloat16", attention_backend=backend) as llm:
            outputs.append(token_ids(llm.generate(prompts, greedy(8), use_tqdm=False)))
    # A first token depends on one prefill only, so rounding rarely changes it; later ones drift.
    first = sum(a[0] == b[0] for a, b in zip(*outputs, strict=True))
    same = sum(a == b for a, b in zip(*outputs, strict=True))
    assert first >= len(prompts) - 1
    assert same >= len(prompts) // 2


def test_flash_attn_refuses_float32(model_dir):
    pytest.importorskip("flash_attn", reason="flash_attn is not installed")
    with pytest.raises(ValueError, match="float32"):
        small_engine(model_dir, attention_backend="flash-attn")


def used_bytes():
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(0)
    return total - free


def test_memory_stays_in_its_share_and_comes_back(model_dir):
    share = 0.5
    total = torch.cuda.mem_get_info(0)[1]
    others = used_bytes()  # the CUDA context of this process, and other processes
    levels = []
    for _ in range(3):
        llm = LLM(str(model_dir), gpu_memory_utilization=share, max_model_len=1024)
        llm.generate(random_prompts([700] * 64), greedy(), use_tqdm=False)
        block_bytes = llm.model_runner.kv_cache.nbytes // llm.config.num_kvcache_blocks
        assert llm.config.num_kvcache_blocks * block_bytes < share * total
        assert llm.config.num_kvcache_blocks * block_bytes > 0.9 * share * total
        assert used_bytes() - others <= share * total
        llm.exit()
        levels.append(used_bytes())
    assert all(abs(level - levels[0]) < 100 << 20 for level in levels), levels


def test_dropping_the_engine_frees_its_memory(model_dir):
    with small_engine(model_dir) as llm:
        llm.generate([[1, 2, 3]], greedy(4), use_tqdm=False)
    del llm
    gc.collect()
    level = used_bytes()
    llm = small_engine(model_dir, kv_cache_memory_bytes=4 << 30, num_kvcache_blocks=None)
    assert used_bytes() > level + (3 << 30)
    del llm
    gc.collect()
    assert abs(used_bytes() - level) < 100 << 20


def test_memory_of_a_dropped_engine_is_not_counted_as_the_next_ones(model_dir):
    gc.collect()
    torch.cuda.empty_cache()
    share, total, others = 0.1, torch.cuda.mem_get_info(0)[1], used_bytes()
    llm = small_engine(model_dir, kv_cache_memory_bytes=8 << 30, num_kvcache_blocks=None)
    llm.itself = llm  # only the garbage collector frees it
    del llm
    with LLM(str(model_dir), gpu_memory_utilization=share, max_model_len=1024):
        assert used_bytes() - others <= share * total


def test_a_share_too_small_is_refused_with_the_knob(model_dir):
    with pytest.raises(ValueError, match="gpu_memory_utilization"):
        LLM(str(model_dir), gpu_memory_utilization=0.005)


def test_an_error_in_a_step_leaves_the_engine_usable(model_dir, prompts, reference, monkeypatch):
    with small_engine(model_dir) as llm:
        execute, calls = llm.model_runner.execute, []

        def fail_once(plan, seqs=()):
            calls.append(plan)
            if len(calls) == 5:
                raise torch.cuda.OutOfMemoryError("injected")
            return execute(plan, seqs)

        monkeypatch.setattr(llm.model_runner, "execute", fail_once)
        assert token_ids(llm.generate(prompts, greedy(), use_tqdm=False)) == reference
        assert len(calls) > 5
        check_all_free(llm)
        assert token_ids(llm.generate(prompts, greedy(), use_tqdm=False)) == reference


@pytest.mark.two_gpus
@pytest.mark.parametrize("enforce_eager", [True, False])
def test_two_ranks_give_the_reference_tokens(model_dir, prompts, reference, enforce_eager):
    with small_engine(model_dir, tensor_parallel_size=2, enforce_eager=enforce_eager) as llm:
        assert token_ids(llm.generate(prompts, greedy(), use_tqdm=False)) == reference


@pytest.mark.four_gpus
@pytest.mark.parametrize("enforce_eager", [True, False])
def test_four_ranks_give_the_reference_tokens(model_dir, prompts, reference, enforce_eager):
    with small_engine(model_dir, tensor_parallel_size=4, enforce_eager=enforce_eager) as llm:
        assert llm.model_runner.tp.peers is not None
        assert token_ids(llm.generate(prompts, greedy(), use_tqdm=False)) == reference


@pytest.mark.two_gpus
def test_two_ranks_sum_through_nccl_if_one_cannot_share_memory(
    model_dir, prompts, reference, monkeypatch
):
    monkeypatch.setattr("nanovllm.parallel.workers._worker_main", worker_without_memory.main)
    with small_engine(model_dir, tensor_parallel_size=2) as llm:
        assert llm.model_runner.tp.peers is None
        assert token_ids(llm.generate(prompts, greedy(), use_tqdm=False)) == reference


@pytest.mark.two_gpus
def test_two_ranks_sum_through_nccl_if_told_to(model_dir, prompts, reference):
    with small_engine(model_dir, tensor_parallel_size=2, disable_custom_all_reduce=True) as llm:
        assert llm.model_runner.tp.peers is None
        assert token_ids(llm.generate(prompts, greedy(), use_tqdm=False)) == reference


@pytest.mark.two_gpus
def test_two_ranks_draw_the_tokens_of_one(model_dir, prompts):
    params = SamplingParams(temperature=0.8, max_tokens=MAX_TOKENS, ignore_eos=True)
    outputs = []
    for size in (1, 2):
        with small_engine(model_dir, tensor_parallel_size=size) as llm:
            assert (llm.model_runner.tp.peers is None) == (size == 1)
            outputs.append(token_ids(llm.generate(prompts, params, use_tqdm=False)))
    # Another order of summation may flip a near tie; most sequences must still agree.
    agreeing = sum(a == b for a, b in zip(*outputs, strict=True))
    assert agreeing >= 0.9 * len(prompts)


@pytest.mark.two_gpus
def test_two_ranks_end_with_a_step_in_flight(model_dir, prompts, reference):
    llm = small_engine(model_dir, tensor_parallel_size=2)
    llm.add_request(prompts[0], greedy(1000))
    for _ in range(20):
        llm.step()
    start = time.monotonic()
    llm.exit()
    assert time.monotonic() - start < 10
    with small_engine(model_dir, tensor_parallel_size=2) as fresh:
        assert token_ids(fresh.generate(prompts, greedy(), use_tqdm=False)) == reference


@pytest.mark.two_gpus
def test_two_ranks_with_preemption_and_an_odd_vocabulary(tmp_path, prompts):
    model_dir = save_model(tmp_path / "m", vocab_size=VOCAB_SIZE + 5, tie_word_embeddings=False)
    reference = reference_greedy(model_dir, prompts, MAX_TOKENS)
    with small_engine(model_dir, tensor_parallel_size=2, num_kvcache_blocks=9, watermark=0) as llm:
        assert token_ids(llm.generate(prompts, greedy(), use_tqdm=False)) == reference
        assert llm.scheduler.num_preemptions > 0
        check_all_free(llm)


@pytest.mark.two_gpus
def test_two_engines_of_two_ranks_side_by_side(model_dir, prompts, reference):
    with (
        small_engine(model_dir, tensor_parallel_size=2) as first,
        small_engine(model_dir, tensor_parallel_size=2) as second,
    ):
        assert token_ids(first.generate(prompts, greedy(), use_tqdm=False)) == reference
        assert token_ids(second.generate(prompts, greedy(), use_tqdm=False)) == reference


@pytest.mark.two_gpus
def test_a_killed_worker_is_named_within_ten_seconds(model_dir):
    llm = small_engine(model_dir, tensor_parallel_size=2)
    llm.add_request([1, 2, 3], greedy(1000))
    for _ in range(20):
        llm.step()
    start = time.monotonic()
    os.kill(llm.executor.workers.workers[0].process.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="rank 1.*SIGKILL"):
        while True:
            llm.step()
    assert time.monotonic() - start < 10
    with pytest.raises(EngineDeadError, match="rank 1.*SIGKILL"):
        llm.generate([[1]], greedy(1))
    with small_engine(model_dir) as fresh:
        assert len(fresh.generate([[1]], greedy(3), use_tqdm=False)[0]["token_ids"]) == 3


@pytest.mark.two_gpus
@pytest.mark.parametrize("shares_memory", [True, False])
def test_a_rank_that_is_stopped_is_named(model_dir, prompts, shares_memory):
    """Whether rank 0's kernels wait in shared memory or in NCCL."""
    llm = small_engine(
        model_dir, tensor_parallel_size=2, disable_custom_all_reduce=not shares_memory
    )
    llm.generate(prompts, greedy(), use_tqdm=False)
    llm.executor.workers.timeout = 2.0
    start = time.monotonic()
    os.kill(llm.executor.workers.workers[0].process.pid, signal.SIGSTOP)
    with pytest.raises(EngineDeadError, match="rank 1.*is stopped"):
        llm.generate(prompts, greedy(), use_tqdm=False)
    assert time.monotonic() - start < 20
    with small_engine(model_dir) as fresh:
        assert len(fresh.generate([[1]], greedy(3), use_tqdm=False)[0]["token_ids"]) == 3


@pytest.mark.two_gpus
@pytest.mark.parametrize("length", [1, 600])
@pytest.mark.parametrize("shares_memory", [True, False])
def test_a_second_ctrl_c_ends_a_step_whose_other_rank_is_stopped(model_dir, length, shares_memory):
    llm = small_engine(
        model_dir,
        tensor_parallel_size=2,
        disable_custom_all_reduce=not shares_memory,
        worker_timeout=60,  # above the limit below: a step that Ctrl-C cannot end fails the test
    )
    # Its kernels are loaded now. Loading one waits for the GPU, in C, where no signal is seen.
    llm.generate([[1] * length], greedy(), use_tqdm=False)
    os.kill(llm.executor.workers.workers[0].process.pid, signal.SIGSTOP)
    progress = llm.executor.workers.progress

    def press():
        while progress.of(0) <= progress.of(1):
            time.sleep(0.05)
        for _ in range(2):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(random_prompts([length]), greedy(), use_tqdm=False)
    assert time.monotonic() - start < 20
    with small_engine(model_dir) as fresh:
        assert len(fresh.generate([[1]], greedy(3), use_tqdm=False)[0]["token_ids"]) == 3


@pytest.mark.two_gpus
def test_ranks_listen_on_the_loopback_only_and_not_after_the_end(model_dir, prompts):
    before = listeners()
    with small_engine(model_dir, tensor_parallel_size=2) as llm:
        llm.generate(prompts, greedy(), use_tqdm=False)
        found = listeners(os.getpid(), llm.executor.workers.workers[0].process.pid)
        assert are_on_the_loopback(found), found
    assert are_on_the_loopback(sorted(set(listeners()) - set(before)))


@pytest.mark.two_gpus
def test_two_ranks_hold_about_twice_the_blocks(model_dir):
    blocks = []
    for size in (1, 2):
        with LLM(
            str(model_dir),
            tensor_parallel_size=size,
            gpu_memory_utilization=0.2,
            max_model_len=1024,
        ) as llm:
            blocks.append(llm.config.num_kvcache_blocks)
    assert 1.8 < blocks[1] / blocks[0] < 2.1


def test_old_and_new_rope_settings_agree(tmp_path):
    model_dir = save_model(
        tmp_path / "m", rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    prompts = random_prompts([50, 300])
    expected = reference_greedy(model_dir, prompts, 8)
    edit_config(model_dir, rope_parameters=None, rope_theta=5e5)
    with small_engine(model_dir) as llm:
        assert token_ids(llm.generate(prompts, greedy(8), use_tqdm=False)) == expected


def test_gated_products_do_not_depend_on_the_batch(tmp_path, monkeypatch):
    """Up to 32 rows one kernel computes gate, up and SiLU, beyond them two kernels."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is Hopper's")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64}
    path = save_model(tmp_path / "model", **sizes)
    prompts = random_prompts([1 + i % 40 for i in range(40)], seed=4)
    launched, outputs = [], []
    product = activation.hopper_gated_linear

    def counting(x, *args):
        launched.append(len(x))
        return product(x, *args)

    monkeypatch.setattr(activation, "hopper_gated_linear", counting)
    for most in (hopper_linear.MAX_GATED_TOKENS, 0):
        monkeypatch.setattr(hopper_linear, "MAX_GATED_TOKENS", most)
        with small_engine(path, dtype="bfloat16", max_num_seqs=40) as llm:
            outputs.append(
                [
                    token_ids(llm.generate(prompts[:n], greedy(8), use_tqdm=False))
                    for n in (1, 9, 40)
                ]
            )
        assert bool(launched) == bool(most)
        assert max(launched, default=0) <= most
        launched.clear()
    assert outputs[0] == outputs[1]
