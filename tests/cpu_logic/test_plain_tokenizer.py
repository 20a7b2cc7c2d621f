"""Tokenizers without transformers: where one is made, it is what `AutoTokenizer` gives."""

import json
import random
import shutil
from pathlib import Path

import pytest
import real_tokenizers
from folder_mutations import VALUES
from tiny_models import CORPUS, save_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from nanovllm import ArgumentError
from nanovllm.config import Config
from nanovllm.inputs.plain_tokenizer import (
    CLASSES_OF,
    QWEN2,
    QWEN2_PATTERN,
    PlainTokenizer,
    in_full,
)
from nanovllm.inputs.token_bytes import token_bytes
from nanovllm.inputs.tokenizer import load_tokenizer
from nanovllm.models.config_defaults import DEFAULTS
from nanovllm.models.registry import ARCHITECTURES

ARCHITECTURE_OF = {family.model_type: name for name, family in ARCHITECTURES.items()}
TEXTS = [
    "",
    "The quick brown fox, it's 12345 BLOCKS",
    "<|im_start|>user\nhi there<|im_end|>\n<|endoftext|> <|im_start|>",
    "naïve café — 日本語 🙂\n\n\tx_y = f(z)  end\n",
    "ﬁ e\u0301 \u212b Ⅳ",  # that NFC or NFKC change
    " the lazy dog<|im_end|> <tool_call>{}</tool_call><|begin_of_text|>",
]


