"""Token ids into text: whole, or token by token with stop strings looked for on the way.

There is one way from ids to text, so that a stream's pieces are the text that `generate` returns.
Requests that are streamed or have stop strings carry an `OutputText`, which follows each token. The
others have a `CompletionText`, which takes as many at a time as there are: all at the end, or parts
of them while the device works. The cost of a token does not depend on how many came before.
"""

from codecs import utf_8_decode
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from nanovllm.errors import is_fault
from nanovllm.inputs.token_bytes import TokenBytes, token_bytes
from nanovllm.sampling_params import SamplingParams

MAX_HELD_TOKENS = 3  # of an incomplete character: one of UTF-8 has 4 bytes at most
PROMPT_WINDOW = 8  # prompt tokens that are decoded along with a completion, as a rule
MAX_SILENT_TOKENS = 8  # that have no text so far, but may have one with the next token


class CompletionText:
    """The text that a completion adds to its prompt, made of its ids in parts.

    Args:
        tokenizer: turns ids into text.
        params: the options of the text.
        prompt_token_ids: what the completion goes on from.
        ids_without_text: tokens that add nothing to the text.
    """

    def __init__(
        self,
        tokenizer: Any,
        params: SamplingParams,
        prompt_token_ids: Sequence[int] = (),
        ids_without_text: frozenset[int] = frozenset(),
    ) -> None:
        self.num_tokens = 0  # that were appended
        self._detokenizer = incremental_detokenizer(
            tokenizer,
            params.skip_special_tokens,
            params.spaces_between_special_tokens,
            prompt_token_ids,
        )
        self._ids_without_text = ids_without_text
        self._pieces: list[str] = []

    def append(self, token_ids: list[int]) -> None:
        """Add the next tokens."""
        self.num_tokens += len(token_ids)
        if silent := self._ids_without_text:
            token_ids = [token_id for token_id in token_ids if token_id not in silent]
        self._pieces.append(self._detokenizer.append(token_ids))

    def finish(self) -> str:
        """The whole text, once the last token is appended."""
        return "".join(self._pieces) + self._detokenizer.finish()


def decode(
    tokenizer: Any,
    token_ids: list[int],
    params: SamplingParams,
    prompt_token_ids: Sequence[int] = (),
    ids_without_text: frozenset[int] = frozenset(),
) -> str:
    """The text that a whole completion adds to its prompt, as `incremental_detokenizer` has it.

    "" without a tokenizer or with `detokenize=False`.
    """
    if tokenizer is None or not params.detokenize:
        return ""
    text = CompletionText(tokenizer, params, prompt_token_ids, ids_without_text)
    text.append(token_ids)
    return text.finish()


class IncrementalDetokenizer(Protocol):
    """The text of a growing list of ids; all pieces together are the text of the whole list.

    A character is given out with the token that completes it. Ids that the tokenizer does not
    have are empty text.
    """

    def append(self, token_ids: Iterable[int]) -> str:
        """The text that further ids complete, maybe empty."""

    def finish(self) -> str:
        """The text held back: U+FFFD for a character that was never completed, or nothing."""

    def num_broken_by(self, token_id: int) -> int:
        """U+FFFDs that would come before the text of this id if it were next.

        They stand for the bytes of a character that the id does not go on with.
        """


def incremental_detokenizer(
    tokenizer: Any,
    skip_special_tokens: bool = False,
    spaces_between_special_tokens: bool = True,
    prompt_token_ids: Sequence[int] = (),
) -> IncrementalDetokenizer:
    """Turns the ids of a completion into the text that they add to that of the prompt.

    That is what the tokenizer decodes prompt and completion to, without what it decodes the prompt
    to. The two differ from the completion's own text where a tokenizer drops the first space of a
    text, and where a prompt of ids ends within a character: this belongs to the completion.
    """
    table = token_bytes(tokenizer, skip_special_tokens)
    if table is not None:
        return BytesDetokenizer(table, prompt_token_ids)
    return WindowDetokenizer(
        tokenizer, skip_special_tokens, spaces_between_special_tokens, prompt_token_ids
    )


