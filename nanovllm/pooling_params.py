"""What becomes of a prompt's last hidden state, for requests that generate nothing."""

from dataclasses import dataclass

from nanovllm.compat import POOLING_NAMES, explain_fields
from nanovllm.parameters import (
    at_least,
    boolean,
    check_values,
    document,
    parameter,
    parameters,
)


@dataclass
class PoolingParams:
    """How `LLM.embed` turns the last token's final hidden state into an embedding.

    {parameters}

    Raises:
        ArgumentError: a value is of the wrong type, below 1 or above 2^31 - 1.
    """

    dimensions: int | None = parameter(
        None,
        at_least(1),
        "keep only so many leading numbers, as models trained for it allow (Matryoshka "
        "representation learning, Kusupati et al. 2022, arXiv 2205.13147). None: all.",
    )
    use_activation: bool | None = parameter(
        None, boolean, "scale what is kept to length 1. None is True."
    )

    def __post_init__(self) -> None:
        check_values(vars(self), parameters(PoolingParams))


document(PoolingParams, PoolingParams)
explain_fields(PoolingParams, POOLING_NAMES, {})
