"""Which quantised checkpoints a config.json may announce: fp8 weights with scales for blocks."""

from collections.abc import Mapping
from typing import Any

from nanovllm.errors import ArgumentError, shown

# Of "fp8": what the fields must be, None standing for what is left out.
FP8_FIELDS: dict[str, tuple[Any, ...]] = {
    "weight_block_size": ([128, 128],),
    "activation_scheme": ("dynamic",),
    "fmt": ("e4m3", None),
}


def check_quantization(raw_config: Mapping[str, Any], path: str) -> None:
    """ArgumentError if config.json announces weights of another kind.

    Args:
        raw_config: config.json as parsed.
        path: the file's path, for the message.
    """
    for name in ("quantization_config", "compression_config"):
        value = raw_config.get(name)
        if not value:
            continue
        fields = value if isinstance(value, Mapping) else {}
        method = fields.get("quant_method", "unnamed")
        if name != "quantization_config" or method != "fp8":
            raise ArgumentError(f"{path}: {name} {shown(method)} is not supported")
        for field, supported in FP8_FIELDS.items():
            if fields.get(field) not in supported:
                raise ArgumentError(
                    f"{path}: quantization_config 'fp8' with {field} "
                    f"{shown(fields.get(field))} is not supported; supported: {supported[0]!r}"
                )
        for module in fields.get("modules_to_not_convert") or []:
            if str(module).endswith("_proj"):  # the embedding, norms and routers never are
                raise ArgumentError(
                    f"{path}: quantization_config 'fp8' whose modules_to_not_convert has "
                    f"{shown(module)} is not supported"
                )
