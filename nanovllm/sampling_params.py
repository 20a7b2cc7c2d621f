"""How one request is sampled and when it stops.

Every value is checked and made plain Python when a `SamplingParams` is made. They are made by the
thousand, so a field that was left alone costs no check.
"""

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, fields, replace
from numbers import Integral
from typing import Any

from nanovllm.compat import (
    BEAM_NAMES,
    SAMPLING_HINTS,
    SAMPLING_NAMES,
    SAMPLING_OFF,
    STRUCTURED_HINTS,
    STRUCTURED_NAMES,
    STRUCTURED_OFF,
    explain_fields,
)
from nanovllm.compat import RequestOutputKind as RequestOutputKind  # where vLLM's scripts import it
from nanovllm.errors import ArgumentError, shown, shown_error
from nanovllm.parameters import (
    Check,
    at_least,
    boolean,
    check_values,
    clamped,
    document,
    finite_number,
    integer,
    number,
    optional,
    parameter,
    parameters,
)
from nanovllm.validation import (
    MAX_INT32,
    check_at_least,
    check_bool,
    check_integer,
    check_number,
    check_unicode,
    clamp_int32,
)

# (completion's token ids, logits [V]) -> logits, or with the prompt's token ids before.
RequestLogitsProcessor = Callable[..., Any]

GREEDY_TEMPERATURE = 1e-5  # below this a request is greedy, as in vLLM
MAX_FLOAT32 = 3.4028234663852886e38  # beyond it a float32, as the device keeps it, is infinite
MIN_FLOAT32 = 1.1754943508222875e-38  # smallest normal one; below it is 0 on some devices
MAX_LOGIT_BIAS = 100.0
MAX_COMPLETIONS = 16384
MAX_STRINGS = 10000  # each is looked for after every token
MAX_LOGPROB_TOKEN_IDS = 128  # vLLM's limit
MAX_CHOICES = 2_000_000  # as many as the characters of all choices may be


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What a completion must look like; exactly one of the first five. Immutable and hashable.

    Args:
        json: a JSON schema: a dict, its JSON text or a pydantic model class. Kept as JSON text.
        regex: a regular expression that the whole completion matches.
        choice: strings, one of which the completion is. Kept as a tuple.
        grammar: a context-free grammar in EBNF (`root ::= ...`) or in Lark's form (`start: ...`).
        json_object: True: any JSON object.
        disable_any_whitespace: no whitespace in JSON but what its strings have; a schema that has
            "x-guidance" says itself where there is some.
        structural_tag: not offered: ArgumentError.

    Raises:
        ArgumentError: none or several are given, or a value is of the wrong type or malformed.
    """

    json: str | dict[str, Any] | type | None = None
    regex: str | None = None
    choice: list[str] | tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        if self.structural_tag is not None:
            raise ArgumentError(
                "structural_tag is an option of vLLM that nanovllm does not have; use json, regex, "
                "choice, grammar or json_object"
            )
        if self.json_object is not None:
            check_bool("json_object", self.json_object)
        check_bool("disable_any_whitespace", self.disable_any_whitespace or False)
        names = ("json", "regex", "choice", "grammar")
        given = [name for name in names if getattr(self, name) is not None]
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            raise ArgumentError(
                "structured outputs need exactly one of json, regex, choice, grammar and "
                f"json_object=True, got {' and '.join(given) or 'none'}"
            )
        if self.disable_any_whitespace and self.json_object:
            vars(self).update(json={"type": "object"}, json_object=None)
        if self.json is not None:
            text = _json_text(self.json)
            if self.disable_any_whitespace:
                text = _without_whitespace(text)
            object.__setattr__(self, "json", text)
        if self.choice is not None:
            choices = _check_strings("choice", self.choice, MAX_CHOICES)
            object.__setattr__(self, "choice", tuple(choices))
            if not self.choice:
                raise ArgumentError("choice must hold at least one string, got none")
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ArgumentError(
                    f"{name} must be a string that is not empty, got {shown(value)}"
                )
            if value is not None:
                check_unicode(name, value)


@dataclass(frozen=True)
class RepetitionDetectionParams:
    """When a completion counts as stuck in a loop, with vLLM's names; immutable.

    It ends when its last `min_count` pieces of k tokens are equal, for a k from `min_pattern_size`
    (0: 1) to `max_pattern_size`.

    Args:
        max_pattern_size: the largest k; 0: nothing is detected.
        min_pattern_size: the smallest k.
        min_count: how often a piece stands in a row, at least 2.

    Raises:
        ArgumentError: a value is of the wrong type or outside its range.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        most = check_at_least("max_pattern_size", self.max_pattern_size, 0)
        least = check_at_least("min_pattern_size", self.min_pattern_size, 0)
        count = check_at_least("min_count", self.min_count, 2 if most else 0)
        if least > most:
            raise ArgumentError(
                f"min_pattern_size must be <= max_pattern_size ({most}), got {least}"
            )
        vars(self).update(max_pattern_size=most, min_pattern_size=least, min_count=count)


