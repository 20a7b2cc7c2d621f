"""On CUDA too a request that makes a step fail ends alone; a GPU that failed ends the engine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_engine_gpu import MAX_TOKENS, check_all_free, greedy, small_engine, token_ids
from test_engine_gpu import random_prompts as draw
from tiny_models import reference_greedy, save_model

from nanovllm import RequestError, SamplingParams
from nanovllm.sampling.logits_sampler import LogitsSampler

POISON = 13  # top_k of the requests that are made to fail
PROMPTS = draw([3, 40, 300, 513, 1, 600, 250, 256], seed=41)


class InjectedError(Exception):
    pass


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def reference(model_dir):
    return reference_greedy(model_dir, PROMPTS, MAX_TOKENS)


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"async_scheduling": False},
        {"enforce_eager": True},
        {"num_kvcache_blocks": 9, "watermark": 0},
        pytest.param({"tensor_parallel_size": 2}, marks=pytest.mark.two_gpus),
    ],
)
def test_the_others_are_completed(model_dir, reference, monkeypatch, settings, is_late):
    sample = LogitsSampler.sample

    def failing(self, logits, seqs, positions):
        sampled = sample(self, logits, seqs, positions)
        for seq in seqs:
            is_due = seq.num_completion_tokens >= 3 or not is_late
            if seq.sampling_params.top_k == POISON and is_due:
                raise InjectedError("odd")
        return sampled

    poisoned = SamplingParams(1.0, MAX_TOKENS, True, top_k=POISON)
    settings = {"dtype": "float32"} | settings
    with small_engine(model_dir, **settings) as llm:
        params = [poisoned if index in (2, 5) else greedy() for index in range(len(PROMPTS))]
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(LogitsSampler, "sample", failing)
                with pytest.raises(RequestError, match=r"prompts\[2\] failed, and 1 more") as e:
                    llm.generate(PROMPTS, params, use_tqdm=False)
            outputs = e.value.outputs
            for index in (5, 2):
                assert outputs.pop(index).error == "InjectedError: odd"
            others = [tokens for i, tokens in enumerate(reference) if i not in (2, 5)]
            assert token_ids(outputs) == others
            check_all_free(llm)
        assert token_ids(llm.generate(PROMPTS, greedy(), use_tqdm=False)) == reference


def test_memory_that_suffices_for_fewer_rows_only(model_dir, reference, monkeypatch):
    with small_engine(model_dir, dtype="float32") as llm:
        execute = llm.model_runner.execute

        def failing(plan, seqs=()):
            if len(plan.rows) > 3:
                raise torch.OutOfMemoryError("injected")
            return execute(plan, seqs)

        monkeypatch.setattr(llm.model_runner, "execute", failing)
        assert token_ids(llm.generate(PROMPTS, greedy(), use_tqdm=False)) == reference


LOST_DEVICE = """
import sys
import torch
from test_engine_gpu import greedy, small_engine
from nanovllm import EngineDeadError
from nanovllm.engine.model_runner import ModelRunner

llm = small_engine(sys.argv[1])
execute = ModelRunner.execute

def failing(self, plan, seqs=()):
    torch.zeros(4, device="cuda")[torch.tensor([99], device="cuda")]  # a device-side assertion
    return execute(self, plan, seqs)

ModelRunner.execute = failing
try:
    llm.generate([[1, 2, 3], [4, 5]], greedy(), use_tqdm=False)
except EngineDeadError as error:
    print("dead:", error, flush=True)
try:
    llm.generate([[1, 2, 3]], greedy(), use_tqdm=False)
except EngineDeadError as error:
    print("still dead:", error, flush=True)
"""


def test_a_gpu_that_failed_ends_the_engine(model_dir):
    """No request is to blame, and nothing runs on that GPU in this process any more."""
    here = Path(__file__).parent
    paths = [str(folder) for folder in (here.parents[1], here.parent, here)]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    result = subprocess.run(
        [sys.executable, "-c", LOST_DEVICE, str(model_dir)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert "\nstill dead: the GPU failed: " in result.stdout, result.stdout + result.stderr
    assert result.stdout.startswith("dead: the GPU failed: ")
