"""Reads checkpoints with quantised weights: packed where the model keeps them so, else as numbers.

The layouts are in the files of the libraries: awq_checkpoint, gptq_checkpoint, compressed_tensors
(with fp8) and bnb_checkpoint.
"""

from collections.abc import Collection, Iterable
from typing import TypeGuard

import torch

from nanovllm.layers.fp8_weights import blocks_of
from nanovllm.models.awq_checkpoint import AwqWeight
from nanovllm.models.bnb_checkpoint import SCALES, STATE, EightBitWeight, FourBitWeight
from nanovllm.models.checkpoint import SafetensorsCheckpoint
from nanovllm.models.compressed_tensors import Fp8Weight, IntQuantized, PackQuantized
from nanovllm.models.fp8_checkpoint import SCALES_SUFFIX
from nanovllm.models.gptq_checkpoint import GptqWeight
from nanovllm.models.quantization_config import Quantization
from nanovllm.models.quantized_weight import FLOATS, PackedNumbers, QuantizedWeight

WEIGHT, SCALE, WORDS, PACKED = ".weight", ".weight_scale", ".qweight", ".weight_packed"
KINDS = ("numbers", "scales", "zeros", "order")  # see `WeightFormat`
# Scales of an fp8 KV cache and of activations: the user asked to leave the cache as it is.
OF_CACHE = (
    *(".k_scale", ".v_scale", ".kv_scale", ".q_scale", ".prob_scale"),
    *("k_proj.output_scale", "v_proj.output_scale"),
)


