"""How a step's plan runs on one rank: a prefill, or a decode pass and its CUDA graph."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.all_consumers import new_consumers
from nanovllm.engine.cuda_graphs import DecodeGraphs
from nanovllm.engine.graph_capture import new_graphs
from nanovllm.engine.group_metadata import decode_metadata, prefill_metadata
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.prefill_graphs import PrefillGraphs
from nanovllm.engine.prefill_inputs import PrefillInputs, prefill_arrays
from nanovllm.engine.rank_state import RankState
from nanovllm.engine.sampler import Sampler
from nanovllm.engine.sequence import Sequence, Wants
from nanovllm.engine.step_plan import NONE, StepPlan
from nanovllm.kernels.copies import upload, upload_one
from nanovllm.kernels.ops import Ops
from nanovllm.kernels.types import DecodeMetadata, PrefillMetadata
from nanovllm.parallel.tensor_parallel import TensorParallel


class ModelRunner(RankState):
    """Executes the plans of one rank.

    All device work goes to the current stream, so steps run in the order of their plans.

    Attributes:
        run: on rank 0, `Executor.run`: loops written for nano-vLLM call it here.
    """

    run: Callable[[list[Sequence], bool], list[int | None]]

    def __init__(self, config: Config, device: torch.device, tp: TensorParallel, ops: Ops) -> None:
        super().__init__(config, device, tp, ops)
        self.sampler = Sampler(ops, tp, self.model.lm_head, self.row_table)
        self.consumers = new_consumers(self)
        self.graphs: DecodeGraphs | None = None
        self.prefill_graphs: PrefillGraphs | None = None
        self._uploaded_batch = NONE  # what `decode_batch` holds

    @torch.inference_mode()
    def execute(self, plan: StepPlan, seqs: Iterable[Sequence] = ()) -> LaunchedStep:
        """Launch a plan on this rank; does not wait for the device.

        seqs: the plan's sequences, on rank 0.
        """
        self.sent_rows.reshape(-1)[plan.updates[:, 0]] = plan.updates[:, 1]
        step = LaunchedStep(plan, list(seqs))
        with self.on_device():
            if plan.is_prefill:
                self._execute_prefill(step)
            else:
                self._execute_decode(step)
            if self.tp.rank == 0:
                step.start_download()
        return step

    def _give(self, want: int, step: LaunchedStep, values: torch.Tensor) -> None:
        """Let the consumer behind `want` have `values`, if a sequence of the step wants it."""
        if step.plan.has(want):
            self.consumers[want].run(step, values)

    def _execute_prefill(self, step: LaunchedStep) -> None:
        """Compute several tokens of each sequence, and sample where a prompt is complete."""
        plan, num_groups = step.plan, len(self.group_layers)
        arrays = prefill_arrays(plan, self.sent_rows, self.block_size, num_groups)
        self._update_row_table(upload_one(plan.updates, self.device))
        if self.prefill_graphs and (size := self.prefill_graphs.size_of(plan)):
            logits = self.prefill_graphs.replay(size, step, arrays)
            if step.token_ids is not None:
                self._give(Wants.LOGITS, step, logits)
            return
        inputs = PrefillInputs(*upload(arrays.values(), self.device))
        wants_all = plan.has(Wants.PROMPT | Wants.STATES)
        hidden_states = self.prefill(inputs, arrays["bounds"][1:].tolist(), wants_all)
        if wants_all:
            self._give(Wants.PROMPT, step, hidden_states)
            self._give(Wants.STATES, step, hidden_states)
            hidden_states = hidden_states.index_select(0, inputs.last_tokens)
        if not len(inputs.rows):
            return  # no prompt is complete
        self._give(Wants.POOLING, step, hidden_states)
        if plan.all_want(Wants.POOLING):
            step.token_ids = inputs.rows  # any numbers: nobody reads them
            return
        step.positions = inputs.last_positions
        step.token_ids, logits = self.sample_last_tokens(hidden_states, inputs)
        self._give(Wants.LOGITS, step, logits)

    def prefill(
        self, inputs: PrefillInputs, max_seqlens: list[int], of_all: bool = False
    ) -> torch.Tensor:
        """The last hidden states of a prefill step [N, hidden_size], or of all tokens.

        max_seqlens: of queries and of keys, as in `PrefillMetadata`.
        """
        slots, tables, copies = inputs.slot_mappings[0], inputs.block_tables, inputs.copies
        tables_and_lengths = inputs.last_block_tables, inputs.last_lengths
        last_tokens = DecodeMetadata(
            slots, *tables_and_lengths, logits_indices=inputs.last_tokens, copies=copies
        )
        metadata = PrefillMetadata(
            slot_mapping=slots,
            block_tables=tables,
            cu_seqlens_q=inputs.cu_seqlens_q,
            cu_seqlens_k=inputs.cu_seqlens_k,
            max_seqlen_q=max_seqlens[0],
            max_seqlen_k=max_seqlens[1],
            rows=inputs.seq_rows,
            last_tokens=None if of_all else last_tokens,
            copies=copies,
            bounds=inputs.bounds,
        )
        if len(self.group_layers) > 1:
            metadata = prefill_metadata(metadata, inputs.slot_mappings.unbind())
        return self.model.model(inputs.token_ids, inputs.positions, metadata)

    def sample_last_tokens(
        self, hidden_states: torch.Tensor, inputs: PrefillInputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [N, hidden_size] -> the token ids that follow [N] int32, logits [N, V]."""
        logits = self.model.lm_head(hidden_states)
        temperatures, seeds, positions = inputs.temperatures, inputs.seeds, inputs.last_positions
        return self.sampler(logits, inputs.rows, temperatures, seeds, positions), logits

    def _execute_decode(self, step: LaunchedStep) -> None:
        """Compute and sample one token of each sequence; its inputs are in the row table."""
        plan = step.plan
        num_seqs = len(plan.rows)
        batch_size = self.graphs.padded_size(num_seqs) if self.graphs else num_seqs
        num_common_tokens = plan.num_common_tokens if self.reads_common_blocks_once else 0
        batch = np.full(1 + batch_size, self.config.max_num_seqs, dtype=np.int32)
        batch[0] = num_common_tokens
        batch[1 : 1 + num_seqs] = plan.rows
        is_same_batch = np.array_equal(batch, self._uploaded_batch)
        if not is_same_batch or len(plan.updates):
            updates, new_batch = upload([plan.updates, batch], self.device)
            self._update_row_table(updates)
            self.decode_batch[: len(batch)].copy_(new_batch)
            self._uploaded_batch = batch
        if self.graphs:
            token_ids = self.graphs.replay(batch_size, num_common_tokens > 0)
        else:
            token_ids = self.decode(self.decode_rows[:batch_size], num_common_tokens > 0)
        step.token_ids = token_ids[:num_seqs]
        self._give(Wants.LOGITS, step, self.decode_logits[:num_seqs])

    def decode(self, rows: torch.Tensor, has_common_blocks: bool = False) -> torch.Tensor:
        """One decode step of `rows` [B], what a graph captures; returns token ids [B] int32.

        The logits are left in `decode_logits`.

        has_common_blocks: read the rows' `num_common_tokens` leading tokens once for all.
        """
        inputs = self.ops.gather_decode_inputs(self.row_table, rows, self.block_size)
        num_common_tokens = self.decode_batch[:1] if has_common_blocks else None
        if self.has_windows:
            metadata = decode_metadata(
                self.ops, self.group_layers, inputs, rows, self.block_size, num_common_tokens
            )
        else:
            tables, lens = inputs.block_tables, inputs.context_lens
            plan = self.ops.plan_decode(self.attentions[0].cache, tables, lens, num_common_tokens)
            metadata = DecodeMetadata(inputs.slot_mapping, tables, lens, plan, rows=rows)
        hidden_states = self.model.model(inputs.input_ids, inputs.positions, metadata)
        logits = self.model.lm_head(hidden_states, out=self.decode_logits[: len(rows)])
        return self.sampler(logits, rows, inputs.temperatures, inputs.seeds, inputs.positions)

    def _update_row_table(self, updates: torch.Tensor) -> None:
        if len(updates):
            indices, values = updates.view(-1, 2).unbind(1)
            self.row_table.view(-1)[indices] = values

    def capture_graphs(self) -> None:
        """Capture steps, where CUDA graphs are used; on all ranks together.

        Graphs hold the addresses of weights and cache. No sequence may have a row.
        """
        config = self.config
        if self.is_cuda and self.ops.supports_cuda_graphs and not config.enforce_eager:
            self._uploaded_batch = NONE
            with self.on_device():
                self.decode_batch.fill_(config.max_num_seqs)  # every row is padding
                self.decode_batch[0] = 0
                is_uniform = self.offload is None and self.adapters is None
                self.graphs = new_graphs(
                    self.model, config.max_num_seqs, self.decode_rows, self.decode, is_uniform
                )
                self.prefill_graphs = PrefillGraphs(self, self.prefill, self.sample_last_tokens)

    def drop_graphs(self) -> None:
        """Run without CUDA graphs from now on."""
        self.graphs = self.prefill_graphs = None

    def close(self) -> None:
        """Drop the graphs, the cache and the weights."""
        self.drop_graphs()
        self.consumers.clear()
        del self.sampler
        super().close()
