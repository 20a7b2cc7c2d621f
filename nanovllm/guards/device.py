"""A GPU whose kernel has failed: nothing runs on it any more."""

import torch

from nanovllm.errors import describe


def device_failure(device: torch.device) -> str | None:
    """How a kernel has failed on a GPU; None: it works, or `device` is none."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception as error:
            return f"the GPU failed: {describe(error)}"
    return None