def token_offsets(
    tokenizer: Any, token_ids: list[int], params: SamplingParams, prompt_token_ids: Sequence[int]
) -> list[int]:
    """Where the text of each token begins in the text of the completion.

    A token that goes on with an incomplete character has the place of this character.
    """
    detokenizer = incremental_detokenizer(
        tokenizer,
        params.skip_special_tokens,
        params.spaces_between_special_tokens,
        prompt_token_ids,
    )
    offsets, length = [], 0
    for token_id in token_ids:
        offsets.append(length + detokenizer.num_broken_by(token_id))
        length += len(detokenizer.append((token_id,)))
    return offsets


def token_texts(tokenizer: Any, token_ids: Iterable[int]) -> dict[int, str]:
    """The text that each token adds in the middle of a text; U+FFFD for a part of a character."""
    table = token_bytes(tokenizer)
    if table is not None:
        return {token_id: table.text(token_id) for token_id in token_ids}
    alone = {token_id: tokenizer.decode([token_id]) for token_id in token_ids}
    # Of no known kind: behind a token that has a text of its own.
    words = (token_id for token_id, text in alone.items() if text.strip(" \ufffd"))
    if (word := next(words, None)) is None:
        return alone
    texts = {}
    for token_id, text in alone.items():
        together = tokenizer.decode([word, token_id])
        is_added = "\ufffd" not in text and together.startswith(alone[word])
        texts[token_id] = together[len(alone[word]) :] if is_added else text
    return texts


class BytesDetokenizer:
    """Adds up the tokens' bytes; at most the 3 bytes of an incomplete character are held back."""

    def __init__(self, table: TokenBytes, prompt_token_ids: Sequence[int] = ()) -> None:
        self._bytes_of = table.__getitem__
        self._errors = table.errors
        self._pending = _incomplete_end(table, prompt_token_ids)
        # At the beginning of the completion's text these are left out: what the prompt's own text
        # shows for the character that it breaks off in, or the first space of a whole text.
        self._left_out = self._pending.decode("utf-8", table.errors)
        if table.strips_prefix_space and not any(map(self._bytes_of, prompt_token_ids)):
            self._left_out = " "

    def append(self, token_ids: Iterable[int]) -> str:
        data = self._pending + b"".join(map(self._bytes_of, token_ids))
        text, num_decoded = utf_8_decode(data, self._errors, False)
        self._pending = data[num_decoded:]
        return self._without_left_out(text) if self._left_out else text

    def finish(self) -> str:
        data, self._pending = self._pending, b""
        return self._without_left_out(utf_8_decode(data, self._errors, True)[0])

    def _without_left_out(self, text: str) -> str:
        if text:
            text, self._left_out = text.removeprefix(self._left_out), ""
        return text

    def num_broken_by(self, token_id: int) -> int:
        data = self._bytes_of(token_id)
        if not self._pending or not data or self._left_out.strip():
            return 0
        try:
            utf_8_decode(self._pending + data[:1], "strict", False)
        except UnicodeDecodeError:
            return len(self._pending.decode("utf-8", self._errors))
        return 0


def _incomplete_end(table: TokenBytes, token_ids: Sequence[int]) -> bytes:
    """The bytes of a character that the ids begin but do not complete."""
    end = b""
    for token_id in reversed(token_ids):
        end = table[token_id] + end
        if len(end) >= MAX_HELD_TOKENS:
            break
    end = end[-MAX_HELD_TOKENS:]
    return end[utf_8_decode(end, "replace", False)[1] :]


