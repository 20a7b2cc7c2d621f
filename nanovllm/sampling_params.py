"""How one request is sampled and when it stops."""

from dataclasses import dataclass

from nanovllm.errors import check_bool, check_integer, check_number

GREEDY_TEMPERATURE = 1e-5  # below this a request is greedy, as in vLLM
MAX_FLOAT32 = 3.4028234663852886e38  # beyond it a float32, as the device keeps it, is infinite


@dataclass
class SamplingParams:
    """Sampling parameters of a request.

    Args:
        temperature: divides the logits; finite and >= 0. Below 1e-5 (so also 0) is greedy decoding.
        max_tokens: completion tokens at most, an EOS token counted; >= 1, or None for as many as
            `max_model_len` allows.
        ignore_eos: go on past EOS tokens.

    Raises:
        ArgumentError: a value is of the wrong type or outside its range.
    """

    temperature: float = 1.0
    max_tokens: int | None = 64
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self.temperature = check_number(
            "temperature", self.temperature, "finite and >= 0", lambda t: 0 <= t <= MAX_FLOAT32
        )
        if self.temperature < GREEDY_TEMPERATURE:
            self.temperature = 0.0
        if self.max_tokens is not None:
            self.max_tokens = check_integer("max_tokens", self.max_tokens, minimum=1)
        check_bool("ignore_eos", self.ignore_eos)
