"""A GPU whose kernel has failed: nothing runs on it any more."""

from ctypes import py_object, pythonapi

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


def keep_for_ever(obj: object) -> None:
    """Never free `obj`."""
    pythonapi.Py_IncRef(py_object(obj))
