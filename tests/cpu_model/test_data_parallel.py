"""Two replicas give what one engine gives, whatever is asked; what dies is named, nothing stays."""

import os
import signal
import threading
from collections import deque
from dataclasses import fields
from itertools import chain

import pytest
import rank_functions
from engine_checks import (
    descendants,
    drain,
    generate,
    greedy,
    is_running,
    processes_named,
    random_prompts,
    tiny_engine,
    wait_until,
)
from tiny_models import reference_greedy, save_model

from nanovllm import (
    LLM,
    ArgumentError,
    EngineDeadError,
    RequestError,
    SamplingParams,
    StructuredOutputsParams,
)
from nanovllm.engine.scheduler_stats import SchedulerStats
from nanovllm.errors import ReplicaDiedError
from nanovllm.parallel.replica_messages import (
    Death,
    Ending,
    Further,
    Progress,
    Snapshot,
    Started,
    Submit,
    Update,
    unpack,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_workers")]
LENGTHS = (5, 260, 40, 257, 12, 100, 1, 300)
PROMPTS = random_prompts(LENGTHS, seed=70)
MAX_TOKENS = 10
# Little room, so that requests wait in the engine too.
SETTINGS = {"max_num_seqs": 2}


def replica_pids() -> dict[int, int]:
    """Index -> pid of the replicas of this process."""
    return {i: pid for i, pid in processes_named("nanovllm-replica-") if is_running(pid)}


@pytest.fixture(scope="module")
def one(shallow_dir):
    with tiny_engine(shallow_dir, **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def two(shallow_dir):
    """Two replicas of two ranks, over gloo: four processes beside this one."""
    before = set(descendants(os.getpid()))
    with tiny_engine(shallow_dir, data_parallel_size=2, tensor_parallel_size=2, **SETTINGS) as llm:
        started = set(descendants(os.getpid())) - before
        yield llm
    assert len(started) == 4
    wait_until(lambda: not any(map(is_running, started)))


@pytest.fixture(scope="module")
def reference(shallow_dir):
    return reference_greedy(shallow_dir, PROMPTS, MAX_TOKENS)


def check_equal(ours, expected, tolerance=1e-4):
    """Two lists of RequestOutputs say the same, times and cached tokens aside."""
    assert len(ours) == len(expected)
    for mine, other in zip(ours, expected, strict=True):
        for name in ("request_id", "prompt", "prompt_token_ids", "finished", "error"):
            assert getattr(mine, name) == getattr(other, name), name
        rows = [(mine.prompt_logprobs, other.prompt_logprobs)]
        for one, two in zip(mine.outputs, other.outputs, strict=True):
            for field in fields(one):
                if "logprob" not in field.name:
                    assert getattr(one, field.name) == getattr(two, field.name), field.name
            rows.append((one.logprobs, two.logprobs))
        for one, two in rows:
            assert (one is None) == (two is None)
            for here, there in zip(one or [], two or [], strict=True):
                assert (here or {}).keys() == (there or {}).keys()
                for token_id in here or {}:
                    assert here[token_id].rank == there[token_id].rank
                    assert here[token_id].logprob == pytest.approx(
                        there[token_id].logprob, abs=tolerance
                    )


def check_nothing_is_held(llm):
    router = llm.scheduler
    assert llm.is_finished() and not router.places and not router.outgoing
    assert router.loads == [0.0, 0.0]
    # A call is answered behind all that came before.
    assert llm.collective_rpc(rank_functions.echo_rank)
    assert llm.reset_prefix_cache()


# ---- the same results -------------------------------------------------------------------------


def test_the_engine_is_an_llm_and_says_what_it_has(two):
    assert isinstance(two, LLM) and "data_parallel_size=2" in repr(two)
    assert two.get_world_size() == 4 and two.get_world_size(include_dp=False) == 2
    assert sorted(replica_pids()) == [0, 1]
    with pytest.raises(AttributeError, match="collective_rpc and apply_model call functions"):
        two.model_runner.model  # noqa: B018


def test_greedy_completions_are_those_of_transformers_and_in_order(two, one, reference):
    one.generate(PROMPTS, greedy(MAX_TOKENS), use_tqdm=False)  # so that both number requests alike
    assert generate(two, PROMPTS, greedy(MAX_TOKENS)) == reference
    metrics = two.get_metrics()
    assert metrics.get("prompt_tokens") == sum(LENGTHS)
    assert metrics.get("generation_tokens") == MAX_TOKENS * len(PROMPTS)
    check_nothing_is_held(two)


def test_every_way_of_sampling_gives_what_one_engine_gives(one, two):
    pytest.importorskip("llguidance")
    every = [
        SamplingParams(temperature=0.9, max_tokens=12),
        SamplingParams(temperature=0.9, max_tokens=12, seed=5, n=3),
        SamplingParams(temperature=0.7, max_tokens=12, logprobs=3, prompt_logprobs=2, n=2),
        SamplingParams(temperature=1.5, max_tokens=40, stop=["e", "th"], ignore_eos=True),
        SamplingParams(temperature=1, max_tokens=12, top_p=0.8, repetition_penalty=1.3),
        SamplingParams(temperature=1, max_tokens=12, min_tokens=12, bad_words=["the"], logprobs=0),
        SamplingParams(
            max_tokens=12, structured_outputs=StructuredOutputsParams(choice=["the fox", "a dog"])
        ),
        SamplingParams(temperature=1, max_tokens=12, stop_token_ids=[3, 4, 5, 6, 7, 8, 9]),
    ]
    prompts = ["the quick", *PROMPTS[1:7], {"prompt": "a paged cache"}]
    ours, expected = (
        llm.generate(prompts, every, use_tqdm=False, priority=[0] * 8) for llm in (two, one)
    )
    check_equal(ours, expected)
    assert ours[6]["text"] in ("the fox", "a dog")
    assert {output.stop_reason for output in ours[3].outputs} & {"e", "th"}
    assert all(o.metrics.first_token_time <= o.metrics.finished_time for o in ours)
    check_nothing_is_held(two)


def test_chats_embeddings_and_scores(one, two):
    talk = [{"role": "user", "content": "the fox"}]
    check_equal(*(llm.chat([talk] * 3, greedy(5), use_tqdm=False) for llm in (two, one)))
    ours, expected = (llm.embed(PROMPTS[:4], use_tqdm=False) for llm in (two, one))
    for mine, other in zip(ours, expected, strict=True):
        assert mine.outputs.embedding == pytest.approx(other.outputs.embedding, abs=1e-5)
    scores = [llm.score("the fox", ["a dog", "the sun"], method="embedding") for llm in (two, one)]
    assert [s.outputs.score for s in scores[0]] == pytest.approx(
        [s.outputs.score for s in scores[1]], abs=1e-5
    )


def test_a_loop_of_steps_counts_every_token(one, two, reference):
    for llm in (one, two):
        ids = [llm.add_request(prompt, greedy(MAX_TOKENS)) for prompt in PROMPTS]
        completions, counts = drain(llm)
        assert list(map(completions.get, ids)) == reference
        assert 0 < sum(n for n in counts if n > 0) <= sum(LENGTHS)
        assert -sum(n for n in counts if n < 0) == (MAX_TOKENS - 1) * len(PROMPTS), counts


def test_streams_grow_and_end_alike(one, two):
    params = SamplingParams(temperature=0.9, max_tokens=15, n=2, seed=3, stop=["zz"])
    grown = []
    for llm in (one, two):
        texts, ids, outputs = {}, {}, {}
        for item in llm.generate_stream(PROMPTS[:4], params):
            key = item.prompt_index, item.index
            texts[key] = texts.get(key, "") + item.text
            ids[key] = ids.get(key, []) + item.token_ids
            if item.finished:
                outputs[item.prompt_index] = item.output
        for (prompt_index, index), text in texts.items():
            completion = outputs[prompt_index].outputs[index]
            assert (text, ids[prompt_index, index]) == (completion.text, completion.token_ids)
        grown.append((texts, ids))
    assert grown[0] == grown[1]
    for llm in (one, two):
        stream = llm.generate_stream(PROMPTS, greedy(500))
        next(stream)
        del stream
    check_nothing_is_held(two)


def test_queued_requests_wait_and_can_be_aborted(one, two, reference):
    for llm in (one, two):
        ids = llm.enqueue(PROMPTS, greedy(MAX_TOKENS))
        llm.abort_request(ids[3])
        outputs = llm.wait_for_completion(use_tqdm=False)
        assert [o.request_id for o in outputs] == ids[:3] + ids[4:]
        assert [o["token_ids"] for o in outputs] == reference[:3] + reference[4:]


# ---- calls on all replicas --------------------------------------------------------------------


def test_calls_reach_every_rank_in_order(two):
    ranks = two.collective_rpc(rank_functions.echo_rank, args=(1,), kwargs={"x": 2})
    pids = [pid for rank, pid, _, _ in ranks if rank == 0]
    assert pids == [pid for _, pid in sorted(replica_pids().items())]
    assert [rank for rank, *_ in ranks] == [0, 1, 0, 1]
    assert [tuple(given) for _, _, *given in ranks] == [((1,), {"x": 2})] * 4
    with pytest.raises(KeyError, match="injected on rank 0"):
        two.collective_rpc(rank_functions.fail_on_rank, args=(0,))
    with pytest.raises(ArgumentError, match="a lambda cannot be sent"):
        two.apply_model(lambda model: 1)
    with pytest.raises(ArgumentError, match="workers have no method 'nothing'"):
        two.collective_rpc("nothing")
    sizes = two.apply_model(rank_functions.num_parameters)
    assert sizes[:2] == sizes[2:] and min(sizes) > 0


def test_a_sleep_keeps_requests_that_run(one, two, reference):
    for llm in (one, two):
        ids = [llm.add_request(prompt, greedy(MAX_TOKENS)) for prompt in PROMPTS]
        finished = dict(llm.step()[0])
        llm.sleep(level=1, mode="keep")
        with pytest.raises(RuntimeError, match="the engine sleeps"):
            llm.step()
        llm.wake_up()
        finished |= drain(llm)[0]
        assert list(map(finished.get, ids)) == reference


def test_new_weights_reach_all_replicas(two, one, reference, tmp_path):
    other = save_model(tmp_path / "other", seed=9, num_hidden_layers=2)
    expected = reference_greedy(other, PROMPTS[:4], 8)
    from safetensors.torch import load_file

    weights = load_file(other / "model.safetensors")
    with pytest.raises(ArgumentError, match="the model has no weight 'nothing'"):
        two.load_weights({"nothing": weights["model.norm.weight"]})
    for llm in (one, two):
        llm.load_weights(weights)
        assert generate(llm, PROMPTS[:4], greedy(8)) == expected
        llm.reload_weights()
        assert generate(llm, PROMPTS[:4], greedy(MAX_TOKENS)) == reference[:4]


# ---- what goes wrong --------------------------------------------------------------------------


def test_a_wrong_request_is_refused_before_anything_is_queued(two):
    with pytest.raises(ArgumentError, match="longer than the maximum model length"):
        two.generate([PROMPTS[0], [1] * 2000], greedy(5))
    with pytest.raises(ArgumentError, match="logprobs must be at most"):
        two.add_request(PROMPTS[0], SamplingParams(logprobs=100))
    check_nothing_is_held(two)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data_parallel_size": 0}, "data_parallel_size must be"),
        ({"replica_death_policy": "ignore"}, "replica_death_policy must be"),
    ],
)
def test_wrong_parameters_start_nothing(shallow_dir, given, message):
    with pytest.raises(ArgumentError, match=message):
        tiny_engine(shallow_dir, **given)


