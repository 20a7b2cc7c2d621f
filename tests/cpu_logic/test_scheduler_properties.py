"""Random workloads over a fake device: whatever the settings, every completion comes out right."""

from dataclasses import dataclass

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scheduling_helpers import (
    FakeEngine,
    check_all_released,
    expected_completion,
    make_scheduler,
)

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

MAX_STEPS = 5000


@dataclass
class Request:
    """A prompt that begins with some of a common stem, and what happens to it."""

    stem_length: int
    own_tokens: list[int]
    max_tokens: int
    ignore_eos: bool
    temperature: float
    arrival: int  # step before which it is queued
    abort_after: int | None  # steps after its arrival
    goes_on: bool = False  # its stem is the request before it with its completion


@dataclass
class Workload:
    """Requests and the settings of the engine that they go through."""

    requests: list[Request]
    block_size: int
    num_blocks: int
    vocab_size: int
    max_num_seqs: int
    budget: int
    max_model_len: int
    is_chunked: bool
    is_caching: bool
    is_overlapped: bool
    watermark: float
    failing_step: int | None


@st.composite
def workloads(draw) -> Workload:
    block_size = draw(st.integers(1, 5))
    num_blocks = draw(st.integers(2, 24))
    max_model_len = draw(st.integers(3, 40))
    is_chunked = draw(st.booleans())
    longest = min(max_model_len - 1, block_size * num_blocks)
    stem_length = st.integers(0, longest)
    request = st.builds(
        Request,
        stem_length=stem_length,
        own_tokens=st.lists(st.integers(0, 2), max_size=8),
        max_tokens=st.integers(1, 20),
        ignore_eos=st.booleans(),
        temperature=st.sampled_from([0.0, 0.7]),
        arrival=st.integers(0, 12),
        abort_after=st.none() | st.integers(0, 12),
    )
    return Workload(
        requests=draw(st.lists(request, min_size=1, max_size=9)),
        block_size=block_size,
        num_blocks=num_blocks,
        vocab_size=draw(st.sampled_from([3, 8, 40])),
        max_num_seqs=draw(st.integers(1, 6)),
        budget=draw(st.integers(1, 24)) if is_chunked else max_model_len + draw(st.integers(0, 40)),
        max_model_len=max_model_len,
        is_chunked=is_chunked,
        is_caching=draw(st.booleans()),
        is_overlapped=draw(st.booleans()),
        watermark=draw(st.sampled_from([0.0, 0.25, 1.0])),
        failing_step=draw(st.none() | st.integers(0, 20)),
    )


