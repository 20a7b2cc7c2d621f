"""Fills a model's parameters from safetensors files or with random numbers; none is left out."""

import zlib
from collections.abc import Collection, Mapping, Set
from weakref import WeakKeyDictionary

import torch
from torch import nn

from nanovllm.errors import ArgumentError, cut, shown
from nanovllm.layers.linear_weight import LinearWeight
from nanovllm.layers.packed_weights import PackedParameter
from nanovllm.layers.weights import OffsetParameter, Parameter, Shard, piece_rows
from nanovllm.models.checkpoint import LM_HEAD, Checkpoint, SafetensorsCheckpoint
from nanovllm.models.fp8_checkpoint import SCALES_SUFFIX, DequantizedCheckpoint
from nanovllm.models.fused_experts import SplitExpertsCheckpoint
from nanovllm.models.heads import head_of
from nanovllm.models.mxfp4_checkpoint import Mxfp4Checkpoint
from nanovllm.models.quantization_config import Quantization
from nanovllm.models.quantized_checkpoint import QuantizedCheckpoint

MAX_NAMES_IN_ERROR = 8
# The ends of tensors that only packed modules have, see `WeightFormat`, and only fp8 ones.
NUMBERS, SCALES = ".numbers", f".weight{SCALES_SUFFIX}"
QUANTIZED = (NUMBERS, SCALES)
EMBEDDING = "model.embed_tokens.weight"
COMPARED_ROWS = 8192  # of the vocabulary at a time
NOT_TEXT = ("mtp.", "visual.", "vision_tower.", "multi_modal_projector.")  # parts of a model
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Checkpoint tensor name -> the parameters and shards that it fills: several if it is fused.
Expected = dict[str, list[tuple[Parameter, Shard]]]
# What `load_tensor` has been asked for: mixtures of experts have tens of thousands of tensors.
_EXPECTED: "WeakKeyDictionary[nn.Module, Expected]" = WeakKeyDictionary()


class DummyCheckpoint:
    """Random weights of the shapes that a model expects: the same for any number of ranks.

    Vectors are norm weights (1, less an offset) or biases (0); matrices are normal with deviation
    `std`, but for the scales of fp8 weights (1) and the biases of experts (0). Each expert of a
    tensor that has all of them is drawn alone, and a large matrix in blocks of rows. The numbers of
    packed weights are uniform, their scales make the weights' deviation `std`.
    """

    def __init__(self, expected: Expected, std: float, device: torch.device) -> None:
        self._shapes = expected_shapes(expected)
        self._offsets = {
            name: parameter.offset
            for name, shards in expected.items()
            for parameter, _ in shards
            if isinstance(parameter, OffsetParameter)
        }
        self._packed = {
            name: parameter
            for name, shards in expected.items()
            for parameter, _ in shards
            if isinstance(parameter, PackedParameter)
        }
        self.std = std
        self.device = device

    def names(self) -> set[str]:
        """See `Checkpoint`."""
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self._shapes[name]

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """See `Checkpoint`."""
        shape = self._shapes[name]
        if name in self._packed:
            return self._read_packed(self._packed[name], name, shape)[index]
        if len(shape) == 1 or name.endswith((SCALES_SUFFIX, "_bias")):
            value = 0.0 if name.endswith("bias") else 1.0 - self._offsets.get(name, 0.0)
            return torch.full(shape, value, device=self.device)[index]
        if len(shape) == 2:
            return self._drawn(name, shape, index)
        experts = range(*index[0].indices(shape[0]))
        return torch.stack([self._drawn(f"{name}.{i}", shape[1:], index[1:]) for i in experts])

    def _read_packed(
        self, parameter: PackedParameter, name: str, shape: tuple[int, ...]
    ) -> torch.Tensor:
        num_values = 2**parameter.bits
        match parameter.part:
            case "numbers":
                random = self._generator(name)
                return torch.randint(
                    256, shape, dtype=torch.uint8, device=self.device, generator=random
                )
            case "scales":  # n values in a row have the deviation sqrt((n^2 - 1) / 12)
                scale = self.std / ((num_values**2 - 1) / 12) ** 0.5
                return torch.full(shape, scale, device=self.device)
            case "zeros":
                middle = num_values // 2
                return torch.full(shape, middle, dtype=torch.uint8, device=self.device)
            case "order":
                return torch.arange(*shape, dtype=torch.int32, device=self.device)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))

    def _drawn(self, name: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> torch.Tensor:
        """A part of a matrix, of which only the blocks that it touches are drawn."""
        start, stop, step = index[0].indices(shape[0])
        num_rows = piece_rows(shape[1])
        offset = start // num_rows * num_rows
        part = slice(start - offset, stop - offset, step), *index[1:]
        blocks = [
            self._draw(f"{name}:{begin}" if begin else name, min(num_rows, shape[0] - begin), shape)
            for begin in range(offset, max(stop, start + 1), num_rows)
        ]
        return (blocks[0] if len(blocks) == 1 else torch.cat(blocks))[part]

    def _draw(self, name: str, num_rows: int, shape: tuple[int, ...]) -> torch.Tensor:
        generator = self._generator(name)
        tensor = torch.empty((num_rows, shape[1]), dtype=torch.float32, device=self.device)
        return tensor.normal_(0.0, self.std, generator=generator)


def expected_tensors(model: nn.Module) -> Expected:
    """The tensors of a checkpoint that fill `model`."""
    expected: Expected = {}
    names: Mapping[str, str] = getattr(model, "checkpoint_names", {})
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, Parameter), name
        for module_name, shard in parameter.shards.items():
            parts = name.replace(".weight_scale", f".weight{SCALES_SUFFIX}").split(".")
            if shard.fused_name is not None:
                module_name = shard.fused_name
            if module_name:
                parts[-2] = module_name
            if parameter.tensor_name is not None:
                parts[-1:] = [parameter.tensor_name] if parameter.tensor_name else []
            name_there = ".".join(names.get(part, part) for part in ".".join(parts).split("."))
            expected.setdefault(name_there, []).append((parameter, shard))
    return expected


