"""The fields of a config.json that are used, each with its check: all others are left out.

So no value that nobody looked at reaches transformers' configuration classes, which take any name.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Any

from nanovllm.errors import ArgumentError, shown
from nanovllm.models.head_config import check_activation, check_labels, check_problem_type
from nanovllm.parameters import Check, at_least, boolean, finite, number, optional, unchecked
from nanovllm.validation import check_integer

MAX_SIZE = 2**31 - 1  # of a dimension
MAX_LAYERS = 1024
MAX_EXPERTS = 4096
MAX_LABELS = 2**20
MAX_POSITIONS = 2**24  # whose rotations are a table
DTYPES = ("bfloat16", "float16", "float32", "float64")


def _check_dtype(where: str, value: Any) -> str:
    """The dtype's name; a torch.dtype may be one of `hf_overrides`."""
    name = str(value).removeprefix("torch.") if len(shown(value)) < 32 else ""
    if name not in DTYPES:
        raise ArgumentError(f"{where} {shown(value)} is not supported; supported: {DTYPES}")
    return name


def _check_layers(where: str, value: Any) -> list[int] | tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        raise ArgumentError(f"{where} must be a list, got {shown(value)}")
    for layer in value:
        check_integer(where, layer, 0, MAX_SIZE)
    return value


def _check_false(where: str, value: Any) -> Any:
    if value:
        raise ArgumentError(f"{where} {shown(value)} is not supported")
    return value


def _check_pattern(where: str, value: Any) -> Any:
    """A number, or EXAONE's letters, which its `layer_types` repeat."""
    if not isinstance(value, str):
        check_integer(where, value, 0, MAX_LAYERS)
    return value


def _without_nulls(where: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: entry for key, entry in value.items() if entry is not None}


SIZE = at_least(1, MAX_SIZE)
POSITIVE = number("> 0 and <= 1e9", lambda x: 0 < x <= 1e9)
DTYPE = optional(Check("", _check_dtype))
ROPE = Check("", _without_nulls)
# null is "derived" or "none" where it is allowed.
FIELDS = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": at_least(1, MAX_LAYERS),
    "num_attention_heads": SIZE,
    "num_key_value_heads": optional(SIZE),
    "head_dim": optional(SIZE),
    "max_position_embeddings": at_least(1, MAX_POSITIONS),
    "original_max_position_embeddings": optional(at_least(1, MAX_POSITIONS)),
    "sliding_window": optional(at_least(1, 2**63 - 1)),
    "max_window_layers": optional(at_least(0, 2**63 - 1)),
    "rms_norm_eps": finite(0),
    "initializer_range": finite(0),
    "tie_word_embeddings": boolean,
    "attention_bias": boolean,
    "mlp_bias": boolean,
    "use_sliding_window": boolean,
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
    "rope_parameters": ROPE,
    "rope_scaling": ROPE,
    # What other modules check.
    **dict.fromkeys(
        """architectures dual_chunk_attention_config eos_token_id hidden_act layer_types
        partial_rotary_factor quantization_config rope_theta""".split(),
        unchecked(),
    ),
}
EXPERT_FIELDS = {
    "num_experts": at_least(1, MAX_EXPERTS),
    "num_experts_per_tok": at_least(1, MAX_EXPERTS),
    "moe_intermediate_size": SIZE,
    "decoder_sparse_step": SIZE,
    "norm_topk_prob": boolean,
    "mlp_only_layers": optional(Check("", _check_layers)),
}
# Of the families that name them among their fields, see `registry.Family`.
FAMILY_FIELDS = {
    **dict.fromkeys("layer_types hidden_activation".split(), unchecked()),  # elsewhere
    **dict.fromkeys("partial_rotary_factor rope_local_base_freq".split(), unchecked()),
    "no_rope_layers": optional(Check("", _check_layers)),
    "no_rope_layer_interval": SIZE,
    "sliding_window": FIELDS["sliding_window"],
    "use_sliding_window": boolean,
    "sliding_window_pattern": optional(Check("", _check_pattern)),
    "attn_logit_softcapping": optional(POSITIVE),
    "final_logit_softcapping": optional(POSITIVE),
    "query_pre_attn_scalar": SIZE,
    "attention_multiplier": POSITIVE,
    "embedding_multiplier": POSITIVE,
    "residual_multiplier": POSITIVE,
    "logits_scaling": POSITIVE,
    "logit_scale": POSITIVE,
    "use_qk_norm": Check("", _check_false),
    **dict.fromkeys("layer_norm_eps norm_epsilon norm_eps".split(), finite(0)),
    **dict.fromkeys("use_bias attention_out_bias qkv_bias".split(), boolean),
    "shared_expert_intermediate_size": SIZE,
    "num_local_experts": EXPERT_FIELDS["num_experts"],
    "swiglu_alpha": POSITIVE,
    "swiglu_limit": POSITIVE,
    # Of gated delta nets.
    **dict.fromkeys(
        """linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim
        linear_conv_kernel_dim full_attention_interval""".split(),
        SIZE,
    ),
}
# Of a classification head.
HEAD_FIELDS = {
    "id2label": optional(Check("", check_labels)),
    "num_labels": optional(at_least(1, MAX_LABELS)),
    "problem_type": Check("", check_problem_type),
    "token_classification_bias": boolean,
    "sentence_transformers": Check("", check_activation),
    "sbert_ce_default_activation_function": Check("", check_activation),
}
# Left out unless they are of this type: little depends on them.
TYPES = {
    "tokenizer_class": str,
    "transformers_version": str,
    "bos_token_id": int,
    "pad_token_id": int,
}


def check_fields(
    raw: Mapping[str, Any],
    path: str,
    class_fields: Container[str],
    family_fields: Sequence[str] = (),
    has_head: bool = False,
) -> dict[str, Any]:
    """The fields of config.json that are used, by their values.

    Args:
        raw: config.json as parsed, with no field under an older name (but for dtypes and rope).
        path: the file's path, for the message.
        class_fields: of the family's configuration: of EXPERT_FIELDS the others are left out.
        family_fields: names in FAMILY_FIELDS that the family uses.
        has_head: the same of a classification head.

    Raises:
        ArgumentError: a field is of another type than it must be, or outside its range.
    """
    known = FIELDS | {n: EXPERT_FIELDS[n] for n in EXPERT_FIELDS if n in class_fields}
    known |= {name: FAMILY_FIELDS[name] for name in family_fields}
    checked: dict[str, Any] = {}
    if has_head:
        known = known | HEAD_FIELDS
        labels, number = raw.get("id2label"), raw.get("num_labels")
        if labels and number and isinstance(labels, dict) and len(labels) != number:
            raise ArgumentError(
                f"{path}: the model's num_labels ({shown(number)}) and id2label "
                f"({len(labels)} labels) do not fit"
            )
    for name, value in raw.items():
        if name in known:
            checked[name] = known[name].run(f"{path}: the model's {name}", value)
        elif type(value) is TYPES.get(name):
            checked[name] = value
    return checked
