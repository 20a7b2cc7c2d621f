"""How often the garbage collector runs within a call, and after it."""

import gc
import threading

import pytest

from nanovllm.guards.garbage import NUM_NEW_OBJECTS, rare_collections

USUAL = (700, 10, 10)


@pytest.fixture(autouse=True)
def thresholds():
    before = gc.get_threshold()
    gc.set_threshold(*USUAL)
    yield
    gc.collect(0)  # a look at all of pytest's objects takes seconds
    gc.set_threshold(*before)


@pytest.fixture
def collections():
    """The generation of each collection."""
    generations: list[int] = []

    def note(phase, info):
        if phase == "stop":
            generations.append(info["generation"])

    gc.callbacks.append(note)
    yield generations
    gc.callbacks.remove(note)


def test_what_a_call_makes_causes_no_collection(collections):
    with rare_collections():
        kept = [[] for _ in range(5000)]
    first = [[] for _ in range(USUAL[0] // 2)]
    assert not collections
    second = [[] for _ in range(USUAL[0])]
    assert len(collections) == 1  # of the user's own objects
    assert gc.get_threshold() == USUAL
    assert len(kept) + len(first) + len(second) == 5000 + 350 + 700


def test_calls_follow_each_other_without_a_collection(collections):
    kept = []
    for _ in range(3):
        with rare_collections():
            assert gc.get_threshold() == (NUM_NEW_OBJECTS, *USUAL[1:])
            kept += [[] for _ in range(2000)]
    with pytest.raises(KeyError), rare_collections():
        raise KeyError
    assert not collections
    gc.collect(0)
    assert gc.get_threshold() == USUAL


def test_cycles_are_found_within():
    class Cycle:
        num_dead = 0

        def __init__(self):
            self.own = self

        def __del__(self):
            Cycle.num_dead += 1

    with rare_collections():
        for _ in range(2 * NUM_NEW_OBJECTS):
            Cycle()
        assert Cycle.num_dead >= NUM_NEW_OBJECTS // 2


@pytest.mark.parametrize("threshold", [0, 10**6])
def test_what_the_user_has_set_stays(threshold):
    gc.set_threshold(threshold, 5, 5)
    with rare_collections():
        assert gc.get_threshold() == (threshold, 5, 5)
    assert gc.get_threshold() == (threshold, 5, 5)


def test_what_the_user_sets_within_or_between_calls_stays():
    with rare_collections():
        gc.set_threshold(500, 5, 5)
    assert gc.get_threshold() == (500, 5, 5)
    with rare_collections():
        pass
    gc.set_threshold(600, 6, 6)
    with rare_collections():
        assert gc.get_threshold() == (NUM_NEW_OBJECTS, 6, 6)
    gc.collect(0)
    assert gc.get_threshold() == (600, 6, 6)


def test_threads_may_be_inside_at_the_same_time():
    is_inside, may_leave = threading.Event(), threading.Event()

    def stay():
        with rare_collections():
            is_inside.set()
            may_leave.wait(10)

    with rare_collections():
        thread = threading.Thread(target=stay)
        thread.start()
        assert is_inside.wait(10)
    assert gc.get_threshold()[0] == NUM_NEW_OBJECTS
    may_leave.set()
    thread.join()
    assert gc.get_threshold()[0] < NUM_NEW_OBJECTS
    gc.collect(0)
    assert gc.get_threshold() == USUAL
