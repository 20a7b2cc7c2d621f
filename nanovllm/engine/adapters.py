"""Which LoRA adapters an engine knows, and which of them are in the slots of its ranks.

A batch may have as many adapters as there are slots. A request whose adapter finds none waits
until a slot is used by no running sequence. Others overtake it meanwhile, but not for ever.
"""

from collections.abc import Sequence as Items
from itertools import count, islice

import torch

from nanovllm.config import Config
from nanovllm.engine.adapter_runner import allocate_layers, load_adapter
from nanovllm.engine.executor import Executor
from nanovllm.engine.request import Request, RequestTable
from nanovllm.engine.scheduling_policy import FCFSQueue
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import ArgumentError
from nanovllm.guards.interrupts import DeferredInterrupt
from nanovllm.lora_request import LoRARequest

LOOK_AHEAD = 512  # waiting sequences behind the first, and how many with adapters may overtake it
FIRST_ROOT = 1 << 63  # of the prefix ids of adapters: those of blocks are less


class AdapterTable:
    """The adapters of an engine, by their numbers.

    Args:
        config: the engine's configuration.
        executor: the engine's.
        requests: the engine's.

    Attributes:
        known: the adapters that requests have named.
        roots: their prefix ids before the first block, which are names that no other adapter and
            no other content of the same folder ever has.
        slots: the adapter in each slot; None: it is free.
        pinned: the adapters that lose their places last.
    """

    def __init__(self, config: Config, executor: Executor, requests: RequestTable) -> None:
        self._executor, self._requests = executor, requests
        self.known: dict[int, LoRARequest] = {}
        self.slots: list[int | None] = [None] * config.max_loras
        self.pinned: set[int] = set()
        self.roots: dict[int, int] = {}
        self._new_root = count(FIRST_ROOT)
        self._last_use = [0] * config.max_loras  # of each slot
        self._clock = count(1)
        self._held_up: Sequence | None = None  # the first of the queue, and who overtook it
        self._num_overtakes = 0

    # ---- requests -------------------------------------------------------------------------------

    def attach(self, request: Request, lora_request: LoRARequest) -> None:
        """Let a new request use an adapter that is `known`."""
        for seq in request.sequences:
            seq.features.lora_request = lora_request
            seq.features.prefix_root = self.roots[lora_request.lora_int_id]

    def register(self, lora_request: LoRARequest) -> None:
        """Know an adapter from now on.

        Raises:
            ArgumentError: it does not fit the model, its number belongs to another folder, or it is
                to be read again while requests use it.
        """
        number, known = lora_request.lora_int_id, self.known.get(lora_request.lora_int_id)
        if known is not None and not lora_request.load_inplace:
            if known.lora_path != lora_request.lora_path:
                raise ArgumentError(
                    f"lora_int_id {number} is that of {known.lora_path!r}, got "
                    f"{lora_request.lora_path!r}; give it another number, remove_lora({number}), "
                    "or say load_inplace=True"
                )
            return
        if known is not None:
            self.check_unused(number)
        adapters = self._executor.model_runner.adapters
        assert adapters is not None
        adapters.check(lora_request.lora_path)
        if layers := adapters.unallocated(lora_request.lora_path):
            self._allocate(layers)
        self.forget(number)
        self.known[number] = lora_request
        self.roots[number] = next(self._new_root)

    def _allocate(self, layers: list[int]) -> None:
        try:
            with DeferredInterrupt():
                self._executor.collective_rpc(allocate_layers, None, (layers,), {})
        except torch.OutOfMemoryError as error:
            raise ArgumentError(
                "no memory for adapters of the embedding and the LM head; lower "
                "gpu_memory_utilization, max_loras or max_lora_rank"
            ) from error

    def check_unused(self, number: int) -> None:
        """ArgumentError if an unfinished request uses an adapter."""
        for seq in self._requests.sequences():
            used = seq.features.lora_request
            if used is not None and used.lora_int_id == number and not seq.is_finished:
                raise ArgumentError(
                    f"adapter {number} cannot go: unfinished requests use it, such as request "
                    f"{seq.request_id}"
                )

    def forget(self, number: int) -> None:
        """Know an adapter no longer that no request uses."""
        self.known.pop(number, None)
        self.roots.pop(number, None)
        self.slots = [None if other == number else other for other in self.slots]

    def load_arguments(self, number: int, slot: int | None = None) -> tuple[object, ...]:
        """Of `load_adapter`, for a known adapter and the slot that it goes to, if any."""
        pinned = {self.roots[other] for other in self.pinned}
        return self.roots[number], self.known[number].lora_path, slot, pinned

    # ---- slots ----------------------------------------------------------------------------------

    def queue(self, policy: type[FCFSQueue]) -> type[FCFSQueue]:
        """A queue of a policy from which only those are admitted whose adapter has a slot."""
        table = self

        class AdapterQueue(policy):  # type: ignore[misc, valid-type]
            """See `AdapterTable.queue`."""

            def head(self, running: Items[Sequence]) -> Sequence | None:
                """See `FCFSQueue.head`."""
                return table.first(self, running)

        return AdapterQueue

    def first(self, queue: FCFSQueue, running: Items[Sequence]) -> Sequence | None:
        """The first sequence of a queue that can run beside others; it gets its adapter's slot."""
        if not queue:
            return None
        head = queue[0]
        if self._find_slot(head) or self._take_slot(head, running):
            return head
        if head is not self._held_up:
            self._held_up, self._num_overtakes = head, 0
        for seq in islice(queue, 1, 1 + LOOK_AHEAD):
            if seq.features.lora_request is None:
                return seq
            # Each may keep a slot that the first one waits for.
            if self._num_overtakes < LOOK_AHEAD and self._find_slot(seq):
                self._num_overtakes += 1
                return seq
        return None

    def _find_slot(self, seq: Sequence) -> bool:
        """Give a sequence the slot that its adapter is in, if any; or none, if it needs none."""
        lora_request = seq.features.lora_request
        if lora_request is None:
            return True
        if lora_request.lora_int_id not in self.slots:
            return False
        self._use(seq, self.slots.index(lora_request.lora_int_id))
        return True

    def _take_slot(self, seq: Sequence, running: Items[Sequence]) -> bool:
        """Load a sequence's adapter into the slot used longest ago, if one is free of others."""
        lora_request = seq.features.lora_request
        assert lora_request is not None
        busy = {other.features.adapter_slot - 1 for other in running}
        free = [slot for slot in range(len(self.slots)) if slot not in busy]
        if not free:
            return False
        slot = min(free, key=lambda i: (self.slots[i] in self.pinned, self._last_use[i]))
        self.slots[slot] = None  # whatever becomes of the load
        args = self.load_arguments(lora_request.lora_int_id, slot)
        self._executor.collective_rpc(load_adapter, None, args, {})
        self.slots[slot] = lora_request.lora_int_id
        self._use(seq, slot)
        return True

    def _use(self, seq: Sequence, slot: int) -> None:
        seq.features.adapter_slot = slot + 1
        self._last_use[slot] = next(self._clock)
