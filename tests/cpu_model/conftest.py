"""Tiny models and their references by transformers; every engine of this folder runs on the CPU."""

import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from engine_checks import check_varied, random_prompts
from forked_python import workers_are_forked
from quick_reference import quick_reference
from thread_ranks import start_thread
from tiny_models import save_model


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """The models are too small for more threads, which would only wait for each other."""
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(previous)


@pytest.fixture(scope="package")
def num_frozen() -> Iterator[list[int]]:
    """The number of modules that no collection of garbage looks at."""
    yield [0]
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _imports_are_no_garbage(num_frozen):
    """Every engine collects garbage when it ends: 0.2 s each time if all imports are looked at."""
    if len(sys.modules) > num_frozen[0]:
        gc.collect()
        gc.freeze()
        num_frozen[0] = len(sys.modules)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """Tied embeddings, 8 query heads on 4 KV heads, eos_token_id 2."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def shallow_dir(tmp_path_factory) -> Path:
    """As `tiny_dir` with two layers, for tests of what a step is made of: they take many steps."""
    return save_model(tmp_path_factory.mktemp("models") / "shallow", num_hidden_layers=2)


@dataclass
class Workload:
    """For `shallow_dir`: prompts that share and repeat prefixes, around multiples of 256."""

    prompts: list[list[int]]
    reference: list[list[int]]
    max_tokens: int


@pytest.fixture(scope="session")
def workload(shallow_dir) -> Workload:
    max_tokens = 16
    shared = random_prompts([600], seed=1)[0]
    prompts = [
        *random_prompts((1, 2, 17, 100, 245, 255, 256, 257, 300, 500, 511, 512, 513)),
        shared[:512],
        shared[:520],
        shared,
        shared,  # equal prompts, in one step where the budget allows
        [*shared, 5],
        shared[:256],
        shared[:512],
    ]
    reference = quick_reference(shallow_dir, prompts, max_tokens)
    check_varied(reference)
    return Workload(prompts, reference, max_tokens)


@pytest.fixture(scope="module")
def forked_workers():
    """Workers are processes which need not import torch, see `forked_python`."""
    with workers_are_forked():
        yield


@pytest.fixture
def ranks_are_threads(monkeypatch):
    """Engines of several ranks start no processes, see `thread_ranks`."""
    previous = torch.get_num_threads()
    monkeypatch.setattr("nanovllm.parallel.workers.start_process", start_thread)
    yield
    torch.set_num_threads(previous)  # a worker has set its own number, which is the process's
