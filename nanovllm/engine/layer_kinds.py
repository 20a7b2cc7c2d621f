"""One decoder layer of each kind: what they launch is what all launch."""

import torch
from torch import nn


def kinds_of_layers(layers: nn.ModuleList) -> nn.ModuleList:
    """The first layer, one of each kind, and the last one, in their order."""
    kinds: dict[object, int] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault(_kind(layer), index)
    return nn.ModuleList(layers[i] for i in sorted({0, *kinds.values(), len(layers) - 1}))


def _kind(layer: nn.Module) -> tuple[object, ...]:
    """Equal for layers that launch the same: types, plain attributes and parameters' shapes."""
    traits: list[object] = []
    for name, module in layer.named_modules():
        values = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str, torch.dtype, type(None)))
        }
        tensors = [(key, p.shape, p.dtype) for key, p in module.named_parameters(recurse=False)]
        traits += [name, type(module), tuple(values.items()), tuple(tensors)]
    return tuple(traits)
