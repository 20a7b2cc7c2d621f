"""Masks and biases against Hugging Face's logits processors; checks against the vocabulary."""

import numpy as np
import pytest
import torch
from tiny_models import save_tokenizer
from transformers import (
    AutoTokenizer,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from nanovllm import ArgumentError, SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling import token_masks
from nanovllm.sampling.history import TokenHistory
from nanovllm.sampling.token_masks import (
    FORBIDDEN,
    AllowedTokens,
    ForbiddenTokens,
    LogitBias,
    apply_bitmask,
)
from nanovllm.sampling.token_rules import compile_rules
from nanovllm.sampling.vocabulary import check_against_vocab, encode_bad_words

VOCAB_SIZE = 45  # not a multiple of 32
WIDTH = 64
CPU = torch.device("cpu")


def new_sequence(prompt: list[int], completion: list[int], row: int = 0, **params) -> Sequence:
    seq = Sequence(prompt, SamplingParams(max_tokens=500, **params))
    seq.token_ids += completion
    seq.row = row
    seq.num_computed_tokens = len(seq.token_ids)
    return seq


def masked(seqs: list[Sequence], logits: torch.Tensor) -> torch.Tensor:
    """The logits [P, VOCAB_SIZE] after the rules of `seqs`, each at its newest token."""
    history = TokenHistory(8, 512, CPU)
    history.write(seqs)
    rules = [compile_rules(seq, VOCAB_SIZE) for seq in seqs]
    padded = torch.full((len(seqs), WIDTH), torch.nan)
    padded[:, :VOCAB_SIZE] = logits
    positions = torch.tensor([len(seq) - 1 for seq in seqs], dtype=torch.int32)
    ForbiddenTokens(seqs, rules, CPU).apply(padded, positions, history)
    AllowedTokens(seqs, rules, VOCAB_SIZE, CPU).apply(padded)
    LogitBias(rules, WIDTH, CPU).apply(padded)
    return padded[:, :VOCAB_SIZE]


def test_bad_words_equal_hugging_face_on_what_was_generated():
    torch.manual_seed(0)
    words = [[[3], [0, 1], [1, 0, 2], [2, 2, 2, 2]], [[0, 0]], [[4], [3, 4]], []]
    num_bans = 0
    for length in range(30):
        batch = []
        for row, bad_word_ids in enumerate(words):
            seq = new_sequence([0, 1, 0], torch.randint(3, (length,)).tolist(), row=row)
            seq.features.bad_word_ids = bad_word_ids
            batch.append(seq)
        changed = masked(batch, torch.zeros(len(batch), VOCAB_SIZE))
        for seq, row in zip(batch, changed, strict=True):
            expected = torch.zeros(1, VOCAB_SIZE)
            if seq.features.bad_word_ids:
                completion = torch.tensor([seq.completion_token_ids], dtype=torch.int64)
                processor = NoBadWordsLogitsProcessor([*seq.features.bad_word_ids])
                expected = processor(completion, expected)
            assert torch.equal(row == FORBIDDEN, expected[0] == -torch.inf), seq.token_ids
            num_bans += int((row == FORBIDDEN).sum())
    assert num_bans > 2 * 30 + 20  # not only the two words of one token


def test_a_bad_word_that_the_prompt_began_may_be_completed():
    seq = new_sequence([7, 8], [])
    seq.features.bad_word_ids = [[7, 8, 9], [8, 5]]
    assert not masked([seq], torch.zeros(1, VOCAB_SIZE)).any()
    seq.token_ids += [7, 8]
    changed = masked([seq], torch.zeros(1, VOCAB_SIZE))
    assert changed[0].nonzero().flatten().tolist() == [5, 9]


def test_min_tokens_equals_hugging_face():
    for num_tokens in range(7):
        seqs = [
            new_sequence([1, 2, 3], list(range(num_tokens)), row=0, min_tokens=4),
            new_sequence([1], list(range(num_tokens)), row=1, min_tokens=1),
            new_sequence([1], list(range(num_tokens)), row=2),
        ]
        for seq in seqs:
            seq.end_token_ids = frozenset((2, 40))
        changed = masked(seqs, torch.zeros(3, VOCAB_SIZE))
        for seq, row in zip(seqs, changed, strict=True):
            processor = MinNewTokensLengthLogitsProcessor(
                seq.num_prompt_tokens, seq.sampling_params.min_tokens, [2, 40], device="cpu"
            )
            expected = processor(torch.tensor([seq.token_ids]), torch.zeros(1, VOCAB_SIZE))
            assert torch.equal(row == FORBIDDEN, expected[0] == -torch.inf)


def test_where_rules_end():
    seq = new_sequence([1, 2, 3], [], min_tokens=4)
    seq.end_token_ids = frozenset((2,))
    assert compile_rules(seq, VOCAB_SIZE).end == 6  # the fourth token is sampled after position 5
    for params in ({"logit_bias": {1: 2.0}}, {"allowed_token_ids": [1]}):
        assert compile_rules(new_sequence([1], [], **params), VOCAB_SIZE).end > 10**9
    assert compile_rules(new_sequence([1], [2], top_p=0.5), VOCAB_SIZE) is None


def test_logit_bias_equals_hugging_face():
    torch.manual_seed(0)
    biases = [{0: 3.0, 44: -100.0}, {17: 0.5}]
    seqs = [new_sequence([1], [], row=row, logit_bias=bias) for row, bias in enumerate(biases)]
    logits = torch.randn(2, VOCAB_SIZE)
    for bias, before, after in zip(biases, logits, masked(seqs, logits), strict=True):
        processor = SequenceBiasLogitsProcessor({(key,): value for key, value in bias.items()})
        expected = processor(torch.tensor([[1]]), before.unsqueeze(0).clone())
        torch.testing.assert_close(after, expected[0], rtol=0, atol=1e-6)


def test_allowed_token_ids_leave_only_these():
    torch.manual_seed(0)
    logits = torch.randn(3, VOCAB_SIZE)
    allowed = [[10], [0, 31, 32, 44]]
    seqs = [new_sequence([1], [], row=r, allowed_token_ids=ids) for r, ids in enumerate(allowed)]
    seqs.append(new_sequence([1], [], row=2, logit_bias={3: 1.0}))
    changed = masked(seqs, logits)
    for ids, before, after in zip(allowed, logits, changed, strict=False):
        assert torch.equal(after[ids], before[ids])
        assert after.isfinite().sum() == len(ids)
    assert changed[2].isfinite().all()


def test_an_allowed_token_is_taken_even_if_it_is_a_bad_word():
    seq = new_sequence([1], [], allowed_token_ids=[10, 11], min_tokens=9)
    seq.features.bad_word_ids = [[10]]
    seq.end_token_ids = frozenset((11,))
    assert masked([seq], torch.zeros(1, VOCAB_SIZE))[0].argmax() in (10, 11)


def test_bitmask_bit_by_bit():
    rng = np.random.default_rng(0)
    bitmask = rng.integers(-(2**31), 2**31, (5, 2), dtype=np.int32)
    logits = torch.ones(5, WIDTH)
    apply_bitmask(logits, torch.from_numpy(bitmask))
    for row, words in zip(logits, bitmask.tolist(), strict=True):
        for token_id, logit in enumerate(row.tolist()):
            assert logit == (1 if words[token_id // 32] >> token_id % 32 & 1 else -np.inf)


class OddTokens:
    """A grammar that allows odd ids."""

    def fill_bitmask(self, bitmask: torch.Tensor, index: int) -> None:
        bitmask[index] = 0xAAAAAAAA - 2**32


def test_grammars_and_allowed_ids_of_a_batch(monkeypatch):
    def fill_bitmasks(grammars, bitmask):
        for index, grammar in enumerate(grammars):
            grammar.fill_bitmask(bitmask, index)

    monkeypatch.setattr(token_masks, "fill_bitmasks", fill_bitmasks)
    seqs = [
        new_sequence([1], [], row=0),
        new_sequence([1], [], row=1, allowed_token_ids=[2, 3, 43]),
        new_sequence([1], [], row=2, allowed_token_ids=[8]),
        new_sequence([1], [], row=3),
    ]
    seqs[0].features.grammar = seqs[1].features.grammar = OddTokens()
    changed = masked(seqs, torch.zeros(4, VOCAB_SIZE))
    left = [row.isfinite().nonzero().flatten().tolist() for row in changed]
    assert left == [list(range(1, VOCAB_SIZE, 2)), [3, 43], [8], list(range(VOCAB_SIZE))]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


def test_bad_words_are_encoded_with_and_without_a_space(tokenizer):
    for word in ("fox", " fox", "the quick"):
        encoded = encode_bad_words([word], tokenizer, 384)
        assert [tokenizer.decode(ids) for ids in encoded] == [word.lstrip(), " " + word.lstrip()]
    assert [tokenizer.decode(ids) for ids in encode_bad_words(["\n"], tokenizer, 384)] == ["\n"]
    assert encode_bad_words([], tokenizer, 384) == []


def test_a_spaced_form_that_ends_as_the_plain_one_is_left_out():
    class Characters:
        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return [ord(character) for character in text]

    assert encode_bad_words(["ab"], Characters(), 128) == [[97, 98]]
    with pytest.raises(ArgumentError, match="bad_words: token id 233 .* 0 to 127"):
        encode_bad_words(["a", "é"], Characters(), 128)


@pytest.mark.parametrize(
    "params",
    [
        {"allowed_token_ids": [3, 10**7]},
        {"logit_bias": {"10000000": 1.0}},
        {"stop_token_ids": [10**7]},
    ],
)
def test_ids_beyond_the_vocabulary_are_refused(params):
    [name] = params
    with pytest.raises(ArgumentError, match=f"{name}: token id 10000000 .* vocabulary: 0 to 44"):
        check_against_vocab(SamplingParams(**params), VOCAB_SIZE)
    check_against_vocab(SamplingParams(**params), 10**7 + 1)
    check_against_vocab(SamplingParams(), VOCAB_SIZE)
