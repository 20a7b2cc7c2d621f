"""The shape of a model: what its layers, its KV cache and its ranks need to know of config.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ArgumentError
from nanovllm.layers.weight_format import WeightFormat
from nanovllm.models.config_fields import MAX_POSITIONS
from nanovllm.models.family import Family
from nanovllm.models.head_config import HeadConfig, head_config
from nanovllm.models.quantization_config import FIELD, Quantization, parse_quantization
from nanovllm.models.rope_config import (
    RopeLimit,
    check_pairs,
    complete_rope,
    max_positions,
    rope_limit,
)
from nanovllm.models.tp_plan import check_plan
from nanovllm.validation import check_integer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from nanovllm.layers.rope_scaling import RopeParameters

NORM_EPS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps")
MAX_EXPERTS_OF_ALL_LAYERS = 2**17  # each has three weights with a shard


@dataclass(frozen=True)
class ModelConfig:
    """A model's configuration: checked, complete and never changed.

    Fields have the names of config.json, but for these.

    Attributes:
        max_positions: tokens of the longest sequence that the rotary embeddings are meant for.
        rope_limit: see `RopeLimit`; None: any length.
        full_attention_limit: tokens of the longest sequence that full attention is right for, and
            the field that says so; None: any.
        quantization: how the checkpoint stores linear weights; None: as they are.
        weight_format: of a checkpoint whose linear weights are packed in 4 or 8 bits.
        layer_windows: of each layer the tokens that a query sees, its own included; None: all.
        layer_types: of each layer, where rotary embeddings differ by it; else empty.
        attention_scale: multiplies the scores; None: 1 / sqrt(head_dim).
        no_rope_layers: of each layer 0 if it has no rotary embeddings; empty: all have.
        embedding_multiplier: multiplies the embeddings; Gemma's own is not among the fields.
        logits_multiplier: multiplies the logits.
        norm_weight_offset: see `Family`.
        has_gated_mlp: see `Family`.
        rms_norm_eps: of layer norms as well.
        moe_intermediate_size: of an expert, whatever the field's name.
        norm_topk_prob: also of families without the field, whose models do so.
        shared_expert_intermediate_size: of an expert that every token has; 0: there is none.
        swiglu_alpha: see `ClampedSwiGLU`, as for `swiglu_limit`; 0: the family has another.
        head: what is there in place of an LM head; None: an LM head.
        linear_num_key_heads: of gated delta nets, as the four fields after it; 0: there are none.
        uses_transformers: whether transformers' own module runs. What it alone needs to know is 0
            or empty then.
        tp_plan: how transformers would share its module among ranks, see `models.tp_plan`.
    """

    architectures: tuple[str, ...]
    dtype: str | None  # of the checkpoint's weights, if it says
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    initializer_range: float
    rope_parameters: "RopeParameters"  # see `models.rope_config`
    max_positions: int
    rope_limit: RopeLimit | None
    full_attention_limit: tuple[int, str] | None
    quantization: Quantization | None
    layer_windows: tuple[int | None, ...]
    weight_format: WeightFormat | None = None
    layer_types: tuple[str, ...] = ()
    no_rope_layers: tuple[int, ...] = ()
    hidden_act: str = "silu"
    attention_scale: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    norm_weight_offset: float | None = None
    has_gated_mlp: bool = True
    eos_token_id: int | list[int] | None = None  # as it is: not checked
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False  # of families whose o_proj has not `attention_bias`
    mlp_bias: bool = False
    qkv_bias: bool = False
    num_experts: int = 0  # 0: a dense model, whose other fields of experts mean nothing
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    shared_expert_intermediate_size: int = 0
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_conv_kernel_dim: int = 0
    swiglu_alpha: float = 0.0
    swiglu_limit: float = 0.0
    head: HeadConfig | None = None
    uses_transformers: bool = False
    tp_plan: Mapping[str, str] | None = None

    @classmethod
    def from_hf(
        cls, hf_config: "PretrainedConfig", family: Family, head: str | None = None
    ) -> "ModelConfig":
        """From a configuration whose fields are checked, as `read_hf_config` gives it.

        Args:
            hf_config: the configuration.
            family: of the configuration.
            head: the kind of classification head that its architecture asks for, if it does.

        Raises:
            ArgumentError: fields do not fit each other.
        """
        head_dim = getattr(hf_config, "head_dim", None)
        if head_dim is None:
            head_dim = hf_config.hidden_size // hf_config.num_attention_heads
        quantization = _quantization(hf_config)
        values: dict[str, Any] = {
            "head": None if head is None else head_config(head, hf_config),
            "architectures": tuple(hf_config.architectures or ()),
            "dtype": str(hf_config.dtype).removeprefix("torch.") if hf_config.dtype else None,
            "head_dim": head_dim,
            "intermediate_size": getattr(hf_config, "intermediate_size", 0),
            "rope_parameters": complete_rope(hf_config),
            "max_positions": max_positions(hf_config),
            "rope_limit": rope_limit(hf_config),
            "full_attention_limit": _full_attention_limit(hf_config, family.fields),
            "quantization": quantization,
            "weight_format": quantization and quantization.weight_format,
            "layer_windows": _layer_windows(hf_config, family.fields),
            "no_rope_layers": _no_rope_layers(hf_config, family),
            "layer_types": tuple(getattr(hf_config, "layer_types", None) or ()),
            "attention_scale": _attention_scale(hf_config),
            "norm_weight_offset": family.norm_weight_offset,
            "has_gated_mlp": family.has_gated_mlp,
            "logits_multiplier": _logits_multiplier(hf_config),
            "rms_norm_eps": _first_of(hf_config, NORM_EPS),
            "num_experts": _num_experts(hf_config),
            "moe_intermediate_size": _expert_size(hf_config),
            **_clamped_swiglu(hf_config, family.fields),
            "norm_topk_prob": getattr(hf_config, "norm_topk_prob", True),
            "mlp_only_layers": tuple(getattr(hf_config, "mlp_only_layers", None) or ()),
        }
        for f in fields(cls):
            if f.name not in values:
                values[f.name] = getattr(hf_config, f.name, f.default)
        values["hidden_act"] = getattr(hf_config, "hidden_activation", values["hidden_act"])
        if hasattr(hf_config, "use_bias"):  # Starcoder2's, of all linear layers
            values["attention_bias"] = values["mlp_bias"] = hf_config.use_bias
        config = cls(**values)
        config._check()
        return config

    @classmethod
    def from_transformers(cls, hf_config: "PretrainedConfig") -> "ModelConfig":
        """Of a model that transformers' own module runs, whose configuration may be any.

        Raises:
            ArgumentError: a field that the engine needs is missing or not a number.
        """
        text = hf_config.get_text_config(decoder=True)

        def size(name: str, default: int | None = None) -> int:
            try:
                value = getattr(text, name, None) or default
            except RuntimeError:  # it differs from layer to layer
                value = default
            return check_integer(f"the model's {name}", value, minimum=1)

        hidden_size, num_heads = size("hidden_size"), size("num_attention_heads", 1)
        head_dim = size("head_dim", hidden_size // num_heads)
        return cls(
            architectures=tuple(hf_config.architectures or ()),
            dtype=str(hf_config.dtype).removeprefix("torch.") if hf_config.dtype else None,
            vocab_size=size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=0,
            num_hidden_layers=size("num_hidden_layers"),
            num_attention_heads=num_heads,
            num_key_value_heads=size("num_key_value_heads", num_heads),
            head_dim=head_dim + head_dim % 2,  # only an estimate: the cache follows the layers
            rms_norm_eps=0.0,
            initializer_range=getattr(text, "initializer_range", None) or 0.02,
            rope_parameters={},
            max_positions=_max_positions_of_any(text),
            rope_limit=None,
            full_attention_limit=None,
            quantization=None,
            layer_windows=(None,) * size("num_hidden_layers"),
            eos_token_id=hf_config.eos_token_id,
            uses_transformers=True,
            tp_plan=getattr(text, "base_model_tp_plan", None),
        )

    def _check(self) -> None:
        check_integer("the model's longest sequence", self.max_positions, 1, MAX_POSITIONS)
        check_integer("the model's head_dim", self.head_dim, minimum=1)
        if self.head_dim % 2 != 0:
            raise ArgumentError(f"the model's head_dim must be even, got {self.head_dim}")
        for index in range(self.num_hidden_layers):
            if (rope := self.rope_of(index)) is not None:
                check_pairs(rope, self.head_dim)
        # Nemotron's class has no default.
        check_integer("the model's num_key_value_heads", self.num_key_value_heads, minimum=1)
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ArgumentError(
                f"the model's num_attention_heads ({self.num_attention_heads}) must be a multiple "
                f"of its num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.has_delta_nets:
            self._check_delta_nets()
        if self.num_experts:
            name = "the model's num_experts_per_tok"
            check_integer(name, self.num_experts_per_tok, 1, self.num_experts)
            name, number = "the model's experts of all layers", self.num_experts
            check_integer(name, self.num_hidden_layers * number, 1, MAX_EXPERTS_OF_ALL_LAYERS)

    def _check_delta_nets(self) -> None:
        if self.linear_num_value_heads % self.linear_num_key_heads != 0:
            raise ArgumentError(
                f"the model's linear_num_value_heads ({self.linear_num_value_heads}) must be a "
                f"multiple of its linear_num_key_heads ({self.linear_num_key_heads})"
            )
        if self.is_delta_net(self.num_hidden_layers - 1):
            raise ArgumentError(
                "the model's last layer must have full attention, got layer_types that end with "
                "'linear_attention'"
            )

    @property
    def has_delta_nets(self) -> bool:
        """Whether some layers are gated delta nets, with a state instead of a KV cache."""
        return any(map(self.is_delta_net, range(self.num_hidden_layers)))

    def is_delta_net(self, index: int) -> bool:
        """Whether layer `index` is a gated delta net."""
        return self.linear_num_key_heads > 0 and self.layer_types[index] == "linear_attention"

    def check_ranks(self, size: int) -> None:
        """ArgumentError if the model cannot be divided over `size` ranks."""
        if self.uses_transformers:
            if size > 1:
                check_plan(self.tp_plan or {}, self.architectures[0], size)
            return
        names = ["num_attention_heads", "intermediate_size"]
        num_kv_heads = self.num_key_value_heads
        if self.num_experts:
            names += ["moe_intermediate_size", "shared_expert_intermediate_size"]
        if self.has_delta_nets:
            names += ["linear_num_key_heads", "linear_num_value_heads"]
        for name in names:
            value = getattr(self, name)
            if value % size != 0:
                raise ArgumentError(
                    f"tensor_parallel_size ({size}) must divide the model's {name} ({value})"
                )
        if num_kv_heads % size != 0 and size % num_kv_heads != 0:
            raise ArgumentError(
                f"tensor_parallel_size ({size}) must divide, or be a multiple of, the model's "
                f"num_key_value_heads ({num_kv_heads})"
            )

    def rope_of(self, index: int) -> "RopeParameters | None":
        """The rotary embeddings of layer `index`; None: it has none."""
        if self.no_rope_layers and not self.no_rope_layers[index]:
            return None
        by_type: Any = self.rope_parameters
        return by_type[self.layer_types[index]] if "full_attention" in by_type else by_type

    def is_sparse(self, index: int) -> bool:
        """Whether layer `index` has experts; the others have a dense MLP."""
        is_dense = not self.num_experts or index in self.mlp_only_layers
        return not is_dense and (index + 1) % self.decoder_sparse_step == 0


def _layer_windows(hf_config: "PretrainedConfig", known: tuple[str, ...]) -> tuple[int | None, ...]:
    """Each layer's window, if the family has one, as transformers' model of it sees it.

    `layer_types` says which layers have it; in families without that field all do.
    """
    num_layers = hf_config.num_hidden_layers
    window = getattr(hf_config, "sliding_window", None) if "sliding_window" in known else None
    if "layer_types" not in known:
        return (window,) * num_layers
    layer_types = hf_config.layer_types
    _check_entries("layer_types", layer_types, num_layers)
    is_windowed = [kind == "sliding_attention" for kind in layer_types[:num_layers]]
    if any(is_windowed) and not window:
        raise ArgumentError("the model's sliding_window must be set: its layer_types name it")
    return tuple(window if windowed else None for windowed in is_windowed)


def _no_rope_layers(hf_config: "PretrainedConfig", family: Family) -> tuple[int, ...]:
    """`ModelConfig.no_rope_layers`, which the config names or its layer types tell."""
    has_window = getattr(hf_config, "sliding_window", None) is not None
    if family.rope_layers == "windowed" or (
        family.rope_layers == "windowed, if any" and has_window
    ):
        return tuple(int(kind == "sliding_attention") for kind in hf_config.layer_types)
    if "no_rope_layers" not in family.fields:
        return ()
    layers = tuple(hf_config.no_rope_layers)
    _check_entries("no_rope_layers", layers, hf_config.num_hidden_layers)
    return layers


def _check_entries(name: str, entries: Sequence[object], num_layers: int) -> None:
    """ArgumentError if a field that has an entry for each layer has too few."""
    if len(entries) < num_layers:
        raise ArgumentError(
            f"the model's {name} must have {num_layers} entries, one for each layer, got "
            f"{len(entries)}"
        )


def _num_experts(hf_config: "PretrainedConfig") -> int:
    """The experts of a sparse layer, by either name that transformers has for them."""
    number: int = getattr(hf_config, "num_experts", 0)
    return number or getattr(hf_config, "num_local_experts", 0)


def _clamped_swiglu(hf_config: "PretrainedConfig", known: tuple[str, ...]) -> dict[str, float]:
    """gpt-oss's constants, which neither its files nor older configuration classes name."""
    defaults = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    return {name: getattr(hf_config, name, defaults[name]) for name in defaults if name in known}


