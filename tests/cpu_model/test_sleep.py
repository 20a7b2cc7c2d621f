"""Sleep at every level and in every mode: memory goes, tokens stay right, nothing hangs."""

from types import SimpleNamespace

import pytest
from engine_checks import (
    check_nothing_is_held,
    check_varied,
    drain,
    generate,
    greedy,
    random_prompts,
    tiny_engine,
)
from tiny_models import reference_greedy

from nanovllm import LLM, ArgumentError

MAX_TOKENS = 10
PROMPTS = random_prompts((5, 40, 257, 300), seed=60)


@pytest.fixture(scope="module")
def reference(tiny_dir):
    reference = reference_greedy(tiny_dir, PROMPTS, MAX_TOKENS)
    check_varied(reference)
    return reference


@pytest.fixture(scope="module")
def engine(tiny_dir):
    with tiny_engine(tiny_dir) as llm:
        yield llm


@pytest.fixture
def llm(engine):
    yield engine
    assert engine.wake_up()
    engine.reload_weights()
    check_nothing_is_held(engine)


def add_all(llm):
    return [llm.add_request(prompt, greedy(MAX_TOKENS)) for prompt in PROMPTS]


def check_generates(llm, reference):
    assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == reference


def cache_bytes(llm):
    return llm.model_runner.kv_cache.untyped_storage().nbytes()


def weight_bytes(llm):
    """Of the memory behind the weights; a tied one counts once."""
    parameters = llm.model_runner.model.parameters()
    return sum(parameter.untyped_storage().nbytes() for parameter in parameters)


def check_asleep(llm, *off):
    assert llm.is_sleeping
    message = rf"sleeps \({', '.join(off)}\): call wake_up"
    finished = llm.is_finished()
    for run in (
        lambda: llm.generate(PROMPTS, greedy(1), use_tqdm=False),
        lambda: llm.step(),
    ):
        with pytest.raises(RuntimeError, match=message):
            run()
    assert llm.is_finished() == finished