def module_name(model: nn.Module, path: str, key: str, shard: Shard) -> str:
    """The checkpoint's name of the module that fills one shard of the weight at `path`.

    key: of the shard in `Parameter.shards`.
    """
    names: Mapping[str, str] = getattr(model, "checkpoint_names", {})
    parent, _, own_name = path.rpartition(".")
    name = (key if shard.fused_name is None else shard.fused_name) or own_name
    return ".".join(names.get(part, part) for part in f"{parent}.{name}".split("."))


def expected_shapes(expected: Expected) -> dict[str, tuple[int, ...]]:
    """Checkpoint tensor name -> the shape that it must have."""
    return {name: shards[0][1].full_shape for name, shards in expected.items()}


def merged_modules(model: nn.Module) -> list[list[str]]:
    """The checkpoint's modules of each weight that is fp8 or packed, by their names."""
    merged: dict[int, list[str]] = {}
    for name, shards in expected_tensors(model).items():
        if name.endswith(QUANTIZED):
            module = name.removesuffix(NUMBERS).removesuffix(SCALES)
            for parameter, _ in shards:
                merged.setdefault(id(parameter), []).append(module)
    return [*merged.values()]


def unpack_unconverted(model: nn.Module, unconverted: Collection[str]) -> None:
    """Hold the weights in the model's dtype of the checkpoint's modules `unconverted`.

    Of modules that are merged into one, all do.
    """
    parameters = {
        parameter
        for name, shards in expected_tensors(model).items()
        if name.endswith(QUANTIZED)
        and name.removesuffix(NUMBERS).removesuffix(SCALES) in unconverted
        for parameter, _ in shards
    }
    for module in model.modules():
        if isinstance(module, LinearWeight) and parameters & {module.loaded, module.weight_scale}:
            module.unpack()


