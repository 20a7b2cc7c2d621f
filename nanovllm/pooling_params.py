"""What becomes of a prompt's hidden states, for requests that generate nothing."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from nanovllm.compat import (
    POOLER_NAMES,
    POOLER_OFF,
    POOLING_HINTS,
    POOLING_NAMES,
    POOLING_OFF,
    explain_fields,
)
from nanovllm.errors import ArgumentError, shown
from nanovllm.parameters import (
    Check,
    at_least,
    boolean,
    check_values,
    choice,
    document,
    finite_number,
    parameter,
    parameters,
)
from nanovllm.validation import check_integer

# vLLM's names of what can be asked of a model by pooling; `score` has a method of its own.
TASKS = ("embed", "classify", "token_embed", "token_classify")
SEQUENCE_TYPES = ("LAST", "CLS", "MEAN")
TOKEN_TYPES = ("ALL", "STEP")
OTHER_NAMES = {"FIRST": "CLS", "first": "CLS"} | {
    name.lower(): name for name in SEQUENCE_TYPES + TOKEN_TYPES
}


def _check_token_ids(name: str, value: Any) -> list[int]:
    """A new list of indices."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ArgumentError(f"{name} must be a list of indices, got {shown(value)}")
    return [check_integer(name, index, 0, 2**31 - 1) for index in value]


RETURNED_TOKEN_IDS = Check("list of indices", _check_token_ids)


@dataclass
class PoolingParams:
    """What a call of `embed`, `encode`, `classify`, `reward` or `score` makes of hidden states.

    {parameters}

    Raises:
        ArgumentError: a value is of the wrong type, or outside its range.
    """

    dimensions: int | None = parameter(
        None,
        at_least(1),
        "keep only so many leading numbers of an embedding, as models trained for it allow "
        "(Matryoshka representation learning, Kusupati et al. 2022, arXiv 2205.13147). None: those "
        "of `pooler_config`, else all.",
    )
    use_activation: bool | None = parameter(
        None,
        boolean,
        "scale an embedding to length 1; make probabilities of a head's logits, by softmax, or "
        "sigmoid for a single label. None: as `pooler_config` or the model's files say, else True.",
    )
    task: str | None = parameter(
        None, choice(*TASKS), "what is asked of the model: `pooling_task` of `encode`."
    )
    step_tag_id: int | None = parameter(
        None,
        at_least(0),
        'with pooling type "STEP" results of the tokens with this id alone. None: that of '
        "`pooler_config`, else results of all tokens.",
    )
    returned_token_ids: list[int] | None = parameter(
        None,
        RETURNED_TOKEN_IDS,
        'with pooling type "STEP" these of a result\'s numbers alone, taken before the activation. '
        "None: those of `pooler_config`, else all.",
    )
    skip_reading_prefix_cache: bool | None = parameter(
        None,
        boolean,
        'compute the whole prompt. None: only for pooling types other than "LAST", which need the '
        "hidden state of every token.",
    )

    def __post_init__(self) -> None:
        check_values(vars(self), parameters(PoolingParams))

    def clone(self) -> "PoolingParams":
        """A copy that shares nothing with this one."""
        return deepcopy(self)


