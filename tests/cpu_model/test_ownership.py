"""An engine serves one thread at a time, in its own process, and cannot be copied."""

import copy
import gc
import json
import pickle
import signal
import threading

import pytest
from engine_checks import (
    check_nothing_is_held,
    fork_script,
    generate,
    greedy,
    random_prompts,
    tiny_engine,
)
from tiny_models import reference_greedy

from nanovllm import LLM, ArgumentError, BeamSearchParams, EngineUseError, SamplingParams
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.guards.lifecycle import Lifecycle
from nanovllm.lora_request import LoRARequest

PROMPTS = random_prompts((5, 260, 40), seed=90)
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def reference(tiny_dir):
    return reference_greedy(tiny_dir, PROMPTS, MAX_TOKENS)


@pytest.fixture(scope="module")
def engine(tiny_dir):
    with tiny_engine(tiny_dir) as llm:
        yield llm


@pytest.fixture
def llm(engine):
    check_nothing_is_held(engine)
    yield engine
    check_nothing_is_held(engine)


class Pause:
    """A progress bar that stops `generate` between two steps until it is told to go on."""

    def __init__(self):
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, **kwargs):
        return self

    def update(self, n):
        pass

    def set_postfix(self, values):
        self.has_begun.set()
        assert self.may_go_on.wait(60)

    def close(self):
        pass


def in_thread(function):
    """What `function()` returns or raises in another thread."""
    outcome = []

    def run():
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="another")
    thread.start()
    thread.join(60)
    return outcome[0]


CALLS = {
    "generate": lambda llm: llm.generate(PROMPTS, greedy(1)),
    "chat": lambda llm: llm.chat([{"role": "user", "content": "a"}], greedy(1)),
    "generate_stream": lambda llm: llm.generate_stream(PROMPTS, greedy(1)),
    "beam_search": lambda llm: llm.beam_search(PROMPTS, BeamSearchParams(1, 1)),
    "embed": lambda llm: llm.embed(PROMPTS),
    "classify": lambda llm: llm.classify(PROMPTS),
    "encode": lambda llm: llm.encode(PROMPTS, pooling_task="embed"),
    "reward": lambda llm: llm.reward(PROMPTS),
    "score": lambda llm: llm.score("a", "b", method="embedding"),
    "enqueue": lambda llm: llm.enqueue(PROMPTS, greedy(1)),
    "enqueue_chat": lambda llm: llm.enqueue_chat([{"role": "user", "content": "a"}], greedy(1)),
    "wait_for_completion": lambda llm: llm.wait_for_completion(),
    "abort_request": lambda llm: llm.abort_request(0),
    "get_output": lambda llm: llm.get_output(0),
    "add_request": lambda llm: llm.add_request(PROMPTS[0], greedy(1)),
    "step": lambda llm: llm.step(),
    "is_finished": lambda llm: llm.is_finished(),
    "has_unfinished_requests": lambda llm: llm.has_unfinished_requests(),
    "get_num_unfinished_requests": lambda llm: llm.get_num_unfinished_requests(),
    "collective_rpc": lambda llm: llm.collective_rpc(lambda worker: 0),
    "apply_model": lambda llm: llm.apply_model(lambda model: 0),
    "sleep": lambda llm: llm.sleep(),
    "wake_up": lambda llm: llm.wake_up(),
    "load_weights": lambda llm: llm.load_weights([]),
    "reload_weights": lambda llm: llm.reload_weights(),
    "init_weight_transfer_engine": lambda llm: llm.init_weight_transfer_engine({}),
    "start_weight_update": lambda llm: llm.start_weight_update(),
    "update_weights": lambda llm: llm.update_weights({}),
    "finish_weight_update": lambda llm: llm.finish_weight_update(),
    "add_lora": lambda llm: llm.add_lora(LoRARequest("a", 1, "/nowhere")),
    "remove_lora": lambda llm: llm.remove_lora(1),
    "list_loras": lambda llm: llm.list_loras(),
    "pin_lora": lambda llm: llm.pin_lora(1),
    "reset_prefix_cache": lambda llm: llm.reset_prefix_cache(),
    "get_metrics": lambda llm: llm.get_metrics(),
    "start_profile": lambda llm: llm.start_profile(),
    "stop_profile": lambda llm: llm.stop_profile(),
    "queue": lambda llm: llm.queue([]),
    "run": lambda llm: llm.run([], False),
    "advance": lambda llm: llm.advance(),
    "drain": lambda llm: llm.drain(),
    "abort": lambda llm: llm.abort([]),
    "exit": lambda llm: llm.exit(),
    "shutdown": lambda llm: llm.shutdown(),
}
# What touches nothing that a step changes, or waits until the step is over.
FREE = {
    "get_tokenizer",
    "get_default_sampling_params",
    "get_world_size",
    "estimate",
    "from_engine_args",
    "check_ready",
    "check_awake",
}