def write_config(folder: Path, model_type: str) -> None:
    raw = {"architectures": [ARCHITECTURE_OF[model_type]], "model_type": model_type}
    raw["num_key_value_heads"] = DEFAULTS[model_type]["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(raw))


def save_qwen2(folder: Path) -> None:
    """A small tokenizer of Qwen2's own class, as transformers saves it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    whole = Qwen2Tokenizer(
        vocab=model["vocab"], merges=merges, unk_token=None, eos_token="<|im_end|>"
    )
    whole.add_tokens(
        [AddedToken("<tool_call>", normalized=False), AddedToken("<|im_start|>", special=True)]
    )
    whole.save_pretrained(folder)


@pytest.fixture(scope="module", params=["general", "qwen2"])
def saved(request, tmp_path_factory) -> Path:
    """A small tokenizer of each kind of class, in the folder of a model."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "general":
        save_tokenizer(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # as older versions write it
        settings["extra_special_tokens"] = ["<|im_start|>"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        save_qwen2(folder)
    write_config(folder, "qwen3")
    return folder


def load(folder: Path) -> object:
    return load_tokenizer(Config(str(folder)))


def without_offsets(backend: Tokenizer) -> dict:
    """tokenizer.json without what is about offsets, and without a decoder's unused options."""

    def clean(part):
        if isinstance(part, list):
            return [clean(each) for each in part]
        if not isinstance(part, dict):
            return part
        return {key: clean(value) for key, value in part.items() if key != "trim_offsets"}

    # The pieces and their merges are large: they are compared as they are written.
    head, _, model_text = backend.to_str().partition(',"model":')
    options, _, pieces = model_text.partition('"vocab":')
    form, model = json.loads(head + "}"), json.loads(options + '"vocab":0}')
    assert pieces
    form["decoder"] = form["decoder"]["type"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        model[name] = model[name] or None
    if (form["post_processor"] or {}).get("type") == "ByteLevel":
        form["post_processor"] = None  # it trims offsets and adds no token
    form |= {"model": model, "pieces": pieces}
    return clean({key: value for key, value in form.items() if key != "version"})


def check_equal(folder: Path, whole: object = None) -> bool:
    """Whether it was loaded without transformers, and equal to what transformers loads."""
    try:
        plain = load(folder)
    except ArgumentError:
        return False
    if not isinstance(plain, PlainTokenizer):
        return False
    assert plain.loaded is None
    whole = whole or AutoTokenizer.from_pretrained(folder)
    ours, theirs = (
        without_offsets(backend) for backend in (plain.plain_backend, whole.backend_tokenizer)
    )
    if theirs["post_processor"] != ours["post_processor"]:  # templates without a token
        assert not ours["post_processor"] or not ours["post_processor"]["special_tokens"]
        assert not theirs["post_processor"] or not theirs["post_processor"]["special_tokens"]
        theirs["post_processor"] = ours["post_processor"]
    assert ours == theirs
    assert plain.eos_token_id == whole.eos_token_id
    assert len(plain) == len(whole)
    for special in (True, False):
        encoded = [whole.encode(text, add_special_tokens=special) for text in TEXTS]
        assert [plain.encode(text, add_special_tokens=special) for text in TEXTS] == encoded
        options = {"add_special_tokens": special, "return_attention_mask": False}
        assert plain(TEXTS, **options)["input_ids"] == encoded
        for token_ids in encoded:
            for skips in (True, False):
                text = whole.decode(token_ids, skip_special_tokens=skips)
                assert plain.decode(token_ids, skip_special_tokens=skips) == text
    table, expected = token_bytes(plain), token_bytes(whole)
    ids = [*range(min(len(whole), 2000)), *range(max(0, len(whole) - 500), len(whole) + 3)]
    assert [table[i] for i in ids] == [expected[i] for i in ids]
    assert plain.loaded is None
    return True


def test_small_ones(saved):
    assert check_equal(saved)


@pytest.mark.parametrize("name", ["austen", "qwen3", "llama-3.2"])
def test_real_ones(name, tmp_path):
    if name in real_tokenizers.FOLDERS:
        whole = real_tokenizers.load(name)
        assert check_equal(real_tokenizers.FOLDERS[name], whole)
    else:
        real_tokenizers.save(name, tmp_path)
        write_config(tmp_path, "llama")
        assert check_equal(tmp_path)


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_classes_of_each_family(saved, model_type, tmp_path):
    """transformers takes the class that is known here, or transformers is asked."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    write_config(tmp_path, model_type)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    name = settings["tokenizer_class"]
    assert check_equal(tmp_path) == (name in CLASSES_OF.get(model_type, ()))
    if name in CLASSES_OF.get(model_type, ()):
        whole = AutoTokenizer.from_pretrained(tmp_path)
        assert type(whole) is (Qwen2Tokenizer if name in QWEN2 else PreTrainedTokenizerFast)


def mutate(value: dict, rng: random.Random) -> None:
    """Change, add or leave out something somewhere in a JSON object."""
    holder: dict | list = value
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = rng.choice(keys)
        inner = holder[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.7:
            holder = inner
            continue
        break
    kind = rng.random()
    if kind < 0.25 and isinstance(holder, dict):
        del holder[key]
    elif kind < 0.45 and isinstance(holder, dict):
        name = rng.choice([*SETTINGS_ADDED, *holder])
        holder[name] = rng.choice([*VALUES, *TOKENS, TOKENS])
    elif isinstance(inner, bool) and rng.random() < 0.8:
        holder[key] = not inner
    else:
        holder[key] = rng.choice([*VALUES, *TOKENS, TOKENS[:1]])


TOKENS = ["<|im_end|>", "<|endoftext|>", "<|im_start|>", "<tool_call>", "the", "<new>"]
SETTINGS_ADDED = """bos_token unk_token sep_token cls_token mask_token image_token add_bos_token
add_eos_token padding_side truncation_side split_special_tokens extra_special_tokens
additional_special_tokens added_tokens_decoder errors add_prefix_space tokenizer_class use_fast
clean_up_tokenization_spaces model_max_length truncation padding""".split()


def count_equal(saved: Path, folder: Path, seeds: range) -> int:
    """How many of the mutations were loaded without transformers."""
    num_plain = 0
    for seed in seeds:
        rng = random.Random(seed)
        for name in ("tokenizer_config.json", "tokenizer.json", "config.json"):
            shutil.copy(saved / name, folder / name)
        for name in rng.choice((["tokenizer_config.json"], ["tokenizer.json"], ["_.json"] * 2)):
            name = rng.choice(("tokenizer_config.json", "tokenizer.json")) if "_." in name else name
            value = json.loads((folder / name).read_text())
            mutate(value, rng)
            (folder / name).write_text(json.dumps(value))
        try:
            num_plain += check_equal(folder)
        except Exception as error:
            where = f"case {seed}: {(folder / 'tokenizer_config.json').read_text()}"
            raise AssertionError(where) from error
    return num_plain


def test_changed_files(saved, tmp_path):
    assert count_equal(saved, tmp_path, range(40)) > 3


def test_legacy_files_beside_need_transformers(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert check_equal(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<new>"}))
    assert load(tmp_path).bos_token == "<new>"
    assert not check_equal(tmp_path)


def test_the_whole_one_answers_everything_else(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    plain, whole = load(tmp_path), AutoTokenizer.from_pretrained(saved)
    shutil.rmtree(tmp_path)  # its files were read at the start
    assert plain.encode(TEXTS[1], truncation=True, max_length=3) == whole.encode(TEXTS[1])[:3]
    assert plain.loaded is in_full(plain) is plain.load()
    assert type(in_full(plain)) is type(whole)
    assert plain.get_vocab() == whole.get_vocab()
    assert plain.name_or_path == str(tmp_path)
    assert [plain.encode(text) for text in TEXTS] == [whole.encode(text) for text in TEXTS]


def test_the_engine_follows_changes_of_the_whole_one(saved):
    plain = load(saved)
    number = plain.encode("<extra>", add_special_tokens=False)
    whole = in_full(plain)
    whole.add_tokens(["<extra>"], special_tokens=True)
    assert plain.encode("<extra>") == [len(plain) - 1] != number
    assert token_bytes(plain)[len(plain) - 1] == b"<extra>"
    before = whole.decode
    whole.decode = lambda token_ids, **options: before(token_ids, **options).upper()
    assert token_bytes(plain) is None
    assert plain.decode(plain.encode("the")) == "THE"