def load_model(
    model: nn.Module,
    directory: str,
    load_format: str,
    std: float = 0.02,
    quantization: Quantization | None = None,
) -> bool:
    """Fill every parameter of `model`, this rank's slices only.

    Args:
        model: built for this rank; its parameters are `layers.weights.Parameter`.
        directory: the model's directory, with one *.safetensors file or several.
        load_format: "auto" reads the files, "dummy" draws random weights of deviation `std`.
        std: see `load_format`.
        quantization: what config.json says of quantised weights; None: nothing but scales of
            blocks, which the files show.

    Returns:
        Whether the model has an LM head: False if it has a classification head, or if a decoder
        was saved without one that it needs; the LM head is zero then.

    Raises:
        ArgumentError: names the tensors that are missing, unexpected or of the wrong shape, or an
            LM head that differs from the embedding that it should be.
    """
    expected = expected_tensors(model)
    where = f"model directory {directory!r}"
    has_lm_head = head_of(model) is None
    checkpoint: Checkpoint
    if load_format == "dummy":
        device = next(model.parameters()).device
        checkpoint = DummyCheckpoint(expected, std, device)
    else:
        files = SafetensorsCheckpoint(directory)
        whole: Checkpoint = Mxfp4Checkpoint(files)
        if quantization is not None and quantization.method != "mxfp4":
            whole = QuantizedCheckpoint(files, expected.keys(), quantization)
        split = SplitExpertsCheckpoint(whole, expected.keys())
        checkpoint = DequantizedCheckpoint(split, expected.keys())
        if has_lm_head:
            has_lm_head = _settle_lm_head(expected, checkpoint, files.is_bare, where)
    _check_names(expected.keys(), checkpoint.names(), where)
    for name, shape in expected_shapes(expected).items():
        if checkpoint.shape(name) != shape:
            raise ArgumentError(
                f"{where}: tensor {name!r} has shape {shown(list(checkpoint.shape(name)))}, "
                f"the config asks for {list(shape)}"
            )
    for name, shards in expected.items():
        for parameter, shard in shards:
            if all(part.start < part.stop for part in shard.source):  # else all padding
                for piece in shard.pieces():
                    parameter.fill(piece, checkpoint.read(name, piece.source))
    return has_lm_head


def load_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Fill this rank's slice of the whole checkpoint tensor `name`, which `model` must expect."""
    expected = _EXPECTED.get(model)
    if expected is None:
        expected = _EXPECTED[model] = expected_tensors(model)
    for parameter, shard in expected[name]:
        parameter.fill(shard, tensor[shard.source])


def is_ignored(name: str) -> bool:
    """Whether checkpoints may hold a tensor `name` that the model does not expect."""
    # A tied model may repeat the embedding as lm_head.weight. Qwen3.5 predicts further tokens with
    # "mtp". Multimodal models have their images' encoder beside the text model.
    return (
        name == LM_HEAD
        or name.endswith("rotary_emb.inv_freq")
        or name.removeprefix("model.").startswith(NOT_TEXT)
    )


def _settle_lm_head(expected: Expected, checkpoint: Checkpoint, is_bare: bool, where: str) -> bool:
    """Whether the model has an LM head; `expected` then asks for the names that it is saved by.

    A head of its own that `is_bare` leaves out is zero. ArgumentError as of `_check_tied`.
    """
    names = checkpoint.names()
    if LM_HEAD in expected:  # not tied
        if is_bare and LM_HEAD not in names:
            [(head, _)] = expected.pop(LM_HEAD)
            head.data.zero_()
            return False
    elif LM_HEAD in names:
        if EMBEDDING in names:
            [(_, shard)] = expected[EMBEDDING]
            _check_tied(checkpoint, shard, where)
        else:  # saved once, by the other name
            expected[LM_HEAD] = expected.pop(EMBEDDING)
    return True


def _check_tied(checkpoint: Checkpoint, shard: Shard, where: str) -> None:
    """ArgumentError if the LM head differs from the embedding, in the shard's rows."""
    if checkpoint.shape(EMBEDDING) != shard.full_shape:
        return  # which is refused later
    rows, (_, width) = shard.source[0], shard.full_shape
    same = checkpoint.shape(LM_HEAD) == shard.full_shape
    for start in range(rows.start, rows.stop, COMPARED_ROWS) if same else ():
        part = slice(start, min(start + COMPARED_ROWS, rows.stop)), slice(0, width)
        same = same and torch.equal(
            checkpoint.read(EMBEDDING, part), checkpoint.read(LM_HEAD, part)
        )
    if not same:
        raise ArgumentError(
            f"{where}: {LM_HEAD} differs from the embedding, but its config says "
            "tie_word_embeddings; hf_overrides={'tie_word_embeddings': False} uses both"
        )


def _check_names(expected: Set[str], found: set[str], where: str) -> None:
    missing = sorted(expected - found)
    unexpected = sorted(name for name in found - expected if not is_ignored(name))
    problems = [
        f"{kind} tensors: {shortened(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise ArgumentError(f"{where} does not fit its config; {'; '.join(problems)}")


def shortened(names: list[str]) -> str:
    """The names for an error message, the first few of them."""
    first = names[:MAX_NAMES_IN_ERROR]
    if len(names) > MAX_NAMES_IN_ERROR:
        first.append(f"and {len(names) - MAX_NAMES_IN_ERROR} more")
    return ", ".join(cut(name) for name in first)