def _check_seed(name: str, value: Any) -> int | None:
    seed = check_integer(name, value, minimum=-(2**63), maximum=2**64 - 1)
    return None if seed == -1 else seed


def _check_strings(name: str, value: Any, most: int = MAX_STRINGS) -> list[str]:
    """A string or strings of valid Unicode, none of them empty, as a new list."""
    strings = [value] if isinstance(value, str) else _as_list(name, value, "strings")
    if len(strings) > most:
        raise ArgumentError(
            f"{name} must hold at most {most} strings, got {len(strings)}: {shown(strings)}"
        )
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ArgumentError(f"{name} must hold strings that are not empty, got {shown(string)}")
        check_unicode(name, string)
    return strings


def _check_token_ids(name: str, value: Any) -> list[int]:
    """Token ids of 0 to 2^31 - 1 as a new list; the vocabulary's end is not known here."""
    token_ids = _as_list(name, value, "token ids")
    if not token_ids:
        return token_ids
    is_plain = set(map(type, token_ids)) <= {int}  # a fast way for many
    if is_plain and 0 <= min(token_ids) <= max(token_ids) <= MAX_INT32:
        return token_ids
    return [check_at_least(f"{name}: a token id", token_id, minimum=0) for token_id in token_ids]


def _check_allowed_token_ids(name: str, value: Any) -> list[int]:
    token_ids = _check_token_ids(name, value)
    if not token_ids:
        raise ArgumentError(f"{name} must hold at least one token id, got none; None allows all")
    return token_ids


def _check_budget(name: str, value: Any) -> int | None:
    budget = check_at_least(name, value, minimum=-1)
    return None if budget == -1 else budget


def _check_logprob_token_ids(name: str, value: Any) -> list[int] | None:
    token_ids = _check_token_ids(name, value)
    if len(token_ids) > MAX_LOGPROB_TOKEN_IDS:
        raise ArgumentError(
            f"{name} must hold at most {MAX_LOGPROB_TOKEN_IDS} token ids, got {len(token_ids)}"
        )
    return token_ids or None


def _check_logit_bias(name: str, value: Any) -> dict[int, float] | None:
    """`{token id: bias}` with biases clamped; None if it is empty."""
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{name} must be a dict of token ids and biases, got {shown(value)}")
    biases = {}
    for key, bias in value.items():
        if not (type(key) is int and 0 <= key <= MAX_INT32):  # there may be one for every token
            # JSON has no other keys than strings.
            is_digits = isinstance(key, str) and len(key) <= 20 and key.isascii() and key.isdigit()
            key = check_at_least(f"{name}: a token id", int(key) if is_digits else key, minimum=0)
        if not (type(bias) is float and abs(bias) <= MAX_LOGIT_BIAS):
            bias = check_number(f"{name}[{key}]", bias, "finite", math.isfinite)
            bias = max(-MAX_LOGIT_BIAS, min(bias, MAX_LOGIT_BIAS))
        biases[key] = bias
    return biases or None


