"""What config.json says of a checkpoint whose linear weights are quantised.

Files of the libraries that wrote older checkpoints, beside config.json, count as well.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nanovllm.errors import ArgumentError, shown
from nanovllm.layers.weight_format import WeightFormat
from nanovllm.model_files import is_file, read_json_object

FIELD = "quantization_config"
# Files beside config.json -> what `quant_method` they stand for if they do not say.
SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
MODELOPT_FILE = "hf_quant_config.json"
BITS = (4, 8)
BLOCK_SIZE = [128, 128]
# What may be said of single modules of a GPTQ checkpoint: `GptqWeight` sees it in the tensors.
SEEN_IN_TENSORS = ("bits", "group_size", "sym", "desc_act")
# How GPTQ searched for the numbers, which says nothing of the result.
OF_THE_SEARCH = (
    "damp_percent damp_auto_increment static_groups true_sequential mse act_group_aware gptaq foem "
    "hessian fallback smooth failsafe"
).split()


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint's linear modules are stored.

    What a module holds is seen in its tensors. So modules may differ, or be left unconverted.

    Attributes:
        method: config.json's `quant_method`; "fp8" also where NVIDIA's modelopt wrote it.
        weight_format: of most modules, where they can stay packed; None: they cannot.
        fp8_scales: what has a scale of its own, where products may be in fp8; None: the weights
            are dequantised as they are loaded.
        group_size: columns that share a scale, where all modules have the same; -1: all of a row;
            None: it is seen in the tensors.
        zero_offset: what GPTQ's stored zeros lack.
        has_carries: whether adding `zero_offset` to them carries over from one to the next.
    """

    method: str
    weight_format: WeightFormat | None = None
    fp8_scales: Literal["blocks", "channels"] | None = None
    group_size: int | None = None
    zero_offset: int = 0
    has_carries: bool = False

    @property
    def is_kept(self) -> bool:
        """Whether weights may stay quantised in memory; else they are dequantised on loading."""
        return self.weight_format is not None or self.fp8_scales is not None


def with_quantization(raw_config: Mapping[str, Any], directory: str) -> dict[str, Any]:
    """config.json's fields with what another file or an older field says of quantised weights."""
    fields = dict(raw_config)
    older = fields.get("compression_config")
    if isinstance(older, Mapping) and older.get("quant_method") == "compressed-tensors":
        fields.setdefault(FIELD, fields.pop("compression_config"))
    if fields.get(FIELD) is not None:
        return fields
    for file_name, method in SIDE_FILES.items():
        path = os.path.join(directory, file_name)
        if is_file(path):
            return fields | {FIELD: {"quant_method": method, **read_json_object(path)}}
    path = os.path.join(directory, MODELOPT_FILE)
    if is_file(path):
        found = read_json_object(path).get("quantization")
        if not isinstance(found, Mapping):
            raise ArgumentError(f"cannot read {path}: it has no quantization")
        return fields | {FIELD: {**found, "quant_method": "modelopt"}}
    return fields


def parse_quantization(fields: Any, path: str) -> Quantization:
    """What `quantization_config` says; ArgumentError with `path` if it is not supported."""
    fields = fields if isinstance(fields, Mapping) else {}
    method = fields.get("quant_method", "unnamed")
    parse = PARSERS.get(method) if isinstance(method, str) else None
    if parse is None:
        raise ArgumentError(f"{path}: {FIELD} {shown(method)} is not supported")
    return parse(fields, f"{path}: {FIELD} {method!r}")


def _mxfp4(fields: Mapping[str, Any], where: str) -> Quantization:
    return Quantization("mxfp4")


def _awq(fields: Mapping[str, Any], where: str) -> Quantization:
    bits = _first(fields, "bits", "w_bit")
    group_size = _first(fields, "group_size", "q_group_size")
    _check(where, "bits", bits, (4,))
    version = _first(fields, "version", "checkpoint_format", "format") or "gemm"
    _check(where, "version", str(version).lower(), ("gemm",))
    _check(where, "backend", fields.get("backend") == "llm-awq" and "llm-awq", (False,))
    _check_group_size(where, group_size)
    has_zeros = fields.get("zero_point", True)
    _check(where, "zero_point", has_zeros, (True, False))
    return Quantization("awq", WeightFormat(4, group_size, has_zeros), group_size=group_size)


