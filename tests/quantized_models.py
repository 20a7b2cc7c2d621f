"""Checkpoints with quantised weights, written from the definitions of their formats.

A packer takes a weight [N, K], gives the tensors of a module, and the weight that they stand for.
"""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit_config

Packer = Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]
LINEARS = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)  # of the numbers in a word, the lowest bits first
# QLoRA's appendix E, as far as a float32 has digits.
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


class Numbers(NamedTuple):
    """Whole numbers [N, K], and the scales and zeros [N, groups] of the groups of columns."""

    numbers: torch.Tensor  # int64
    scales: torch.Tensor  # float32, of values that float16 has
    zeros: torch.Tensor  # int64
    groups: torch.Tensor  # int64 [K]

    def weight(self) -> torch.Tensor:
        return (self.numbers - self.zeros[:, self.groups]).float() * self.scales[:, self.groups]


def rounded(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    is_symmetric: bool = False,
    has_order: bool = False,
) -> Numbers:
    """The weight in whole numbers; with an order, each group's columns lie anywhere."""
    num_columns = weight.shape[1]
    size = num_columns if group_size == -1 else group_size
    groups = torch.arange(num_columns) // size
    if has_order:
        generator = torch.Generator().manual_seed(num_columns)
        groups = groups[torch.randperm(num_columns, generator=generator)]
    top = 2**bits - 1
    scales, zeros = [], []
    for group in range(int(groups.max()) + 1):
        part = weight[:, groups == group].float()
        if is_symmetric:
            scale = part.abs().amax(1) / (top / 2)
            zero = torch.full_like(scale, (top + 1) // 2)
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale = (high - low) / top
            zero = (-low / scale).round()
        scales.append(scale.half().float())
        zeros.append(zero.long())
    found = Numbers(weight, torch.stack(scales, 1), torch.stack(zeros, 1), groups)
    numbers = (weight / found.scales[:, groups]).round().long() + found.zeros[:, groups]
    return found._replace(numbers=numbers.clamp(0, top))


def words(numbers: torch.Tensor, bits: int, places: tuple[int, ...] | None = None) -> torch.Tensor:
    """Numbers [n, k] in int32 words [n, k * bits / 32]; `places`: which goes to which bits."""
    each = 32 // bits
    parts = numbers.unflatten(1, (-1, each))
    word = sum(parts[:, :, (places or range(each))[i]] << (bits * i) for i in range(each))
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def awq(weight: torch.Tensor, group_size: int = 32, has_zeros: bool = True):
    found = rounded(weight, 4, group_size, not has_zeros)
    tensors = {
        "qweight": words(found.numbers.t(), 4, AWQ_ROWS),
        "scales": found.scales.t().half(),
    }
    if has_zeros:
        tensors["qzeros"] = words(found.zeros.t(), 4, AWQ_ROWS)
    return tensors, found.weight()


def gptq(
    weight: torch.Tensor,
    bits: int = 4,
    group_size: int = 32,
    is_symmetric: bool = True,
    has_order: bool = False,
    is_v2: bool = False,
):
    found = rounded(weight, bits, group_size, is_symmetric, has_order)
    zeros = found.zeros if is_v2 else (found.zeros - 1) % 2**bits
    tensors = {
        "qweight": words(found.numbers, bits).t(),
        "qzeros": words(zeros.t(), bits),
        "scales": found.scales.t().half(),
        "g_idx": found.groups.int(),
    }
    return tensors, found.weight()


def gptqmodel(weight: torch.Tensor):
    """As GPTQModel writes zeros: it takes ones from whole words."""
    tensors, expected = gptq(weight, is_symmetric=False, is_v2=True)
    return tensors | {"qzeros": tensors["qzeros"] - 0x11111111}, expected


def pack_quantized(
    weight: torch.Tensor,
    bits: int = 4,
    group_size: int = 32,
    is_symmetric: bool = True,
    has_order: bool = False,
):
    found = rounded(weight, bits, group_size, is_symmetric, has_order)
    tensors = {
        "weight_packed": words(found.numbers, bits),
        "weight_scale": found.scales.half(),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not is_symmetric:
        tensors["weight_zero_point"] = words(found.zeros.t(), bits).t()
    if has_order:
        tensors["weight_g_idx"] = found.groups.int()
    return tensors, found.weight()


def int_quantized(weight: torch.Tensor, by_row: bool = True, is_symmetric: bool = True):
    flat = weight if by_row else weight.reshape(1, -1)
    found = rounded(flat, 8, -1, is_symmetric)
    tensors = {
        "weight": (found.numbers - 128).to(torch.int8).view(weight.shape),
        "weight_scale": found.scales if by_row else found.scales.flatten(),
    }
    if not is_symmetric:
        tensors["weight_zero_point"] = (found.zeros - 128).to(torch.int8)
    return tensors, found.weight().view(weight.shape)


def fp8(
    weight: torch.Tensor, by_row: bool = False, shape: tuple[int, ...] = (), is_static: bool = False
):
    largest = weight.abs().amax(1, keepdim=True) if by_row else weight.abs().amax()
    scale = largest / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    tensors = {"weight": values, "weight_scale": scale if by_row else scale.view(shape)}
    if is_static:
        tensors["input_scale"] = torch.tensor(0.1)
    return tensors, values.float() * scale


def nf4(weight: torch.Tensor, block: int = 64, is_nested: bool = False):
    flat = weight.flatten().float()
    blocks = flat.view(-1, block)
    largest = blocks.abs().amax(1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "float32"}
    state["shape"] = list(weight.shape)
    tensors = {"weight.quant_map": NF4}
    if is_nested:  # a table of 256 numbers, blocks of 256
        table = torch.linspace(-1, 1, 256)
        offset = float(largest.mean())
        nested = torch.stack([part.abs().amax() for part in (largest - offset).split(256)])
        factors = nested.repeat_interleave(256)[: len(largest)]
        codes = (((largest - offset) / factors).unsqueeze(1) - table).abs().argmin(1)
        tensors |= {"weight.nested_absmax": nested, "weight.nested_quant_map": table}
        state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
        tensors["weight.absmax"] = codes.to(torch.uint8)
        largest = table[codes] * factors + offset
    else:
        tensors["weight.absmax"] = largest
    codes = ((blocks / largest.unsqueeze(1)).unsqueeze(2) - NF4).abs().argmin(2)
    expected = (NF4[codes] * largest.unsqueeze(1)).view(weight.shape)
    pairs = codes.flatten().to(torch.uint8).view(-1, 2)
    tensors["weight"] = (pairs[:, 0] << 4 | pairs[:, 1]).unsqueeze(1)
    text = json.dumps(state).encode()
    name = "weight.quant_state.bitsandbytes__nf4"
    return tensors | {name: torch.tensor(list(text), dtype=torch.uint8)}, expected


def llm_int8(weight: torch.Tensor):
    largest = weight.float().abs().amax(1)
    numbers = (weight / largest.unsqueeze(1) * 127).round()
    tensors = {
        "weight": numbers.to(torch.int8),
        "SCB": largest,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, numbers * (largest / 127).unsqueeze(1)


def of_group(bits: int, inputs: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """A group of compressed-tensors' config_groups."""
    args = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **weights}
    return {"targets": ["Linear"], "weights": args, "input_activations": inputs}


def groups_config(layout: str, *groups: dict[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": ["lm_head"],
    }


def gptq_config(**changes: Any) -> dict[str, Any]:
    fields = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    return {"quant_method": "gptq", "checkpoint_format": "gptq", **fields, **changes}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
NF4_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
}
# Name -> what config.json says, and the packer.
FORMATS: dict[str, tuple[dict[str, Any], Packer]] = {
    "awq": (AWQ, awq),
    "awq-row": (AWQ | {"group_size": -1}, partial(awq, group_size=-1)),
    "awq-symmetric": (AWQ | {"zero_point": False}, partial(awq, has_zeros=False)),
    "gptq": (gptq_config(), gptq),
    "gptq-8-row": (
        gptq_config(bits=8, group_size=-1, desc_act=True),
        partial(gptq, bits=8, group_size=-1),
    ),
    "gptq-order": (
        gptq_config(desc_act=True, sym=False),
        partial(gptq, is_symmetric=False, has_order=True),
    ),
    "gptq-8-v2": (
        gptq_config(bits=8, sym=False, checkpoint_format="gptq_v2"),
        partial(gptq, bits=8, is_symmetric=False, is_v2=True),
    ),
    "gptqmodel": (gptq_config(sym=False, meta={"quantizer": ["gptqmodel:2.2.0"]}), gptqmodel),
    "w4a16": (
        groups_config("pack-quantized", of_group(4, strategy="group", group_size=32)),
        pack_quantized,
    ),
    "w4a16-order": (
        groups_config(
            "pack-quantized",
            of_group(4, strategy="group", group_size=32, symmetric=False, actorder="group"),
        ),
        partial(pack_quantized, is_symmetric=False, has_order=True),
    ),
    "w8a16": (
        groups_config("pack-quantized", of_group(8, strategy="channel")),
        partial(pack_quantized, bits=8, group_size=-1),
    ),
    "w8a8": (groups_config("int-quantized", of_group(8, INT8, strategy="channel")), int_quantized),
    "w8a8-tensor": (
        groups_config("int-quantized", of_group(8, INT8, strategy="tensor")),
        partial(int_quantized, by_row=False),
    ),
    "w8a8-zeros": (
        groups_config("int-quantized", of_group(8, INT8, strategy="channel", symmetric=False)),
        partial(int_quantized, is_symmetric=False),
    ),
    "fp8-channels": (
        groups_config("float-quantized", of_group(8, DYNAMIC, strategy="channel", type="float")),
        partial(fp8, by_row=True),
    ),
    "fp8-static": (
        groups_config("float-quantized", of_group(8, STATIC, strategy="tensor", type="float")),
        partial(fp8, shape=(1,), is_static=True),
    ),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, fp8),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        partial(fp8, is_static=True),
    ),
    "nf4": (NF4_CONFIG, nf4),
    "nf4-nested": (NF4_CONFIG, partial(nf4, is_nested=True)),
    "llm-int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, llm_int8),
}


def contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def save_quantized(
    source: Path,
    root: Path,
    form: str,
    unconverted: tuple[str, ...] = (),
    converted: tuple[str, ...] = LINEARS,
) -> tuple[Path, Path]:
    """The model `source` as a checkpoint of FORMATS[form], and one with the weights it stands for.

    Weights are packed whose names end with an entry of `converted`, and of whose names no entry of
    `unconverted` is a part.
    """
    config, pack = FORMATS[form]
    quantized, exact = root / form, root / f"{form} exact"
    shutil.copytree(source, quantized)
    shutil.copytree(source, exact)
    tensors, weights = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(converted) and not any(part in name for part in unconverted):
            packed, weights[name] = pack(tensor)
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{end}": part for end, part in packed.items()}
        else:
            tensors[name] = weights[name] = tensor
    for directory, saved in ((quantized, tensors), (exact, weights)):
        save_file(contiguous(saved), directory / "model.safetensors", metadata={"format": "pt"})
    edit_config(quantized, quantization_config=config)
    return quantized, exact
