"""LoRA adapters for a model: which layers they change, and each rank's part of their weights."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.config import Config
from nanovllm.errors import ArgumentError
from nanovllm.kernels import row_state
from nanovllm.layers.context import ModelContext
from nanovllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from nanovllm.layers.lora import (
    AdapterEmbedding,
    AdapterHead,
    AdapterLayer,
    AdapterStep,
    AnyAdapterLayer,
    Term,
    slot_rank,
)
from nanovllm.layers.weights import Shard
from nanovllm.models.base import CausalLM
from nanovllm.models.heads import head_of
from nanovllm.models.loader import module_name, shortened
from nanovllm.models.lora_checkpoint import LoRACheckpoint

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"  # as checkpoints name these modules


class Target(NamedTuple):
    """A projection that adapters may change, of a module of the checkpoint."""

    layer: int  # which of `AdapterModel.layers`
    projection: int  # of the layer
    shard: Shard
    shape: tuple[int, int]  # of the whole weight: an adapter's B has as many rows, A columns
    is_embedding: bool = False


class AdapterModel:
    """The adapters of one rank: in the slots of its layers, and ready for them in host memory.

    Args:
        model: with its weights loaded.
        config: the engine's configuration.
        context: what the model was built with.
        row_table: tells each row's adapter, see `row_state.ADAPTER`.

    Attributes:
        step: tells the layers which adapters the tokens of a step have.
        layers: those that adapters may change.
    """

    def __init__(
        self, model: CausalLM, config: Config, context: ModelContext, row_table: Tensor
    ) -> None:
        self.config, self._context = config, context
        self.step = AdapterStep(context.ops, config.max_loras, row_table[:, row_state.ADAPTER])
        model.model.register_forward_pre_hook(self.step.begin)
        self._model = model
        self.layers: list[AnyAdapterLayer] = []
        self._targets: dict[str, list[Target]] = {}
        rank = slot_rank(config.max_lora_rank)
        for path, module in model.named_modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                self._note_targets(path, module)
                self.layers.append(AdapterLayer(module, self.step, rank, context))
        self._note_vocabulary(rank)
        self._on_host: OrderedDict[int, list[Term]] = OrderedDict()  # the last used one last

    def _note_targets(self, path: str, linear: ColumnParallelLinear | RowParallelLinear) -> None:
        for projection, (key, shard) in enumerate(linear.shards.items()):
            name = module_name(self._model, path, key, shard)
            num_rows, num_columns = shard.full_shape
            target = Target(len(self.layers), projection, shard, (num_rows, num_columns))
            self._targets.setdefault(name, []).append(target)

    def _note_vocabulary(self, rank: int) -> None:
        """The embedding and the LM head, which may have one weight."""
        model, number = self._model, len(self.layers)
        embedding, head, step = model.model.embed_tokens, model.lm_head, self.step
        [shard] = embedding.weight.shards.values()
        vocab_size, hidden_size = shard.full_shape
        self.layers += [
            AdapterEmbedding(embedding, vocab_size, step, rank, self._context),
            AdapterHead(head, step, rank, self._context),
        ]
        shape = hidden_size, vocab_size
        self._targets[EMBEDDING] = [Target(number, 0, shard, shape, is_embedding=True)]
        if head_of(model) is None:
            [shard] = head.weight.shards.values()
            self._targets[HEAD] = [Target(number + 1, 0, shard, (vocab_size, hidden_size))]

    def check(self, path: str) -> None:
        """ArgumentError if the adapter in this folder does not fit; reads no weights."""
        checkpoint = LoRACheckpoint(path)
        names = {self._known_name(module): module for module in checkpoint.modules}
        if unknown := sorted(module for name, module in names.items() if name not in self._targets):
            raise ArgumentError(
                f"{checkpoint.where} changes modules that take no adapter in this model: "
                f"{shortened(unknown)}"
            )
        for name, own_name in names.items():
            module = checkpoint.modules[own_name]
            if module.rank > self.config.max_lora_rank:
                raise ArgumentError(
                    f"{checkpoint.where}: the rank of {own_name} is {module.rank}, and "
                    f"max_lora_rank is {self.config.max_lora_rank}"
                )
            target = self._targets[name][0]
            num_rows, num_columns = target.shape
            shapes = checkpoint.shape(module.a), checkpoint.shape(module.b)
            fitting = (module.rank, num_columns), (num_rows, module.rank)
            if module.is_embedding != target.is_embedding or shapes != fitting:
                raise ArgumentError(
                    f"{checkpoint.where}: {own_name} has A {list(shapes[0])} and B "
                    f"{list(shapes[1])}; the model asks for [r, {num_columns}] and [{num_rows}, r]"
                )

        for own_name in checkpoint.base_weights:
            self._check_base(checkpoint, own_name)

    def _check_base(self, checkpoint: LoRACheckpoint, own_name: str) -> None:
        """ArgumentError if an adapter was trained on another embedding or LM head."""
        name = self._known_name(own_name)
        weights = {EMBEDDING: self._model.model.embed_tokens.weight}
        if HEAD in self._targets:
            weights[HEAD] = self._model.lm_head.weight
        if name in weights:
            weight, shard = weights[name], self._targets[name][0].shard
            whole = checkpoint.read_base(own_name)
            own = weight[shard.target].cpu()
            if whole.shape == shard.full_shape and torch.equal(
                whole[shard.source].to(own.dtype), own
            ):
                return
        raise ArgumentError(
            f"{checkpoint.where} has whole weights of {own_name}, which are not this model's"
        )

    def unallocated(self, path: str) -> list[int]:
        """The layers whose slots take no memory yet, of those that an adapter changes."""
        names = map(self._known_name, LoRACheckpoint(path).modules)
        layers = {target.layer for name in names for target in self._targets[name]}
        return sorted(number for number in layers if not self.layers[number].is_allocated)

    def allocate(self, layers: Iterable[int]) -> None:
        """Take memory for slots. CUDA graphs of steps with adapters are void then."""
        for number in layers:
            layer = self.layers[number]
            assert not isinstance(layer, AdapterLayer)
            layer.allocate()

    def _known_name(self, module: str) -> str:
        """A module's name in the checkpoint; adapters of embedding models have no "model."."""
        return module if module in self._targets else f"model.{module}"

    def load(self, key: int, path: str, slot: int | None, pinned: Iterable[int] = ()) -> bool:
        """Have an adapter in host memory, and in a slot if one is given.

        Args:
            key: names it, and what is in the folder now.
            path: its folder, which has passed `check`.
            slot: where it goes. Steps launched before still read what was there.
            pinned: keys of adapters that leave host memory last.

        Returns:
            Whether it was read from its folder.
        """
        is_new = key not in self._on_host
        if is_new:
            terms = self._read(path)
            self._make_room(set(pinned))
            self._on_host[key] = terms
        self._on_host.move_to_end(key)
        if slot is not None:
            of_layers: dict[int, list[Term]] = {}
            for term in self._on_host[key]:
                of_layers.setdefault(term.layer, []).append(term)
            for number, layer in enumerate(self.layers):
                layer.clear(slot)
                layer.fill(slot, of_layers.get(number, ()))
        return is_new

    def drop(self, key: int) -> None:
        """Forget an adapter in host memory; its slot stays as it is."""
        self._on_host.pop(key, None)

    def loaded(self) -> set[int]:
        """The keys of the adapters in host memory."""
        return set(self._on_host)

    def _make_room(self, pinned: set[int]) -> None:
        """Drop what was used longest ago, so that one more fits."""
        limit = self.config.max_cpu_loras or self.config.max_loras
        while len(self._on_host) >= limit:
            oldest = next(iter(self._on_host))
            self.drop(next((i for i in self._on_host if i not in pinned), oldest))

    def _read(self, path: str) -> list[Term]:
        """This rank's part of an adapter, in the dtype of the slots and in one piece of memory."""
        checkpoint = LoRACheckpoint(path)
        tensors = checkpoint.read()
        parts = []
        for own_name, module in checkpoint.modules.items():
            for layer, projection, shard, *_ in self._targets[self._known_name(own_name)]:
                a, b = tensors[module.a], tensors[module.b].float() * module.scale
                if not module.is_embedding:  # whose slots are whole on every rank
                    rows, columns = shard.source
                    a, b = a[:, columns], shard.in_order(b[rows])
                parts.append((layer, projection, a, b))
        sizes = [tensor.numel() for *_, a, b in parts for tensor in (a, b)]
        is_cuda = self._context.device.type == "cuda"
        memory = torch.empty(sum(sizes), dtype=self._context.dtype, pin_memory=is_cuda)
        places = iter(memory.split(sizes))
        return [
            Term(layer, projection, _stored(a, next(places)), _stored(b, next(places)))
            for layer, projection, a, b in parts
        ]


def _stored(tensor: Tensor, memory: Tensor) -> Tensor:
    """`tensor` in flat memory of another dtype."""
    return memory.view(tensor.shape).copy_(tensor)
