"""Tokenizers of known classes read from tokenizer.json alone, without transformers.

The tokenizers library reads the file as it is. So does transformers for its general class, and for
Qwen2Tokenizer, which it builds anew, if the file says what the class builds. Any setting that is
not known to change nothing makes none: then transformers loads the tokenizer.
"""

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

GENERAL = ("PreTrainedTokenizerFast", "TokenizersBackend")
QWEN2 = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
CLASSES = (*GENERAL, *QWEN2)
# model_type -> the classes that transformers loads as tokenizer_config.json names them. Of other
# families it takes another class, or changes how texts are split (Mistral's).
_GENERAL_TYPES = """arcee cohere cohere2 exaone4 gemma gemma2 gemma3_text glm glm4 gpt_oss granite
granitemoe helium llama olmo2 olmo3 olmoe qwen3_5_text seed_oss smollm3 starcoder2"""
CLASSES_OF = {
    **dict.fromkeys(_GENERAL_TYPES.split(), GENERAL),
    "qwen2": QWEN2,
    **dict.fromkeys(("qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"), CLASSES),
}
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")
# Settings and the values that they may have; those of the tokens are checked apart.
SETTINGS: dict[str, Callable[[Any], bool]] = {
    "add_bos_token": lambda value: True,  # not used where there is a tokenizer.json
    "add_eos_token": lambda value: True,
    "add_prefix_space": lambda value: value is None or value is False,
    "backend": lambda value: value == "tokenizers",
    "chat_template": lambda value: value is None or type(value) is str,
    "clean_up_tokenization_spaces": lambda value: type(value) is bool,  # not done to BPE's texts
    "errors": lambda value: value == "replace",
    "is_local": lambda value: type(value) is bool,
    "model_input_names": lambda value: value == ["input_ids", "attention_mask"],
    "model_max_length": lambda value: type(value) in (int, float),
    "split_special_tokens": lambda value: value is False,
    "tokenizer_class": lambda value: value in CLASSES,
}
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = {
    "type": "Split",
    "pattern": {"Regex": QWEN2_PATTERN},
    "behavior": "Isolated",
    "invert": False,
}
BYTES = "ByteLevel"
# Of a special token that transformers would not add once more.
OPTIONS = {
    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
    "special": True,
}
ENCODING_OPTIONS = {"add_special_tokens", "return_attention_mask"}


