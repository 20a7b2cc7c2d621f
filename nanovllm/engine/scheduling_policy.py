"""Who is admitted next, when that is worth a step, and who is preempted first.

The order by priority is in priority_queue.py, that of one call's sequences in queue_order.py.
"""

from collections import deque
from collections.abc import Sequence as Items

from nanovllm.engine.sequence import Sequence

# When sequences that decode are held up for those that wait; see `is_worth_admitting`.
ADMISSION_SHARE = 1 / 8  # this much of the slots and of the blocks is free
ADMISSION_INTERVAL = 24  # or so many decode steps have passed since the last prefill step


def is_worth_admitting(
    num_waiting: int,
    num_decodes_since_prefill: int,
    slots: tuple[int, int],
    blocks: tuple[float, int],
) -> bool:
    """Whether what waits is worth a prefill step while other sequences decode.

    A prefill step holds up all that decode, for about as long with one short prompt as with ten. So
    sequences are admitted together: when a share of slots and blocks is free (or as many slots as
    sequences wait), and else at intervals. What fits is therefore admitted after ADMISSION_INTERVAL
    decode steps at most, and at once where little runs or the last prefill is long ago.

    Args:
        num_waiting: sequences that wait.
        num_decodes_since_prefill: decode steps since the last prefill step.
        slots: how many sequences more may run, and how many may at most.
        blocks: how many KV blocks are free for them, and how many there are.
    """
    if num_decodes_since_prefill >= ADMISSION_INTERVAL:
        return True
    (num_free_slots, num_slots), (num_free_blocks, num_blocks) = slots, blocks
    return (
        num_free_slots >= min(num_waiting, ADMISSION_SHARE * num_slots)
        and num_free_blocks >= ADMISSION_SHARE * num_blocks
    )


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
