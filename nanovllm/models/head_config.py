"""What is on top of a decoder in place of an LM head: a classification head, as config.json says.

`ARCHITECTURES` of `models.registry` are causal language models. The names below end differently and
stand for the same decoder with another head, so a new family has these heads from the beginning.
The heads of the first two are those of transformers' GenericForSequenceClassification and
GenericForTokenClassification; those of the others are in the files of Qwen2.5-Math-RM and
Qwen2.5-Math-PRM (Zhang et al. 2025, arXiv 2501.07301).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ArgumentError, shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CAUSAL_LM = "ForCausalLM"
DECODER = "Model"  # saved alone, as embedding models are: its files may lack an LM head
SEQUENCE, TOKEN = "sequence", "token"
REWARD, PROCESS_REWARD = "reward", "process_reward"
ENDINGS = {"ForSequenceClassification": SEQUENCE, "ForTokenClassification": TOKEN, DECODER: None}
# Where a family has images too, its plain names stand for all of it, and these for the text alone.
TEXT_DECODERS = {
    "Gemma3Text": "Gemma3",
    "Qwen3_5Text": "Qwen3_5",
    "Qwen3_5MoeText": "Qwen3_5Moe",
}
REWARD_MODELS = {"Qwen2ForRewardModel": REWARD, "Qwen2ForProcessRewardModel": PROCESS_REWARD}
NUM_REWARDS = {REWARD: 1, PROCESS_REWARD: 2}  # config.json does not say it
# What a head may have beside a linear layer, by config.json's `problem_type`: the function of the
# loss that it was trained with (transformers' ForSequenceClassificationLoss).
IDENTITY, SIGMOID, SOFTMAX = "identity", "sigmoid", "softmax"
ACTIVATIONS = {
    "regression": IDENTITY,
    "single_label_classification": None,  # by the number of labels
    "multi_label_classification": SIGMOID,
    None: None,
}


@dataclass(frozen=True)
class HeadConfig:
    """A classification head.

    Attributes:
        kind: SEQUENCE (one result for a prompt), TOKEN (one for each token), REWARD or
            PROCESS_REWARD (the same, by two layers).
        labels: their names; a result has a number for each.
        has_bias: whether the linear layer has one.
        activation: makes results of the head's logits: IDENTITY, SIGMOID, SOFTMAX; None: SOFTMAX
            of several numbers, SIGMOID of one.
        score_activation: the class that a cross-encoder's files name for scores; None: none.
    """

    kind: str
    labels: tuple[str, ...]
    has_bias: bool
    activation: str | None = None
    score_activation: str | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """vLLM's names of what a model with this head answers; the first is its own."""
        return ("classify", "token_classify") if self.kind == SEQUENCE else ("token_classify",)

    def num_weights(self, hidden_size: int) -> int:
        """The weights of its matrices."""
        rows = len(self.labels) + (hidden_size if self.kind in NUM_REWARDS else 0)
        return rows * hidden_size


def split_architecture(name: str) -> tuple[str, str | None]:
    """The causal language model with the same decoder, and the kind of the head; None: that one."""
    if name in REWARD_MODELS:
        return name.partition("For")[0] + CAUSAL_LM, REWARD_MODELS[name]
    for ending, kind in ENDINGS.items():
        decoder = name.removesuffix(ending)
        if decoder != name and decoder not in TEXT_DECODERS.values():
            return TEXT_DECODERS.get(decoder, decoder) + CAUSAL_LM, kind
    return name, None


def causal_lm_of(name: str) -> str:
    """The causal language model with the same decoder as an architecture."""
    return split_architecture(name)[0]


def head_config(kind: str, hf_config: "PretrainedConfig") -> HeadConfig:
    """The head of a checked configuration.

    Raises:
        ArgumentError: fields do not fit each other.
    """
    labels = {int(index): label for index, label in (hf_config.id2label or {}).items()}
    names = tuple(labels[index] for index in sorted(labels))
    if kind in NUM_REWARDS:
        names = tuple(f"LABEL_{index}" for index in range(NUM_REWARDS[kind]))
    sentence_transformers = getattr(hf_config, "sentence_transformers", None) or {}
    older = getattr(hf_config, "sbert_ce_default_activation_function", None)
    return HeadConfig(
        kind,
        names,
        has_bias=kind == TOKEN and getattr(hf_config, "token_classification_bias", True),
        activation=ACTIVATIONS[hf_config.problem_type],
        score_activation=sentence_transformers.get("activation_fn", older),
    )


def check_labels(name: str, value: Any) -> Any:
    """`id2label` of config.json: the names of labels 0, 1, ... by their numbers."""
    is_dict = isinstance(value, dict) and all(isinstance(label, str) for label in value.values())
    if not is_dict or {str(key) for key in value} != {str(i) for i in range(len(value))}:
        raise ArgumentError(f"{name} must name the labels 0, 1, ..., got {shown(value)}")
    if not value:
        raise ArgumentError(f"{name} must name a label at least, got {shown(value)}")
    return value


def check_problem_type(name: str, value: Any) -> str | None:
    """`problem_type` of config.json."""
    if not isinstance(value, (str, type(None))) or value not in ACTIVATIONS:
        supported = ", ".join(filter(None, ACTIVATIONS))
        raise ArgumentError(f"{name} {shown(value)} is not supported; supported: {supported}")
    return value


def check_activation(name: str, value: Any) -> Any:
    """The name of a class of torch.nn for the scores of a cross-encoder, or a dict with it."""
    function = value.get("activation_fn") if isinstance(value, dict) else value
    if not isinstance(function, (str, type(None))):
        raise ArgumentError(f"{name} must name a class of torch.nn, got {shown(value)}")
    return value
