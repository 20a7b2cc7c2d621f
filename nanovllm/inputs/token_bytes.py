"""The bytes that each token adds to a text, for tokenizers that put a text together from bytes.

Two kinds are known by the decoder of their tokenizer.json. A byte-level one (GPT-2's, and so
Qwen's, Llama 3's and SmolLM's) writes every byte as one character. A SentencePiece one (Llama 2's,
Mistral's, Gemma's) writes a space as "▁" and what is no piece as bytes such as "<0x0A>".
"""

import codecs
import json
import re
from codecs import charmap_encode
from typing import Any
from weakref import WeakKeyDictionary

from nanovllm.inputs.plain_tokenizer import PlainTokenizer

SPACE = "▁"
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SENTENCEPIECE_DECODER = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
# The space that such a tokenizer puts before each text when it encodes.
STRIP_PREFIX_SPACE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
# Bytes that are no UTF-8: a U+FFFD for each, as SentencePiece has it.
EACH_BYTE = "nanovllm.each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replace_each_byte)


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
ALPHABET_OF_BYTES = {byte: character for character, byte in BYTE_ALPHABET.items()}
CHARACTER_MAP = {ord(character): byte for character, byte in BYTE_ALPHABET.items()}


class TokenBytes(dict[int, bytes]):
    """The bytes of each id as it stands in the middle of a text, filled as they are asked for.

    The bytes of all tokens together, decoded as UTF-8, are the text. An id that the tokenizer does
    not have is b"".

    Args:
        backend: a `tokenizers.Tokenizer` of a known kind.
        skip_special_tokens: special tokens are b"".

    Attributes:
        errors: how bytes that are no UTF-8 are decoded, as a name that `bytes.decode` takes.
        strips_prefix_space: a space at the beginning of the whole text is left out.
    """

    def __init__(self, backend: Any, skip_special_tokens: bool) -> None:
        super().__init__()
        self._backend = backend
        self._skips = skip_special_tokens
        self._special_ids: set[int] = set()
        self._num_known = 0  # ids that `_special_ids` is about
        self.is_byte_level = type(backend.decoder).__name__ == "ByteLevel"
        self.errors = "replace" if self.is_byte_level else EACH_BYTE
        self.strips_prefix_space = not self.is_byte_level and STRIP_PREFIX_SPACE in _decoder_steps(
            backend.decoder
        )

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""  # not kept: the user may add tokens to the tokenizer
        data = b"" if self._skips and self._is_special(token_id) else self._bytes_of(token)
        self[token_id] = data
        return data

    def _is_special(self, token_id: int) -> bool:
        if token_id >= self._num_known:
            added = self._backend.get_added_tokens_decoder()
            self._special_ids = {id_ for id_, token in added.items() if token.special}
            self._num_known = max(self._backend.get_vocab_size(), *added, token_id) + 1
        return token_id in self._special_ids

    def _bytes_of(self, token: str) -> bytes:
        if self.is_byte_level:
            try:
                return charmap_encode(token, "strict", CHARACTER_MAP)[0]
            except UnicodeEncodeError:  # an added token, written as it is
                return token.encode()
        if byte := BYTE_PIECE.fullmatch(token):
            return bytes.fromhex(byte[1])
        return token.replace(SPACE, " ").encode()

    def text(self, token_id: int) -> str:
        """The text of one token; U+FFFD for a part of a character."""
        return self[token_id].decode("utf-8", self.errors)

    def ids_of(self, data: bytes) -> list[int]:
        """The ids of single tokens with these bytes, by the ways in which such a token is written.

        Args:
            data: valid UTF-8.
        """
        spellings = {data.decode(), data.decode().replace(" ", SPACE)}
        if self.is_byte_level:
            spellings.add("".join(ALPHABET_OF_BYTES[byte] for byte in data))
        elif len(data) == 1:
            spellings.add(f"<0x{data[0]:02X}>")
        ids = {self._backend.token_to_id(spelling) for spelling in spellings} - {None}
        return sorted(token_id for token_id in ids if self[token_id] == data)

    def form_of_encoder(self) -> str:
        """The tokenizer.json of a tokenizer that encodes a text as if other text came before it."""
        # The model, which is most of it, comes last and stays as it is written.
        head, separator, model = self._backend.to_str().partition(',"model":')
        fields = json.loads(head + "}") | {"truncation": None, "padding": None}
        if not self.is_byte_level:  # a space before each text is added in several ways
            replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
            fields |= {"normalizer": replace, "pre_tokenizer": None}
        head = json.dumps(fields, separators=(",", ":")).removesuffix("}")
        head = head.replace('"add_prefix_space":true', '"add_prefix_space":false')
        return f"{head}{separator}{model}"

    def byte_pieces(self, data: bytes) -> list[int] | None:
        """The ids that spell `data` byte by byte; None if a byte has no token of its own."""
        if self.is_byte_level:
            pieces = [ALPHABET_OF_BYTES[byte] for byte in data]
        else:
            pieces = [f"<0x{byte:02X}>" for byte in data]
        ids = [self._backend.token_to_id(piece) for piece in pieces]
        return None if None in ids else ids


