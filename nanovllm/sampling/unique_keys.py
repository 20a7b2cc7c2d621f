"""Keeps the objects of a generated JSON text from repeating a key, which no grammar can.

Strings are compared as they are spelled: the grammars allow one spelling of each.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

QUOTE, BACKSLASH, OPEN_OBJECT, CLOSE_OBJECT, OPEN_LIST, CLOSE_LIST, COMMA = b'"\\{}[],'


class QuoteTokens:
    """The tokens of a vocabulary that hold quotes, and so may complete a key.

    Args:
        texts: token id to bytes, of the tokens that are text.
    """

    def __init__(self, texts: dict[int, bytes]) -> None:
        self.texts = texts
        quoted = sorted((text, token_id) for token_id, text in texts.items() if b'"' in text)
        self.sorted_texts = [text for text, _ in quoted]
        self.sorted_ids = np.array([token_id for _, token_id in quoted], dtype=np.int64)
        self._ids_by_text: dict[bytes, list[int]] = {}
        self.longest = max(map(len, texts.values()), default=0)
        # By how many quotes they hold at least: a key needs two, one after a string three.
        self.at_least = {
            count: np.array([i for text, i in quoted if text.count(b'"') >= count], dtype=np.int64)
            for count in (1, 2, 3)
        }

    def beginning_with(self, text: bytes) -> np.ndarray:
        """The ids of tokens that begin with `text`, whose last byte is a quote."""
        end = text[:-1] + bytes([QUOTE + 1])
        low = bisect_left(self.sorted_texts, text)
        return self.sorted_ids[low : bisect_left(self.sorted_texts, end, low)]

    def spelled(self, text: bytes) -> list[int]:
        """The ids of the tokens that are `text`."""
        if not self._ids_by_text:
            for token_id, token in self.texts.items():
                self._ids_by_text.setdefault(token, []).append(token_id)
        return self._ids_by_text.get(text, [])


class UniqueKeys:
    """The keys of the objects that a JSON text has opened so far.

    Args:
        tokens: of the vocabulary.
        may_run_out: whether the beginning of a key may allow few keys, as that of a pattern does.
    """

    def __init__(self, tokens: QuoteTokens, may_run_out: bool = False) -> None:
        self._tokens = tokens
        self.may_run_out = may_run_out
        self._open: list[set[bytes] | None] = []  # keys of each open object; None for a list
        self._key = bytearray()  # as far as it is spelled
        self._in_string = self._is_escaped = self._in_key = self._expects_key = False

    def accept(self, token_id: int) -> None:
        """Read on by one token; one that is no text changes nothing."""
        self._read(self._tokens.texts.get(token_id, b""))

    def forbid(self, row: np.ndarray) -> None:
        """Clear the bits of the tokens that would complete a key which is there already.

        Args:
            row: [words] int32, of a bitmask: bit j % 32 of word j // 32 is token j's.
        """
        is_key = self._in_string and self._in_key
        if is_key and (keys := self._open[-1]):
            start = bytes(self._key)
            for key in keys:
                if key.startswith(start):
                    clear_bits(row, self._tokens.beginning_with(key[len(start) :] + b'"'))
        # Tokens that complete a key which they begin as well are rare, so each is read in full.
        if not self._in_string and any(self._open):
            candidates = self._tokens.at_least[2]
        else:
            candidates = self._tokens.at_least[3]
        bits = row[candidates >> 5] >> (candidates & 31) & 1
        repeating = [i for i in candidates[bits == 1] if self._would_repeat(self._tokens.texts[i])]
        if repeating:
            clear_bits(row, np.array(repeating))

    @property
    def place(self) -> tuple[int, bytes]:
        """How many objects and lists are open, and the key as far as it is spelled."""
        return len(self._open), bytes(self._key)

    def along(self, row: np.ndarray) -> list[int]:
        """The tokens of the row after which the text is within a key that may become one which is
        there already."""
        if self._in_string and self._in_key and (keys := self._open[-1]):
            start = len(self._key)
            used = {key[start:] for key in keys if key.startswith(self._key)}
            longest = self._tokens.longest
            texts = {k[:end] for k in used for end in range(1, min(len(k), longest) + 1)}
            ids = [token_id for text in texts for token_id in self._tokens.spelled(text)]
        elif not self._in_string and any(self._open):
            ids = self._tokens.at_least[1].tolist()
        else:  # of the tokens that end a string and begin a key
            ids = self._tokens.at_least[2].tolist()
        candidates = np.array(ids, dtype=np.int64)
        bits = row[candidates >> 5] >> (candidates & 31) & 1
        return [i for i in candidates[bits == 1].tolist() if self._goes_along(i)]

    def _goes_along(self, token_id: int) -> bool:
        after = self.fork()
        after.accept(token_id)
        if not (after._in_string and after._in_key):
            return False
        return any(key.startswith(after._key) for key in after._open[-1] or ())

    def fork(self) -> UniqueKeys:
        """An independent copy in the same state."""
        copy = UniqueKeys(self._tokens)
        copy.__dict__.update(self.__dict__)
        copy._open = [None if keys is None else set(keys) for keys in self._open]
        copy._key = bytearray(self._key)
        return copy

    def _would_repeat(self, text: bytes) -> bool:
        return self.fork()._read(text)

    def _read(self, text: bytes) -> bool:
        """Read on; whether a key was repeated."""
        is_repeated = False
        for byte in text:
            if self._in_string:
                if byte == QUOTE and not self._is_escaped:
                    self._in_string = False
                    if self._in_key:
                        keys, key = self._open[-1], bytes(self._key)
                        assert keys is not None
                        is_repeated |= key in keys
                        keys.add(key)
                        self._expects_key = False
                    continue
                self._is_escaped = byte == BACKSLASH and not self._is_escaped
                if self._in_key:
                    self._key.append(byte)
            elif byte == QUOTE:
                self._in_string, self._in_key = True, self._expects_key
                self._key.clear()
            elif byte == OPEN_OBJECT:
                self._open.append(set())
                self._expects_key = True
            elif byte == OPEN_LIST:
                self._open.append(None)
                self._expects_key = False
            elif byte in (CLOSE_OBJECT, CLOSE_LIST) and self._open:
                self._open.pop()
                self._expects_key = False
            elif byte == COMMA:
                self._expects_key = bool(self._open) and self._open[-1] is not None
        return is_repeated


def clear_bits(row: np.ndarray, token_ids: np.ndarray) -> None:
    """Forbid these tokens in a row of a bitmask."""
    bits = np.left_shift(np.uint32(1), (token_ids & 31).astype(np.uint32))
    np.bitwise_and.at(row.view(np.uint32), token_ids >> 5, ~bits)
