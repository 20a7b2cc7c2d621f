"""What one sequence wants of single tokens, as arrays on the host, made once.

Allowed ids, bad words, min_tokens and logit_bias; `token_masks` applies them on the device.
"""

from dataclasses import dataclass

import numpy as np

from nanovllm.sampling.state import SampledSequence

MAX_POSITION = 2**31 - 1
ANY_TOKEN = -1


@dataclass
class TokenRules:
    """One sequence's rules: F tokens that are forbidden under a condition, N biased ones.

    Token `forbidden[0, i]` may not follow a token at a position >= `forbidden[1, i]` and
    < `forbidden[2, i]` if the newest tokens up to it are `prefixes[i]`.
    """

    allowed: np.ndarray | None  # [ceil(vocab_size / 32)] int32, bits as in a grammar's bitmask
    forbidden: np.ndarray  # [3, F] int64
    prefixes: np.ndarray  # [F, K] int32, right-aligned; ANY_TOKEN matches all
    biased: np.ndarray  # [N] int64 token ids
    biases: np.ndarray  # [N] float32

    def __post_init__(self) -> None:
        self.num_forbidden = self.forbidden.shape[1]
        self.needs_history = self.prefixes.shape[1] > 0  # whether a ban depends on earlier tokens
        is_permanent = self.allowed is not None or len(self.biased) > 0
        # The position from which on they change nothing.
        self.end = MAX_POSITION if is_permanent else int(self.forbidden[2].max())


def compile_rules(seq: SampledSequence, vocab_size: int) -> TokenRules | None:
    """The rules of a sequence (its grammar apart); None if it has none.

    The last token of a bad word is forbidden after its other ones if all those were generated; end
    tokens are while the completion has fewer than min_tokens.
    """
    params = seq.sampling_params
    num_prompt_tokens = seq.num_prompt_tokens
    forbidden = [
        (word[-1], num_prompt_tokens + len(word) - 2, MAX_POSITION)
        for word in seq.features.bad_word_ids
    ]
    if params.min_tokens:
        end = num_prompt_tokens + params.min_tokens - 1
        forbidden += [(token_id, 0, end) for token_id in sorted(seq.end_token_ids)]
    bias = params.logit_bias or {}
    if not (forbidden or bias or params.allowed_token_ids):
        return None
    prefix_length = max((len(word) - 1 for word in seq.features.bad_word_ids), default=0)
    prefixes = np.full((len(forbidden), prefix_length), ANY_TOKEN, dtype=np.int32)
    for prefix, word in zip(prefixes, seq.features.bad_word_ids, strict=False):
        prefix[prefix_length - len(word) + 1 :] = word[:-1]
    return TokenRules(
        allowed=_pack_bits(params.allowed_token_ids, vocab_size),
        forbidden=np.array(forbidden, dtype=np.int64).reshape(-1, 3).T,
        prefixes=prefixes,
        biased=np.array(list(bias), dtype=np.int64),
        biases=np.array(list(bias.values()), dtype=np.float32),
    )


def _pack_bits(token_ids: list[int] | None, vocab_size: int) -> np.ndarray | None:
    """[ceil(vocab_size / 32)] int32 with the bits of `token_ids` set."""
    if token_ids is None:
        return None
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.bool_)
    bits[token_ids] = True
    return np.packbits(bits, bitorder="little").view(np.int32)
