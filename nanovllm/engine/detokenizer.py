"""Token ids into text: whole, or token by token with stop strings looked for on the way.

Only requests that are streamed or have stop strings carry an `OutputText`; the others are decoded
once, at their end. The cost of a token does not depend on how many came before.
"""

from codecs import utf_8_decode
from collections.abc import Iterable
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from nanovllm.sampling_params import SamplingParams

MAX_HELD_TOKENS = 3  # of an incomplete character: one of UTF-8 has 4 bytes at most


def decode(tokenizer: Any, token_ids: list[int], params: SamplingParams) -> str:
    """The text of a whole completion; "" without a tokenizer or with `detokenize=False`."""
    if tokenizer is None or not params.detokenize:
        return ""
    options = _decode_options(params.skip_special_tokens, params.spaces_between_special_tokens)
    return tokenizer.decode(token_ids, **options)


def _decode_options(
    skip_special_tokens: bool, spaces_between_special_tokens: bool
) -> dict[str, bool]:
    """Keywords of `tokenizer.decode`; an object of another make need not know them."""
    options = {}
    if skip_special_tokens:
        options["skip_special_tokens"] = True
    if not spaces_between_special_tokens:
        options["spaces_between_special_tokens"] = False
    return options


class IncrementalDetokenizer(Protocol):
    """The text of a growing list of ids; all pieces together are the text of the whole list.

    A character is given out with the token that completes it. Ids that the tokenizer does not
    have are empty text.
    """

    def append(self, token_ids: Iterable[int]) -> str:
        """The text that further ids complete, maybe empty."""

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that was never completed, or nothing."""


def incremental_detokenizer(
    tokenizer: Any, skip_special_tokens: bool = False, spaces_between_special_tokens: bool = True
) -> IncrementalDetokenizer:
    """The fast kind for a byte-level tokenizer, the general one for any other."""
    if not _is_byte_level(tokenizer):
        return WindowDetokenizer(tokenizer, skip_special_tokens, spaces_between_special_tokens)
    tables = _token_bytes.setdefault(tokenizer, {})
    if skip_special_tokens not in tables:
        tables[skip_special_tokens] = TokenBytes(tokenizer.backend_tokenizer, skip_special_tokens)
    return ByteLevelDetokenizer(tables[skip_special_tokens])


# ---- byte-level tokenizers: GPT-2's, and so Qwen's and Llama 3's --------------------------------


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (
        type(getattr(backend, "decoder", None)).__name__ == "ByteLevel"
        and type(getattr(backend, "model", None)).__name__ == "BPE"
    )


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable characters of Latin-1 stand for their own code; the other bytes, in their order, are
    written with the characters from 256 on, as GPT-2 does.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    written_as = [*printable, *(256 + index for index in range(len(others)))]
    return dict(zip(map(chr, written_as), [*printable, *others], strict=True))


BYTE_ALPHABET = _byte_alphabet()


class TokenBytes(dict[int, bytes]):
    """The UTF-8 bytes of each id, filled as they are asked for; text is decoded from their sum.

    Args:
        backend: a `tokenizers.Tokenizer` whose decoder is `ByteLevel`.
        skip_special_tokens: special tokens are b"".
    """

    def __init__(self, backend: Any, skip_special_tokens: bool) -> None:
        super().__init__()
        self.backend = backend
        self.skip_special_tokens = skip_special_tokens

    def __missing__(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""  # not kept: the user may add tokens to the tokenizer
        if self.skip_special_tokens:
            added = self.backend.get_added_tokens_decoder().get(token_id)
            if added is not None and added.special:
                token = ""
        try:
            data = bytes([BYTE_ALPHABET[character] for character in token])
        except KeyError:  # an added token, written as it is
            data = token.encode()
        self[token_id] = data
        return data


# By tokenizer, then by skip_special_tokens.
_token_bytes: WeakKeyDictionary[Any, dict[bool, TokenBytes]] = WeakKeyDictionary()


class ByteLevelDetokenizer:
    """Adds up the tokens' bytes; at most the 3 bytes of an incomplete character are held back."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._pending = b""

    def append(self, token_ids: Iterable[int]) -> str:
        table = self._token_bytes
        data = self._pending + b"".join([table[token_id] for token_id in token_ids])
        text, num_decoded = utf_8_decode(data, "replace", False)
        self._pending = data[num_decoded:]
        return text

    def finish(self) -> str:
        data, self._pending = self._pending, b""
        return utf_8_decode(data, "replace", True)[0]


# ---- any other tokenizer -------------------------------------------------------------------------


