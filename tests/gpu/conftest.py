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
        for marker, needed in (("two_gpus", 2), ("four_gpus", 4)):
            if 0 < num_gpus < needed and item.get_closest_marker(marker):
                reason = f"needs {needed} CUDA devices, found {num_gpus}"
                item.add_marker(pytest.mark.skip(reason=reason))
