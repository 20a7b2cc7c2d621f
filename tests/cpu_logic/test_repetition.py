"""When a completion counts as repeating itself, against the definition in words of strings."""

import random

import pytest

from nanovllm import ArgumentError, SamplingParams
from nanovllm.engine.repetition import RepetitionRule, is_repetitive
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import RepetitionDetectionParams


def repeats(text: str, params: RepetitionDetectionParams) -> bool:
    """Whether the text ends with a piece of an allowed size, min_count times over."""
    sizes = range(max(1, params.min_pattern_size), params.max_pattern_size + 1)
    pieces = (text[-size:] for size in sizes if size <= len(text))
    return any(text.endswith(piece * params.min_count) for piece in pieces)


@pytest.mark.parametrize("limits", [(3, 0, 2), (1, 1, 4), (4, 2, 3), (5, 5, 2), (9, 3, 2)])
def test_detection_is_that_of_the_definition(limits):
    params, rng, found = RepetitionDetectionParams(*limits), random.Random(7), 0
    for _ in range(2000):
        piece = "".join(rng.choices("ab", k=rng.randint(1, 5)))
        text = "".join(rng.choices("abc", k=rng.randint(0, 6))) + piece * rng.randint(1, 4)
        expected = repeats(text, params)
        assert is_repetitive([ord(c) for c in text], params) is expected, text
        found += expected
    assert 100 < found < 1900


def sequence(tokens: list[int], **values) -> Sequence:
    params = SamplingParams(
        repetition_detection={"max_pattern_size": 2, "min_count": 2}, max_tokens=9, **values
    )
    seq = Sequence([1, 1, 1], params)
    seq.end_token_ids = frozenset([8])
    rule = RepetitionRule(seq, params.repetition_detection)
    for token_id in tokens:
        seq.token_ids.append(token_id)
        seq.ending = rule.on_token(token_id)
        if seq.ending:
            break
    return seq


@pytest.mark.parametrize(
    ("tokens", "values", "num_tokens"),
    [
        ([1, 2, 1, 2, 5], {}, 4),
        ([1, 2, 3, 3], {}, 4),  # the prompt's tokens do not count
        ([8, 8, 8], {}, None),  # ids that end it anyway
        ([1, 1, 1, 1, 5, 5], {"min_tokens": 5}, 6),
        ([0, 1, 2, 3, 4, 5, 6, 7, 7], {}, None),  # the length comes first
    ],
)
def test_the_order_of_ends_is_that_of_vllm(tokens, values, num_tokens):
    seq = sequence(tokens, **values)
    assert seq.ending == (num_tokens and ("repetition", "repetition_detected"))
    assert seq.num_completion_tokens == (num_tokens or len(tokens))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_pattern_size": 2}, "min_count must be >= 2, got 0"),
        ({"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2}, "<= max_pattern_size"),
        ({"max_pattern_size": -1}, "max_pattern_size must be >= 0, got -1"),
        ({"max_pattern_size": 1.5, "min_count": 2}, "max_pattern_size must be an integer"),
    ],
)
def test_wrong_limits_are_named(values, message):
    with pytest.raises(ArgumentError, match=message):
        RepetitionDetectionParams(**values)
    with pytest.raises(ArgumentError, match=message):
        SamplingParams(repetition_detection=values)


def test_other_values_are_named():
    with pytest.raises(ArgumentError, match="repetition_detection must be a RepetitionDetection"):
        SamplingParams(repetition_detection={"max_size": 3})
    assert SamplingParams(repetition_detection=None).repetition_detection is None
