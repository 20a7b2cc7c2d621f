"""LoRA adapters of a model's layers: weights in slots, and the terms they add to the products.

Layers keep their names and parameters: a forward hook adds the terms of the adapters. While
`AdapterStep.is_on` is False the hooks do nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanovllm.kernels.ops import Ops
from nanovllm.kernels.types import (
    AttentionMetadata,
    LinearOutput,
    LoRAWeights,
    PrefillMetadata,
    Unreduced,
)
from nanovllm.layers.context import ModelContext
from nanovllm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.layers.weights import shape_of

MIN_RANK = 16  # of the slots: what matrix instructions take


def slot_rank(max_rank: int) -> int:
    """The rank of slots for adapters of `max_rank` at most: see `LoRAWeights.rank`."""
    return max(MIN_RANK, 1 << (max_rank - 1).bit_length())


class Term(NamedTuple):
    """What one adapter adds to one projection, this rank's part, in host memory."""

    layer: int  # which `AdapterLayer`
    projection: int  # of the layer
    a: Tensor  # [r, K]
    b: Tensor  # [rows of the projection, r], the scale included


class AdapterStep:
    """Which adapter each token of the running step has.

    Args:
        ops: the backend.
        num_slots: of adapters.
        slots: [rows of the row table] int32, 1 + the slot of each row's adapter; 0: none.

    Attributes:
        is_on: whether any token has one. The host knows it before each step, and CUDA graphs are
            captured for either.
        slots: [T] int32, 1 + the slot of each token's adapter; 0: none.
        head_tokens: [B] int32, those of the T tokens that the LM head reads; None: those that the
            last layer computes.
    """

    slots: Tensor

    def __init__(self, ops: Ops, num_slots: int, slots: Tensor) -> None:
        self.ops, self.num_slots, self._of_rows = ops, num_slots, slots
        self.is_on = False
        self.head_tokens: Tensor | None = None
        self._plans: dict[int, object] = {}  # by numbers of tokens

    def begin(self, decoder: nn.Module, args: tuple[Tensor, Tensor, AttentionMetadata]) -> None:
        """A forward pre-hook of the decoder."""
        if not self.is_on:
            return
        input_ids, _, metadata = args
        assert metadata.rows is not None
        slots = self._of_rows.index_select(0, metadata.rows)
        if isinstance(metadata, PrefillMetadata):
            lengths = metadata.cu_seqlens_q.diff()
            slots = torch.repeat_interleave(slots, lengths, output_size=len(input_ids))
        self.slots = slots
        self._plans = {len(slots): self._plan(None)}
        last = metadata.last_tokens
        # The last layer may go on with some tokens. As many as there are can only be all of them.
        if last is not None and len(last.context_lens) != len(slots):
            self._plans[len(last.context_lens)] = self._plan(last.logits_indices)

    def _plan(self, tokens: Tensor | None) -> object:
        slots = self.slots if tokens is None else self.slots.index_select(0, tokens)
        return self.ops.plan_adapters(slots, self.num_slots) if len(slots) else None

    def add(self, out: LinearOutput, x: Tensor, weights: LoRAWeights) -> None:
        """Add the terms of the step's adapters to `out`, the product of x."""
        if len(x):
            self.ops.add_adapters(out, x, weights, self._plans[len(x)])

    @contextmanager
    def reading(self, tokens: slice) -> Iterator[None]:
        """The LM head reads these of the T tokens inside."""
        before = self.head_tokens
        if self.is_on:
            device = self.slots.device
            indices = torch.arange(tokens.start, tokens.stop, dtype=torch.int32, device=device)
            self.head_tokens = indices
        yield
        self.head_tokens = before

    def add_to_logits(self, logits: Tensor, x: Tensor, weights: LoRAWeights) -> None:
        """`add` of the LM head."""
        if self.head_tokens is None:
            self.add(logits, x, weights)
        elif len(x):
            self.ops.add_adapters(logits, x, weights, self._plan(self.head_tokens))


class AdapterLayer:
    """The slots of one linear layer.

    Args:
        linear: gets the hook that adds their terms.
        step: of the rank.
        rank: see `slot_rank`.
        context: what the model was built with.
    """

    def __init__(
        self,
        linear: ColumnParallelLinear | RowParallelLinear,
        step: AdapterStep,
        rank: int,
        context: ModelContext,
    ) -> None:
        self._step = step
        _, num_columns = shape_of(linear.shards)
        targets = [shard.target[0] for shard in linear.shards.values()]
        rows = tuple((part.start, part.stop) for part in targets)
        self.weights = new_weights(step.num_slots, rank, num_columns, rows, context)
        linear.has_adapters = True
        linear.register_forward_hook(self._add)

    def _add(
        self, linear: nn.Module, args: tuple[Tensor], output: LinearOutput | Unreduced
    ) -> None:
        if self._step.is_on:
            out = output.term if isinstance(output, Unreduced) else output
            self._step.add(out, args[0], self.weights)

    is_allocated = True  # from the beginning, so that the KV cache gets what is left

    def clear(self, slot: int) -> None:
        """Let a slot add nothing."""
        clear(self.weights, slot)

    def fill(self, slot: int, terms: Sequence[Term]) -> None:
        """Put terms into a slot that is clear. Does not wait for the device."""
        fill(self.weights, slot, terms)


