"""Checks and encodings of the parameters that depend on the vocabulary, made once a request."""

from collections.abc import Collection
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from nanovllm.errors import ArgumentError, is_fault, shown_error
from nanovllm.inputs.token_bytes import token_bytes
from nanovllm.sampling_params import SamplingParams

TEXTS_BEFORE = ("a", "1", ".", "。", "\n", " ")  # of each kind that a word may follow
MAX_SPACES = 16  # before a word in one token
MAX_KNOWN_WORDS = 10_000


def check_against_vocab(params: SamplingParams, vocab_size: int) -> None:
    """ArgumentError if `params` name a token id beyond a vocabulary of `vocab_size` ids."""
    _check_ids("allowed_token_ids", params.allowed_token_ids or [], vocab_size)
    _check_ids("logit_bias", params.logit_bias or {}, vocab_size)
    _check_ids("logprob_token_ids", params.logprob_token_ids or [], vocab_size)
    _check_ids("stop_token_ids", params.stop_token_ids or [], vocab_size)


def encode_bad_words(words: list[str], tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """The token ids of each word in the ways in which the tokenizer spells it.

    Those are what it makes of the word at the beginning of a text and after other text, with a
    space before it and without, each single token that is the word, and its bytes where they are
    tokens. A form that ends as another one does is left out. Of a word that is not all whitespace,
    leading whitespace does not count.

    Raises:
        ArgumentError: a word has no tokens, one beyond the model's vocabulary, or the tokenizer
            refuses it.
    """
    encoded: list[list[int]] = []
    for word in words:
        spellings = _spellings(tokenizer).get(word)
        if spellings is None:
            spellings = _spellings(tokenizer)[word] = _spell(word, tokenizer)
        if not spellings.natural:
            raise ArgumentError(f"bad_words: the tokenizer has no tokens for {word[:200]!r}")
        for token_ids in spellings.natural:
            _check_ids("bad_words", token_ids, vocab_size)
        encoded += _without_longer(
            [ids for ids in spellings.natural + spellings.others if max(ids) < vocab_size]
        )
    return encoded


def encode_mark(text: str, tokenizer: Any, vocab_size: int) -> list[int]:
    """The token ids of a text around reasoning; ArgumentError if the model has none for it."""
    token_ids = list(tokenizer.encode(text, add_special_tokens=False))
    if not token_ids:
        raise ArgumentError(f"reasoning_config: the tokenizer has no tokens for {text[:200]!r}")
    _check_ids("reasoning_config", token_ids, vocab_size)
    return token_ids


class _Spellings(NamedTuple):
    natural: list[list[int]]  # at the beginning of a text, and there after a space
    others: list[list[int]]


# By tokenizer, then by word: a batch has the same words in every request.
_known_spellings: WeakKeyDictionary[Any, dict[str, _Spellings]] = WeakKeyDictionary()


def _spellings(tokenizer: Any) -> dict[str, _Spellings]:
    try:
        known = _known_spellings.setdefault(tokenizer, {})
    except TypeError:  # an object of another make that cannot be a key
        return {}
    if len(known) >= MAX_KNOWN_WORDS:
        known.clear()
    return known


def _spell(word: str, tokenizer: Any) -> _Spellings:
    def encode(text: str) -> list[int]:
        try:
            return list(tokenizer.encode(text, add_special_tokens=False))
        except BaseException as error:  # of many types
            if not is_fault(error):
                raise
            raise ArgumentError(
                f"bad_words: the tokenizer refuses {word[:200]!r}: {shown_error(error)}"
            ) from error

    bare = word.lstrip() or word
    forms = [bare] if bare.isspace() else [bare, " " + bare]
    natural = [token_ids for form in forms if (token_ids := encode(form))]
    others = []
    for before in TEXTS_BEFORE:
        first = encode(before)
        for form in forms:
            token_ids = encode(before + form)
            if token_ids[: len(first)] == first:  # else the word shares a token with that text
                others.append(token_ids[len(first) :])
    table = token_bytes(tokenizer)
    if table is not None:
        for num_spaces in range(1 if bare.isspace() else MAX_SPACES + 1):
            others += [[i] for i in table.ids_of(b" " * num_spaces + bare.encode())]
        if not table.is_byte_level and (pieces := table.byte_pieces(bare.encode())):
            others.append(pieces)
    return _Spellings(natural, [token_ids for token_ids in others if token_ids])


def _without_longer(spellings: list[list[int]]) -> list[list[int]]:
    """Those that do not end with another one, which forbids them as well; none twice."""
    kept: list[list[int]] = []
    for token_ids in spellings:
        ends = (token_ids[start:] for start in range(1, len(token_ids)))
        if token_ids not in kept and not any(end in spellings for end in ends):
            kept.append(token_ids)
    return kept


def _check_ids(name: str, token_ids: Collection[Any], vocab_size: int) -> None:
    highest = max(token_ids, default=0)
    if highest >= vocab_size:
        raise ArgumentError(
            f"{name}: token id {highest} is out of vocabulary: 0 to {vocab_size - 1}"
        )