def _gptq(fields: Mapping[str, Any], where: str) -> Quantization:
    bits, group_size = fields.get("bits"), fields.get("group_size")
    _check(where, "bits", bits, BITS)
    _check_group_size(where, group_size)
    layout = _first(fields, "checkpoint_format", "format") or "gptq"
    _check(where, "checkpoint_format", layout, ("gptq", "gptq_v2"))
    _check(where, "is_marlin_format", bool(fields.get("is_marlin_format")), (False,))
    _check(where, "pack_dtype", fields.get("pack_dtype") or "int32", ("int32",))
    _check(where, "adapter", fields.get("adapter") or None, (None,))
    _check(where, "rotation", fields.get("rotation") or None, (None,))
    is_symmetric, has_order = fields.get("sym", True), fields.get("desc_act", False)
    _check(where, "sym", is_symmetric, (True, False))
    _check(where, "desc_act", has_order, (True, False))
    _check_rules(fields.get("dynamic"), where)
    has_order = has_order and group_size != -1
    assert isinstance(bits, int) and isinstance(group_size, int)
    return Quantization(
        "gptq",
        WeightFormat(bits, group_size, not is_symmetric, has_order),
        zero_offset=1 if layout == "gptq" else 0,
        has_carries=_is_of_gptqmodel(fields.get("meta")),
    )


def _is_of_gptqmodel(meta: Any) -> bool:
    """Whether GPTQModel wrote the checkpoint, which lowers packed zeros all at once."""
    names = meta.get("quantizer") if isinstance(meta, Mapping) else None
    names = names if isinstance(names, list) else [names]
    return any(str(name).startswith("gptqmodel") for name in names)


def _check_rules(rules: Any, where: str) -> None:
    """ArgumentError for rules of single modules that change more than tensors tell."""
    if not rules:
        return
    if not isinstance(rules, Mapping):
        raise ArgumentError(f"{where}: dynamic must be an object, got {shown(rules)}")
    for pattern, changes in rules.items():
        if str(pattern).startswith("-:") or changes is False:
            continue  # the modules are not converted
        for name, value in changes.items() if isinstance(changes, Mapping) else [("", changes)]:
            if name == "bits":
                _check(f"{where}: dynamic {shown(pattern)}", name, value, BITS)
            elif name not in (*SEEN_IN_TENSORS, *OF_THE_SEARCH):
                raise ArgumentError(
                    f"{where}: dynamic {shown(pattern)} with {shown(name)} is not supported; "
                    f"supported: {', '.join(SEEN_IN_TENSORS)}"
                )


def _compressed_tensors(fields: Mapping[str, Any], where: str) -> Quantization:
    layout = fields.get("format")
    layouts = "pack-quantized int-quantized float-quantized naive-quantized mixed-precision".split()
    _check(where, "format", layout, layouts)
    status = str(fields.get("quantization_status", "compressed")).lower()
    _check(where, "quantization_status", status, ("compressed", "frozen"))
    _check_kv_cache(fields, where)
    for name in ("transform_config", "moe_sparsity_config"):
        _check(where, name, fields.get(name) or None, (None,))
    sparsity = fields.get("sparsity_config") or {}
    sparse_format = sparsity.get("format") if isinstance(sparsity, Mapping) else sparsity
    _check(where, "sparsity_config with format", sparse_format, ("dense", None))
    groups = fields.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ArgumentError(f"{where}: config_groups must be an object, got {shown(groups)}")
    formats, scales = [], []
    for name, group in groups.items():
        of_group = f"{where}: config_groups {shown(name)}"
        if not isinstance(group, Mapping):
            raise ArgumentError(f"{of_group} must be an object, got {shown(group)}")
        _check(of_group, "output_activations", group.get("output_activations"), (None,))
        _check(of_group, "format", group.get("format") or layouts[0], layouts)
        weights = group.get("weights")
        if not isinstance(weights, Mapping):
            raise ArgumentError(f"{of_group}: weights must be an object, got {shown(weights)}")
        if weights.get("type", "int") == "float":
            scales.append(_fp8_scales_of_group(weights, group.get("input_activations"), of_group))
        else:
            formats.append(_format_of_group(weights, of_group))
    return Quantization(
        "compressed-tensors",
        formats[0] if formats else None,
        scales[0] if not formats and len({*scales}) == 1 else None,
    )


def _format_of_group(weights: Mapping[str, Any], where: str) -> WeightFormat:
    where += ": weights"
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    _check(where, "type", weights.get("type", "int"), ("int",))
    _check(where, "num_bits", bits, BITS)
    _check(where, "strategy", strategy, ("group", "channel", "tensor"))
    _check(where, "dynamic", weights.get("dynamic") or False, (False,))
    group_size = -1
    if strategy == "group":
        group_size = weights.get("group_size") or 0
        _check_group_size(where, group_size)
    has_order = weights.get("actorder") in ("group", "dynamic", True) and group_size != -1
    assert isinstance(bits, int)
    return WeightFormat(bits, group_size, not weights.get("symmetric", True), has_order)


