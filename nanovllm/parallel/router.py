"""Decides which replica computes which sequence: by what of its prefix a replica has, and by load.

Every sequence gets a home when it is queued, and waits in the queue of its home. A replica that has
room takes from its own queue, and from the longest one when that is empty. So equal prefixes meet,
and no replica runs dry while sequences wait.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.packed_tokens import pack_tokens
from nanovllm.engine.priority_queue import PriorityQueue
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.scheduler_stats import SchedulerStats
from nanovllm.engine.scheduling_policy import FCFSQueue
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.sequence_errors import note_error, tell_rules
from nanovllm.errors import ReplicaDiedError
from nanovllm.parallel.replica_messages import Snapshot, Update

# The load of a prompt's token, that of a generated one being 1: a prefill computes many at once.
PROMPT_SHARE = 1 / 16
# So many tokens of a prefix that a replica has outweigh one generated token of load. The gain is
# smaller, but what comes together mostly belongs together, and the end is balanced otherwise.
MATCH_SHARE = 1.0
MAX_MATCHED_BLOCKS = 16  # of a prompt that are looked up
MAX_PREFIXES = 2**16  # that are remembered
# What a replica has beside its slots, so that it never waits for the engine: this share of them.
RESERVE = 1 / 4
MAX_DEATHS = 2  # a sequence whose replica has died so often may be the reason


class Link(Protocol):
    """What the router asks of the replicas."""

    def cancel(self, index: int, tickets: list[int]) -> None:
        """Let a replica forget sequences."""

    def reset_prefix_cache(self) -> bool:
        """Let all replicas, which have no sequences, forget all cached K/V; whether they did."""


@dataclass
class Place:
    """Where a sequence is: waiting for its home, or sent there under a ticket."""

    home: int
    load: float
    ticket: int | None = None


class ReplicaQueues(FCFSQueue):
    """The waiting sequences of all replicas, each in the queue of its home.

    Args:
        new_queue: makes the queue of a replica.
        size: how many there are.
        home_of: chooses the home of a sequence that is queued.
    """

    def __init__(
        self, new_queue: Callable[[], FCFSQueue], size: int, home_of: Callable[[Sequence], int]
    ) -> None:
        super().__init__()
        self.of_replica = [new_queue() for _ in range(size)]
        self._home_of = home_of

    def __len__(self) -> int:
        return sum(map(len, self.of_replica))

    def __bool__(self) -> bool:
        return any(self.of_replica)

    def add(self, seq: Sequence) -> None:
        """See `FCFSQueue.add`."""
        self.of_replica[self._home_of(seq)].add(seq)

    def put_back(self, seq: Sequence) -> None:
        """See `FCFSQueue.put_back`."""
        self.of_replica[self._home_of(seq)].put_back(seq)

    def drop_finished(self) -> None:
        """See `FCFSQueue.drop_finished`."""
        for waiting in self.of_replica:
            waiting.drop_finished()

    def steal(self) -> Sequence:
        """Take a sequence from the longest queue: the last, or the most urgent one."""
        longest = max(self.of_replica, key=len)
        return longest.popleft() if isinstance(longest, PriorityQueue) else longest.pop()


class ReplicaBlocks:
    """The KV blocks of all replicas together, as far as anybody asks for them here."""

    def __init__(self, router: "Router", num_blocks: int) -> None:
        self._router = router
        self.blocks = range(num_blocks)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds, as the replicas have told last."""
        held = sum(
            self._router.blocks_of[index] - snapshot.num_free_blocks
            for index, snapshot in self._router.snapshots.items()
        )
        return len(self.blocks) - held

    def reset_prefix_cache(self) -> bool:
        """Forget all cached K/V; False if a sequence is at a replica."""
        return not self._router.running and self._router.link.reset_prefix_cache()


