"""Which waiting sequence runs next where adapters share few slots."""

from types import SimpleNamespace

import pytest

from nanovllm import SamplingParams
from nanovllm.engine import adapters as table_module
from nanovllm.engine.adapters import AdapterTable
from nanovllm.engine.priority_queue import PriorityQueue
from nanovllm.engine.request import RequestTable
from nanovllm.engine.scheduling_policy import FCFSQueue
from nanovllm.engine.sequence import Sequence
from nanovllm.lora_request import LoRARequest


class Ranks:
    """Takes down what is loaded."""

    def __init__(self):
        self.loads = []

    def collective_rpc(self, method, timeout, args, kwargs):
        _, path, slot, _ = args
        self.loads.append((path.rpartition("/")[2], slot))
        return [True]


def new_table(max_loras, numbers=(1, 2, 3, 4)):
    ranks = Ranks()
    table = AdapterTable(SimpleNamespace(max_loras=max_loras), ranks, RequestTable())
    for number in numbers:
        table.known[number] = LoRARequest(str(number), number, str(number))
        table.roots[number] = 100 + number
    return table, ranks


def new_seq(number=None, priority=0):
    seq = Sequence([1], SamplingParams(), priority=priority)
    if number is not None:
        seq.features.lora_request = LoRARequest(str(number), number, str(number))
    return seq


def admit_all(queue, running):
    """The adapters of all that are admitted, in order."""
    admitted = []
    while (seq := queue.head(running)) is not None:
        queue.remove(seq)
        running.append(seq)
        used = seq.features.lora_request
        admitted.append(used and used.lora_int_id)
    return admitted


def new_queue(table, *numbers, policy=FCFSQueue):
    queue = table.queue(policy)()
    for number in numbers:
        queue.add(new_seq(number))
    return queue


def test_adapters_beyond_the_slots_wait_and_are_overtaken():
    table, ranks = new_table(2)
    queue, running = new_queue(table, 1, None, 2, 3, 1, None, 4, 2), []
    assert admit_all(queue, running) == [1, None, 2, 1, None, 2]
    assert ranks.loads == [("1", 0), ("2", 1)]
    running[:] = [seq for seq in running if seq.features.adapter_slot != 1]
    assert admit_all(queue, running) == [3] and ranks.loads[2:] == [("3", 0)]
    assert [seq.features.adapter_slot for seq in running] == [0, 2, 0, 2, 1]
    running.clear()
    assert admit_all(queue, running) == [4] and not queue
    assert ranks.loads[3:] == [("4", 1)], "the slot used longest ago"


def test_an_adapter_in_a_slot_is_not_loaded_again():
    table, ranks = new_table(2)
    for numbers in ((1, 2), (2, 1), (1,)):
        assert admit_all(new_queue(table, *numbers), []) == [*numbers]
    assert len(ranks.loads) == 2
    assert admit_all(new_queue(table, 3), []) == [3] and ranks.loads[2:] == [("3", 1)]


def test_pinned_adapters_leave_their_slots_last():
    table, ranks = new_table(2)
    table.pinned.add(1)
    for number in (1, 2, 3, 4):
        assert admit_all(new_queue(table, number), []) == [number]
    assert [slot for _, slot in ranks.loads] == [0, 1, 1, 1]
    running = [new_seq(4)]
    running[0].features.adapter_slot = 2
    assert admit_all(new_queue(table, 3), running) == [3], "nobody waits for ever"


def test_whoever_waits_for_a_slot_gets_it(monkeypatch):
    """However many come that use those there are."""
    monkeypatch.setattr(table_module, "LOOK_AHEAD", 3)
    table, _ = new_table(1)
    queue, running = new_queue(table, 1, 2), []
    assert admit_all(queue, running) == [1]
    num_overtakes = 0
    for _ in range(10):
        queue.add(new_seq(1))
        queue.add(new_seq(None))
        num_overtakes += admit_all(queue, running).count(1)
    assert num_overtakes == 3
    running[:] = [seq for seq in running if not seq.features.adapter_slot]
    assert admit_all(queue, running)[0] == 2


def test_a_load_that_fails_leaves_the_slot_free():
    table, ranks = new_table(1)
    assert admit_all(new_queue(table, 1), []) == [1]

    def fail(*args):
        raise OSError("gone")

    ranks.collective_rpc = fail
    with pytest.raises(OSError, match="gone"):
        new_queue(table, 2).head([])
    assert table.slots == [None]


def test_priorities_hold():
    table, _ = new_table(1)
    queue = table.queue(PriorityQueue)()
    for number, priority in ((1, 5), (2, 1), (None, 3)):
        queue.add(new_seq(number, priority))
    assert admit_all(queue, []) == [2, None] and len(queue) == 1
