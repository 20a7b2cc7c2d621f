"""Which layers of a mixture of experts are sparse, and what its config.json must hold."""

from typing import TYPE_CHECKING

from nanovllm.errors import ArgumentError, check_integer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MAX_EXPERTS_OF_ALL_LAYERS = 2**17  # each has three weights with a shard


def check_experts(hf_config: "PretrainedConfig", tensor_parallel_size: int) -> None:
    """ArgumentError for numbers of experts that no model can have; a dense model passes."""
    if not hasattr(type(hf_config)(), "num_experts_per_tok"):
        return  # the family has none, whatever its config.json has
    check_integer(
        "the model's num_experts_per_tok",
        hf_config.num_experts_per_tok,
        minimum=1,
        maximum=hf_config.num_experts,
    )
    num_experts = hf_config.num_hidden_layers * hf_config.num_experts
    check_integer("the model's experts of all layers", num_experts, 1, MAX_EXPERTS_OF_ALL_LAYERS)
    if hf_config.moe_intermediate_size % tensor_parallel_size != 0:
        raise ArgumentError(
            f"tensor_parallel_size ({tensor_parallel_size}) must divide the model's "
            f"moe_intermediate_size ({hf_config.moe_intermediate_size})"
        )


def is_sparse(hf_config: "PretrainedConfig", index: int) -> bool:
    """Whether layer `index` has experts; the others have a dense MLP."""
    is_dense = index in hf_config.mlp_only_layers
    return not is_dense and (index + 1) % hf_config.decoder_sparse_step == 0
