"""Who is admitted next and who is preempted first: the scheduling policies."""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence as Items

from nanovllm.engine.sequence import Sequence


class FCFSQueue(deque[Sequence]):
    """Waiting sequences, first come, first served; the leftmost is admitted next."""

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        self.append(seq)

    def put_back(self, seq: Sequence) -> None:
        """Queue a preempted sequence."""
        self.appendleft(seq)

    def drop_finished(self) -> None:
        """Forget sequences that have ended."""
        left = [seq for seq in self if not seq.is_finished]
        self.clear()
        self.extend(left)

    def victim(self, running: Items[Sequence]) -> Sequence:
        """Which of the running sequences, oldest admission first, is preempted first."""
        return running[-1]


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
