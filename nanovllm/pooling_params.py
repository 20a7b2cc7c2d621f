"""What becomes of a prompt's last hidden state, for requests that generate nothing."""

from dataclasses import dataclass

from nanovllm.compat import POOLING_NAMES, explain_fields
from nanovllm.validation import check_at_least, check_bool


@dataclass
class PoolingParams:
    """How `LLM.embed` turns the last token's final hidden state into an embedding.

    Args:
        dimensions: keep only so many leading numbers, as models trained for it allow (Matryoshka
            representation learning, Kusupati et al. 2022, arXiv 2205.13147); None: all.
        use_activation: scale what is kept to length 1; None is True.

    Raises:
        ArgumentError: a value is of the wrong type, below 1 or above 2^31 - 1.
    """

    dimensions: int | None = None
    use_activation: bool | None = None

    def __post_init__(self) -> None:
        if self.dimensions is not None:
            self.dimensions = check_at_least("dimensions", self.dimensions, minimum=1)
        if self.use_activation is not None:
            check_bool("use_activation", self.use_activation)


explain_fields(PoolingParams, POOLING_NAMES, {})
