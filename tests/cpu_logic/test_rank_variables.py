"""vLLM's environment variables for ranks, and the GPUs that a process of several takes."""

import os
from pathlib import Path

import pytest

from nanovllm import ArgumentError
from nanovllm.compat import local_rank
from nanovllm.config import Config
from nanovllm.engine.startup import prepare
from nanovllm.guards.visible_gpus import VARIABLE, gpus_of, take_gpus

MODEL = str(Path(__file__).resolve().parents[2] / "nanovllm" / "assets" / "austen-7m")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in ("SIZE", "RANK", "RANK_LOCAL", "MASTER_IP", "MASTER_PORT"):
        monkeypatch.delenv(f"VLLM_DP_{name}", raising=False)
    monkeypatch.setenv(VARIABLE, "")  # so that it is as it was afterwards
    monkeypatch.delenv(VARIABLE)


def set_ranks(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(f"VLLM_DP_{name}", str(value))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"SIZE": 1, "RANK": 0}, None),
        ({"SIZE": ""}, None),
        ({"SIZE": 2, "RANK": 1, "RANK_LOCAL": 1}, 1),
        ({"SIZE": 4, "RANK": 3, "RANK_LOCAL": 1, "MASTER_IP": "10.0.0.1", "MASTER_PORT": 9}, 1),
        ({"SIZE": 2, "RANK": 1}, 1),
    ],
)
def test_the_local_rank(monkeypatch, values, expected):
    set_ranks(monkeypatch, **values)
    assert local_rank() == expected


def test_gpus_that_an_older_script_has_chosen_stay(monkeypatch):
    set_ranks(monkeypatch, SIZE=2, RANK=1)
    monkeypatch.setenv(VARIABLE, "2,3")
    assert local_rank() is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"SIZE": "two"}, "VLLM_DP_SIZE in the environment must be an integer >= 0, got 'two'"),
        ({"SIZE": 2}, "VLLM_DP_RANK in the environment must be an integer from 0 to 1"),
        ({"SIZE": 2, "RANK": 2}, "one below VLLM_DP_SIZE, got '2'"),
        ({"SIZE": 2, "RANK": -1}, "VLLM_DP_RANK in the environment must be an integer >= 0"),
        ({"SIZE": 4, "RANK": 1, "RANK_LOCAL": 2}, "must be at most VLLM_DP_RANK .1., got 2"),
    ],
)
def test_wrong_values_are_named(monkeypatch, values, message):
    set_ranks(monkeypatch, **values)
    with pytest.raises(ArgumentError, match=message):
        local_rank()


def test_each_process_has_its_own_gpus():
    assert [gpus_of(index, 2, None) for index in range(2)] == ["0,1", "2,3"]
    assert gpus_of(1, 1, "5,GPU-a1b2,7") == "GPU-a1b2"
    with pytest.raises(ArgumentError, match="process 1 .* needs 4 visible GPUs, .* has 3"):
        gpus_of(1, 2, "5,6,7")


def test_gpus_are_taken_once(monkeypatch):
    monkeypatch.setenv(VARIABLE, "4,5,6,7")
    take_gpus(1, 2)
    take_gpus(1, 2)
    assert gpus_of(0, 2, None) == "0,1"
    assert os.environ[VARIABLE] == "6,7"
    take_gpus(1, 1)
    assert os.environ[VARIABLE] == "5", "of those that were visible at first"
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    take_gpus(1, 1)
    with pytest.raises(ArgumentError, match="CUDA has started with '5': make the engine before"):
        take_gpus(0, 1)


def test_an_engine_takes_the_gpus_of_its_rank(monkeypatch):
    """As in vLLM's example, which starts a process for each rank."""
    set_ranks(monkeypatch, SIZE=2, RANK=1, RANK_LOCAL=1)
    config, device, *_ = prepare(MODEL, {"device": "cpu"})
    assert (config.data_parallel_size, device.type, os.environ[VARIABLE]) == (1, "cpu", "1")
    with pytest.raises(ArgumentError, match=r"data_parallel_size \(2\) and VLLM_DP_SIZE"):
        prepare(MODEL, {"device": "cpu", "data_parallel_size": 2})


def test_too_few_gpus_for_the_replicas_are_told(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    config = Config(MODEL, device="cuda", data_parallel_size=4)
    with pytest.raises(
        ArgumentError,
        match=r"tensor_parallel_size \(1\) \* data_parallel_size \(4\) needs .* found 3",
    ):
        config.resolve_device()
