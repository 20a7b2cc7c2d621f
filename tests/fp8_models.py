"""Model directories with fp8 weights, and plain ones with the values that fp8 gives them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit_config

BLOCK = 128
LINEARS = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
STACKED = ("experts.gate_up_proj", "experts.down_proj")  # [experts, columns, rows]
CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"],
}


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] -> fp8 [N, K] and float32 scales of its blocks, largest magnitude / 448."""
    scales = torch.stack(
        [
            torch.stack([block.abs().max() / 448 for block in rows.split(BLOCK, dim=1)])
            for rows in weight.float().split(BLOCK)
        ]
    )
    return (weight / spread(scales, weight)).to(torch.float8_e4m3fn), scales


def spread(scales: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """scales of blocks -> one for each element of weight [N, K]."""
    n, k = weight.shape
    return scales.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]


def through_blocks(weight: torch.Tensor) -> torch.Tensor:
    """weight [N, K] as a checkpoint with scales of blocks keeps it, in float32."""
    values, scales = quantize_blocks(weight)
    return values.float() * spread(scales, weight)


def through_rows(weight: torch.Tensor) -> torch.Tensor:
    """weight [N, K] as quantization="fp8" keeps it, in float32."""
    largest = weight.float().abs().amax(1, keepdim=True)
    return (weight * (448 / largest)).to(torch.float8_e4m3fn).float() * (largest * (1 / 448))


def save_fp8(source: Path, target: Path) -> Path:
    """`source` with fp8 weights and their scales."""

    def quantized(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        values, scales = quantize_blocks(weight)
        return {name: values, f"{name}_scale_inv": scales}

    _save(source, target, quantized)
    edit_config(target, quantization_config=CONFIG)
    return target


def save_rounded(
    source: Path, target: Path, through_fp8: Callable[[torch.Tensor], torch.Tensor]
) -> Path:
    """`source` with the values that fp8 gives its weights."""
    return _save(source, target, lambda name, weight: {name: through_fp8(weight)})


def _save(source: Path, target: Path, convert) -> Path:
    shutil.copytree(source, target)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(STACKED):
            experts = [convert(name, weight.t())[name].t() for weight in tensor]
            tensors[name] = torch.stack(experts)
        else:
            tensors |= convert(name, tensor) if name.endswith(LINEARS) else {name: tensor}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
