"""The scheduling policy "priority"."""

from bisect import bisect_right
from collections.abc import Sequence as Items

from nanovllm.engine.scheduling_policy import FCFSQueue
from nanovllm.engine.sequence import Sequence


class PriorityQueue(FCFSQueue):
    """Waiting sequences by priority, the lower the earlier, then by age."""

    def add(self, seq: Sequence) -> None:
        """Queue a sequence in its place."""
        # The search may run a garbage collection, and that the finalizer of a stream, which
        # aborts: so it looks at a copy.
        self.insert(bisect_right(tuple(self), _rank(seq), key=_rank), seq)

    put_back = add

    def victim(self, running: Items[Sequence]) -> Sequence:
        """The last by priority."""
        return max(running, key=_rank)


def _rank(seq: Sequence) -> tuple[int, int, int]:
    return seq.priority, seq.request_id, seq.index


POLICIES = {"fcfs": FCFSQueue, "priority": PriorityQueue}
