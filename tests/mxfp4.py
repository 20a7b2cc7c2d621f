"""Packs weights as MXFP4 checkpoints have them, and saves gpt-oss models of them."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit_config

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [..., K], K a multiple of 32 -> blocks [..., K / 32, 16] and scales [..., K / 32].

    The largest of a block is at most 6 times its scale; each number goes to the nearest.
    """
    groups = weight.float().unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1).clamp(min=2.0**-100)
    exponents = (largest / 6).log2().ceil()
    scaled = groups / (2.0**exponents).unsqueeze(-1)
    codes = (scaled.unsqueeze(-1) - E2M1).abs().argmin(-1).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def save_mxfp4(source: Path, target: Path) -> Path:
    """The gpt-oss model `source` with its experts in MXFP4, as OpenAI's checkpoints are."""
    shutil.copytree(source, target)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = pack(tensor.transpose(1, 2))
        else:
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    edit_config(target, quantization_config=config)
    return target
