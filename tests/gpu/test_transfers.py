"""Uploads and downloads through pinned memory: the right bytes, aligned, and never overwritten."""

import numpy as np
import pytest
import torch

from nanovllm.kernels.copies import ALIGNMENT, Download, upload

SLEEP_CYCLES = 20_000_000  # about 10 ms on the device


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


def test_upload_keeps_values_shapes_and_dtypes_and_aligns_every_array(device):
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(-(2**31), 2**31, (3, 5), dtype=np.int32),
        np.empty((0, 2), dtype=np.int32),
        rng.integers(-(2**63), 2**63 - 1, 7, dtype=np.int64),
        rng.random(3, dtype=np.float32),
        rng.integers(0, 99, (4, 6), dtype=np.int32)[:, 1:3],  # not contiguous
        np.empty(0, dtype=np.int64),
        rng.integers(0, 99, 1, dtype=np.int32),
    ]
    for _ in range(8):
        tensors = upload(arrays, device)
        for array, tensor in zip(arrays, tensors, strict=True):
            assert tensor.device == device
            assert tensor.is_contiguous()
            assert not tensor.numel() or tensor.data_ptr() % ALIGNMENT == 0
            torch.testing.assert_close(tensor.cpu(), torch.from_numpy(array.copy()), rtol=0, atol=0)


def test_uploads_that_wait_for_a_busy_device_are_not_overwritten(device):
    """Pinned memory is taken again only after the copy out of it."""
    kept = []
    for number in range(12):
        torch.cuda._sleep(SLEEP_CYCLES)
        array = np.full(1000, number, dtype=np.int32)
        [tensor] = upload([array], device)
        array[:] = -1
        kept.append(tensor.clone())
    for number, tensor in enumerate(kept):
        assert (tensor == number).all(), number


def test_downloads_keep_their_tokens(device):
    for first in range(0, 100, 4):
        launched = []
        for number in range(first, first + 4):
            token_ids = torch.full((1000,), number, dtype=torch.int32, device=device)
            torch.cuda._sleep(SLEEP_CYCLES // 10)
            launched.append(Download(token_ids, token_ids + 1))
            token_ids.fill_(-1)
        for number, download in enumerate(launched, first):
            own, next_ones = download.wait()
            assert own.tolist() == [number] * 1000 and next_ones.tolist() == [number + 1] * 1000