def public_methods():
    names = {*vars(LLM), *vars(LLMEngine), *vars(Lifecycle)}
    return {name for name in names if name[0] != "_" and callable(getattr(LLM, name))}


def test_the_calls_below_are_all_methods_there_are():
    assert public_methods() == CALLS.keys() | FREE


# ---- threads ----------------------------------------------------------------------------------


def test_every_call_is_refused_while_another_thread_is_inside(llm, reference):
    pause = Pause()
    results = []
    params = greedy(MAX_TOKENS)
    thread = threading.Thread(
        target=lambda: results.append(
            [o["token_ids"] for o in llm.generate(PROMPTS, params, use_tqdm=pause)]
        ),
        name="the first",
    )
    thread.start()
    try:
        assert pause.has_begun.wait(60)
        for name, call in CALLS.items():
            called = "exit" if name == "shutdown" else name
            with pytest.raises(EngineUseError, match=rf"{called}\(\) .* generate\(\).*'the first'"):
                call(llm)
        assert llm.get_default_sampling_params() == SamplingParams()
        assert llm.get_tokenizer() is llm.tokenizer
        assert not llm.is_sleeping
    finally:
        pause.may_go_on.set()
        thread.join(60)
    assert results == [reference]
    assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference


def test_four_threads_get_right_results_or_are_refused(llm, reference):
    outcomes = []

    def work():
        for _ in range(15):
            try:
                outcomes.append(generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference)
            except EngineUseError:
                outcomes.append(None)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert len(outcomes) == 60
    assert False not in outcomes
    assert True in outcomes


def test_a_lock_of_ones_own_lets_threads_take_turns(llm, reference):
    lock, results = threading.Lock(), []

    def work():
        for _ in range(3):
            with lock:
                results.append(generate(llm, PROMPTS, greedy(MAX_TOKENS)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results == [reference] * 9


def test_a_refused_item_of_a_stream_loses_nothing(llm, reference):
    pause = Pause()
    stream = llm.generate_stream(PROMPTS, greedy(MAX_TOKENS), use_tqdm=pause)
    items = []
    thread = threading.Thread(target=lambda: items.extend(stream))
    thread.start()
    assert pause.has_begun.wait(60)
    for refused in (lambda: next(stream), stream.close, lambda: llm.step()):
        with pytest.raises(EngineUseError, match=r"while generate_stream\(\) runs in thread"):
            refused()
    pause.may_go_on.set()
    thread.join(60)
    outputs = sorted((i.prompt_index, i.output["token_ids"]) for i in items if i.finished)
    assert [token_ids for _, token_ids in outputs] == reference


def test_between_two_items_of_a_stream_any_thread_may_call(llm, reference):
    stream = llm.generate_stream(PROMPTS[:1], greedy(MAX_TOKENS))
    items = [next(stream)]
    assert in_thread(lambda: generate(llm, PROMPTS, greedy(MAX_TOKENS))) == reference
    in_thread(lambda: items.append(next(stream)))
    items += stream
    assert [t for item in items for t in item.token_ids] == reference[0]


def test_a_stream_dropped_by_another_thread_ends(llm, reference):
    """Its requests are aborted by whoever is inside; nothing is raised in the collector."""
    pause = Pause()
    stream = llm.generate_stream(PROMPTS, greedy(None))
    next(stream)
    results = []
    thread = threading.Thread(
        target=lambda: results.append(llm.generate(PROMPTS, greedy(MAX_TOKENS), use_tqdm=pause))
    )
    thread.start()
    assert pause.has_begun.wait(60)
    del stream
    gc.collect()
    pause.may_go_on.set()
    thread.join(60)
    assert [output["token_ids"] for output in results[0]] == reference
    assert llm.is_finished()


def test_calls_from_a_progress_bar_are_made(llm, reference):
    """It is updated between two steps."""
    inner = []

    class Bar(Pause):
        def update(self, n):
            inner.append(generate(llm, PROMPTS[:1], greedy(3)))

        def set_postfix(self, values):
            pass

    outputs = llm.generate(PROMPTS, greedy(MAX_TOKENS), use_tqdm=Bar())
    assert [output["token_ids"] for output in outputs] == reference
    assert inner
    assert all(result == [reference[0][:3]] for result in inner)


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"exit", "shutdown"}))
def test_a_call_from_inside_a_step_is_refused(llm, reference, monkeypatch, name):
    """As a signal handler or a tokenizer of the caller's own may try it."""
    postprocess, refusals = llm.scheduler.postprocess, []

    def calling(*args):
        if not refusals:
            with pytest.raises(EngineUseError, match="from inside a step") as raised:
                CALLS[name](llm)
            refusals.append(raised)
        return postprocess(*args)

    monkeypatch.setattr(llm.scheduler, "postprocess", calling)
    assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference
    assert len(refusals) == 1


