"""Which attention a config.json may ask for: full attention, or what is the same up to some length.

`Config` compares that length with max_model_len.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ArgumentError, check_integer, shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_attention(raw_config: Mapping[str, Any], path: str) -> None:
    """ArgumentError, beginning with `path`, for attention that is not supported."""
    _check_dual_chunk(raw_config.get("dual_chunk_attention_config"), path)
    layer_types = raw_config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(t != "full_attention" for t in layer_types):
        raise ArgumentError(
            f"{path}: layer_types {shown(layer_types)} is not supported; supported: full_attention"
        )


def _check_dual_chunk(fields: Any, path: str) -> None:
    if fields is None:
        return
    where = f"{path}: dual_chunk_attention_config"
    if not isinstance(fields, Mapping):
        raise ArgumentError(f"{where} must be an object, got {shown(fields)}")
    check_integer(f"{where}: chunk_size", fields.get("chunk_size"), minimum=2)
    maximum = fields["chunk_size"] - 1
    check_integer(f"{where}: local_size", fields.get("local_size"), minimum=1, maximum=maximum)


def full_attention_limit(hf_config: "PretrainedConfig") -> tuple[int, str] | None:
    """Tokens of the longest sequence that full attention is right for, and why; None: any.

    Dual chunk attention (An et al. 2024, arXiv 2402.17463) is full attention within the first
    chunk.
    """
    limits = []
    window = getattr(hf_config, "sliding_window", None)
    if window is not None:
        limits.append((window, "sliding_window"))
    chunks = getattr(hf_config, "dual_chunk_attention_config", None)
    if chunks is not None:
        first_chunk = chunks["chunk_size"] - chunks["local_size"]
        limits.append((first_chunk, "first chunk of dual chunk attention"))
    return min(limits, default=None)
