"""Tiny models with sliding windows, and what transformers makes of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import reference_greedy, save_model
from torch.nn import functional
from transformers import AttentionInterface

from nanovllm.models import model_config

Windows = tuple[int | None, ...]  # of each layer
# By the windows of their cache groups. No family of the library has three groups: there the layers
# of a model without windows get some.
MODELS: dict[str, dict[str, Any]] = {
    "full, 300": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 300,
        "use_sliding_window": True,
    },
    "300": {"architecture": "MistralForCausalLM", "sliding_window": 300},
    "full, 300, 20": {},
}
THREE_GROUPS: Windows = (300, None, 20)


def save_windowed(directory: Path, name: str) -> Path:
    """The model MODELS[name]."""
    return save_model(directory, **MODELS[name])


@contextmanager
def windows_of(name: str) -> Iterator[None]:
    """An engine that is made within it has the windows of MODELS[name]."""
    with pytest.MonkeyPatch.context() as patch:
        if not MODELS[name]:
            patch.setattr(model_config, "_layer_windows", lambda *_: THREE_GROUPS)
        yield


def windowed_reference(
    directory: Path,
    name: str,
    prompts: list[list[int]],
    max_tokens: int,
    guesses: list[list[int]] | None = None,
) -> list[list[int]]:
    """`reference_greedy` of MODELS[name]."""
    if MODELS[name]:
        return reference_greedy(directory, prompts, max_tokens, guesses)
    AttentionInterface.register("windowed", _windowed_attention(THREE_GROUPS))
    attention = {"attn_implementation": "windowed"}
    return reference_greedy(directory, prompts, max_tokens, guesses, **attention)


def _windowed_attention(windows: Windows) -> Callable[..., Any]:
    """Transformers' attention function: query [B, Hq, Lq, D], key and value [B, Hkv, Lk, D]."""

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        end = key.shape[2]
        q = torch.arange(end - query.shape[2], end)[:, None]
        k = torch.arange(end)
        mask = (k <= q) & (k > q - (windows[module.layer_idx] or end))
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    return attend
