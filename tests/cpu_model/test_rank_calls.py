"""Calls on two ranks (gloo, on the CPU): rpc, sleep, new weights, traces, in one engine."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import rank_functions
import torch
from engine_checks import (
    check_nothing_is_held,
    drain,
    generate,
    greedy,
    random_prompts,
    tiny_engine,
    wait_until,
    worker_pids,
)
from nanovllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from nanovllm.utils.network_utils import get_open_port
from tiny_models import VOCAB_SIZE, reference_greedy, save_model
from transformers import Qwen3ForCausalLM

from nanovllm import ArgumentError, EngineDeadError, EngineUseError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_workers")]
MAX_TOKENS = 8
PROMPTS = random_prompts((5, 257, 300), seed=80)


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    """Untied, with biases, a vocabulary that two ranks do not divide: every kind of shard."""
    folder = tmp_path_factory.mktemp("models")
    settings = {
        "vocab_size": VOCAB_SIZE + 5,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "num_key_value_heads": 2,
    }
    return [save_model(folder / str(seed), seed=seed, **settings) for seed in (3, 4)]


@pytest.fixture(scope="module")
def references(model_dirs):
    return [reference_greedy(path, PROMPTS, MAX_TOKENS) for path in model_dirs]


@pytest.fixture(scope="module")
def engines():
    """One engine serves all tests; a second follows if one of them has ended it."""
    engines = []
    yield engines
    for llm in engines:
        llm.exit()


@pytest.fixture
def llm(engines, model_dirs):
    if not engines or not engines[-1]._finalizer.alive:
        extension, transfer = rank_functions.Extension, {"backend": "nccl"}
        engines.append(
            tiny_engine(
                model_dirs[0],
                tensor_parallel_size=2,
                worker_extension_cls=extension,
                weight_transfer_config=transfer,
            )
        )
    return engines[-1]


def check_generates(llm, expected):
    assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == expected
    check_nothing_is_held(llm)


def test_a_worker_needs_no_transformers(llm):
    """Of rank 0 nothing is said: this process has imported them."""
    assert llm.collective_rpc(rank_functions.imported, args=("transformers",))[1] is False


def test_results_of_every_rank_in_order(llm):
    pids = [os.getpid(), worker_pids()[1]]
    expected = [(rank, pids[rank], (1, "two"), {"three": [3]}) for rank in (0, 1)]
    results = llm.collective_rpc(
        rank_functions.echo_rank, timeout=30, args=(1, "two"), kwargs={"three": [3]}
    )
    assert results == expected
    assert llm.collective_rpc(rank_functions.sum_of_ranks) == [3.0, 3.0]
    assert llm.collective_rpc("reload_weights") == [None, None]
    counts = llm.apply_model(rank_functions.num_parameters)
    assert len(counts) == llm.get_world_size() == 2
    assert counts[0] == counts[1] == rank_functions.num_parameters(llm.model_runner.model)


def test_a_call_may_not_call_the_engine(llm, references, monkeypatch):
    """The other ranks are busy with the same call."""
    monkeypatch.setattr(rank_functions, "on_announcement", llm.step)
    with pytest.raises(EngineUseError, match=r"step\(\) was called from inside a step"):
        llm.collective_rpc(rank_functions.call_engine)
    check_generates(llm, references[0])


def test_calls_between_steps(llm, references):
    ids = [llm.add_request(prompt, greedy(MAX_TOKENS)) for prompt in PROMPTS]
    completions = {}
    while not llm.is_finished():
        completions.update(llm.step()[0])
        assert llm.collective_rpc(rank_functions.sum_of_ranks) == [3.0, 3.0]
    assert [completions[request_id] for request_id in ids] == references[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_leaves_the_engine_usable(llm, references, rank):
    llm.add_request(PROMPTS[0], greedy(MAX_TOKENS))
    llm.step()
    with pytest.raises(KeyError, match=f"injected on rank {rank}") as raised:
        llm.collective_rpc(rank_functions.fail_on_rank, args=(rank,))
    if rank == 1:
        assert "On rank 1" in str(raised.value.__cause__)
    drain(llm)
    check_generates(llm, references[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no_such_method",), "workers have no method 'no_such_method'"),
        (("block_size",), "workers have no method 'block_size'"),
        ((5,), "a method's name or a callable, got 5"),
        ((lambda worker: 0,), "lambda.* must be defined at the top level"),
        ((rank_functions.echo_rank, 0), "timeout must be seconds > 0, got 0"),
    ],
)
def test_wrong_calls_are_not_made(llm, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        llm.collective_rpc(*arguments)


@pytest.mark.parametrize("level", [1, 2])
def test_every_rank_sleeps(llm, references, level):
    awake = llm.collective_rpc(rank_functions.memory_bytes)
    llm.add_request(PROMPTS[0], greedy(MAX_TOKENS))
    llm.step()
    llm.sleep(level, mode="keep")
    for num_cache_bytes, num_weight_bytes in llm.collective_rpc(rank_functions.memory_bytes):
        assert num_cache_bytes == 0
        assert level == 1 or num_weight_bytes < 1000
    assert llm.wake_up(["weights"]) is False
    if level == 2:
        llm.reload_weights()
    assert llm.wake_up() is True
    assert llm.collective_rpc(rank_functions.memory_bytes) == awake
    [completion] = drain(llm)[0].values()
    assert completion == references[0][0]
    check_generates(llm, references[0])


def test_a_trainer_reaches_every_rank(llm, model_dirs, references):
    """By broadcasts, by methods that a class adds to the workers, by vLLM's way to the model."""
    trained = Qwen3ForCausalLM.from_pretrained(model_dirs[1], dtype=torch.float32)
    state = trained.state_dict()
    address = {"master_address": "127.0.0.1", "master_port": get_open_port(), "world_size": 3}
    with ThreadPoolExecutor() as pool:
        joining = pool.submit(NCCLWeightTransferEngine.trainer_init, address, "cpu")
        llm.init_weight_transfer_engine({"init_info": address | {"rank_offset": 1}})
        sending = pool.submit(
            NCCLWeightTransferEngine.trainer_send_weights,
            state.items(),
            group=joining.result(60),
            packed=True,
        )
        update = {"names": list(state), "dtype_names": ["float32"] * len(state), "packed": True,
                  "shapes": [list(tensor.shape) for tensor in state.values()]}  # fmt: skip
        llm.update_weights({"update_info": update})
        sending.result(60)
    check_generates(llm, references[1])
    llm.reload_weights()
    assert llm.collective_rpc("take_weights", args=(state,)) == [sorted(state)] * 2
    llm.reset_prefix_cache()
    check_generates(llm, references[1])
    llm.collective_rpc("remember", args=(5,))
    assert llm.collective_rpc("recall") == [(0, "cpu", 5), (1, "cpu", 5)]
    llm.reload_weights()
    llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights(state.items())
    check_generates(llm, references[1])
    llm.reload_weights()