class WindowDetokenizer:
    """For a tokenizer of no known kind: decodes the newest tokens behind those before them.

    What comes before, at first the end of the prompt and then the tokens of the last piece, may
    change the text. What ends in U+FFFD may be an incomplete character and is held back for a few
    tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        # An object of another make need not know these.
        self._options = {}
        if skip_special_tokens:
            self._options["skip_special_tokens"] = True
        if not spaces_between_special_tokens:
            self._options["spaces_between_special_tokens"] = False
        self._prompt: Sequence[int] | None = prompt_token_ids  # until its end is the context
        self._context: list[int] = []  # the ids of the last piece, or the end of the prompt
        self._context_text = ""
        self._new: list[int] = []  # ids after them
        self._num_held = 0  # of the new ids, those held back for an incomplete character
        self._left_out = ""  # at the beginning of the completion's text

    def append(self, token_ids: Iterable[int]) -> str:
        if self._prompt is not None:
            prompt, self._prompt = self._prompt, None
            try:
                self._take_prompt(prompt)
            except BaseException as error:  # a prompt's ids need no text: they are no context
                if not is_fault(error):
                    raise
                self._set_context([])
                self._num_held = 0
        return "".join([self._append(token_id) for token_id in token_ids])

    def _take_prompt(self, prompt: Sequence[int]) -> None:
        """Make the end of the prompt the context: so much of it that it has whole characters.

        The tokens of a character that the prompt breaks off in go before the new ids; what the
        prompt itself shows for them is left out.
        """
        length = PROMPT_WINDOW
        while True:
            self._set_context(list(prompt[-length:]))
            if length >= len(prompt) or (self._context_text and "\ufffd" not in self._context_text):
                break
            length *= 8
        if not self._context_text:
            self._context = self._context[-PROMPT_WINDOW:]
        whole, text = self._context, self._context_text
        while self._context_text.endswith("\ufffd") and self._num_held < MAX_HELD_TOKENS:
            self._num_held += 1
            self._set_context(whole[: -self._num_held])
        self._new = whole[len(self._context) :]
        self._left_out = text[len(self._context_text) :]

    def _set_context(self, token_ids: list[int]) -> None:
        self._context = token_ids
        self._context_text = self._decode(token_ids) if token_ids else ""

    def _append(self, token_id: int) -> str:
        self._new.append(token_id)
        text = self._decode(self._context + self._new)
        if text == self._context_text and text and len(self._new) > MAX_SILENT_TOKENS:
            self._new.pop()
            return ""
        if text.endswith("\ufffd") and self._num_held < MAX_HELD_TOKENS:
            self._num_held += 1
            return ""
        return self._give_out(text)

    def _give_out(self, text: str) -> str:
        """The new part of `text`, of the context and the new ids, which become the context."""
        if len(text) <= len(self._context_text):  # no text: these ids alone would be no context
            return ""
        piece = text[len(self._context_text) :].removeprefix(self._left_out)
        self._set_context(self._new)
        self._new, self._num_held, self._left_out = [], 0, ""
        return piece

    def finish(self) -> str:
        return self._give_out(self._decode(self._context + self._new)) if self._new else ""

    def num_broken_by(self, token_id: int) -> int:
        return 0  # nothing is known about the bytes of a token

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
        prompt_token_ids: what the completion goes on from; no stop string is looked for in it.
        ids_without_text: tokens that add nothing to the text.
    """

    def __init__(
        self,
        tokenizer: Any,
        params: SamplingParams,
        prompt_token_ids: Sequence[int] = (),
        ids_without_text: frozenset[int] = frozenset(),
    ) -> None:
        self.stop_string: str | None = None  # the one that was hit
        self._detokenizer = incremental_detokenizer(
            tokenizer,
            params.skip_special_tokens,
            params.spaces_between_special_tokens,
            prompt_token_ids,
        )
        self._ids_without_text = ids_without_text
        self._stop = params.stop or []
        self._is_stop_included = params.include_stop_str_in_output
        self._num_tokens_before_stop = params.min_tokens
        self._first_characters = {stop[0] for stop in self._stop}
        self._prefixes = {stop[:end] for stop in self._stop for end in range(1, len(stop))}
        self._max_held = max(map(len, self._prefixes), default=0)
        self._pieces: list[str] = []  # text that no stop string can cut any more
        self._held = ""  # after it: what may become a stop string
        self._num_taken = 0  # pieces that `take_text` has returned

    def on_token(self, token_id: int) -> tuple[str, str | None] | None:
        """`append` it; "stop" and the stop string if it is hit."""
        self.append(token_id)
        return None if self.stop_string is None else ("stop", self.stop_string)

    def append(self, token_id: int) -> None:
        """Add a token; without effect once a stop string was hit."""
        if self.stop_string is not None:
            return
        self._num_tokens_before_stop -= 1
        if token_id in self._ids_without_text:
            return
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


def output_text_of(finish_rules: Iterable[object]) -> OutputText | None:
    """The text among a sequence's finish rules: of one that is streamed or has stop strings."""
    return next((rule for rule in finish_rules if isinstance(rule, OutputText)), None)