def _check_structured_outputs(name: str, value: Any) -> StructuredOutputsParams:
    if not isinstance(value, StructuredOutputsParams):
        raise ArgumentError(f"{name} must be a StructuredOutputsParams, got {shown(value)}")
    return value


def takes_prompt(processor: RequestLogitsProcessor) -> bool:
    """Whether a logits processor takes the prompt's ids too: it has three parameters to give."""
    try:
        declared = inspect.signature(processor).parameters.values()
    except (TypeError, ValueError):  # of a function in C
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in declared) == 3


def _check_logits_processors(name: str, value: Any) -> list[RequestLogitsProcessor] | None:
    processors = _as_list(name, value, "callables")
    for processor in processors:
        if isinstance(processor, type):
            raise ArgumentError(
                f"{name} of a request must be callables, got {shown(processor)}; a class goes into "
                f"LLM(..., {name}=[...])"
            )
        if not callable(processor):
            raise ArgumentError(f"{name} must be callables, got {shown(processor)}")
        try:
            signature = inspect.signature(processor)
        except (TypeError, ValueError):  # of a function in C
            continue
        try:
            signature.bind(*[None] * (3 if takes_prompt(processor) else 2))
        except TypeError as error:
            raise ArgumentError(
                f"{name} must take (token_ids, logits) or (prompt_token_ids, token_ids, logits), "
                f"got {shown(processor)}: {error}"
            ) from None
    return processors or None


