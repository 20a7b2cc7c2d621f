"""What one rank has: its part of the model, the KV cache, the row table and a decode batch."""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine import kv_cache, state_cache
from nanovllm.engine.cache_groups import num_group_blocks
from nanovllm.kernels.ops import Ops
from nanovllm.layers.attention import Attention
from nanovllm.layers.context import ModelContext
from nanovllm.layers.gated_delta_net import GatedDeltaNet
from nanovllm.models.base import CausalLM
from nanovllm.models.families import load_weights, new_model
from nanovllm.models.lora import AdapterModel
from nanovllm.models.weight_offload import offload_weights
from nanovllm.parallel.tensor_parallel import TensorParallel


class RankState:
    """The memory of one rank, which `ModelRunner` computes on.

    Args:
        config: the engine's configuration, the same on every rank.
        device: this rank's device.
        tp: this rank's place among the ranks.
        ops: the backend.

    Attributes:
        model: this rank's slice of the model.
        offload: has the weights that wait in host memory; None: all are on the device.
        adapters: LoRA adapters; None: the engine takes none.
        states: the memory of all recurrent states, of every row of the row table.
        row_table: a row for each running sequence, see `kernels.row_state`.
        sent_rows: the host's copy of what plans have sent to it: never the token or the length,
            which steps write.
        attentions: the attention layers.
        group_layers: one of them for each cache group.
        has_windows: whether any has a window that a sequence can exceed.
        reads_common_blocks_once: whether decode steps read common leading tokens once for all.
        decode_batch: the number of leading tokens that a decode batch has in common, then its rows;
            CUDA graphs read them here.
        decode_rows: the rows of it.
        decode_logits: [max_num_seqs, V] where decode steps leave their logits.
    """

    def __init__(self, config: Config, device: torch.device, tp: TensorParallel, ops: Ops) -> None:
        self.config = config
        self.device = device
        self.tp = tp
        self.block_size = config.kvcache_block_size
        self.is_cuda = device.type == "cuda"
        self.profiler: tuple[torch.profiler.profile, str] | None = None  # and where its trace goes
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
                config.weight_format,
            )
            self.model = new_model(config, context)
            self.offload = offload_weights(self.model, config, device)
            self.reload_weights()
            self.attentions = [m for m in self.model.modules() if isinstance(m, Attention)]
            self._assign_cache_groups()
            self._allocate_row_table()
            self._allocate_states()
            self.adapters: AdapterModel | None = None
            if config.enable_lora and isinstance(self.model, CausalLM):
                self.adapters = AdapterModel(self.model, config, context, self.row_table)

    @property
    def rank(self) -> int:
        """This rank's number."""
        return self.tp.rank

    def reload_weights(self) -> None:
        """Fill the parameters again from the model's directory, or with the same random numbers."""
        if self.offload is not None:
            self.offload.finish_copies()
        self.has_lm_head = load_weights(self.model, self.config)

    def call(
        self, method: str | Callable[..., object], /, *args: object, **kwargs: object
    ) -> object:
        """Call a method by its name, or a callable with this runner as its first argument."""
        if isinstance(method, str):
            return getattr(self, method)(*args, **kwargs)
        with self.on_device():
            return method(self, *args, **kwargs)

    def _assign_cache_groups(self) -> None:
        """Tell each attention layer its cache group; a window that nothing exceeds is none."""
        windows = self.config.cache_windows
        for attention in self.attentions:
            attention.window = self.config.cache_window(attention.window)
            of_cache = self.config.cache_window(attention.cache_spec.window)
            attention.cache_group = windows.index(of_cache)
        by_group = {a.cache_group: a for a in reversed(self.attentions)}
        self.group_layers = [by_group[group] for group in range(len(windows))]
        self.has_windows = windows != (None,)
        # Behind a window a table's entries are stale: equal ones need not be common blocks.
        self.reads_common_blocks_once = self.ops.reads_common_blocks_once and windows[0] is None

    def _allocate_row_table(self) -> None:
        config = self.config
        row_width = config.row_width
        self.row_table = torch.zeros(
            (config.max_num_seqs + 1, row_width), dtype=torch.int32, device=self.device
        )
        # The host's copy of what plans have sent: never the token or the length, which steps write.
        self.sent_rows = np.zeros(self.row_table.shape, dtype=np.int32)
        # The number of leading tokens that the decode batch has in common, then its rows; graphs
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

    def _allocate_states(self) -> None:
        """Give every gated delta net its state for each row of the row table."""
        delta_nets = [m for m in self.model.modules() if isinstance(m, GatedDeltaNet)]
        states = state_cache.allocate(
            [delta_net.state_spec for delta_net in delta_nets],
            self.config.max_num_seqs,
            self.device,
        )
        for delta_net, state in zip(delta_nets, states, strict=True):
            delta_net.state = state
        self.states = [memory for state in states for memory in state]

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Give every attention layer a cache, of `num_blocks` blocks in the first cache group."""
        self.num_kvcache_blocks = num_blocks
        specs = [attention.cache_spec for attention in self.attentions]
        of_groups = num_group_blocks(self.config, num_blocks)
        of_layers = [of_groups[attention.cache_group] for attention in self.attentions]
        caches, self.kv_cache, self.kv_scales = kv_cache.allocate(
            specs, of_layers, self.block_size, self.device
        )
        for attention, cache in zip(self.attentions, caches, strict=True):
            attention.cache = cache

    def on_device(self) -> AbstractContextManager[object]:
        """Within it this rank's GPU is the current one."""
        return torch.cuda.device(self.device) if self.is_cuda else nullcontext()

    def close(self) -> None:
        """Drop the cache and the weights."""
        for attention in self.attentions:
            del attention.cache
        self.attentions, self.group_layers = [], []
        if self.offload is not None:
            self.offload.finish_copies()
            self.offload = None
        del self.model, self.adapters, self.states, self.kv_cache, self.kv_scales, self.row_table
        del self.decode_batch, self.decode_rows, self.decode_logits
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
