"""One rank's model, KV cache and row table, and how a step's plan runs on them."""

import gc
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine import kv_cache
from nanovllm.engine.consumers import LogitsProcessing, Pooling, PromptLogprobs, StepConsumer
from nanovllm.engine.cuda_graphs import DecodeGraphs
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.prefill_inputs import prefill_inputs
from nanovllm.engine.sampler import Sampler
from nanovllm.engine.sequence import Sequence, Wants
from nanovllm.engine.step_plan import StepPlan
from nanovllm.kernels.copies import upload
from nanovllm.kernels.ops import Ops
from nanovllm.kernels.types import DecodeMetadata, PrefillMetadata
from nanovllm.layers.attention import Attention
from nanovllm.layers.context import ModelContext
from nanovllm.models.base import model_class
from nanovllm.models.loader import load_model
from nanovllm.parallel.tensor_parallel import TensorParallel


class ModelRunner:
    """Executes step plans on one rank.

    All device work goes to the current stream, in the order of the plans.

    Args:
        config: the engine's configuration, the same on every rank.
        device: this rank's device.
        tp: this rank's place among the ranks.
        ops: the backend.

    Attributes:
        run: on rank 0, `Executor.run`: loops written for nano-vLLM call it here.
    """

    run: Callable[[list[Sequence], bool], list[int | None]]

    def __init__(self, config: Config, device: torch.device, tp: TensorParallel, ops: Ops) -> None:
        self.config = config
        self.device = device
        self.tp = tp
        self.block_size = config.kvcache_block_size
        self.is_cuda = device.type == "cuda"
        self.profiler: tuple[torch.profiler.profile, str] | None = None  # and where its trace goes
        self._uploaded_batch: np.ndarray = np.empty(0, dtype=np.int32)  # in decode_batch
        model_config = config.model_config
        self.ops = ops
        with self.on_device():
            context = ModelContext(
                self.ops,
                tp,
                config.resolve_dtype(),
                device,
                config.max_model_len,
                config.fp8_scales,
                config.resolve_kv_cache_dtype(),
            )
            self.model = model_class(model_config.architectures)(model_config, context)
            self.reload_weights()
            self.attentions = [m for m in self.model.modules() if isinstance(m, Attention)]
            self._allocate_row_table()
            lm_head = self.model.lm_head
            self.sampler = Sampler(self.ops, tp, lm_head, self.row_table)
            self.consumers: dict[int, StepConsumer] = {
                Wants.LOGITS: LogitsProcessing(config, device, tp, self.ops, self.row_table),
                Wants.PROMPT: PromptLogprobs(config, tp, lm_head),
                Wants.POOLING: Pooling(),
            }
        self.graphs: DecodeGraphs | None = None

    @property
    def rank(self) -> int:
        """This rank's number."""
        return self.tp.rank

    def reload_weights(self) -> None:
        """Fill the parameters again from the model's directory, or with the same random numbers."""
        config = self.config
        std = config.model_config.initializer_range
        self.has_lm_head = load_model(self.model, config.model, config.load_format, std)

    # ---- a step -------------------------------------------------------------------------------

    def call(self, method: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a method by its name, or a callable with this runner as its first argument."""
        if isinstance(method, str):
            return getattr(self, method)(*args, **kwargs)
        with self.on_device():
            return method(self, *args, **kwargs)

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
        plan = step.plan
        inputs = prefill_inputs(plan, self.sent_rows, self.block_size, self.device)
        self._update_row_table(inputs.row_updates)
        wants_all = plan.has(Wants.PROMPT)
        metadata = PrefillMetadata(
            slot_mapping=inputs.slot_mapping,
            block_tables=inputs.block_tables,
            cu_seqlens_q=inputs.cu_seqlens_q,
            cu_seqlens_k=inputs.cu_seqlens_k,
            max_seqlen_q=int(plan.lengths.max()),
            max_seqlen_k=int((plan.starts + plan.lengths).max()),
            last_tokens=None
            if wants_all
            else DecodeMetadata(
                slot_mapping=inputs.slot_mapping,
                block_tables=inputs.last_block_tables,
                context_lens=inputs.last_positions + 1,
                logits_indices=inputs.last_tokens,
            ),
        )
        hidden_states = self.model.model(inputs.token_ids, inputs.positions, metadata)
        if wants_all:
            self._give(Wants.PROMPT, step, hidden_states)
            hidden_states = hidden_states.index_select(0, inputs.last_tokens)
        if not len(inputs.rows):
            return  # no prompt is complete
        self._give(Wants.POOLING, step, hidden_states)
        if plan.all_want(Wants.POOLING):
            step.token_ids = inputs.rows  # any numbers: nobody reads them
            return
        logits = self.model.lm_head(hidden_states)
        step.token_ids = self.sampler(
            logits, inputs.rows, inputs.temperatures, inputs.seeds, inputs.last_positions
        )
        self._give(Wants.LOGITS, step, logits)

    def _execute_decode(self, step: LaunchedStep) -> None:
        plan = step.plan
        num_seqs = len(plan.rows)
        batch_size = self.graphs.padded_size(num_seqs) if self.graphs else num_seqs
        num_common_blocks = plan.num_common_blocks if self.ops.reads_common_blocks_once else 0
        batch = np.full(1 + batch_size, self.config.max_num_seqs, dtype=np.int32)
        batch[0] = num_common_blocks
        batch[1 : 1 + num_seqs] = plan.rows
        is_same_batch = np.array_equal(batch, self._uploaded_batch)
        if not is_same_batch or len(plan.updates):
            updates, new_batch = upload([plan.updates, batch], self.device)
            self._update_row_table(updates)
            self.decode_batch[: len(batch)].copy_(new_batch)
            self._uploaded_batch = batch
        if self.graphs:
            token_ids = self.graphs.replay(batch_size, num_common_blocks > 0)
        else:
            token_ids = self.decode(self.decode_rows[:batch_size], num_common_blocks > 0)
        step.token_ids = token_ids[:num_seqs]
        self._give(Wants.LOGITS, step, self.decode_logits[:num_seqs])

    def decode(self, rows: torch.Tensor, has_common_blocks: bool = False) -> torch.Tensor:
        """One decode step of `rows` [B], what a graph captures; returns token ids [B] int32.

        The logits are left in `decode_logits`.

        has_common_blocks: read the rows' `num_common_blocks` leading blocks once for all.
        """
        inputs = self.ops.gather_decode_inputs(self.row_table, rows, self.block_size)
        plan = self.ops.plan_decode(
            self.attentions[0].cache,
            inputs.block_tables,
            inputs.context_lens,
            self.decode_batch[:1] if has_common_blocks else None,
        )
        metadata = DecodeMetadata(
            inputs.slot_mapping, inputs.block_tables, inputs.context_lens, plan
        )
        hidden_states = self.model.model(inputs.input_ids, inputs.positions, metadata)
        logits = self.model.lm_head(hidden_states, out=self.decode_logits[: len(rows)])
        return self.sampler(logits, rows, inputs.temperatures, inputs.seeds, inputs.positions)

    def _update_row_table(self, updates: torch.Tensor) -> None:
        if len(updates):
            indices, values = updates.view(-1, 2).unbind(1)
            self.row_table.view(-1)[indices] = values

    # ---- set-up -------------------------------------------------------------------------------

    def _allocate_row_table(self) -> None:
        config = self.config
        row_width = config.row_width
        self.row_table = torch.zeros(
            (config.max_num_seqs + 1, row_width), dtype=torch.int32, device=self.device
        )
        # The host's copy of what plans have sent: never the token or the length, which steps write.
        self.sent_rows = np.zeros(self.row_table.shape, dtype=np.int32)
        # The number of leading blocks that the decode batch has in common, then its rows; graphs
        # read them here. Every row starts as padding.
        self.decode_batch = torch.full(
            (1 + config.max_num_seqs,), config.max_num_seqs, dtype=torch.int32, device=self.device
        )
        self.decode_batch[0] = 0
        self.decode_rows = self.decode_batch[1:]
        self.decode_logits = torch.empty(
            (config.max_num_seqs, len(self.model.lm_head.weight)),
            dtype=config.resolve_dtype(),
            device=self.device,
        )

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Give every attention layer a cache of `num_blocks` blocks."""
        self.num_kvcache_blocks = num_blocks
        specs = [attention.cache_spec for attention in self.attentions]
        caches, self.kv_cache, self.kv_scales = kv_cache.allocate(
            specs, num_blocks, self.block_size, self.device
        )
        for attention, cache in zip(self.attentions, caches, strict=True):
            attention.cache = cache

    def on_device(self) -> AbstractContextManager[object]:
        """Within it this rank's GPU is the current one."""
        return torch.cuda.device(self.device) if self.is_cuda else nullcontext()

    def capture_graphs(self) -> None:
        """Capture the decode steps, where CUDA graphs are used; on all ranks together.

        Graphs hold the addresses of weights and cache. No sequence may have a row.
        """
        config = self.config
        if self.is_cuda and self.ops.supports_cuda_graphs and not config.enforce_eager:
            self._uploaded_batch = np.empty(0, dtype=np.int32)
            with self.on_device():
                self.decode_batch.fill_(config.max_num_seqs)  # every row is padding
                self.decode_batch[0] = 0
                self.graphs = DecodeGraphs(config.max_num_seqs, self.decode_rows, self.decode)

    def drop_graphs(self) -> None:
        """Run without CUDA graphs from now on."""
        self.graphs = None

    def close(self) -> None:
        """Drop the graphs, the cache and the weights."""
        self.drop_graphs()
        for attention in self.attentions:
            del attention.cache
        self.attentions = []
        del self.model, self.kv_cache, self.kv_scales, self.row_table
        del self.decode_batch, self.decode_rows, self.decode_logits
        self.consumers.clear()
        del self.sampler
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
