"""Every test of this folder needs a CUDA device."""

from pathlib import Path

import pytest
import torch
from tiny_models import edit_config, save_model


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


@pytest.fixture(scope="module")
def large_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 layers of 80 MB in bf16, 1.3 GB: a copy of one takes longer than its kernels."""
    path = save_model(tmp_path_factory.mktemp("models") / "large")
    edit_config(
        path,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=16,
        layer_types=["full_attention"] * 16,
        initializer_range=0.02,
    )
    return path
