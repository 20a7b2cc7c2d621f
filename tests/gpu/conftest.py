"""Every test of this folder needs a CUDA device."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    num_gpus = torch.cuda.device_count()
    for item in items:
        if here not in item.path.parents:
            continue
        if num_gpus == 0:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        elif item.get_closest_marker("two_gpus") and num_gpus < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs 2 CUDA devices, found {num_gpus}"))