# By tokenizer, then by skip_special_tokens. None: of no known kind.
_tables: WeakKeyDictionary[Any, dict[bool, TokenBytes | None]] = WeakKeyDictionary()


def token_bytes(tokenizer: Any, skip_special_tokens: bool = False) -> TokenBytes | None:
    """The table of a tokenizer, made once for each; None if it is of no known kind."""
    if isinstance(tokenizer, PlainTokenizer):
        if tokenizer.loaded is None:
            tables = _tables.setdefault(tokenizer, {})
            if skip_special_tokens not in tables:
                tables[skip_special_tokens] = TokenBytes(
                    tokenizer.plain_backend, skip_special_tokens
                )
            return tables[skip_special_tokens]
        tokenizer = tokenizer.loaded
    # Whoever puts another `decode` in its place, in a class or on the object, wants it called.
    if _module_of(tokenizer, "decode") != "transformers.tokenization_utils_base":
        return None
    tables = _tables.setdefault(tokenizer, {})
    if skip_special_tokens not in tables:
        is_known = _is_known_kind(tokenizer)
        tables[skip_special_tokens] = (
            TokenBytes(tokenizer.backend_tokenizer, skip_special_tokens) if is_known else None
        )
    return tables[skip_special_tokens]


def _is_known_kind(tokenizer: Any) -> bool:
    if _module_of(tokenizer, "_decode") != "transformers.tokenization_utils_tokenizers":
        return False
    backend = tokenizer.backend_tokenizer
    if tokenizer.clean_up_tokenization_spaces:
        # Spaces are taken out of the text afterwards; not of BPE's, unless it is asked for twice.
        option = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        if type(backend.model).__name__ != "BPE" or getattr(tokenizer, option, False):
            return False
    if type(backend.decoder).__name__ == "ByteLevel":
        return type(backend.model).__name__ == "BPE"
    steps = _decoder_steps(backend.decoder)
    return steps in (SENTENCEPIECE_DECODER, [*SENTENCEPIECE_DECODER, STRIP_PREFIX_SPACE])


def _module_of(tokenizer: Any, name: str) -> str | None:
    """The module in which a method of the tokenizer is written."""
    method = getattr(tokenizer, name, None)
    return getattr(getattr(method, "__func__", None), "__module__", None)


def _decoder_steps(decoder: Any) -> list[dict[str, Any]]:
    """The parts of a decoder that is a sequence, as tokenizer.json has them; else none."""
    if type(decoder).__name__ != "Sequence":
        return []
    try:
        steps: list[dict[str, Any]] = json.loads(decoder.__getstate__())["decoders"]
    except Exception:  # a part written in Python has no such form
        return []
    return steps
