"""What sets one model family apart from the others, as far as its config.json goes."""

from typing import Literal, NamedTuple

QUANTIZATION = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "modelopt")


class Family(NamedTuple):
    """A model family that this library computes itself.

    Attributes:
        model_type: of its config.json.
        module: with a class of the architecture's name, which `families.model_class` imports.
        fields: what it computes of config.json that other families refuse or leave out. Each has
            its check in `config_fields.FAMILY_FIELDS`.
        activations: values that `hidden_act` may have, the default first.
        norm_weight_offset: what its checkpoints leave out of norm weights, which are float32 here;
            None: norm weights are of the model's dtype, to which a norm is rounded before them.
        has_rope_by_layer_type: whether its rotary embeddings differ by layer type.
        rope_layers: which layers have rotary embeddings, where config.json does not say so: those
            with a window, or those with a window unless no window is set at all.
        has_mrope: whether rope parameters may have sections for the places of images' tokens.
        has_gated_mlp: whether its MLPs have three matrices, and not two.
        quantization: kinds of quantised checkpoints that are read, by config.json's `quant_method`.
    """

    model_type: str
    module: str
    fields: tuple[str, ...] = ()
    activations: tuple[str, ...] = ("silu",)
    norm_weight_offset: float | None = None
    has_rope_by_layer_type: bool = False
    rope_layers: Literal["all", "windowed", "windowed, if any"] = "all"
    has_mrope: bool = False
    has_gated_mlp: bool = True
    quantization: tuple[str, ...] = QUANTIZATION