def test_ctrl_c_drops_the_call_and_the_engine_goes_on(two, reference):
    two.collective_rpc(rank_functions.make_steps_slow, args=(0.03,))
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        two.generate(PROMPTS * 3, greedy(500), use_tqdm=False)
    check_nothing_is_held(two)
    assert generate(two, PROMPTS, greedy(MAX_TOKENS)) == reference


def test_a_dead_replicas_requests_go_on_elsewhere(two, reference, caplog):
    """The last test of this engine. Its steps are slow: nobody is done before the death."""
    two.collective_rpc(rank_functions.make_steps_slow, args=(0.05,))
    pids = replica_pids()
    streamed = []
    for item in two.generate_stream(PROMPTS, greedy(MAX_TOKENS)):
        if not streamed:
            os.kill(pids[1], signal.SIGKILL)
        streamed.append(item)
    outputs = {item.prompt_index: item.output for item in streamed if item.finished}
    assert [outputs[i]["token_ids"] for i in range(len(PROMPTS))] == reference
    for index in range(len(PROMPTS)):
        pieces = [item.token_ids for item in streamed if item.prompt_index == index]
        assert list(chain.from_iterable(pieces)) == reference[index], "nothing came twice"
    assert f"replica 1 (pid {pids[1]}) was killed by SIGKILL" in caplog.text
    assert two.collective_rpc(rank_functions.echo_rank)[0][1] == pids[0]
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(EngineDeadError, match=r"all replicas have died: replica 1 .*; replica 0"):
        two.generate(PROMPTS, greedy(MAX_TOKENS), use_tqdm=False)
    with pytest.raises(EngineDeadError, match="all replicas have died"):
        two.add_request(PROMPTS[0])
    assert not replica_pids()


