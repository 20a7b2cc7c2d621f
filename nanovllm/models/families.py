"""The class of a model's family, imported when it is wanted."""

import importlib

from nanovllm.models.base import CausalLM
from nanovllm.models.registry import ARCHITECTURES, first_supported


def model_class(architectures: tuple[str, ...]) -> type[CausalLM]:
    """The class that runs the first supported name of `architectures`."""
    name = first_supported([*architectures])
    assert name is not None, architectures
    return getattr(importlib.import_module(ARCHITECTURES[name][1]), name)