def test_new_weights_reach_every_rank(llm, model_dirs, references):
    state = Qwen3ForCausalLM.from_pretrained(model_dirs[1], dtype=torch.float32).state_dict()
    assert llm.load_weights(state) == set(state)
    check_generates(llm, references[1])
    with pytest.raises(ArgumentError, match="no weight 'x'"):
        llm.load_weights([("x", torch.zeros(1))])
    llm.reload_weights()
    check_generates(llm, references[0])


def test_a_trace_of_every_rank(llm, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_TORCH_PROFILER_DIR", str(tmp_path))
    with pytest.raises(ArgumentError, match="the profiler does not run"):
        llm.stop_profile()
    llm.start_profile("folder/run")
    with pytest.raises(ArgumentError, match="the profiler runs already"):
        llm.start_profile()
    generate(llm, PROMPTS[:1], greedy(2))
    paths = llm.stop_profile()
    assert paths == [str(tmp_path / "folder" / f"run-rank{rank}.json") for rank in (0, 1)]
    for path in paths:
        with open(path, encoding="utf-8") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert "aten::embedding" in names


def test_a_rank_that_dies_in_a_call_ends_the_engine(llm):
    start = time.monotonic()
    message = "rank 1 .* exited with code 7"
    with pytest.raises(EngineDeadError, match=message):
        llm.collective_rpc(rank_functions.end_on_rank, args=(1,))
    for call in (
        lambda: llm.collective_rpc(rank_functions.echo_rank),
        lambda: llm.generate(PROMPTS, greedy(1)),
        lambda: llm.sleep(),
    ):
        with pytest.raises(EngineDeadError, match=message):
            call()
    assert time.monotonic() - start < 60  # what is not noticed waits for ten minutes
    wait_until(lambda: not worker_pids())
    assert repr(llm).startswith("LLM(model=")
