"""Prefill steps of few tokens as CUDA graphs, one for each padded number of tokens.

A small prefill keeps the host longer than the device: it has hundreds of kernels. A captured step
is launched at once. Its shapes are fixed, so the tokens that are missing are padding: sequences of
their own behind the others, of up to PADDING_LEN tokens. They attend to block 0, write nothing, and
nothing is sampled. Behind them are empty sequences.
"""

from collections.abc import Callable
from dataclasses import replace
from operator import le
from typing import NamedTuple

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.capture import capturing
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.layer_kinds import FewLayers
from nanovllm.engine.prefill_inputs import PrefillInputs
from nanovllm.engine.rank_state import RankState
from nanovllm.engine.sequence import Wants
from nanovllm.engine.step_plan import StepPlan
from nanovllm.kernels import row_state
from nanovllm.kernels.cache_units import COPY_UNIT
from nanovllm.kernels.copies import ALIGNMENT, TORCH_DTYPES, upload_one
from nanovllm.models.base import CausalLM
from nanovllm.models.size import num_weights

SMALLEST, LARGEST = 128, 4096  # tokens of a captured step
MAX_SEQS = 32
PADDING_LEN = 256  # no block has fewer tokens
TOKENS_PER_SEQ = 16  # a step has one sequence for so many tokens at most
# Multiplications of a captured step at most: where a GPU takes longer for them than the host for
# its launches, padding costs more than it saves.
MAX_PRODUCTS = 2e12
# What a padded step does not give.
UNPADDED = Wants.PROMPT | Wants.STATES | Wants.POOLING


Prefill = Callable[[PrefillInputs, list[int]], torch.Tensor]
Sample = Callable[[torch.Tensor, PrefillInputs], tuple[torch.Tensor, torch.Tensor]]


class PaddedSize(NamedTuple):
    """The shape of a captured step."""

    num_tokens: int
    num_seqs: int  # without padding
    num_copies: int
    max_seqlen_k: int