def test_after_an_error_other_threads_may_call(llm, reference):
    with pytest.raises(ArgumentError):
        llm.generate(PROMPTS, greedy(1), priority="x")
    assert in_thread(lambda: generate(llm, PROMPTS, greedy(MAX_TOKENS))) == reference
    outcome = in_thread(lambda: llm.generate([[10**9]], greedy(1)))
    assert isinstance(outcome, ArgumentError)
    assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference


# ---- copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_engine_and_a_stream_cannot_be_copied(llm, reference, copier, wrapped):
    with pytest.raises(TypeError, match="LLM cannot be pickled or copied.*make a new one"):
        copier([llm] if wrapped and copier is not copy.copy else llm)
    with llm.generate_stream(PROMPTS, greedy(MAX_TOKENS)) as stream:
        next(stream)
        with pytest.raises(TypeError, match="stream cannot be pickled or copied"):
            copier(stream)
    assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference


def test_what_an_engine_returns_can_be_copied(llm):
    params = SamplingParams(max_tokens=4, logprobs=2, prompt_logprobs=1, n=2)
    values = [
        *llm.generate(PROMPTS, params, use_tqdm=False),
        *llm.embed(PROMPTS, use_tqdm=False),
        *llm.score("a", ["b", "c"], method="embedding", use_tqdm=False),
        *llm.generate_stream(PROMPTS[:1], params),
        llm.get_metrics(),
        params,
    ]
    for value in values:
        for twin in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
            assert type(twin) is type(value)
            assert repr(twin) == repr(value)


# ---- forked children --------------------------------------------------------------------------

FORKS = """
import gc, json, os, sys, warnings
from multiprocessing import get_context
from engine_checks import check_nothing_is_held, generate, greedy, tiny_engine
from nanovllm import EngineUseError

warnings.simplefilter("ignore", DeprecationWarning)  # that of a fork beside other threads
model, prompts, reference = json.loads(sys.argv[1])

def check_parent():
    assert generate(llm, prompts, greedy(len(reference[0]))) == reference
    check_nothing_is_held(llm)

def check_refused():
    for call in (
        lambda: llm.generate(prompts, greedy(1)),
        lambda: llm.add_request(prompts[0], greedy(1)),
        lambda: llm.step(),
        lambda: llm.get_metrics(),
        lambda: llm.collective_rpc("reload_weights"),
    ):
        try:
            call()
        except EngineUseError as error:
            assert f"belongs to process {os.getppid()}" in str(error), error
        else:
            raise AssertionError("not refused")
    llm.exit()

def leave_by_os_exit():
    os._exit(0)

def leave_by_sys_exit():
    sys.exit(0)

def leave_by_an_error():
    check_refused()
    sys.excepthook = lambda *error: None
    raise ValueError

def leave_by_a_signal():
    os.abort()

def leave_after_dropping_it():
    global llm
    check_refused()
    del llm
    gc.collect()
    sys.exit(0)

def leave_by_the_end_of_a_with_block():
    with llm:
        sys.exit(0)

for size in (1, 2):
    llm = tiny_engine(model, tensor_parallel_size=size)
    check_parent()
    for way in [v for k, v in list(globals().items()) if k.startswith("leave_")]:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            way()
            os._exit(77)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(way.__name__, status, flush=True)
        check_parent()

    # In the middle of a stream, and with a step in flight.
    llm.add_request(prompts[0], greedy(len(reference[0])))
    with llm.generate_stream(prompts, greedy(len(reference[0]))) as stream:
        next(stream)
        pid = os.fork()
        if pid == 0:
            try:
                next(stream)
            except EngineUseError:
                sys.exit(0)  # through the end of the block
            os._exit(77)
        print("stream", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        items = [item for item in stream if item.finished]
    items.sort(key=lambda item: item.prompt_index)
    assert [item.output["token_ids"] for item in items] == reference
    llm.wait_for_completion(use_tqdm=False)
    check_parent()

    process = get_context("fork").Process(target=check_refused)
    process.start()
    process.join()
    print("Process", process.exitcode, flush=True)
    check_parent()
    with get_context("fork").Pool(2) as pool:
        pool.map(abs, range(10))
    check_parent()
    llm.exit()
print("done", flush=True)
"""


@pytest.mark.slow
def test_forked_children_leave_the_engine_to_their_parent(tiny_dir, tmp_path, reference):
    """On one rank and on two."""
    path = tmp_path / "script.py"
    path.write_text(FORKS)
    arguments = json.dumps([str(tiny_dir), PROMPTS, reference])
    with fork_script(path, arguments) as process:
        try:
            output, _ = process.communicate(timeout=240)
        finally:
            process.kill()
    lines = [line for line in output.splitlines() if not line.startswith("Generating")]
    children = [
        "leave_by_os_exit 0",
        "leave_by_sys_exit 0",
        "leave_by_an_error 1",
        f"leave_by_a_signal {-signal.SIGABRT}",
        "leave_after_dropping_it 0",
        "leave_by_the_end_of_a_with_block 0",
        "stream 0",
        "Process 0",
    ]
    assert lines == [*children, *children, "done"], output
