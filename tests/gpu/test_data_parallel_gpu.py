"""Two replicas on two GPUs give the tokens of one engine; none takes the other's memory."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB_SIZE, reference_greedy, save_model

from nanovllm import LLM, SamplingParams

pytestmark = pytest.mark.two_gpus
MAX_TOKENS = 24
LENGTHS = (1, 17, 255, 256, 257, 300, 513, 600, 40, 41, 42, 43)
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
RANK_SCRIPT = """
import sys, torch
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], max_model_len=1024, num_kvcache_blocks=64)
[output] = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
print(torch.cuda.device_count(), torch.cuda.get_device_properties(0).uuid, output["token_ids"])
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def reference(model_dir, prompts):
    return reference_greedy(model_dir, prompts, MAX_TOKENS)


def engine(model_dir, **kwargs):
    settings = {"max_model_len": 1024, "max_num_seqs": 4, "num_kvcache_blocks": 64}
    return LLM(str(model_dir), **(settings | kwargs))


def token_ids(outputs):
    return [output["token_ids"] for output in outputs]


def device_of(runner):
    return str(torch.cuda.get_device_properties(runner.device).uuid)


def test_two_replicas_give_the_tokens_of_one(model_dir, prompts, reference):
    sampled = SamplingParams(temperature=0.8, max_tokens=MAX_TOKENS, n=2)
    outputs = []
    for size in (1, 2):
        with engine(model_dir, data_parallel_size=size) as llm:
            assert token_ids(llm.generate(prompts, GREEDY, use_tqdm=False)) == reference
            outputs.append(
                [
                    [completion.token_ids for completion in output.outputs]
                    for output in llm.generate(prompts, sampled, use_tqdm=False)
                ]
            )
            if size == 2:
                assert len(set(llm.collective_rpc(device_of))) == 2
                llm.sleep()
                llm.wake_up()
                assert token_ids(llm.generate(prompts, GREEDY, use_tqdm=False)) == reference
    assert outputs[0] == outputs[1]


def test_each_replica_takes_its_share_of_its_own_gpu(model_dir):
    with engine(
        model_dir, data_parallel_size=2, num_kvcache_blocks=None, gpu_memory_utilization=0.2
    ) as llm:
        first, second = llm.executor.blocks_of
        assert first > 0 and abs(first - second) < 0.1 * first  # the engine's process is on GPU 0
        assert llm.config.num_kvcache_blocks == min(first, second)


def test_a_replica_that_is_killed_leaves_its_work_to_the_other(model_dir, prompts, reference):
    with engine(model_dir, data_parallel_size=2) as llm:
        for prompt in prompts:
            llm.add_request(prompt, GREEDY)
        completions = dict(llm.step()[0])
        os.kill(llm.executor.group.replicas[0].process.pid, signal.SIGKILL)
        while not llm.is_finished():
            completions.update(llm.step()[0])
    assert [completions[i] for i in range(len(prompts))] == reference


def test_processes_with_vllms_variables_take_their_own_gpus(model_dir):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_SCRIPT, str(model_dir)],
            env=os.environ
            | {"VLLM_DP_SIZE": "2", "VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    lines = [process.communicate(timeout=300)[0].splitlines()[-1] for process in processes]
    (count, first, tokens), (other_count, second, other_tokens) = (
        line.split(" ", 2) for line in lines
    )
    assert count == other_count == "1" and first != second and tokens == other_tokens