class PlainTokenizer:
    """What an engine asks of a tokenizer, answered by the tokenizers library.

    All else, and everything once that was needed, is the business of transformers' tokenizer. It is
    that one which users get, who may change it.

    Args:
        backend: a `tokenizers.Tokenizer` of byte-level BPE.
        eos_token: None: there is none.
        load: returns transformers' tokenizer of the same files.
    """

    is_fast = True

    def __init__(self, backend: Any, eos_token: str | None, load: Callable[[], Any]) -> None:
        self.plain_backend = backend
        self.loaded: Any | None = None  # the tokenizer of transformers, once it was needed
        self._eos_token, self._load, self._lock = eos_token, load, threading.Lock()

    def load(self) -> Any:
        """The tokenizer of transformers; ArgumentError if it cannot be loaded."""
        with self._lock:
            if self.loaded is None:
                self.loaded = self._load()
        return self.loaded

    def encode(self, text: Any, **options: Any) -> list[int]:
        """The ids of a text, with special tokens unless `add_special_tokens=False`."""
        if isinstance(text, str) and self._is_plain(options):
            return self([text], **options)["input_ids"][0]
        return self.load().encode(text, **options)

    def __call__(self, texts: Any, **options: Any) -> Any:
        """The ids of each text, under "input_ids"."""
        if isinstance(texts, list) and self._is_plain(options):
            encodings = self.plain_backend.encode_batch(
                texts, add_special_tokens=options.get("add_special_tokens", True)
            )
            return {"input_ids": [encoding.ids for encoding in encodings]}
        return self.load()(texts, **options)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> str:
        """The text of ids."""
        is_plain = self.loaded is None and isinstance(token_ids, list) and not options
        if is_plain and set(map(type, token_ids)) <= {int}:
            return self.plain_backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return self.load().decode(token_ids, skip_special_tokens=skip_special_tokens, **options)

    def _is_plain(self, options: Mapping[str, Any]) -> bool:
        return (
            self.loaded is None
            and options.keys() <= ENCODING_OPTIONS
            and type(options.get("add_special_tokens", True)) is bool
            and not options.get("return_attention_mask")
        )

    @property
    def eos_token_id(self) -> int | None:
        if self.loaded is not None:
            return self.loaded.eos_token_id
        return None if self._eos_token is None else self.plain_backend.token_to_id(self._eos_token)

    def __len__(self) -> int:
        if self.loaded is not None:
            return len(self.loaded)
        return self.plain_backend.get_vocab_size(with_added_tokens=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also what a copy that is not made yet asks for
            raise AttributeError(name)
        return getattr(self.load(), name)


def in_full(tokenizer: Any) -> Any:
    """The tokenizer of transformers behind a `PlainTokenizer`; any other as it is."""
    return tokenizer.load() if isinstance(tokenizer, PlainTokenizer) else tokenizer


def plain_backend(
    text: str, fields: Mapping[str, Any], settings: Mapping[str, Any], model_type: str
) -> Any | None:
    """The tokenizer of a tokenizer.json, if transformers' would be equal to it; else None.

    Args:
        text: of the file.
        fields: of the file, but for its model.
        settings: tokenizer_config.json, without what is left out of its copy.
        model_type: of config.json.

    Raises:
        Exception: the tokenizers library cannot read the file.
    """
    name = settings.get("tokenizer_class")
    if not isinstance(name, str) or name not in CLASSES_OF.get(model_type, ()):
        return None
    if not _are_plain(settings):
        return None
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_str(text)
    is_bytes = type(backend.model).__name__ == "BPE" and type(backend.decoder).__name__ == BYTES
    if not is_bytes or backend.truncation is not None or backend.padding is not None:
        return None
    if not _are_added(settings, fields, backend) or (
        name in QWEN2 and not _is_as_qwen2_builds(backend)
    ):
        return None
    if backend.post_processor is None:
        backend.post_processor = processors.TemplateProcessing(
            single="$A:0", pair="$A:0 $B:1", special_tokens=[]
        )
    return backend


def special_tokens(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens that have a name, those of Qwen2Tokenizer's defaults among them."""
    defaults: dict[str, str] = {}
    if settings["tokenizer_class"] in QWEN2:
        defaults = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    named = {name: settings.get(name, defaults.get(name)) for name in SPECIAL_TOKENS}
    return {name: token for name, token in named.items() if token is not None}


def _are_plain(settings: Mapping[str, Any]) -> bool:
    tokens = {*SPECIAL_TOKENS, *MORE_TOKENS, "added_tokens_decoder"}
    return all(
        name in tokens or (name in SETTINGS and SETTINGS[name](value))
        for name, value in settings.items()
    )


def _are_added(settings: Mapping[str, Any], fields: Mapping[str, Any], backend: Any) -> bool:
    """Whether tokenizer.json has all tokens of the settings, with the same options."""
    added = {
        token_id: {name: getattr(token, name) for name in ("content", *OPTIONS)}
        for token_id, token in backend.get_added_tokens_decoder().items()
    }
    listed = {token["id"]: token for token in fields["added_tokens"]}
    if listed != {token_id: {**added[token_id], "id": token_id} for token_id in added}:
        return False  # the library numbered them anew
    decoder = settings.get("added_tokens_decoder")
    if "added_tokens_decoder" in settings and (
        not isinstance(decoder, dict) or {int(key): decoder[key] for key in decoder} != added
    ):
        return False
    more = [settings[name] for name in MORE_TOKENS if settings.get(name) is not None]
    if len(more) > 1 or not all(isinstance(tokens, list) for tokens in more):
        return False
    special = {
        t["content"] for t in added.values() if {name: t[name] for name in OPTIONS} == OPTIONS
    }
    tokens = [*special_tokens(settings).values(), *(token for tokens in more for token in tokens)]
    return all(isinstance(token, str) and token in special for token in tokens)


def _is_as_qwen2_builds(backend: Any) -> bool:
    """Whether the class, which takes the vocabulary and the post-processor, builds the same."""
    model = backend.model
    options = (model.dropout, model.unk_token, model.fuse_unk, model.byte_fallback)
    affixes = (model.continuing_subword_prefix, model.end_of_word_suffix)
    if any(options) or any(affixes) or model.ignore_merges:
        return False
    num_tokens = backend.get_vocab_size(with_added_tokens=False)
    added = sorted(backend.get_added_tokens_decoder())
    if added != list(range(num_tokens, num_tokens + len(added))):
        return False  # the class would number them so
    if _state(backend.normalizer) != {"type": "NFC"}:
        return False
    parts = _state(backend.pre_tokenizer).get("pretokenizers", [])
    # `trim_offsets` is about offsets, which nothing here asks for.
    return [{k: v for k, v in part.items() if k != "trim_offsets"} for part in parts] == [
        QWEN2_SPLIT,
        {"type": BYTES, "add_prefix_space": False, "use_regex": False},
    ]


def _state(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as tokenizer.json has it."""
    return {} if part is None else json.loads(part.__getstate__())