def build_sequences(workload: Workload, eos_token_ids: frozenset[int]) -> list[Sequence]:
    """The sequences as the engine would number and limit them."""
    pool_size = workload.num_blocks * workload.block_size
    longest = min(workload.max_model_len - 1, pool_size)
    stem = [(i * i + i // 3) % 3 for i in range(longest)]
    sequences = []
    for request_id, request in enumerate(workload.requests):
        start = stem[: request.stem_length]
        if request.goes_on and sequences:
            before = sequences[-1]
            completion, _ = expected_completion(before, workload.vocab_size, eos_token_ids)
            start = before.prompt_token_ids + completion
        prompt = (start + request.own_tokens)[:longest] or [0]
        params = SamplingParams(request.temperature, request.max_tokens, request.ignore_eos)
        max_length = min(workload.max_model_len, pool_size + 1, len(prompt) + request.max_tokens)
        seed = 0x9E3779B97F4A7C15 * (request_id // 2) % 2**64  # some pairs complete alike
        sequences.append(Sequence(prompt, params, request_id, max_length, seed))
    return sequences


def run(workload: Workload) -> FakeEngine:
    scheduler = make_scheduler(
        max_num_seqs=workload.max_num_seqs,
        max_num_batched_tokens=workload.budget,
        enable_chunked_prefill=workload.is_chunked,
        watermark=workload.watermark,
        num_kvcache_blocks=workload.num_blocks,
        kvcache_block_size=workload.block_size,
        enable_prefix_caching=workload.is_caching,
    )
    max_blocks = -(-workload.max_model_len // workload.block_size)
    engine = FakeEngine(scheduler, workload.vocab_size, max_blocks, workload.is_overlapped)
    sequences = build_sequences(workload, scheduler.eos_token_ids)
    arrivals = [request.arrival for request in workload.requests]
    aborts = [
        None if request.abort_after is None else request.arrival + request.abort_after
        for request in workload.requests
    ]
    queued: list[Sequence] = []
    for number in range(MAX_STEPS):
        for seq, arrival, abort in zip(sequences, arrivals, aborts, strict=True):
            if arrival == number:
                scheduler.add(seq)
                queued.append(seq)
            if abort == number and not seq.is_finished:
                engine.abort(seq)
        if number == workload.failing_step:
            engine.fail([seq for seq in queued if not seq.is_finished])
        engine.step()
        if number >= max(arrivals) and scheduler.is_finished():
            break
    else:
        raise AssertionError("requests are left over")
    assert engine.step() is None
    check_all_released(scheduler)
    for seq, abort in zip(sequences, aborts, strict=True):
        expected, reason = expected_completion(seq, workload.vocab_size, scheduler.eos_token_ids)
        assert seq.is_finished
        assert seq.num_tokens <= min(seq.max_length, workload.max_model_len)
        if seq.finish_reason == "abort":
            assert abort is not None
            assert seq.completion_token_ids == expected[: seq.num_completion_tokens]
        else:
            assert (seq.completion_token_ids, seq.finish_reason) == (expected, reason)
    return engine


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(workloads())
def test_any_workload_completes_rightly_and_leaves_nothing_behind(workload):
    run(workload)


@st.composite
def tight_workloads(draw) -> Workload:
    """Long completions in a pool that holds little more than one sequence: many preemptions."""
    block_size = draw(st.integers(1, 4))
    max_model_len = draw(st.integers(16, 32))
    num_blocks = -(-max_model_len // block_size) + draw(st.integers(0, 6))
    request = st.builds(
        Request,
        stem_length=st.integers(0, 10),
        own_tokens=st.lists(st.integers(0, 2), max_size=4),
        max_tokens=st.integers(8, 24),
        ignore_eos=st.booleans(),
        temperature=st.just(0.7),
        arrival=st.integers(0, 3),
        abort_after=st.none() | st.integers(0, 30),
    )
    is_chunked = draw(st.booleans())
    return Workload(
        requests=draw(st.lists(request, min_size=3, max_size=8)),
        block_size=block_size,
        num_blocks=num_blocks,
        vocab_size=draw(st.sampled_from([8, 40])),
        max_num_seqs=draw(st.integers(2, 8)),
        budget=draw(st.integers(1, 40)) if is_chunked else 64,
        max_model_len=max_model_len,
        is_chunked=is_chunked,
        is_caching=draw(st.booleans()),
        is_overlapped=draw(st.booleans()),
        watermark=draw(st.sampled_from([0.0, 0.25])),
        failing_step=draw(st.none() | st.integers(0, 40)),
    )


def test_workloads_with_many_preemptions_complete_rightly():
    num_preemptions = 0

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(tight_workloads())
    def run_and_count(workload):
        nonlocal num_preemptions
        num_preemptions += run(workload).scheduler.num_preemptions

    run_and_count()
    assert num_preemptions > 200, "the workloads do not test what they are meant to"


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(workloads())
def test_workloads_complete_rightly_even_if_all_hashes_collide(workload):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockManager, "compute_hash", staticmethod(lambda *_: 42))
        run(workload)


def cache_one_token_too_early(
    manager, seq, num_computed_tokens, original=BlockManager.cache_blocks
):
    most = min(seq.num_tokens, len(seq.block_table) * manager.block_size)
    original(manager, seq, min(num_computed_tokens + 1, most))


def find_without_comparing_prefixes(manager, block_hash, tokens, parent_prefix_id):
    for block_id in manager.hash_to_block_ids.get(block_hash, ()):
        if manager.blocks[block_id].tokens == tokens:
            return manager.blocks[block_id]
    return None


def hash_without_parent(tokens, prefix=None):
    return hash(tokens)


def use_a_block_twice(manager, seq, original=BlockManager.may_append):
    original(manager, seq)
    if len(seq.block_table) > 2:
        seq.block_table[0] = seq.block_table[1]


@pytest.mark.parametrize(
    "defects",
    [
        {"cache_blocks": cache_one_token_too_early},
        {
            "_find": find_without_comparing_prefixes,
            "compute_hash": staticmethod(hash_without_parent),
        },
        {"may_append": use_a_block_twice},
        {"_forget": lambda manager, block: None},
    ],
    ids=["cached too early", "prefix ignored", "wrong block", "never forgotten"],
)
def test_these_checks_notice_a_defective_block_manager(defects, monkeypatch):
    for name, defect in defects.items():
        monkeypatch.setattr(BlockManager, name, defect)

    @settings(
        max_examples=300, deadline=None, derandomize=True, database=None, phases=[Phase.generate]
    )
    @given(workloads())
    def run_defective(workload):
        run(workload)

    with pytest.raises((AssertionError, KeyError)):
        run_defective()