class QuantizedCheckpoint:
    """A checkpoint whose quantised weights read as the model's parameters want them.

    A weight that the model packs has the tensors that `WeightFormat` names. One that it keeps in
    fp8 is "x.weight" with a scale for each row, "x.weight_scale_inv" [N] float32. All others read
    as "x.weight" [N, K] in float32. What fp8 activations and caches are scaled by is left out, as
    are biases of zeros that the model does not have.

    Args:
        checkpoint: the files.
        expected: the tensors that the model has.
        quantization: what config.json says of the weights.

    Raises:
        ArgumentError: the tensors of a weight are incomplete or do not fit each other.
    """

    def __init__(
        self,
        checkpoint: SafetensorsCheckpoint,
        expected: Collection[str],
        quantization: Quantization,
    ) -> None:
        self._checkpoint = checkpoint
        self._form = quantization.weight_format
        self._shown: dict[str, tuple[QuantizedWeight, str]] = {}
        weights = quantized_weights(checkpoint, quantization)
        names = checkpoint.names()
        self._renamed = _block_scales(checkpoint, names, weights)
        hidden = {*self._renamed.values()}
        if quantization.method in ("compressed-tensors", "fp8"):
            hidden |= {name for name in names if name.endswith((".input_scale", *OF_CACHE))}
        for module, weight in weights.items():
            hidden |= {*weight.tensors}
            if f"{module}.numbers" in expected:
                kinds = [kind for kind in KINDS if f"{module}.{kind}" in expected]
                self._shown |= {f"{module}.{kind}": (weight, kind) for kind in kinds}
                continue
            scales = module + WEIGHT + SCALES_SUFFIX
            is_fp8 = scales in expected and isinstance(weight, Fp8Weight)
            self._shown[module + WEIGHT] = weight, "fp8" if is_fp8 else "weight"
            if is_fp8:
                self._shown[scales] = weight, "row scales"
            bias = f"{module}.bias"
            if bias in names and bias not in expected and self._is_zero(bias):
                hidden.add(bias)
        self._names = names - hidden | self._shown.keys() | self._renamed.keys()

    def names(self) -> set[str]:
        """See `Checkpoint`."""
        return set(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        if name not in self._shown:
            return self._checkpoint.shape(self._renamed.get(name, name))
        weight, kind = self._shown[name]
        if kind == "row scales":
            return weight.shape[:1]
        return weight.packed_shape(kind) if _is_packed(weight, kind) else weight.shape

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """See `Checkpoint`."""
        if name not in self._shown:
            return self._checkpoint.read(self._renamed.get(name, name), index)
        weight, kind = self._shown[name]
        if _is_packed(weight, kind):
            assert self._form is not None
            return weight.packed(kind, self._form, index)
        if isinstance(weight, Fp8Weight) and kind == "row scales":
            return weight.row_scales(index[0])
        rows, columns = index
        if isinstance(weight, Fp8Weight) and kind == "fp8":
            return weight.fp8_values(rows, columns)
        return weight.values(rows, columns)

    def _is_zero(self, name: str) -> bool:
        everything = tuple(slice(0, size) for size in self._checkpoint.shape(name))
        return not bool(self._checkpoint.read(name, everything).any())


def quantized_weights(
    checkpoint: SafetensorsCheckpoint, quantization: Quantization
) -> dict[str, QuantizedWeight]:
    """The quantised weights by the names of their modules; not those with scales for blocks."""
    weights: dict[str, QuantizedWeight] = {}
    method, names = quantization.method, checkpoint.names()
    for name in sorted(names):
        if method == "awq" and name.endswith(WORDS):
            module = name.removesuffix(WORDS)
            weights[module] = AwqWeight(checkpoint, module, quantization)
        elif method == "gptq" and name.endswith(WORDS):
            module = name.removesuffix(WORDS)
            weights[module] = GptqWeight(checkpoint, module, quantization)
        elif method == "compressed-tensors" and name.endswith(PACKED):
            module = name.removesuffix(PACKED)
            weights[module] = PackQuantized(checkpoint, module)
        elif method == "bitsandbytes" and f".{STATE}" in name:
            module = name.rpartition(f".{STATE}")[0]
            weights[module] = FourBitWeight(checkpoint, module)
        elif method == "bitsandbytes" and name.endswith(f".{SCALES}"):
            module = name.removesuffix(f".{SCALES}")
            weights[module] = EightBitWeight(checkpoint, module)
        elif name.endswith((SCALE, SCALE + "_inv")):
            module = name.removesuffix("_inv").removesuffix(SCALE)
            kind = checkpoint.dtype(module + WEIGHT) if module + WEIGHT in names else ""
            if kind == "I8" and method == "compressed-tensors":
                weights[module] = IntQuantized(checkpoint, module)
            elif kind == "F8_E4M3":
                by_blocks = quantization.fp8_scales == "blocks"
                if not _has_blocks(checkpoint, module, name, by_blocks):
                    weights[module] = Fp8Weight(checkpoint, module)
    return weights


def unconverted_modules(
    directory: str, quantization: Quantization, merged: Iterable[Collection[str]]
) -> set[str]:
    """The modules that the files do not have as `quantization` says of most.

    Args:
        directory: of the files.
        quantization: what config.json says of the weights.
        merged: names of modules that the model multiplies together. They need one order of their
            columns.
    """
    merged = [*merged]
    if not merged:  # the model keeps no weight as it is stored
        return set()
    checkpoint = SafetensorsCheckpoint(directory)
    weights = quantized_weights(checkpoint, quantization)
    names, form = checkpoint.names(), quantization.weight_format

    def is_converted(module: str) -> bool:
        weight = weights.get(module)
        if form is not None:
            return isinstance(weight, PackedNumbers) and weight.fits(form)
        if quantization.fp8_scales == "channels":
            return isinstance(weight, Fp8Weight)
        name = module + WEIGHT
        return weight is None and name in names and checkpoint.dtype(name) == "F8_E4M3"

    found = set()
    for modules in merged:
        if form is not None and form.has_order and all(map(is_converted, modules)):
            orders = [_order_of(weights[module]) for module in modules]
            if not all(torch.equal(order, orders[0]) for order in orders):
                found |= {*modules}
        found |= {module for module in modules if not is_converted(module)}
    return found


def _order_of(weight: QuantizedWeight) -> torch.Tensor:
    assert isinstance(weight, PackedNumbers)
    return weight.order()


def _is_packed(weight: QuantizedWeight, kind: str) -> TypeGuard[PackedNumbers]:
    return isinstance(weight, PackedNumbers) and kind in KINDS


def _has_blocks(
    checkpoint: SafetensorsCheckpoint, module: str, scales: str, by_blocks: bool
) -> bool:
    """Whether an fp8 weight has a scale for each block, which `fp8_checkpoint` reads.

    by_blocks: whether one scale [1, 1] is that of a block.
    """
    weight, found = checkpoint.shape(module + WEIGHT), checkpoint.shape(scales, FLOATS)
    grid = tuple(blocks_of(slice(0, size)).stop for size in weight)
    is_one = found == (1, 1) and not by_blocks
    return len(found) == 2 and found == grid and found != (weight[0], 1) and not is_one


def _block_scales(
    checkpoint: SafetensorsCheckpoint, names: set[str], weights: dict[str, QuantizedWeight]
) -> dict[str, str]:
    """Of scales of blocks "x.weight_scale_inv" -> compressed-tensors' name, "x.weight_scale"."""
    return {
        name + "_inv": name
        for name in names
        if name.endswith(SCALE)
        and (module := name.removesuffix(SCALE)) not in weights
        and module + WEIGHT in names
        and checkpoint.dtype(module + WEIGHT) == "F8_E4M3"
    }
