"""The class of a model's family, imported when it is wanted."""

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from nanovllm.config import Config
from nanovllm.layers.context import ModelContext
from nanovllm.models.base import CausalLM
from nanovllm.models.head_config import split_architecture
from nanovllm.models.heads import new_head
from nanovllm.models.loader import load_model, merged_modules, unpack_unconverted
from nanovllm.models.packed_layers import finish_layers_at_once
from nanovllm.models.quantized_checkpoint import unconverted_modules
from nanovllm.models.registry import family_of, first_supported
from nanovllm.models.weight_offload import with_layers_on_host

if TYPE_CHECKING:
    from nanovllm.models.transformers_model import TransformersForCausalLM

Model: TypeAlias = "CausalLM | TransformersForCausalLM"


def new_model(config: Config, context: ModelContext) -> Model:
    """The model of one rank, its weights not loaded.

    In one with a classification head, `score`, the embedding stands in for the LM head that it does
    not have: tables and the warm-up need one of the vocabulary's size. With `cpu_offload_gb` the
    layers' parameters are in host memory, for `weight_offload.offload_weights`.
    """
    model_config = config.model_config
    quantization = model_config.quantization
    if not model_config.uses_transformers:
        family = model_class(model_config.architectures)
        if config.cpu_offload_bytes:
            family = with_layers_on_host(family)
        if model_config.head is None:
            model = family(model_config, context)
        else:
            model = family(replace(model_config, tie_word_embeddings=True), context)
            model.score = new_head(model_config.head, model_config.hidden_size, context)
        if quantization is not None and config.load_format == "auto":
            merged = merged_modules(model)
            unpack_unconverted(model, unconverted_modules(config.model, quantization, merged))
        if not config.cpu_offload_bytes:  # a layer's weights are there until the layer ends
            finish_layers_at_once(model.model, context)
        return model
    from nanovllm.models.transformers_model import TransformersForCausalLM

    return TransformersForCausalLM(config.hf_config, model_config.vocab_size, context)


def load_weights(model: Model, config: Config) -> bool:
    """Fill every parameter of `model`; returns and raises as `load_model`."""
    std = config.model_config.initializer_range
    if isinstance(model, CausalLM):
        quantization = config.model_config.quantization
        return load_model(model, config.model, config.load_format, std, quantization)
    return model.load(config.model, config.load_format, std)


def model_class(architectures: tuple[str, ...]) -> type[CausalLM]:
    """The class whose decoder runs the first supported name of `architectures`."""
    module = importlib.import_module(family_of(architectures).module)
    name, _ = split_architecture(str(first_supported([*architectures])))
    return getattr(module, name)