def _check_extra_args(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{name} must be a dict, got {shown(value)}")
    return dict(value)


def _check_repetition_detection(name: str, value: Any) -> RepetitionDetectionParams:
    if isinstance(value, RepetitionDetectionParams):
        return value
    if not isinstance(value, Mapping) or value.keys() - {f.name for f in REPETITION_FIELDS}:
        raise ArgumentError(
            f"{name} must be a RepetitionDetectionParams or a dict of its values, got "
            + shown(value)
        )
    return RepetitionDetectionParams(**value)


def _check_output_kind(name: str, value: Any) -> RequestOutputKind:
    if not isinstance(value, RequestOutputKind):
        known = ", ".join(f"RequestOutputKind.{kind.name}" for kind in RequestOutputKind)
        raise ArgumentError(f"{name} must be one of {known}, got {shown(value)}")
    return value


def _check_truncation(name: str, value: Any) -> int:
    if isinstance(value, Integral) and value == -1:
        return check_integer(name, value, minimum=-1)
    return clamp_int32(name, value, minimum=1)


def _as_list(name: str, value: Any, items: str) -> list[Any]:
    if type(value) is list:  # spares the slow look at abstract types
        return value.copy()
    if not isinstance(value, (str, bytes, Mapping)):
        try:
            return list(value.tolist() if hasattr(value, "tolist") else value)
        except Exception:  # of many types: an array on another device, or without data
            pass
    raise ArgumentError(f"{name} must be a list of {items}, got {shown(value)}")


def _json_text(schema: Any) -> str:
    """A JSON schema (dict, text or pydantic model class) as JSON text."""
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        try:
            schema = schema.model_json_schema()
        except Exception as error:  # a field of the model has no JSON schema
            raise ArgumentError(f"json: {shown(schema)} has none: {shown_error(error)}") from error
    if not isinstance(schema, (str, Mapping)):
        raise ArgumentError(
            "json must be a JSON schema: a dict, JSON text or a pydantic model, got "
            + shown(schema)
        )
    try:
        text = schema if isinstance(schema, str) else json.dumps(dict(schema), ensure_ascii=False)
        parsed = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(
            f"json is not a valid JSON schema: {str(error)[:200]}, got {shown(schema)}"
        ) from None
    if not isinstance(parsed, (dict, bool)):
        raise ArgumentError(f"json must hold a JSON object or a boolean, got {shown(schema)}")
    return check_unicode("json", text)


def _without_whitespace(text: str) -> str:
    """The text of a schema whose JSON has no whitespace, unless it says itself what there is."""
    schema = json.loads(text)
    if schema is True:
        schema = {}
    if isinstance(schema, dict):
        schema.setdefault("x-guidance", {"whitespace_flexible": False})
    return json.dumps(schema, ensure_ascii=False)


SHARE = number("in (0, 1]", lambda share: 0 < share <= 1)
REPETITION_FIELDS = fields(RepetitionDetectionParams)
PENALTY = number("in [-2, 2]", lambda penalty: -2 <= penalty <= 2)


@dataclass
class SamplingParams:
    """Sampling parameters of a request. All but the first three are given by name.

    {parameters}

    Raises:
        ArgumentError: a value is of the wrong type or outside its range.
        TypeError: an unknown keyword; the message says what it is called here.
    """

    temperature: float = parameter(
        1.0,
        number("finite and >= 0", lambda t: 0 <= t <= MAX_FLOAT32),
        "divides the logits. Below 1e-5 (so also 0) is greedy decoding, which sets `top_p`, "
        "`top_k` and `min_p` to their defaults.",
    )
    max_tokens: int | None = parameter(
        64,
        optional(clamped(1)),
        "completion tokens at most, an EOS token counted. None: as many as `max_model_len` allows; "
        "so is any number above that.",
    )
    ignore_eos: bool = parameter(False, boolean, "go on past EOS tokens.")
    _: KW_ONLY
    n: int = parameter(
        1, integer(1, MAX_COMPLETIONS), "completions of each prompt. Greedy decoding has only one."
    )
    top_p: float = parameter(
        1.0,
        Check(SHARE.limits, lambda name, value: max(SHARE.run(name, value), MIN_FLOAT32)),
        "sample among the most probable tokens whose probabilities first reach this sum. 1 is off.",
    )
    top_k: int = parameter(
        0,
        Check("integer >= -1", lambda name, value: max(clamp_int32(name, value, minimum=-1), 0)),
        "sample among this many of the most probable tokens. 0, -1 and any number from the "
        "vocabulary's size on are off.",
    )
    min_p: float = parameter(
        0.0,
        number("in [0, 1]", lambda p: 0 <= p <= 1),
        "sample among tokens of at least this share of the highest probability.",
    )
    seed: int | None = parameter(
        None,
        Check("integer from -2^63 to 2^64 - 1", _check_seed),
        "keys the draws of this request, whatever runs beside it. Completion i of `n` has seed + "
        "i. None and -1: derived from the engine's seed and the request's number.",
    )
    stop: str | list[str] | None = parameter(
        None,
        Check("string or list of strings", _check_strings),
        "strings that end the completion. The text is cut before it, the token ids "
        "are not. Needs `detokenize`.",
    )
    stop_token_ids: list[int] | None = parameter(
        None,
        Check("list of token ids", _check_token_ids),
        "further token ids that end the completion. They are kept in it, as an EOS token is.",
    )
    include_stop_str_in_output: bool = parameter(
        False, boolean, "cut the text after the stop string."
    )
    min_tokens: int = parameter(
        0,
        clamped(0),
        "completion tokens before which neither EOS nor a stop id is sampled, nor a stop string "
        "looked for. At most `max_tokens`.",
    )
    presence_penalty: float = parameter(
        0.0, PENALTY, "taken off the logit of each token generated before."
    )
    frequency_penalty: float = parameter(
        0.0, PENALTY, "taken off a token's logit for each time that it was generated."
    )
    repetition_penalty: float = parameter(
        1.0,
        number("finite and > 0", lambda p: MIN_FLOAT32 <= p <= MAX_FLOAT32),
        "divides the positive and multiplies the negative logits of tokens of prompt and "
        "completion. 1 is off.",
    )
    logit_bias: dict[int, float] | dict[str, float] | None = parameter(
        None,
        Check("dict of token ids and numbers", _check_logit_bias),
        "added to the logits of these token ids, which may be strings of digits. Clamped to "
        "[-100, 100].",
    )
    allowed_token_ids: list[int] | None = parameter(
        None,
        Check("list of token ids", _check_allowed_token_ids),
        "sample among these only.",
    )
    bad_words: list[str] | None = parameter(
        None,
        Check("string or list of strings", _check_strings),
        "strings whose last token is not sampled after their other ones.",
    )
    logprobs: int | None = parameter(
        None,
        at_least(-1),
        "log probabilities of the sampled token and of this many of the most probable ones at each "
        "position, as the model gives them before any other parameter counts. 0: of the sampled "
        "one; -1: of all.",
    )
    prompt_logprobs: int | None = parameter(
        None, at_least(-1), "log probabilities of the prompt's tokens, as of `logprobs`."
    )
    logprob_token_ids: list[int] | None = parameter(
        None,
        Check(f"list of at most {MAX_LOGPROB_TOKEN_IDS} token ids", _check_logprob_token_ids),
        "log probabilities of the sampled token and of these at each position, instead of the most "
        "probable ones: `logprobs` is None or their number. Their `rank` is None.",
    )
    flat_logprobs: bool = parameter(
        False,
        boolean,
        "give log probabilities as `FlatLogprobs`, which reads as the list of dicts.",
    )
    detokenize: bool = parameter(True, boolean, 'decode the completion. False leaves the text "".')
    skip_special_tokens: bool = parameter(False, boolean, "leave special tokens out of the text.")
    spaces_between_special_tokens: bool = parameter(
        True, boolean, "as of the tokenizer's `decode`."
    )
    structured_outputs: StructuredOutputsParams | None = parameter(
        None,
        Check("`StructuredOutputsParams`", _check_structured_outputs),
        "what the completion must look like.",
    )
    logits_processors: list[RequestLogitsProcessor] | None = parameter(
        None,
        Check("list of callables", _check_logits_processors),
        "each is called with the completion's token ids (a list) and the logits of the next token "
        "(float32 `[vocabulary]`), and returns the logits. One with three parameters gets the "
        "prompt's token ids first; transformers' own get what transformers gives them.",
    )
    extra_args: dict[str, Any] | None = parameter(
        None,
        Check("dict", _check_extra_args),
        "for logits processors of the engine, which find it in their request's parameters.",
    )
    thinking_token_budget: int | None = parameter(
        None,
        Check("integer >= -1", _check_budget),
        "tokens of reasoning at most, then its end follows. Needs the engine's `reasoning_config`. "
        "-1 is None.",
    )
    repetition_detection: RepetitionDetectionParams | dict[str, int] | None = parameter(
        None,
        Check("`RepetitionDetectionParams` or dict", _check_repetition_detection),
        'when a completion that repeats itself ends, with the finish reason "repetition".',
    )
    output_kind: RequestOutputKind = parameter(
        RequestOutputKind.CUMULATIVE,
        Check("`RequestOutputKind`", _check_output_kind),
        "what each output of `LLMEngine.step` and `AsyncLLM.generate` has: all there is by now "
        "(`CUMULATIVE`), what is new (`DELTA`), or all of a request that has ended "
        "(`FINAL_ONLY`). Other calls return whole outputs whatever it is.",
    )
    skip_reading_prefix_cache: bool | None = parameter(
        None, boolean, "compute the whole prompt. None: only if `prompt_logprobs` ask for it."
    )
    truncate_prompt_tokens: int | None = parameter(
        None,
        Check("integer >= 1, or -1", _check_truncation),
        "keep this many tokens at a prompt's end; special tokens that the tokenizer puts at its "
        "start stay. -1: as many as leave room for one token.",
    )

    def __post_init__(self) -> None:
        check_values(self.__dict__, _PARAMETERS)
        self.stop = self.stop or []
        self.stop_token_ids = self.stop_token_ids or []
        self.bad_words = self.bad_words or []
        if self.temperature < GREEDY_TEMPERATURE:
            self.temperature, self.top_p, self.top_k, self.min_p = 0.0, 1.0, 0, 0.0
            if self.n > 1:
                raise ArgumentError(f"n must be 1 if greedy (temperature 0), got {self.n}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ArgumentError(
                f"min_tokens must be <= max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )
        num_ids = len(self.logprob_token_ids or ())
        if num_ids and self.logprobs not in (None, num_ids):
            raise ArgumentError(
                f"logprobs must be None or {num_ids}, the number of logprob_token_ids, got "
                f"{self.logprobs}"
            )
        if self.stop and not self.detokenize:
            raise ArgumentError(f"stop needs detokenize=True, got stop={shown(self.stop)} without")

    @property
    def num_logprobs(self) -> int | None:
        """How many log probabilities each position gets beside the sampled token's; None: none."""
        if self.logprobs is not None:
            return self.logprobs
        return len(self.logprob_token_ids) if self.logprob_token_ids else None

    @property
    def needs_logits(self) -> bool:
        """Whether sampling needs more of the parameters on the device than the temperature.

        Neither what ends a completion afterwards (`stop`, `stop_token_ids`, `max_tokens`) nor
        `seed`, `n`, `prompt_logprobs` and the text's options count.
        """
        return bool(
            self.top_p < 1.0
            or self.top_k
            or self.min_p
            or self.min_tokens
            or self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
            or self.allowed_token_ids
            or self.bad_words
            or self.num_logprobs is not None
            or self.structured_outputs
            or self.logits_processors
            or self.thinking_token_budget is not None
        )

    def __copy__(self) -> "SamplingParams":
        new: SamplingParams = object.__new__(type(self))
        vars(new).update(vars(self))  # `copy` would take four times as long
        return new

    def clone(self) -> "SamplingParams":
        """A copy that shares no list or dict with this one; checked anew."""
        return replace(self)

    @classmethod
    def from_optional(cls, **values: Any) -> "SamplingParams":
        """vLLM's: parameters of which None stands for the default, but for `max_tokens`."""
        return cls(**{k: v for k, v in values.items() if v is not None or k == "max_tokens"})


def _check_no_structure(name: str, value: Any) -> None:
    if value is not None:
        raise ArgumentError(f"{name} is not supported for beam search, got {shown(value)}")


@dataclass
class BeamSearchParams:
    """Parameters of `LLM.beam_search`, with vLLM's names.

    {parameters}

    Raises:
        ArgumentError: a value is of the wrong type or outside its range.
        TypeError: an unknown keyword.
    """

    beam_width: int = parameter(
        MISSING,
        integer(1, MAX_COMPLETIONS),
        "beams that go on at each step, and that are returned. At most half of `max_logprobs`.",
    )
    max_tokens: int = parameter(
        MISSING, clamped(1), "completion tokens at most; `max_model_len` ends a beam too."
    )
    ignore_eos: bool = parameter(False, boolean, "go on past EOS tokens.")
    temperature: float = parameter(
        0.0,
        number("finite and >= 0", lambda t: 0 <= t <= MAX_FLOAT32),
        "of a token that is drawn at each step and is one more candidate if it is above 0. Scores "
        "are of the model's own probabilities.",
    )
    length_penalty: float = parameter(
        1.0,
        finite_number,
        "a beam's score is its summed log probability, divided by its length to this power. Above "
        "0 favours long beams.",
    )
    include_stop_str_in_output: bool = parameter(
        False,
        boolean,
        "vLLM's, which changes nothing offline: `tokens` and `text` always end with the EOS token.",
    )
    structured_outputs: None = parameter(
        None, Check("None", _check_no_structure), "vLLM's; only None."
    )

    def __post_init__(self) -> None:
        check_values(vars(self), parameters(BeamSearchParams))


_PARAMETERS = parameters(SamplingParams)
SAMPLING_FIELDS = frozenset(p.name for p in _PARAMETERS)

document(SamplingParams, SamplingParams)
document(BeamSearchParams, BeamSearchParams)
explain_fields(SamplingParams, SAMPLING_NAMES, SAMPLING_HINTS, SAMPLING_OFF)
explain_fields(BeamSearchParams, BEAM_NAMES, {})
explain_fields(StructuredOutputsParams, STRUCTURED_NAMES, STRUCTURED_HINTS, STRUCTURED_OFF)
