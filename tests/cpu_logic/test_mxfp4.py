"""MXFP4 weights: every number exactly as transformers unpacks it, any part of a tensor."""

import pytest
import torch
from mxfp4 import pack
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nanovllm import ArgumentError
from nanovllm.models.checkpoint import SafetensorsCheckpoint
from nanovllm.models.mxfp4_checkpoint import Mxfp4Checkpoint, dequantize_mxfp4


def random_packed(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
    return blocks, torch.randint(110, 140, shape, dtype=torch.uint8)


def test_every_byte_and_every_scale_is_read_as_transformers_reads_it():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for scale in (0, 1, 126, 127, 128, 200, 252):  # of 253 and more the largest are not finite
        scales = torch.full((1, 1, 16), scale, dtype=torch.uint8)
        expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).transpose(1, 2)
        assert torch.equal(dequantize_mxfp4(blocks, scales), expected)
    nan = torch.full((1, 1, 16), 255, dtype=torch.uint8)
    assert dequantize_mxfp4(blocks, nan).isnan().all()


def test_packed_numbers_come_back():
    numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -6.0])
    weight = numbers[torch.randint(0, 10, (2, 3, 64))] * torch.tensor([2.0**-5, 8.0, 1.0])[:, None]
    weight[:, :, ::32] = torch.tensor([6 * 2.0**-5, 6 * 8.0, 6.0])[:, None]  # fixes the scales
    assert torch.equal(dequantize_mxfp4(*pack(weight)).float(), weight)


@pytest.mark.parametrize(
    "index",
    [
        (slice(0, 3), slice(0, 96), slice(0, 10)),
        (slice(1, 2), slice(0, 96), slice(3, 10, 2)),  # up's features of the second of two ranks
        (slice(2, 3), slice(48, 96), slice(0, 10)),  # half of a block
        (slice(2, 3), slice(40, 60), slice(2, 8, 2)),
    ],
)
def test_parts_are_those_of_the_whole(index, tmp_path):
    blocks, scales = random_packed(3, 10, 3)
    other = torch.randn(4, 4)
    tensors = {"x_blocks": blocks, "x_scales": scales, "y": other, "z_blocks": 2 * other}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Mxfp4Checkpoint(SafetensorsCheckpoint(str(tmp_path)))
    assert checkpoint.names() == {"x", "y", "z_blocks"}
    assert checkpoint.shape("x") == (3, 96, 10) and checkpoint.shape("y") == (4, 4)
    whole = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(checkpoint.read("x", index), whole[index])
    assert torch.equal(checkpoint.read("y", (slice(0, 2),)), other[:2])


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        ((3, 10, 2, 16), (3, 10, 3), r"got \[3, 10, 2, 16\] and \[3, 10, 3\]"),
        ((3, 10, 3, 8), (3, 10, 3), r"got \[3, 10, 3, 8\]"),
        ((10, 3, 16), (10, 3), r"must have shape \[experts, rows, blocks, 16\]"),
    ],
)
def test_blocks_and_scales_that_do_not_fit_are_refused(blocks, scales, message, tmp_path):
    tensors = {"x_blocks": torch.zeros(blocks), "x_scales": torch.zeros(scales)}
    save_file({n: t.to(torch.uint8) for n, t in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ArgumentError, match=message):
        Mxfp4Checkpoint(SafetensorsCheckpoint(str(tmp_path)))


def test_blocks_of_another_dtype_are_refused(tmp_path):
    blocks, scales = random_packed(1, 2, 1)
    save_file({"x_blocks": blocks.float(), "x_scales": scales}, tmp_path / "model.safetensors")
    with pytest.raises(ArgumentError, match="'x_blocks' of .* is torch.float32; supported: U8"):
        Mxfp4Checkpoint(SafetensorsCheckpoint(str(tmp_path)))
