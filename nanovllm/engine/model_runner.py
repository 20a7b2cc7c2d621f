"""One rank's model, KV cache and row table, and how a step's plan runs on them.

`run` is the whole step; `launch` is its first half, which does not wait for the device.
"""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine import kv_cache
from nanovllm.engine.copies import DownloadRing, UploadRing
from nanovllm.engine.cuda_graphs import DecodeGraphs
from nanovllm.engine.launched_step import LaunchedStep, StepExtras
from nanovllm.engine.prefill_inputs import PrefillInputs, prefill_inputs
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_plan import NONE, POOLED, PlanBuilder, StepPlan
from nanovllm.errors import ArgumentError
from nanovllm.kernels.ops import DecodeInputs, Ops, select_ops
from nanovllm.layers.attention import (
    Attention,
    DecodeMetadata,
    LastTokensMetadata,
    PrefillMetadata,
)
from nanovllm.layers.context import ModelContext
from nanovllm.models.loader import load_model
from nanovllm.models.registry import model_class
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.parallel.workers import WorkerGroup
from nanovllm.sampling.pooler import HiddenStatesDownload
from nanovllm.sampling.sampler import ApartSampler


def choose_ops(config: Config, device: torch.device) -> Ops:
    """The operations of the configured backend; ArgumentError if it cannot run here."""
    try:
        return select_ops(
            config.attention_backend,
            device,
            config.resolve_dtype(),
            config.model_config.head_dim,
            compile_torch_ops=not config.enforce_eager,
            kv_cache_dtype=config.resolve_kv_cache_dtype(),
        )
    except ValueError as error:
        raise ArgumentError(str(error)) from error