class WindowDetokenizer:
    """Decodes the newest tokens behind those of the last piece, whose text they may depend on.

    What ends in U+FFFD may be an incomplete character and is held back for a few tokens. Where the
    ids are no valid UTF-8, or the decoder changes text that came long before, the pieces may differ
    from the text of the whole list.
    """

    def __init__(
        self, tokenizer: Any, skip_special_tokens: bool, spaces_between_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._options = _decode_options(skip_special_tokens, spaces_between_special_tokens)
        self._context: list[int] = []  # the ids of the last piece
        self._context_text = ""
        self._new: list[int] = []  # ids after them
        self._num_held = 0  # of the new ids, those held back for an incomplete character

    def append(self, token_ids: Iterable[int]) -> str:
        return "".join([self._append(token_id) for token_id in token_ids])

    def _append(self, token_id: int) -> str:
        self._new.append(token_id)
        text = self._decode(self._context + self._new)
        if self._context and text == self._context_text:
            self._new.pop()  # no text: the window need not grow
            return ""
        if text.endswith("\ufffd") and self._num_held < MAX_HELD_TOKENS:
            self._num_held += 1
            return ""
        return self._give_out(text)

    def _give_out(self, text: str) -> str:
        """What `text`, of the context and the new ids, adds; the new ids become the context."""
        if len(text) <= len(self._context_text):  # no text: these ids alone would be no context
            return ""
        piece = text[len(self._context_text) :]
        self._context, self._new, self._num_held = self._new, [], 0
        self._context_text = self._decode(self._context)
        return piece

    def finish(self) -> str:
        return self._give_out(self._decode(self._context + self._new))

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, **self._options)


# ---- stop strings --------------------------------------------------------------------------------


class OutputText:
    """The text of one completion as its tokens come, and the stop string that ends it.

    A stop string counts once its last character is in the text of a token after the first
    `min_tokens`; special tokens have a text too, unless they are skipped. Of several strings the
    one that ends first counts, of those that end together the longest; their order does not matter.
    The text is cut before it, or behind it with `include_stop_str_in_output`. Ids are never cut.

    Args:
        tokenizer: turns ids into text.
        params: `stop`, `min_tokens` and the options of the text.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self.stop_string: str | None = None  # the one that was hit
        self._detokenizer = incremental_detokenizer(
            tokenizer, params.skip_special_tokens, params.spaces_between_special_tokens
        )
        self._stop = params.stop or []
        self._is_stop_included = params.include_stop_str_in_output
        self._num_tokens_before_stop = params.min_tokens
        self._first_characters = {stop[0] for stop in self._stop}
        self._prefixes = {stop[:end] for stop in self._stop for end in range(1, len(stop))}
        self._max_held = max(map(len, self._prefixes), default=0)
        self._pieces: list[str] = []  # text that no stop string can cut any more
        self._held = ""  # after it: what may become a stop string
        self._num_taken = 0  # pieces that `take_text` has returned

    def append(self, token_id: int) -> None:
        """Add a token; without effect once a stop string was hit."""
        if self.stop_string is not None:
            return
        self._num_tokens_before_stop -= 1
        new_text = self._detokenizer.append((token_id,))
        if new_text:
            self._add(new_text)

    def _add(self, new_text: str) -> None:
        if not self._held and self._first_characters.isdisjoint(new_text):
            self._pieces.append(new_text)  # nothing begins here
            return
        text = self._held + new_text
        if self._num_tokens_before_stop < 0 and (hit := self._first_hit(text)):
            end, start, self.stop_string = hit
            self._held = text[: end if self._is_stop_included else start]
            return
        lengths = range(min(len(text), self._max_held), 0, -1)
        num_held = next((n for n in lengths if text[-n:] in self._prefixes), 0)
        num_kept = len(text) - num_held
        self._pieces.append(text[:num_kept])
        self._held = text[num_kept:]

    def _first_hit(self, text: str) -> tuple[int, int, str] | None:
        """End, start and stop string of the match that counts; it ends behind the held text."""
        num_old = len(self._held)
        hits = []
        for stop in self._stop:
            start = text.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0:
                hits.append((start + len(stop), start, stop))
        return min(hits, default=None)

    @property
    def text(self) -> str:
        """The text so far, without an incomplete character."""
        return "".join(self._pieces) + self._held

    def take_text(self) -> str:
        """For streaming: the text since the last call that no stop string can cut any more."""
        new_text = "".join(self._pieces[self._num_taken :])
        self._num_taken = len(self._pieces)
        return new_text

    def final_text(self) -> str:
        """The whole text, once the last token is appended; `take_text` then returns the rest."""
        if self.stop_string is None:
            self._held += self._detokenizer.finish()
        self._pieces.append(self._held)
        self._held = ""
        return "".join(self._pieces)
