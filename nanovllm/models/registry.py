"""The supported model families, and the features that they have: all else is refused by name."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nanovllm.errors import MAX_SHOWN, ArgumentError, cut, shown
from nanovllm.models.family import Family
from nanovllm.models.head_config import ENDINGS, REWARD_MODELS, split_architecture
from nanovllm.models.quantization_config import FIELD, parse_quantization
from nanovllm.models.rope_config import check_rope
from nanovllm.validation import check_integer

GELU = ("gelu_pytorch_tanh", "gelu")
WINDOW = ("sliding_window",)
LAYER_TYPES = (*WINDOW, "layer_types")
WINDOWS = (*LAYER_TYPES, "use_sliding_window")
PARTIAL_ROPE = ("partial_rotary_factor",)
GEMMA2 = (*LAYER_TYPES, "query_pre_attn_scalar", "hidden_activation", "final_logit_softcapping")
GRANITE = tuple(
    "embedding_multiplier attention_multiplier residual_multiplier logits_scaling".split()
)
COHERE = ("layer_norm_eps", "logit_scale", "use_qk_norm")
NEMOTRON = (*PARTIAL_ROPE, "norm_eps")
STARCODER2 = (*WINDOW, "norm_epsilon", "use_bias")
QWEN2_MOE = (*WINDOWS, "qkv_bias", "shared_expert_intermediate_size")
GPT_OSS = (*LAYER_TYPES, "swiglu_alpha", "swiglu_limit")
DELTA_NET = (
    *"layer_types full_attention_interval partial_rotary_factor".split(),
    *"linear_num_key_heads linear_key_head_dim linear_num_value_heads".split(),
    *"linear_value_head_dim linear_conv_kernel_dim".split(),
)
# Each name stands for those with other heads too: see `models.head_config`.
ARCHITECTURES = {
    "ArceeForCausalLM": Family(
        "arcee", "nanovllm.models.arcee", (), ("relu2",), has_gated_mlp=False
    ),
    "Cohere2ForCausalLM": Family(
        "cohere2",
        "nanovllm.models.cohere2",
        (*LAYER_TYPES, *COHERE, "sliding_window_pattern"),
        rope_layers="windowed",
    ),
    "CohereForCausalLM": Family("cohere", "nanovllm.models.cohere", COHERE),
    "Exaone4ForCausalLM": Family(
        "exaone4",
        "nanovllm.models.exaone4",
        (*LAYER_TYPES, "sliding_window_pattern"),
        rope_layers="windowed, if any",
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2", "nanovllm.models.gemma2", (*GEMMA2, "attn_logit_softcapping"), GELU, 1.0
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        "nanovllm.models.gemma3",
        (*GEMMA2, "sliding_window_pattern", "rope_local_base_freq"),
        GELU,
        norm_weight_offset=1.0,
        has_rope_by_layer_type=True,
    ),
    "GemmaForCausalLM": Family("gemma", "nanovllm.models.gemma", (), GELU, 1.0),
    "Glm4ForCausalLM": Family("glm4", "nanovllm.models.glm4", PARTIAL_ROPE),
    "GlmForCausalLM": Family("glm", "nanovllm.models.glm", PARTIAL_ROPE),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        "nanovllm.models.gpt_oss",
        GPT_OSS,
        norm_weight_offset=0.0,
        quantization=("mxfp4",),
    ),
    "GraniteForCausalLM": Family("granite", "nanovllm.models.granite", GRANITE),
    "GraniteMoeForCausalLM": Family(
        "granitemoe",
        "nanovllm.models.granite_moe",
        (*GRANITE, "num_local_experts"),
        quantization=(),
    ),
    "HeliumForCausalLM": Family("helium", "nanovllm.models.helium", norm_weight_offset=0.0),
    "LlamaForCausalLM": Family("llama", "nanovllm.models.llama"),
    "MinistralForCausalLM": Family("ministral", "nanovllm.models.ministral", LAYER_TYPES),
    "MistralForCausalLM": Family("mistral", "nanovllm.models.mistral", WINDOW),
    "MixtralForCausalLM": Family("mixtral", "nanovllm.models.mixtral", WINDOW),
    "NemotronForCausalLM": Family(
        "nemotron",
        "nanovllm.models.nemotron",
        NEMOTRON,
        ("relu2",),
        norm_weight_offset=1.0,
        has_gated_mlp=False,
    ),
    "Olmo2ForCausalLM": Family("olmo2", "nanovllm.models.olmo2", norm_weight_offset=0.0),
    "Olmo3ForCausalLM": Family(
        "olmo3",
        "nanovllm.models.olmo3",
        LAYER_TYPES,
        norm_weight_offset=0.0,
        has_rope_by_layer_type=True,
    ),
    "OlmoeForCausalLM": Family("olmoe", "nanovllm.models.olmoe"),
    "Phi3ForCausalLM": Family("phi3", "nanovllm.models.phi3", (*PARTIAL_ROPE, *WINDOW)),
    "Qwen2ForCausalLM": Family("qwen2", "nanovllm.models.qwen2", WINDOWS),
    "Qwen2MoeForCausalLM": Family("qwen2_moe", "nanovllm.models.qwen2_moe", QWEN2_MOE),
    "Qwen3ForCausalLM": Family("qwen3", "nanovllm.models.qwen3", WINDOWS),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe", "nanovllm.models.qwen3_moe", (*WINDOW, "use_sliding_window")
    ),
    "Qwen3NextForCausalLM": Family(
        "qwen3_next",
        "nanovllm.models.qwen3_next",
        (*DELTA_NET, "shared_expert_intermediate_size"),
        norm_weight_offset=1.0,
        has_mrope=True,
    ),
    "Qwen3_5ForCausalLM": Family(
        "qwen3_5_text", "nanovllm.models.qwen3_5", DELTA_NET, norm_weight_offset=1.0, has_mrope=True
    ),
    "Qwen3_5MoeForCausalLM": Family(
        "qwen3_5_moe_text",
        "nanovllm.models.qwen3_5_moe",
        (*DELTA_NET, "shared_expert_intermediate_size"),
        norm_weight_offset=1.0,
        has_mrope=True,
    ),
    "SeedOssForCausalLM": Family("seed_oss", "nanovllm.models.seed_oss", ("attention_out_bias",)),
    "Starcoder2ForCausalLM": Family(
        "starcoder2", "nanovllm.models.starcoder2", STARCODER2, GELU, has_gated_mlp=False
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        "nanovllm.models.smollm3",
        (*WINDOWS, "no_rope_layers", "no_rope_layer_interval"),
    ),
}
# What changes a model's results, and only the families compute that name it among their fields:
# `is_causal` if it is false; fields, also those with a word in their names, unless they are false,
# null, 0 or empty; factors beside 1.
UNSUPPORTED_FIELDS = (
    "use_sliding_window use_mrope rope_interleaved alibi clip_qkv per_layer_config "
    "use_bidirectional_attention"
).split()
UNSUPPORTED_WORDS = ("softcap", "soft_cap")
FACTORS = (
    "logit_scale logits_scaling embedding_multiplier residual_multiplier attention_multiplier"
).split()


def check_supported(raw_config: Mapping[str, Any], path: str) -> None:
    """ArgumentError if config.json asks for a family or a feature that this library lacks.

    Args:
        raw_config: config.json as parsed, before any library fills in defaults.
        path: the file's path, for the message.
    """
    family = _check_family(raw_config, path)
    check_rope(raw_config, path, family)
    for name, value in raw_config.items():
        if name not in family.fields and _is_unsupported(name, value):
            raise ArgumentError(f"{path}: {cut(name)}={_as_json(value)} is not supported")
    _check_attention(raw_config, family, path)
    _check_quantization(raw_config, family, path)
    name = "hidden_activation" if "hidden_activation" in family.fields else "hidden_act"
    activation = raw_config.get(name, family.activations[0])
    if activation not in family.activations:
        raise ArgumentError(
            f"{path}: {name} {shown(activation)} is not supported; supported: "
            f"{', '.join(family.activations)}"
        )


def _check_attention(raw_config: Mapping[str, Any], family: Family, path: str) -> None:
    """ArgumentError for other attention than the family's, or what is the same to some length."""
    _check_dual_chunk(raw_config.get("dual_chunk_attention_config"), path)
    layer_types = raw_config.get("layer_types") or []
    supported = ["full_attention"]
    if "layer_types" in family.fields:
        is_delta_net = "linear_conv_kernel_dim" in family.fields
        supported.append("linear_attention" if is_delta_net else "sliding_attention")
    if not isinstance(layer_types, list) or any(t not in supported for t in layer_types):
        raise ArgumentError(
            f"{path}: layer_types {shown(layer_types)} is not supported; supported: "
            f"{', '.join(supported)}"
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


def _check_quantization(raw_config: Mapping[str, Any], family: Family, path: str) -> None:
    """ArgumentError for weights of another kind than the family's checkpoints."""
    for name in (FIELD, "compression_config"):
        value = raw_config.get(name)
        if not value:
            continue
        fields = value if isinstance(value, Mapping) else {}
        method = fields.get("quant_method", "unnamed")
        if name != FIELD or method not in family.quantization:
            raise ArgumentError(f"{path}: {name} {shown(method)} is not supported")
        parse_quantization(fields, path)


def _as_json(value: Any) -> str:
    return cut(json.dumps(value, default=repr))


def _is_unsupported(name: str, value: Any) -> bool:
    if name == "is_causal":  # false: every token attends to all of the prompt
        return value is False
    if name in FACTORS:
        return value is not None and value != 1
    return bool(value) and (
        name in UNSUPPORTED_FIELDS or any(word in name for word in UNSUPPORTED_WORDS)
    )


def _check_family(raw_config: Mapping[str, Any], path: str) -> Family:
    architectures = raw_config.get("architectures") or []
    name = first_supported(architectures)
    if name is None:
        raise ArgumentError(
            f"{path}: architectures {_shown_names(architectures)} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}, the same with {' or '.join(ENDINGS)}, "
            f"{', '.join(REWARD_MODELS)}"
        )
    model_type, family = raw_config.get("model_type"), family_of([name])
    if model_type != family.model_type:
        raise ArgumentError(
            f"{path}: architectures {_shown_names(architectures)} with model_type "
            f"{shown(model_type)} is not "
            f"supported; the model_type of {name} is {family.model_type!r}"
        )
    return family


def _shown_names(architectures: Any) -> str:
    is_short = isinstance(architectures, str) and len(architectures) <= MAX_SHOWN
    return architectures if is_short else shown(architectures)


def family_of(architectures: Sequence[str]) -> Family:
    """The family of the first supported name."""
    name = first_supported([*architectures])
    assert name is not None, architectures
    return ARCHITECTURES[split_architecture(name)[0]]


def first_supported(architectures: Any) -> str | None:
    """The first name of config.json's `architectures` that is supported."""
    if not isinstance(architectures, list):
        return None
    names = (name for name in architectures if isinstance(name, str))
    return next((name for name in names if split_architecture(name)[0] in ARCHITECTURES), None)


def head_kind(architectures: Any) -> str | None:
    """The kind of the head that the first supported name asks for; None: an LM head."""
    name = first_supported(architectures)
    return None if name is None else split_architecture(name)[1]