class ModelRunner:
    """Executes step plans on one rank.

    All device work goes to the current stream, in the order of the plans.

    Args:
        config: the engine's configuration, the same on every rank.
        device: this rank's device.
        tp: this rank's place among the ranks.
        agree: exchanges this rank's number of KV blocks for the smallest of all ranks.
        workers: the other ranks, which rank 0 tells of each plan; None on every other rank.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        tp: TensorParallel,
        agree: Callable[[int], int] = int,
        workers: WorkerGroup | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.tp = tp
        self.workers = workers
        self.block_size = config.kvcache_block_size
        self.is_cuda = device.type == "cuda"
        self.profiler: tuple[torch.profiler.profile, str] | None = None  # and where its trace goes
        self._uploaded_batch: np.ndarray = np.empty(0, dtype=np.int32)  # in decode_batch
        self._seqs: list[Sequence] = []  # of the step that is being launched; rank 0 only
        self._extras = StepExtras()
        self.is_mid_step = False  # after a failed launch: the ranks are out of step
        model_config = config.model_config
        self.ops = choose_ops(config, device)
        self.apart_sampler = ApartSampler(config, device, tp, self.ops)
        with self._on_device():
            free_at_start = torch.cuda.mem_get_info(device)[0] if self.is_cuda else 0
            context = ModelContext(
                self.ops,
                tp,
                config.resolve_dtype(),
                device,
                config.max_model_len,
                config.fp8_scales,
            )
            self.model = model_class(model_config.architectures)(model_config, context)
            self.reload_weights()
            self._attentions = [m for m in self.model.modules() if isinstance(m, Attention)]
            self._allocate_row_table()
            self.num_kvcache_blocks = agree(self._decide_num_blocks(free_at_start))
            self._allocate_kv_cache(self.num_kvcache_blocks)
            self.graphs: DecodeGraphs | None = None
            self.capture_graphs()

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
        with self._on_device():
            return method(self, *args, **kwargs)

    def run(self, seqs: list[Sequence], is_prefill: bool) -> list[int | None]:
        """Compute one step and wait for its tokens (None where a prompt is not complete yet)."""
        return self.launch(seqs, is_prefill).wait()

    def launch(self, seqs: list[Sequence], is_prefill: bool) -> LaunchedStep:
        """Start one step on every rank; does not wait for the device."""
        start = perf_counter()
        self.is_mid_step = False
        plan = self.plan_builder.build(seqs, is_prefill)
        packed = plan.pack() if self.workers is not None else None
        self.is_mid_step = True
        if packed is not None and self.workers is not None:
            self.workers.send(packed)
        self._seqs, self._extras = seqs, StepExtras()
        token_ids = self.execute(plan)
        with self._on_device():
            download = self.downloads.download(token_ids) if len(token_ids) else None
        self.is_mid_step = False
        return LaunchedStep(seqs, plan, download, self._extras, perf_counter() - start)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> torch.Tensor:
        """Run a plan on this rank; [number of sampled sequences] int32 token ids on the device."""
        self.sent_rows.reshape(-1)[plan.updates[:, 0]] = plan.updates[:, 1]
        with self._on_device():
            run = self._execute_prefill if plan.is_prefill else self._execute_decode
            token_ids, logits = run(plan)
            if len(plan.apart):
                self.apart_sampler.sample(
                    plan, self._seqs, logits, token_ids, self.row_table, self._extras
                )
            return token_ids

    def _execute_prefill(self, plan: StepPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """The sampled token ids [N] and the logits [N, V] that they were sampled from."""
        inputs = prefill_inputs(plan, self.sent_rows, self.block_size, self.uploads.upload)
        self._update_row_table(inputs.row_updates)
        wants_prompt_logits = bool(plan.prompt_logits.any())
        metadata = PrefillMetadata(
            slot_mapping=inputs.slot_mapping,
            block_tables=inputs.block_tables,
            cu_seqlens_q=inputs.cu_seqlens_q,
            cu_seqlens_k=inputs.cu_seqlens_k,
            max_seqlen_q=int(plan.lengths.max()),
            max_seqlen_k=int((plan.starts + plan.lengths).max()),
            last_layer=None
            if wants_prompt_logits
            else LastTokensMetadata(
                slot_mapping=inputs.slot_mapping,
                block_tables=inputs.last_block_tables,
                context_lens=inputs.last_positions + 1,
                last_tokens=inputs.last_tokens,
            ),
        )
        hidden_states = self.model.model(inputs.token_ids, inputs.positions, metadata)
        if wants_prompt_logits:
            self.apart_sampler.compute_prompt_logprobs(
                plan, self._seqs, hidden_states, self.model.lm_head, self._extras
            )
            hidden_states = hidden_states.index_select(0, inputs.last_tokens)
        if not len(inputs.rows):
            return inputs.token_ids[:0], hidden_states
        if (plan.samples == POOLED).any():
            if self.tp.rank == 0:
                seqs = [seq for seq in self._seqs if seq.is_prefilled]
                self._extras.hidden_states = HiddenStatesDownload(seqs, hidden_states)
            if not (plan.samples == 1).any():
                return inputs.rows, hidden_states  # any numbers do for tokens: nobody reads them
        logits = self.model.lm_head(hidden_states)
        token_ids = self._sample(
            logits, inputs.rows, inputs.temperatures, inputs.seeds, inputs.last_positions
        )
        return token_ids, logits

    def _execute_decode(self, plan: StepPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """The sampled token ids [B] and the logits [B, V] that they were sampled from."""
        num_seqs = len(plan.rows)
        batch_size = self.graphs.padded_size(num_seqs) if self.graphs else num_seqs
        num_common_blocks = plan.num_common_blocks if self.ops.reads_common_blocks_once else 0
        batch = np.full(1 + batch_size, self.config.max_num_seqs, dtype=np.int32)
        batch[0] = num_common_blocks
        batch[1 : 1 + num_seqs] = plan.rows
        is_same_batch = np.array_equal(batch, self._uploaded_batch)
        if not is_same_batch or len(plan.updates):
            updates, new_batch = self.uploads.upload([plan.updates, batch])
            self._update_row_table(updates)
            self.decode_batch[: len(batch)].copy_(new_batch)
            self._uploaded_batch = batch
        if self.graphs:
            token_ids = self.graphs.replay(batch_size, num_common_blocks > 0)
        else:
            token_ids = self._decode(self.decode_rows[:batch_size], num_common_blocks > 0)
        return token_ids[:num_seqs], self.decode_logits[:num_seqs]

    def _decode(self, rows: torch.Tensor, has_common_blocks: bool = False) -> torch.Tensor:
        """One decode step of `rows` [B], what a graph captures; returns token ids [B] int32.

        The logits are left in `decode_logits`.

        has_common_blocks: read the rows' `num_common_blocks` leading blocks once for all.
        """
        inputs: DecodeInputs = self.ops.gather_decode_inputs(self.row_table, rows, self.block_size)
        plan = self.ops.plan_decode(
            self._attentions[0].key_cache,
            inputs.block_tables,
            inputs.context_lens,
            self.decode_batch[:1] if has_common_blocks else None,
        )
        metadata = DecodeMetadata(
            inputs.slot_mapping, inputs.block_tables, inputs.context_lens, plan
        )
        hidden_states = self.model.model(inputs.input_ids, inputs.positions, metadata)
        logits = self.model.lm_head(hidden_states, out=self.decode_logits[: len(rows)])
        return self._sample(logits, rows, inputs.temperatures, inputs.seeds, inputs.positions)

    def _sample(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        temperatures: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Sample a token for each row and enter it in the row table; all arguments are [B, ...].

        Rows that are sampled apart, later in the same step, get any token here.
        """
        lm_head = self.model.lm_head
        scores, token_ids = self.ops.sample(
            logits,
            temperatures,
            seeds,
            positions,
            lm_head.first_token_id,
            lm_head.vocab_size,
        )
        token_ids = self.tp.argmax(scores, token_ids)
        self.ops.write_back(self.row_table, rows, token_ids, positions)
        return token_ids

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
        self.plan_builder = PlanBuilder(config.max_num_seqs, row_width)
        capacity = PrefillInputs.max_bytes(
            config.max_num_seqs, config.max_num_batched_tokens, row_width
        )
        self.uploads = UploadRing(capacity, self.device)
        self.downloads = DownloadRing(config.max_num_seqs, self.device)
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

    def _allocate_kv_cache(self, num_blocks: int) -> None:
        self.kv_cache, self.kv_scales = kv_cache.allocate(
            self.config, self.tp.size, num_blocks, self.device
        )
        for attention, key, value in zip(self._attentions, *self.kv_cache, strict=True):
            attention.key_cache, attention.value_cache = key, value
        if self.kv_scales is not None:
            for attention, key, value in zip(self._attentions, *self.kv_scales, strict=True):
                attention.key_scales, attention.value_scales = key, value

    def _decide_num_blocks(self, free_at_start: int) -> int:
        available = None
        if self.is_cuda:
            peak_bytes = self._warm_up()
            available = kv_cache.available_gpu_bytes(
                self.device, self.config.gpu_memory_utilization, free_at_start, peak_bytes
            )
        return kv_cache.decide_num_blocks(self.config, self.tp.size, available)

    def _warm_up(self) -> int:
        """Run the largest prefill and decode steps once, which builds the kernels.

        Returns the peak of the activations' bytes.
        """
        config = self.config
        self._allocate_kv_cache(num_blocks=1)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        length = min(config.max_num_batched_tokens // num_seqs, config.max_model_len)
        # Every block table entry is 0, so all sequences read and write the one block there is.
        sequences = np.arange(num_seqs, dtype=np.int32)
        ones = np.ones(num_seqs, dtype=np.int32)
        self.execute(
            StepPlan(
                is_prefill=True,
                rows=sequences,
                updates=np.empty((0, 2), dtype=np.int32),
                token_ids=np.zeros(num_seqs * length, dtype=np.int32),
                starts=0 * ones,
                lengths=length * ones,
                apart=NONE,
                shared=length * ones,
                samples=ones,
                prompt_logits=0 * ones,
            )
        )
        torch.cuda.synchronize(self.device)
        self._decode_padding(config.max_num_seqs)
        if self.ops.reads_common_blocks_once:
            self._decode_padding(config.max_num_seqs, has_common_blocks=True)
        torch.cuda.synchronize(self.device)
        self.row_table.zero_()
        return torch.cuda.max_memory_allocated(self.device) - before

    @torch.inference_mode()
    def _decode_padding(self, batch_size: int, has_common_blocks: bool = False) -> None:
        self._decode(self.decode_rows[:batch_size], has_common_blocks)

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.is_cuda else nullcontext()

    def capture_graphs(self) -> None:
        """Capture the decode steps, where CUDA graphs are used; on all ranks together.

        Graphs hold the addresses of weights and cache. No sequence may have a row.
        """
        config = self.config
        if self.is_cuda and self.ops.supports_cuda_graphs and not config.enforce_eager:
            self._uploaded_batch = np.empty(0, dtype=np.int32)
            with self._on_device():
                self.decode_batch.fill_(config.max_num_seqs)  # every row is padding
                self.decode_batch[0] = 0
                self.graphs = DecodeGraphs(config.max_num_seqs, self.decode_rows, self._decode)

    def drop_graphs(self) -> None:
        """Run without CUDA graphs from now on."""
        self.graphs = None

    def close(self) -> None:
        """Drop the graphs, the cache and the weights."""
        self.drop_graphs()
        for attention in self._attentions:
            del attention.key_cache, attention.value_cache
            attention.key_scales = attention.value_scales = None
        self._attentions = []
        del self.model, self.kv_cache, self.kv_scales, self.row_table, self.uploads
        del self.decode_batch, self.decode_rows, self.downloads, self.decode_logits
        self.apart_sampler.release()
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