def padded_sizes(config: Config) -> list[PaddedSize]:
    """The sizes of captured steps, ascending: powers of 2 of tokens.

    Copies within an fp8 cache, whose scales take many kernels, are left to other steps.
    """
    model = config.model_config
    if model.num_experts:
        model = replace(model, num_experts=model.num_experts_per_tok)
    weights = num_weights(model) - model.vocab_size * model.hidden_size
    most = min(config.max_num_batched_tokens, LARGEST)
    copies_units = config.enable_prefix_caching and config.kv_cache_dtype == "auto"
    most_copies = config.kvcache_block_size // COPY_UNIT - 1 if copies_units else 0  # of a sequence
    sizes = []
    num_tokens = SMALLEST
    while num_tokens <= most and num_tokens * weights <= MAX_PRODUCTS:
        num_seqs = min(MAX_SEQS, num_tokens // TOKENS_PER_SEQ, config.max_num_seqs)
        num_copies = num_seqs * most_copies
        sizes.append(PaddedSize(num_tokens, num_seqs, num_copies, config.max_model_len))
        num_tokens *= 2
    return sizes


def captured_sizes(rank: RankState) -> list[PaddedSize]:
    """`padded_sizes`, or none if a rank's prefill steps are not captured.

    They are with one rank and this library's modules, whose weights and adapters no step changes,
    if sequences have neither windows nor states.
    """
    is_plain = isinstance(rank.model, CausalLM) and rank.adapters is None
    has_one_cache = not rank.has_windows and not rank.states
    is_alone = rank.tp.size == 1 and rank.offload is None
    is_ours = rank.config.attention_backend != "flash-attn"  # whose kernels were never captured
    can_be = is_plain and has_one_cache and is_alone and is_ours
    return padded_sizes(rank.config) if can_be else []


def padding(size: PaddedSize, table_width: int, padding_row: int) -> dict[str, np.ndarray]:
    """The arrays of `prefill_arrays` for a step of padding alone."""
    num_tokens, num_seqs, num_copies, _ = size
    num_all_seqs = num_seqs + -(-num_tokens // PADDING_LEN)

    def full(*shape: int, value: int = 0) -> np.ndarray:
        return np.full(shape, value, dtype=np.int32)

    ends = np.minimum(PADDING_LEN * np.arange(num_all_seqs + 1, dtype=np.int32), num_tokens)
    return {
        "token_ids": full(num_tokens),
        "positions": full(num_tokens),
        "slot_mappings": np.full((1, num_tokens), -1, dtype=np.int64),
        "cu_seqlens_q": ends,
        "cu_seqlens_k": ends,
        "block_tables": full(num_all_seqs, table_width),
        "last_tokens": full(num_seqs),
        "last_positions": full(num_seqs),
        "last_lengths": full(num_seqs),
        "last_block_tables": full(num_seqs, table_width),
        "seq_rows": full(num_all_seqs, value=padding_row),
        "rows": full(num_seqs, value=padding_row),
        "temperatures": np.zeros(num_seqs, dtype=np.float32),
        "seeds": full(num_seqs, 2),
        "copies": full(num_copies, 2),
        "bounds": np.array([num_all_seqs, PADDING_LEN, PADDING_LEN], dtype=np.int32),
    }


class PaddedInputs:
    """A captured step's inputs, at fixed addresses.

    Args:
        size: of the step.
        table_width: block table entries of a row.
        padding_row: in the row table.
        device: where the inputs lie.

    Attributes:
        inputs: of padding alone at first.
    """

    def __init__(
        self, size: PaddedSize, table_width: int, padding_row: int, device: torch.device
    ) -> None:
        arrays = padding(size, table_width, padding_row)
        ends = np.cumsum([-(-a.nbytes // ALIGNMENT) * ALIGNMENT for a in arrays.values()]).tolist()
        self._places = {
            name: (start, start + array.nbytes, array.dtype, array.shape)
            for (name, array), start in zip(arrays.items(), [0, *ends], strict=False)
        }
        self._padding = np.zeros(ends[-1] // 4, dtype=np.int32)
        for name, view in self._views(self._padding).items():
            view[:] = arrays[name]
        self._padding_ends = PADDING_LEN * np.arange(1, len(arrays["seq_rows"]) + 1, dtype=np.int32)
        self._memory = upload_one(self._padding, device)
        as_bytes = self._memory.view(torch.uint8)
        self.inputs = PrefillInputs(
            **{
                name: as_bytes[start:end].view(TORCH_DTYPES[dtype]).view(shape)
                for name, (start, end, dtype, shape) in self._places.items()
            }
        )

    def _views(self, memory: np.ndarray) -> dict[str, np.ndarray]:
        as_bytes = memory.view(np.uint8)
        return {
            name: as_bytes[start:end].view(dtype).reshape(shape)
            for name, (start, end, dtype, shape) in self._places.items()
        }

    def fill(self, arrays: dict[str, np.ndarray]) -> None:
        """Take a step's `prefill_arrays`, with padding behind each."""
        memory = self._padding.copy()
        views = self._views(memory)
        for name, array in arrays.items():
            views[name][tuple(map(slice, array.shape))] = array
        num_padding = len(views["token_ids"]) - len(arrays["token_ids"])
        num_seqs = len(arrays["seq_rows"])
        padding_ends = self._padding_ends[: len(views["seq_rows"]) - num_seqs].clip(max=num_padding)
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            views[name][num_seqs + 1 :] = arrays[name][-1] + padding_ends
        views["bounds"][0] += -(-num_padding // PADDING_LEN)
        views["bounds"][1:].clip(min=min(num_padding, PADDING_LEN), out=views["bounds"][1:])
        # Those missing are of a unit into itself, which is not the target of another.
        copies = arrays["copies"]
        views["copies"][len(copies) :] = copies[0, 1] if len(copies) else 0
        self._memory.copy_(upload_one(memory, self._memory.device))


class _CapturedStep(NamedTuple):
    graph: torch.cuda.CUDAGraph
    padded: PaddedInputs  # where a replay finds its inputs
    token_ids: torch.Tensor
    logits: torch.Tensor


class PrefillGraphs:
    """Captured prefill steps of every padded size; all share one memory pool.

    Args:
        rank: whose steps.
        prefill: `ModelRunner.prefill`.
        sample: `ModelRunner.sample_last_tokens`.
    """

    def __init__(self, rank: RankState, prefill: Prefill, sample: Sample) -> None:
        self.rank, self.prefill, self.sample = rank, prefill, sample
        self.sizes = captured_sizes(rank)
        self.steps: dict[PaddedSize, _CapturedStep] = {}
        self._pool: object = None
        if not self.sizes:
            return
        few = FewLayers(rank.model.model)
        with torch.inference_mode():
            # The largest first: smaller ones then fit in the pool it leaves.
            for size in reversed(self.sizes):
                self._run_and_capture(size, few)

    def size_of(self, plan: StepPlan) -> PaddedSize | None:
        """The captured size that serves a prefill; None: none does."""
        if plan.has(UNPADDED):
            return None
        needed = len(plan.token_ids), len(plan.rows), len(plan.copies)
        fitting = (size for size in self.sizes if all(map(le, needed, size)))
        return next(fitting, None)

    def replay(
        self, size: PaddedSize, step: LaunchedStep, arrays: dict[str, np.ndarray]
    ) -> torch.Tensor:
        """Run a step; gives it its token ids and positions, valid until the next replay.

        arrays: of `prefill_arrays`.

        Returns:
            The logits [N, V] of the sampled sequences.
        """
        captured = self.steps[size]
        captured.padded.fill(arrays)
        captured.graph.replay()
        if num_sampled := len(arrays["rows"]):
            step.token_ids = captured.token_ids[:num_sampled]
            step.positions = captured.padded.inputs.last_positions[:num_sampled]
        return captured.logits[:num_sampled]

    def _run_and_capture(self, size: PaddedSize, few: FewLayers) -> None:
        """Some layers launch by launch, which builds what a capture may not build; then a graph."""
        padded = new_padded_inputs(self.rank, size)
        with few.alone():
            run_padded(size, padded.inputs, self.prefill, self.sample)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self._pool):
            token_ids, logits = run_padded(size, padded.inputs, self.prefill, self.sample)
        self._pool = graph.pool()
        self.steps[size] = _CapturedStep(graph, padded, token_ids, logits)


def new_padded_inputs(rank: RankState, size: PaddedSize) -> PaddedInputs:
    """Inputs of a size for a rank's steps."""
    width = rank.config.row_width - row_state.BLOCK_TABLE
    return PaddedInputs(size, width, rank.config.max_num_seqs, rank.device)


def run_padded(
    size: PaddedSize, inputs: PrefillInputs, prefill: Prefill, sample: Sample
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step, without host synchronisation: token ids [N] int32 and logits [N, V].

    prefill, sample: as of `PrefillGraphs`.
    """
    longest = min(size.num_tokens, size.max_seqlen_k)
    return sample(prefill(inputs, [longest, size.max_seqlen_k]), inputs)
