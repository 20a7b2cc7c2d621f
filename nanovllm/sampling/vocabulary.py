"""What of a request's parameters depends on the vocabulary: checks and encodings, made once."""

from collections.abc import Collection
from typing import Any

from nanovllm.errors import ArgumentError
from nanovllm.sampling_params import SamplingParams


def check_against_vocab(params: SamplingParams, vocab_size: int) -> None:
    """ArgumentError if `params` name a token id beyond a vocabulary of `vocab_size` ids."""
    _check_ids("allowed_token_ids", params.allowed_token_ids or [], vocab_size)
    _check_ids("logit_bias", params.logit_bias or {}, vocab_size)
    _check_ids("stop_token_ids", params.stop_token_ids or [], vocab_size)


def encode_bad_words(words: list[str], tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """The token ids of each word, as at the beginning of a text and after a space.

    The second form is left out where it only ends as the first does. Of a word that is not all
    whitespace, leading whitespace does not count.

    Raises:
        ArgumentError: a word has no tokens, or one beyond the model's vocabulary.
    """
    encoded: list[list[int]] = []
    for word in words:
        bare = word.lstrip() or word
        plain = tokenizer.encode(bare, add_special_tokens=False)
        if not plain:
            raise ArgumentError(f"bad_words: the tokenizer has no tokens for {word!r}")
        encoded.append(plain)
        if not bare.isspace():
            spaced = tokenizer.encode(" " + bare, add_special_tokens=False)
            if spaced[-len(plain) :] != plain:
                encoded.append(spaced)
    for token_ids in encoded:
        _check_ids("bad_words", token_ids, vocab_size)
    return encoded


def _check_ids(name: str, token_ids: Collection[Any], vocab_size: int) -> None:
    highest = max(token_ids, default=0)
    if highest >= vocab_size:
        raise ArgumentError(
            f"{name}: token id {highest} is out of the vocabulary: 0 to {vocab_size - 1}"
        )