# ---- without processes ------------------------------------------------------------------------


class FakeGroup:
    """Two replicas: the first one dies, the second one answers every sequence with one token."""

    def __init__(self, config, device_type, entry_point):
        self.started = {index: Started(16, True) for index in range(config.data_parallel_size)}
        self.messages = deque([(0, Death("replica 0 (pid 1) exited with code 3"))])

    def post(self, index, packed):
        message = unpack(packed)
        if index == 1 and isinstance(message, Submit):
            further = Further([], [], 0, 0, Ending("stop", None, None, None))
            updates = [Update(one.ticket, [7], further) for one in message.submissions]
            snapshot = Snapshot(SchedulerStats(), 0, 16)
            self.messages.append((1, Progress(True, 3, updates, snapshot)))

    def receive(self):
        return self.messages.popleft()

    def close(self):
        pass


@pytest.mark.parametrize("policy", ["fail", "retry"])
def test_the_policy_says_what_becomes_of_a_dead_replicas_requests(shallow_dir, monkeypatch, policy):
    monkeypatch.setattr("nanovllm.parallel.replica_executor.ReplicaGroup", FakeGroup)
    with tiny_engine(shallow_dir, data_parallel_size=2, replica_death_policy=policy) as llm:
        if policy == "retry":
            assert generate(llm, [[1], [2], [3]], greedy(5)) == [[7]] * 3
            return
        with pytest.raises(
            RequestError, match=r"prompts\[0\] failed, and 1 more: Replica"
        ) as raised:
            llm.generate([[1], [2], [3]], greedy(5), use_tqdm=False)
        outputs = raised.value.outputs
        assert [output["token_ids"] for output in outputs] == [[], [7], []]
        assert outputs[0].error == "ReplicaDiedError: replica 0 (pid 1) exited with code 3"
        assert isinstance(raised.value.__cause__, ReplicaDiedError)
        assert generate(llm, [[4]], greedy(5)) == [[7]], "the engine goes on"