def _expert_size(hf_config: "PretrainedConfig") -> int:
    """The features of an expert; families without dense layers call them intermediate_size."""
    size: int = getattr(hf_config, "moe_intermediate_size", 0)
    return size or getattr(hf_config, "intermediate_size", 0)


def _quantization(hf_config: "PretrainedConfig") -> Quantization | None:
    """How the checkpoint stores its weights; None: as they are."""
    fields = getattr(hf_config, FIELD, None)
    return parse_quantization(fields, "the model's configuration") if fields else None


def _attention_scale(hf_config: "PretrainedConfig") -> float | None:
    """Gemma's is 1 / sqrt(`query_pre_attn_scalar`), Granite's `attention_multiplier`."""
    scalar = getattr(hf_config, "query_pre_attn_scalar", None)
    if scalar is not None:
        return float(scalar**-0.5)
    return getattr(hf_config, "attention_multiplier", None)


def _logits_multiplier(hf_config: "PretrainedConfig") -> float:
    """Cohere's `logit_scale` multiplies, Granite's `logits_scaling` divides."""
    scale: float = getattr(hf_config, "logit_scale", 1.0)
    return scale / getattr(hf_config, "logits_scaling", 1.0)


def _first_of(hf_config: "PretrainedConfig", names: tuple[str, ...]) -> Any:
    return next(getattr(hf_config, name) for name in names if hasattr(hf_config, name))


def _max_positions_of_any(text_config: "PretrainedConfig") -> int:
    """The same of a configuration of any family; MAX_POSITIONS if it names no limit.

    Rotations that change with a batch's longest sequence hold up to the length that they had in
    training.
    """
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    original = "original_max_position_embeddings"
    limits = [getattr(text_config, name, None) for name in names]
    rope = getattr(text_config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            limits += (parameters.get(original), getattr(text_config, original, None))
    found = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min([*found, MAX_POSITIONS])


def _full_attention_limit(
    hf_config: "PretrainedConfig", known: tuple[str, ...]
) -> tuple[int, str] | None:
    """Tokens of the longest sequence that full attention is right for, and why; None: any.

    Dual chunk attention (An et al. 2024, arXiv 2402.17463) is full attention within the first
    chunk.
    """
    limits = []
    window = getattr(hf_config, "sliding_window", None)
    if window is not None and "sliding_window" not in known:
        limits.append((window, "sliding_window"))
    chunks = getattr(hf_config, "dual_chunk_attention_config", None)
    if chunks is not None:
        first_chunk = chunks["chunk_size"] - chunks["local_size"]
        limits.append((first_chunk, "first chunk of dual chunk attention"))
    return min(limits, default=None)
