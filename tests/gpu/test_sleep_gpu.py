"""Sleep on CUDA: memory is really given back; graphs, cache and weights are right afterwards."""

import gc
import json
from pathlib import Path

import pytest
import rank_functions
import torch
from tiny_models import VOCAB_SIZE, reference_greedy, save_model
from transformers import Qwen3ForCausalLM

from nanovllm import LLM, SamplingParams

MAX_TOKENS = 24
MIB = 1 << 20


def make_prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = make_prompts((1, 17, 255, 256, 300, 513, *range(20, 35)))
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(1.0, MAX_TOKENS, True, top_k=20, top_p=0.9, seed=1)


def token_ids(outputs):
    return [output["token_ids"] for output in outputs]


def generate(llm, prompts=PROMPTS, params=GREEDY):
    return token_ids(llm.generate(prompts, params, use_tqdm=False))


def used_bytes(device=0):
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save_model(folder / str(seed), seed=seed) for seed in (0, 5)]


@pytest.fixture(scope="module")
def references(model_dirs):
    return [reference_greedy(path, PROMPTS, MAX_TOKENS) for path in model_dirs]


def engine(path, **kwargs):
    settings = {"max_model_len": 1024, "max_num_seqs": 32, "num_kvcache_blocks": 256}
    return LLM(str(path), **(settings | kwargs))


@pytest.mark.parametrize("level", [1, 2])
def test_memory_is_given_back(large_dir, level):
    baseline = used_bytes()
    with engine(
        large_dir,
        load_format="dummy",
        dtype="bfloat16",
        num_kvcache_blocks=None,
        kv_cache_memory_bytes=4 << 30,
    ) as llm:
        expected = generate(llm)
        awake = used_bytes()
        weights = sum(p.nbytes for p in llm.model_runner.model.parameters())
        assert weights > 1000 * MIB
        assert awake - baseline > (4 << 30) + weights
        for _ in range(2):
            llm.sleep(level)
            # Left: kernels, cuBLAS's workspace, the row table, the rotation's table.
            assert used_bytes() - baseline < 600 * MIB
            assert llm.wake_up()
            if level == 2:
                llm.reload_weights()
            assert abs(used_bytes() - awake) < 300 * MIB
            assert generate(llm) == expected


def test_waking_without_memory_can_be_repeated(model_dirs, references):
    with engine(model_dirs[0], num_kvcache_blocks=None, kv_cache_memory_bytes=8 << 30) as llm:
        llm.sleep()
        free = torch.cuda.mem_get_info()[0]
        hog = torch.empty(free - (4 << 30), dtype=torch.uint8, device="cuda")
        with pytest.raises(RuntimeError, match="memory"):
            llm.wake_up()
        assert llm.is_sleeping
        with pytest.raises(RuntimeError, match="call wake_up"):
            llm.step()
        del hog
        torch.cuda.empty_cache()
        assert llm.wake_up()
        assert generate(llm) == references[0]


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_tokens_after_waking_at_every_batch_size(model_dirs, enforce_eager, kv_cache_dtype):
    settings = {"kv_cache_dtype": "fp8", "dtype": "bfloat16"} if kv_cache_dtype == "fp8" else {}
    with engine(model_dirs[0], enforce_eager=enforce_eager, **settings) as llm:
        batches = [PROMPTS[:n] for n in (1, 3, len(PROMPTS))]
        common = [[*PROMPTS[5], 1], [*PROMPTS[5], 2]] * 10  # read a common prefix once for all
        runs = [(batch, params) for batch in [*batches, common] for params in (GREEDY, SAMPLED)]
        expected = [generate(llm, *run) for run in runs]
        for level in (1, 2, 1):
            llm.sleep(level)
            # Other memory there now, so that what comes back lies elsewhere.
            other = torch.full((64 * MIB,), 255, dtype=torch.uint8, device="cuda")
            llm.wake_up()
            if level == 2:
                llm.reload_weights()
            assert (llm.model_runner.graphs is None) == enforce_eager
            assert [generate(llm, *run) for run in runs] == expected
            del other


@pytest.mark.parametrize("num_steps", [1, 5])
def test_requests_go_on_after_waking(model_dirs, references, num_steps):
    with engine(model_dirs[0]) as llm:
        ids = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS]
        for _ in range(num_steps):
            llm.step()
        llm.sleep(1, mode="keep")
        llm.wake_up()
        completions = {}
        while not llm.is_finished():
            completions.update(llm.step()[0])
        assert [completions[request_id] for request_id in ids] == references[0]


def test_other_weights_after_a_deep_sleep(model_dirs, references):
    state = Qwen3ForCausalLM.from_pretrained(model_dirs[1], dtype=torch.float32).state_dict()
    with engine(model_dirs[0]) as llm:
        assert generate(llm) == references[0]
        llm.sleep(2)
        llm.wake_up(["weights"])
        llm.load_weights({name: tensor.cuda() for name, tensor in state.items()})
        assert llm.wake_up(["kv_cache"])
        assert generate(llm) == references[1]
        # And while it is awake: the graphs read the weights where they are.
        llm.reload_weights()
        assert generate(llm) == references[0]
        llm.load_weights(iter(state.items()))
        assert generate(llm) == references[1]


def test_the_trace_has_kernels(model_dirs, tmp_path):
    with engine(model_dirs[0]) as llm:
        llm.start_profile(str(tmp_path / "run"))
        generate(llm, PROMPTS[:2])
        [path] = llm.stop_profile()
    assert path == str(tmp_path / "run-rank0.json")
    events = json.loads(Path(path).read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)


@pytest.mark.two_gpus
def test_two_gpus_sleep_and_take_new_weights(model_dirs, references):
    state = Qwen3ForCausalLM.from_pretrained(model_dirs[1], dtype=torch.float32).state_dict()
    with engine(model_dirs[0], tensor_parallel_size=2) as llm:
        assert [rank for rank, *_ in llm.collective_rpc(rank_functions.echo_rank)] == [0, 1]
        assert generate(llm) == references[0]
        sampled = generate(llm, PROMPTS, SAMPLED)
        for level in (1, 2):
            ids = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS]
            for _ in range(3):
                llm.step()
            llm.sleep(level, mode="keep")
            assert [n for n, _ in llm.collective_rpc(rank_functions.memory_bytes)] == [0, 0]
            llm.wake_up(["weights"])
            if level == 2:
                llm.reload_weights()
            assert llm.wake_up()
            completions = {}
            while not llm.is_finished():
                completions.update(llm.step()[0])
            assert [completions[request_id] for request_id in ids] == references[0]
            assert generate(llm, PROMPTS, SAMPLED) == sampled
        llm.load_weights({name: tensor.cuda() for name, tensor in state.items()})
        assert generate(llm) == references[1]


@pytest.mark.two_gpus
def test_two_gpus_give_their_memory_back(large_dir):
    torch.zeros(1, device="cuda:1")
    baselines = [used_bytes(device) for device in (0, 1)]
    with engine(
        large_dir,
        load_format="dummy",
        dtype="bfloat16",
        num_kvcache_blocks=None,
        kv_cache_memory_bytes=4 << 30,
        tensor_parallel_size=2,
    ) as llm:
        expected = generate(llm)
        awake = [used_bytes(device) for device in (0, 1)]
        llm.sleep()
        for device in (0, 1):
            asleep = used_bytes(device)
            # NCCL and the worker's CUDA context stay.
            assert asleep - baselines[device] < 2500 * MIB
            assert awake[device] - asleep > (4 << 30)
        assert llm.wake_up()
        assert generate(llm) == expected