@dataclass
class PoolerConfig:
    """How the engine pools where a request does not say: `LLM(..., pooler_config=...)`.

    {parameters}

    Raises:
        ArgumentError: a value is of the wrong type, outside its range, or contradicts another.
    """

    task: str | None = parameter(
        None,
        choice(*TASKS),
        "the one task that the engine answers, which `encode` then does without a `pooling_task`. "
        'With none all tasks of the model are answered. With "token_embed" `score` takes '
        '`method="late-interaction"`.',
    )
    pooling_type: str | None = parameter(
        None,
        choice(*SEQUENCE_TYPES, *TOKEN_TYPES, aliases=OTHER_NAMES),
        'what is pooled. Of a prompt: the hidden state of its "LAST" token, of its first ("CLS"), '
        'or their "MEAN". Of tokens: those of "ALL", or of those that end a "STEP". It stands for '
        "one of the next two.",
    )
    seq_pooling_type: str | None = parameter(
        None,
        choice(*SEQUENCE_TYPES, aliases=OTHER_NAMES),
        "what makes one result of a prompt. None: what the model's files for sentence-transformers "
        'say, else "LAST".',
    )
    tok_pooling_type: str | None = parameter(
        None,
        choice(*TOKEN_TYPES, aliases=OTHER_NAMES),
        'which tokens have results of their own. None: "ALL", or "STEP" of a process reward model.',
    )
    use_activation: bool | None = parameter(
        None, boolean, "as of `PoolingParams`. None: as the model's files say, else True."
    )
    normalize: bool | None = parameter(
        None, boolean, "an older name of `use_activation`, for embeddings."
    )
    activation: bool | None = parameter(
        None, boolean, "an older name of `use_activation`, for classification."
    )
    softmax: bool | None = parameter(
        None, boolean, "an older name of `use_activation`, for classification."
    )
    dimensions: int | None = parameter(None, at_least(1), "as of `PoolingParams`.")
    logit_mean: float | None = parameter(
        None, finite_number, "what a head's logits are lowered by before the activation."
    )
    logit_sigma: float | None = parameter(
        None,
        finite_number,
        "what they are divided by after that: Platt's scaling of scores. It may not be 0.",
    )
    step_tag_id: int | None = parameter(None, at_least(0), "as of `PoolingParams`.")
    returned_token_ids: list[int] | None = parameter(
        None, RETURNED_TOKEN_IDS, "as of `PoolingParams`."
    )

    def __post_init__(self) -> None:
        check_values(vars(self), parameters(PoolerConfig))
        self._check_agreement("pooling_type", "seq_pooling_type", "tok_pooling_type", both=True)
        self._check_agreement("use_activation", "normalize", "activation", "softmax")
        if self.logit_sigma == 0:
            raise ArgumentError("logit_sigma must not be 0")

    def _check_agreement(self, name: str, *others: str, both: bool = False) -> None:
        """ArgumentError if names of one thing differ, or with `both` if the first is not alone."""
        value = getattr(self, name)
        for other in others:
            second = getattr(self, other)
            if second is not None and value is not None and (both or second != value):
                raise ArgumentError(
                    f"{name}={value!r} and {other}={second!r} are names of one thing: give one"
                )
            if not both:
                name, value = (name, value) if second is None else (other, second)

    @property
    def sequence_type(self) -> str | None:
        """What makes one result of a prompt, if it is said."""
        given = self.pooling_type if self.pooling_type in SEQUENCE_TYPES else None
        return given or self.seq_pooling_type

    @property
    def token_type(self) -> str | None:
        """Which tokens have results of their own, if it is said."""
        given = self.pooling_type if self.pooling_type in TOKEN_TYPES else None
        return given or self.tok_pooling_type

    @property
    def is_activated(self) -> bool | None:
        """`use_activation` by any of its names."""
        given = (self.use_activation, self.normalize, self.activation, self.softmax)
        return next((value for value in given if value is not None), None)


def as_pooler_config(name: str, value: Any) -> PoolerConfig:
    """A checked copy of a PoolerConfig, or one made of a dict; ArgumentError for anything else."""
    if isinstance(value, PoolerConfig):
        return replace(value)
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{name} must be a PoolerConfig or a dict, got {shown(value)}")
    try:
        return PoolerConfig(**value)
    except (ArgumentError, TypeError) as error:
        raise ArgumentError(f"{name}: {error}") from error


document(PoolingParams, PoolingParams)
explain_fields(PoolingParams, POOLING_NAMES, POOLING_HINTS, POOLING_OFF)
document(PoolerConfig, PoolerConfig)
explain_fields(PoolerConfig, POOLER_NAMES, {}, POOLER_OFF)