class AdapterHead:
    """The slots of the LM head, which take memory from the first adapter on that changes it.

    Arguments are those of `AdapterLayer`.
    """

    def __init__(
        self, head: ParallelLMHead, step: AdapterStep, rank: int, context: ModelContext
    ) -> None:
        self._step, self._rank, self._context = step, rank, context
        self._shape = head.weight.shape
        self.weights: LoRAWeights | None = None
        self._x: Tensor
        head.register_forward_pre_hook(self._remember)
        self._finish, head.finish = head.finish, self._add

    def _remember(self, head: nn.Module, args: tuple[Tensor]) -> None:
        if self.weights is not None:
            self._x = args[0]

    def _add(self, logits: Tensor) -> Tensor:
        """What becomes of the product: terms come before soft caps and multipliers."""
        if self._step.is_on and self.weights is not None:
            self._step.add_to_logits(logits, self._x, self.weights)
        return self._finish(logits) if self._finish else logits

    @property
    def is_allocated(self) -> bool:
        """Whether the slots have memory."""
        return self.weights is not None

    def allocate(self) -> None:
        """Take the memory of the slots."""
        num_rows, num_columns = self._shape
        self.weights = new_weights(
            self._step.num_slots, self._rank, num_columns, ((0, num_rows),), self._context
        )

    def clear(self, slot: int) -> None:
        """See `AdapterLayer.clear`."""
        if self.weights is not None:
            clear(self.weights, slot)

    def fill(self, slot: int, terms: Sequence[Term]) -> None:
        """See `AdapterLayer.fill`."""
        if terms:
            assert self.weights is not None
            fill(self.weights, slot, terms)


class AdapterEmbedding:
    """The slots of the token embedding, on every rank whole; otherwise as `AdapterHead`.

    An adapter has a row of A^T for each token id, which B multiplies.
    """

    def __init__(
        self,
        embedding: VocabParallelEmbedding,
        vocab_size: int,
        step: AdapterStep,
        rank: int,
        context: ModelContext,
    ) -> None:
        self._step, self._context = step, context
        self._table_shape = step.num_slots, vocab_size, rank
        self._hidden_size = embedding.weight.shape[1]
        self._table: Tensor | None = None
        self._weights: LoRAWeights | None = None
        embedding.register_forward_hook(self._add)

    def _add(self, embedding: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if self._step.is_on and self._table is not None and self._weights is not None:
            places = (self._step.slots - 1).clamp(min=0) * self._table_shape[1] + args[0]
            inner = self._table.flatten(0, 1).index_select(0, places)
            self._step.add(output, inner, self._weights)

    @property
    def is_allocated(self) -> bool:
        """See `AdapterHead.is_allocated`."""
        return self._table is not None

    def allocate(self) -> None:
        """See `AdapterHead.allocate`."""
        num_slots, _, rank = self._table_shape
        rows = ((0, self._hidden_size),)
        self._weights = new_weights(num_slots, rank, None, rows, self._context)
        self._table = new_zeros(self._context, *self._table_shape)

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """See `AdapterLayer.clear`."""
        if self._table is not None and self._weights is not None:
            self._table[slot].zero_()
            clear(self._weights, slot)

    @torch.no_grad()
    def fill(self, slot: int, terms: Sequence[Term]) -> None:
        """See `AdapterLayer.fill`."""
        for term in terms:
            assert self._table is not None and self._weights is not None
            self._table[slot, :, : len(term.a)].copy_(term.a.T, non_blocking=True)
            fill(self._weights, slot, [term])


AnyAdapterLayer = AdapterLayer | AdapterHead | AdapterEmbedding


# ---- slots --------------------------------------------------------------------------------------


def new_zeros(context: ModelContext, *shape: int) -> Tensor:
    """Zeros in the model's dtype."""
    return torch.zeros(shape, dtype=context.dtype, device=context.device)


def new_weights(
    num_slots: int,
    rank: int,
    num_columns: int | None,
    rows: tuple[tuple[int, int], ...],
    context: ModelContext,
) -> LoRAWeights:
    """Slots that add nothing; num_columns: K, None: there is no A."""
    a = None
    if num_columns is not None:
        a = new_zeros(context, num_slots, len(rows) * rank, num_columns)
    return LoRAWeights(a, new_zeros(context, num_slots, rows[-1][1], rank), rows)


@torch.no_grad()
def clear(weights: LoRAWeights, slot: int) -> None:
    """Let a slot add nothing."""
    if weights.a is not None:
        weights.a[slot].zero_()
    weights.b[slot].zero_()


@torch.no_grad()
def fill(weights: LoRAWeights, slot: int, terms: Sequence[Term]) -> None:
    """Put terms into a slot that is clear. Does not wait for the device."""
    for term in terms:
        rank, (first, _) = len(term.a), weights.rows[term.projection]
        start = term.projection * weights.rank
        if weights.a is not None:
            weights.a[slot, start : start + rank].copy_(term.a, non_blocking=True)
        weights.b[slot, first : first + len(term.b), :rank].copy_(term.b, non_blocking=True)