class Router(Scheduler):
    """The scheduler of an engine whose sequences are computed by replicas.

    A sequence runs from when it is sent to a replica, where it may wait once more.

    Args:
        config: the engine's configuration.
        link: of the replicas.
        blocks_of: each replica's number of KV blocks.

    Attributes:
        outgoing: sequences that are to be sent, since `schedule` has chosen their replicas.
        snapshots: what each replica has counted, by its newest message.
    """

    def __init__(self, config: Config, link: Link, blocks_of: list[int]) -> None:
        self.link = link
        self.blocks_of = blocks_of
        self.alive = list(range(len(blocks_of)))
        self.loads = [0.0] * len(blocks_of)
        self.snapshots: dict[int, Snapshot] = {}
        self.outgoing: list[Sequence] = []
        self.places: dict[Sequence, Place] = {}
        self._by_ticket: dict[int, Sequence] = {}
        self._num_tickets = 0
        self._num_sent = [0] * len(blocks_of)  # and not ended
        self._prefixes: OrderedDict[int, set[int]] = OrderedDict()  # hash -> who has it
        self._homes: dict[int, int] = {}  # of requests with several completions
        self._num_new_tokens: dict[Sequence, int] = {}  # of those that `take` returned last
        self._num_deaths: dict[Sequence, int] = {}  # of replicas that had the sequence
        super().__init__(config)
        # A decode step of every replica.
        self._room = self.max_num_seqs + max(1, int(RESERVE * self.max_num_seqs))
        self.max_num_seqs *= len(blocks_of)

    def clear(self) -> None:
        """Nothing waits or runs."""
        self._cancel([seq for seq, place in self.places.items() if place.ticket is not None])
        self.places.clear()
        self._by_ticket.clear()
        self.outgoing.clear()
        self.loads = [0.0] * len(self.loads)
        self._num_sent = [0] * len(self.loads)
        self.block_manager = cast(BlockManager, ReplicaBlocks(self, sum(self.blocks_of)))
        self.running: deque[Sequence] = deque()
        self.queues = ReplicaQueues(self.new_queue, len(self.loads), self._settle)
        self.waiting = self.queues
        self.held: list[Sequence] = []

    # ---- homes --------------------------------------------------------------------------------

    def _settle(self, seq: Sequence) -> int:
        """Choose the home of a sequence that is to wait."""
        left = seq.max_length - len(seq)
        load = left + PROMPT_SHARE * len(seq)
        home = self._home_of(seq)
        self.loads[home] += load
        self.places[seq] = Place(home, load)
        return home

    def _home_of(self, seq: Sequence) -> int:
        several = seq.sampling_params.n > 1
        if several and self._homes.get(seq.request_id) in self.alive:
            return self._homes[seq.request_id]
        hashes = self._prefix_hashes(seq)
        matched = dict.fromkeys(self.alive, 0)
        for depth, value in enumerate(hashes, 1):
            for index in self._prefixes.get(value, ()):
                if index in matched:
                    matched[index] = depth * self.config.kvcache_block_size
        home = min(self.alive, key=lambda r: self.loads[r] - MATCH_SHARE * matched[r])
        for value in hashes:
            self._prefixes.setdefault(value, set()).add(home)
            self._prefixes.move_to_end(value)
        while len(self._prefixes) > MAX_PREFIXES:
            self._prefixes.popitem(last=False)
        if several:
            self._homes[seq.request_id] = home
        return home

    def _prefix_hashes(self, seq: Sequence) -> list[int]:
        """Of the first full blocks, each with all before it."""
        if not (self.config.enable_prefix_caching and seq.may_read_prefix_cache):
            return []
        size = self.config.kvcache_block_size
        num_blocks = min(seq.num_prompt_tokens // size, MAX_MATCHED_BLOCKS)
        hashes: list[int] = []
        for start in range(0, num_blocks * size, size):
            parent = hashes[-1] if hashes else None
            tokens = pack_tokens(seq.token_ids[start : start + size])
            hashes.append(BlockManager.compute_hash(tokens, parent))
        return hashes

    def _move(self, place: Place, home: int) -> None:
        self.loads[place.home] -= place.load
        self.loads[home] += place.load
        place.home = home

    # ---- steps --------------------------------------------------------------------------------

    def schedule(self, in_flight: bool = False) -> tuple[list[Sequence], bool]:
        """Choose what is sent to replicas with room, into `outgoing`.

        Returns:
            All sequences that are at replicas: a step is whatever one of them tells next.
        """
        if in_flight:
            return [], False
        queues = self.queues.of_replica
        for index in self.alive:
            while queues[index] and self._num_sent[index] < self._room:
                self._send(queues[index].popleft(), index)
        for index in self.alive:
            while self.queues and self._num_sent[index] < self._room:
                self._send(self.queues.steal(), index)
        return list(self.running), False

    def _send(self, seq: Sequence, index: int) -> None:
        place = self.places[seq]
        if place.home != index:
            self._move(place, index)
        place.ticket = self._num_tickets
        self._num_tickets += 1
        self._by_ticket[place.ticket] = seq
        self._num_sent[index] += 1
        seq.status = SequenceStatus.RUNNING
        if seq.features.grammar is not None:  # it is followed where the sequence is computed
            seq.finish_rules.remove(seq.features.grammar)
            seq.features.grammar = None
        self.running.append(seq)
        self.outgoing.append(seq)

    def take(self, index: int, updates: list[Update], snapshot: Snapshot) -> list[Sequence]:
        """Give sequences what a replica has told of them, ends aside.

        Returns:
            Those that have got anything, for `postprocess`.
        """
        self.snapshots[index] = snapshot
        self._sum_up()
        self._num_new_tokens = {}
        for update in updates:
            seq = self._by_ticket.get(update.ticket)
            if seq is None:
                continue  # it was cancelled
            if seq.finish_rules:
                for token_id in update.token_ids:
                    seq.token_ids.append(token_id)
                    tell_rules(seq, token_id)
            else:
                seq.token_ids += update.token_ids
            self._num_new_tokens[seq] = len(update.token_ids)
            if update.further is None:
                continue
            update.further.apply(seq)
            if (ending := update.further.ending) is not None:
                self._drop_ticket(seq)
                seq.finish_reason, seq.stop_reason, error, _ = ending
                if error is not None:
                    note_error(seq, error)
        return list(self._num_new_tokens)

    def postprocess(self, seqs: list[Sequence], token_ids: list[int | None]) -> list[Sequence]:
        """End those of the sequences that have ended; each is returned once for every new token."""
        alive: list[Sequence] = []
        for seq in seqs:
            if seq.status is SequenceStatus.FINISHED:
                continue
            alive += [seq] * max(1, self._num_new_tokens.get(seq, 1))
            if seq.finish_reason is not None or seq.error is not None:
                self.finish(seq, "abort" if seq.error else str(seq.finish_reason))
        return alive

    def bury(self, index: int, cause: str, retries: bool) -> list[Sequence]:
        """Take back the sequences of a replica that has died.

        Args:
            index: of the replica.
            cause: of its death, for those that end with it.
            retries: compute them elsewhere; else they end with a `ReplicaDiedError`.

        Returns:
            Those that are to end, for `postprocess`.
        """
        self.alive.remove(index)
        self._num_new_tokens = {}
        for holders in self._prefixes.values():
            holders.discard(index)
        ended: list[Sequence] = []
        sent = [seq for seq in self.running if self.places[seq].home == index]
        for seq in reversed(sent):  # each goes to the front of a queue
            self._drop_ticket(seq)
            deaths = self._num_deaths[seq] = self._num_deaths.get(seq, 0) + 1
            if retries and deaths < MAX_DEATHS:
                self.preempt(seq)
            else:
                note_error(seq, ReplicaDiedError(cause))
                ended.append(seq)
        waiting = self.queues.of_replica[index]
        while waiting:
            seq = waiting.popleft()
            self._leave(seq)
            self.queues.add(seq)
        if index in self.snapshots:
            self.snapshots[index].num_free_blocks = self.blocks_of[index]
        return ended

    # ---- ends ---------------------------------------------------------------------------------

    def preempt(self, seq: Sequence) -> None:
        """Take a sequence back from its replica, to be sent again with the tokens it has."""
        self.running.remove(seq)
        self._release(seq)
        seq.reset()
        self.waiting.put_back(seq)

    def abort(self, seqs: list[Sequence]) -> None:
        """End sequences that run or wait, in one message to each replica."""
        self._cancel(seqs)
        super().abort(seqs)

    def finish(self, seq: Sequence, reason: str) -> None:
        """End a sequence; one that waits is left in its queue."""
        if seq.status is SequenceStatus.WAITING:
            self._leave(seq)
        super().finish(seq, reason)
        self._num_deaths.pop(seq, None)
        if seq.index == seq.sampling_params.n - 1:
            self._homes.pop(seq.request_id, None)

    def _release(self, seq: Sequence) -> None:
        self._cancel([seq])
        self._leave(seq)

    def _leave(self, seq: Sequence) -> None:
        """It is no load any more."""
        if (place := self.places.pop(seq, None)) is not None:
            self.loads[place.home] -= place.load

    def _cancel(self, seqs: list[Sequence]) -> None:
        """Let replicas forget those of `seqs` that they have."""
        tickets: dict[int, list[int]] = {}
        for seq in seqs:
            place = self.places.get(seq)
            if place is not None and place.ticket is not None:
                tickets.setdefault(place.home, []).append(place.ticket)
                self._drop_ticket(seq)
        for index, own in tickets.items():
            if index in self.alive:
                self.link.cancel(index, own)

    def _drop_ticket(self, seq: Sequence) -> None:
        """Whatever its replica tells of it from now on is of no use."""
        place = self.places[seq]
        assert place.ticket is not None
        del self._by_ticket[place.ticket]
        self._num_sent[place.home] -= 1
        place.ticket = None

    def _sum_up(self) -> None:
        """`stats` and `num_preemptions` of all replicas together; ends are counted here."""
        totals = SchedulerStats(num_finished=self.stats.num_finished)
        names = [name for name in vars(totals) if name != "num_finished"]
        for name in names:
            total = sum(getattr(snapshot.stats, name) for snapshot in self.snapshots.values())
            setattr(totals, name, total)
        self.stats = totals
        self.num_preemptions = sum(s.num_preemptions for s in self.snapshots.values())
