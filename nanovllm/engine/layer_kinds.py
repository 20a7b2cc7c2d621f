"""One decoder layer of each kind: what they launch is what all launch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class FewLayers:
    """A decoder with one layer of each kind; what it computes means nothing."""

    def __init__(self, decoder: nn.Module) -> None:
        assert isinstance(decoder.layers, nn.ModuleList)
        self._decoder, self._few = decoder, kinds_of_layers(decoder.layers)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it the decoder has these layers and no others."""
        all_layers = self._decoder.layers
        self._decoder.layers = self._few
        try:
            yield
        finally:
            self._decoder.layers = all_layers


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