@pytest.mark.parametrize("level", [1, 2])
def test_memory_goes_and_the_same_tokens_come(llm, reference, level):
    check_generates(llm, reference)
    num_cache_bytes, num_weight_bytes = cache_bytes(llm), weight_bytes(llm)
    llm.sleep(level)
    check_asleep(llm, "kv_cache", "weights")
    assert cache_bytes(llm) == 0
    if level == 2:
        assert weight_bytes(llm) < 0.01 * num_weight_bytes
    assert llm.wake_up() is True
    assert not llm.is_sleeping
    assert cache_bytes(llm) == num_cache_bytes
    assert weight_bytes(llm) == num_weight_bytes
    model = llm.model_runner.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if level == 2:
        assert all((parameter == 0).all() for parameter in model.parameters())
        llm.reload_weights()
    outputs = llm.generate(PROMPTS, greedy(MAX_TOKENS), use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == reference
    assert [output.num_cached_tokens for output in outputs] == [0] * len(PROMPTS)


def test_tags_wake_one_by_one(llm, reference):
    llm.sleep(2)
    assert llm.wake_up(["weights"]) is False
    llm.reload_weights()
    check_asleep(llm, "kv_cache")
    assert llm.wake_up(["scheduling"]) is False
    assert llm.wake_up(["kv_cache"]) is True
    check_generates(llm, reference)
    assert llm.wake_up() is True  # it is awake


def test_sleeping_deeper_and_less_deep(llm, reference):
    llm.sleep(0)
    llm.sleep(1)
    check_asleep(llm, "kv_cache", "scheduling", "weights")
    llm.sleep(0)
    llm.sleep(1)
    assert llm.wake_up(["weights", "kv_cache"]) is False
    check_asleep(llm, "scheduling")
    assert llm.wake_up(["scheduling"]) is True
    check_generates(llm, reference)
    llm.sleep(2)
    llm.sleep(1)  # what is gone stays gone
    assert llm.wake_up() is True
    assert all((parameter == 0).all() for parameter in llm.model_runner.model.parameters())


@pytest.mark.parametrize("level", [0, 1])
def test_requests_queue_up_while_it_sleeps(llm, reference, level):
    llm.sleep(level)
    ids = llm.enqueue(PROMPTS, greedy(MAX_TOKENS))
    with pytest.raises(RuntimeError, match="call wake_up"):
        llm.wait_for_completion(use_tqdm=False)
    llm.wake_up()
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [output.request_id for output in outputs] == ids
    assert [output["token_ids"] for output in outputs] == reference


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_keep_goes_on_where_it_was(llm, reference, level, num_steps):
    ids = add_all(llm)
    for _ in range(num_steps):
        llm.step()
    num_preemptions = llm.scheduler.num_preemptions
    llm.sleep(level, mode="keep")
    check_asleep(llm, *(["scheduling"] if level == 0 else ["kv_cache", "weights"]))
    assert len(llm.scheduler.running) == (len(PROMPTS) if level == 0 and num_steps else 0)
    llm.wake_up()
    completions, _ = drain(llm)
    assert [completions[request_id] for request_id in ids] == reference
    preempted = llm.scheduler.num_preemptions - num_preemptions
    assert preempted == (len(PROMPTS) if level and num_steps else 0)


@pytest.mark.parametrize("level", [0, 1])
def test_wait_finishes_first(llm, reference, level):
    ids = add_all(llm)
    llm.step()
    llm.sleep(level, mode="wait")
    assert llm.scheduler.is_finished()
    llm.wake_up()
    outputs, num_tokens = llm.step()
    assert num_tokens == 0
    completions = dict(outputs)
    assert [completions[request_id] for request_id in ids] == reference


@pytest.mark.parametrize("level", [0, 1])
def test_abort_is_the_default(llm, reference, level):
    ids = add_all(llm)
    for _ in range(3):
        llm.step()
    llm.sleep(level)
    check_nothing_is_held(llm)
    outputs = [llm.get_output(request_id) for request_id in ids]
    assert {output.outputs[0].finish_reason for output in outputs} == {"abort"}
    for output, expected in zip(outputs, reference, strict=True):
        num_tokens = len(output["token_ids"])
        assert 2 <= num_tokens < MAX_TOKENS
        assert output["token_ids"] == expected[:num_tokens]
    llm.wake_up()
    check_generates(llm, reference)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.sleep(3), "level must be between 0 and 2, got 3"),
        (lambda llm: llm.sleep(True), "level must be an integer"),
        (lambda llm: llm.sleep(1, "later"), "mode must be one of abort, wait, keep, got 'later'"),
        (lambda llm: llm.wake_up(["weight"]), "tags must be of weights, .*, got 'weight'"),
    ],
)
def test_wrong_arguments_change_nothing(llm, call, message):
    llm.add_request(PROMPTS[0], greedy(2))
    llm.step()
    with pytest.raises(ArgumentError, match=message):
        call(llm)
    assert not llm.is_sleeping
    assert len(llm.scheduler.running) == 1
    drain(llm)


def test_an_engine_can_end_asleep(tiny_dir):
    arguments = SimpleNamespace(model=str(tiny_dir), device="cpu", num_kvcache_blocks=8)
    for level in (1, 2):
        llm = LLM.from_engine_args(arguments)
        assert llm.llm_engine is llm
        assert "(embed_tokens): VocabParallelEmbedding()" in repr(llm.model_runner.model)
        llm.sleep(level)
        llm.exit()
        llm.exit()
        assert repr(llm) == f"LLM(model={str(tiny_dir)!r})"


def test_cached_prefixes_can_be_forgotten(llm, reference):
    def num_cached_tokens():
        [output] = llm.generate([PROMPTS[3]], greedy(1), use_tqdm=False)
        return output.num_cached_tokens

    check_generates(llm, reference)
    assert num_cached_tokens() == 256
    assert llm.reset_prefix_cache() is True
    assert num_cached_tokens() == 0
    assert num_cached_tokens() == 256
    ids = add_all(llm)
    llm.step()
    assert llm.reset_prefix_cache() is False
    assert llm.reset_prefix_cache(reset_running_requests=True) is True
    completions, _ = drain(llm)
    assert [completions[request_id] for request_id in ids] == reference