def _fp8_scales_of_group(
    weights: Mapping[str, Any], inputs: Any, where: str
) -> Literal["blocks", "channels"] | None:
    """The scales that fp8 products take, if the activations' are made as ours are."""
    strategy = weights.get("strategy")
    _check(f"{where}: weights", "num_bits", weights.get("num_bits"), (8,))
    _check(f"{where}: weights", "strategy", strategy, ("tensor", "channel", "block"))
    _check(f"{where}: weights", "symmetric", weights.get("symmetric", True), (True,))
    if strategy == "block":
        block = weights.get("block_structure")
        _check(f"{where}: weights", "block_structure", block, (BLOCK_SIZE, "128x128"))
    is_dynamic = isinstance(inputs, Mapping) and inputs.get("dynamic") is True
    if not is_dynamic or inputs.get("num_bits") != 8 or inputs.get("type") != "float":
        return None
    if strategy == "block":
        return "blocks" if inputs.get("group_size") == BLOCK_SIZE[1] else None
    return "channels" if inputs.get("strategy") == "token" else None


def _fp8(fields: Mapping[str, Any], where: str) -> Quantization:
    _check(where, "fmt", fields.get("fmt"), ("e4m3", None))
    _check_kv_cache(fields, where)
    if fields.get("weight_block_size") is None:
        _check(where, "activation_scheme", fields.get("activation_scheme"), ("dynamic", "static"))
        is_dynamic = fields["activation_scheme"] == "dynamic"
        return Quantization("fp8", fp8_scales="channels" if is_dynamic else None)
    _check(where, "weight_block_size", fields["weight_block_size"], (BLOCK_SIZE,))
    _check(where, "activation_scheme", fields.get("activation_scheme"), ("dynamic",))
    return Quantization("fp8", fp8_scales="blocks")


def _modelopt(fields: Mapping[str, Any], where: str) -> Quantization:
    _check(where, "quant_algo", fields.get("quant_algo"), ("FP8",))
    _check(where, "kv_cache_quant_algo", fields.get("kv_cache_quant_algo"), (None,))
    _check_kv_cache(fields, where)
    return Quantization("fp8")


def _bitsandbytes(fields: Mapping[str, Any], where: str) -> Quantization:
    if fields.get("load_in_8bit") or fields.get("_load_in_8bit"):
        has_fp16 = bool(fields.get("llm_int8_has_fp16_weight"))
        _check(where, "llm_int8_has_fp16_weight", has_fp16, (False,))
        return Quantization("bitsandbytes", WeightFormat(8, -1))
    is_4bit = bool(fields.get("load_in_4bit") or fields.get("_load_in_4bit"))
    _check(where, "load_in_4bit", is_4bit, (True,))
    _check(where, "bnb_4bit_quant_type", fields.get("bnb_4bit_quant_type"), ("nf4", "fp4"))
    storage = fields.get("bnb_4bit_quant_storage") or "uint8"
    _check(where, "bnb_4bit_quant_storage", storage, ("uint8",))
    return Quantization("bitsandbytes")


PARSERS: dict[str, Callable[[Mapping[str, Any], str], Quantization]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
}


def _first(fields: Mapping[str, Any], *names: str) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _check(where: str, name: str, value: Any, supported: Any) -> None:
    # True is equal to 1, and unhashable values may be anything.
    if not any(value == one and type(value) is type(one) for one in supported):
        raise ArgumentError(
            f"{where} with {name} {shown(value)} is not supported; supported: "
            f"{', '.join(map(repr, supported))}"
        )


def _check_group_size(where: str, group_size: Any) -> None:
    if type(group_size) is not int or (group_size != -1 and group_size < 1):
        raise ArgumentError(
            f"{where} with group_size {shown(group_size)} is not supported; supported: -1 (all "
            "columns of a row) and above"
        )


def _check_kv_cache(fields: Mapping[str, Any], where: str) -> None:
    """ArgumentError for a checkpoint that asks for an fp8 KV cache with scales of its own."""
    scheme = fields.get("kv_cache_scheme")
    if scheme:
        raise ArgumentError(
            f"{where} with kv_cache_scheme {shown(scheme)} is not supported: "
            f"hf_overrides={{{FIELD!r}: {{'kv_cache_scheme': None}}}} leaves it out, and "
            "kv_cache_dtype='fp8' is a cache with scales of each token"
        )
