"""Who is admitted next, when that is worth a step, and who is preempted first.

The order by priority is in priority_queue.py, that of one call's sequences in queue_order.py.
"""

from collections import deque
from collections.abc import Sequence as Items
from itertools import islice

from nanovllm.engine.sequence import Sequence

# When sequences that decode are held up for those that wait; see `is_worth_admitting`.
ADMISSION_SHARE = 1 / 8  # this much of the slots and of the cache is free
ADMISSION_INTERVAL = 24  # or so many decode steps have passed since the last prefill step


def is_worth_admitting(
    waiting: Items[Sequence],
    num_cached: int,
    num_decodes_since_prefill: int,
    slots: tuple[int, int],
    tokens: tuple[float, int, int],
) -> bool:
    """Whether what waits is worth a prefill step while other sequences decode.

    A prefill step holds up all that decode, for about as long with one short prompt as with ten. So
    sequences are admitted together: when a share of slots and cache is free, or less that is enough
    for all that wait or for a full step, and else at intervals. What fits is therefore admitted
    after ADMISSION_INTERVAL decode steps at most, and at once where little runs or the last prefill
    is long ago. Those that wait are taken to have as much cached as the last one.

    Args:
        waiting: sequences that wait, the next one first.
        num_cached: tokens of the prompt admitted last that were cached.
        num_decodes_since_prefill: decode steps since the last prefill step.
        slots: how many sequences more may run, and how many may at most.
        tokens: how many the free KV blocks hold, how many all of them, and how many a step
            computes at most.
    """
    if num_decodes_since_prefill >= ADMISSION_INTERVAL:
        return True
    (num_free, num_slots), (num_free_tokens, num_tokens, step_size) = slots, tokens
    if num_free_tokens < min(ADMISSION_SHARE * num_tokens, step_size):
        return False
    many = num_free >= min(len(waiting), ADMISSION_SHARE * num_slots)
    return many or sum(s.num_tokens - num_cached for s in islice(waiting, num_free)) >= step_size


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

    def head(self, running: Items[Sequence]) -> Sequence | None:
        """Which sequence is admitted next beside those running; None: none of them can be."""
        return self[0] if self else None

    def victim(self, running: Items[Sequence]) -> Sequence:
        """Which of the running sequences, oldest admission first, is preempted first."""
        return running[-1]
