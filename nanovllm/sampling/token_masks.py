"""Forbids and biases single tokens on the device: grammars, allowed ids, bad words and the like.

Everything that is the same in every step is uploaded once for a batch; what depends on how far a
sequence is, the device finds out from positions and the token history.
"""

from collections.abc import Sequence as Items

import numpy as np
import torch

from nanovllm.kernels.copies import upload_one
from nanovllm.sampling.history import TokenHistory
from nanovllm.sampling.state import SampledSequence
from nanovllm.sampling.structured_outputs import fill_bitmasks
from nanovllm.sampling.token_rules import ANY_TOKEN, TokenRules

# The logit of a bad word and of an early end. Finite: where allowed ids or a grammar leave nothing
# but such tokens, one of them is taken.
FORBIDDEN = -1e30


def apply_bitmask(logits: torch.Tensor, bitmask: torch.Tensor) -> None:
    """Set the logits [P, W] float32 of the tokens whose bit is 0 to -inf, in place.

    bitmask: [P, words] int32, 32 * words <= W; bit j % 32 of word j // 32 is token j's.
    """
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=logits.device)
    is_forbidden = (bitmask.view(torch.uint8).unsqueeze(-1) & bits) == 0  # [P, 4 * words, 8]
    is_forbidden = is_forbidden.flatten(1)
    logits[:, : is_forbidden.shape[1]].masked_fill_(is_forbidden, -torch.inf)


class AllowedTokens:
    """The bitmasks of the first M of the sequences: of those with a grammar or allowed ids."""

    def __init__(
        self,
        seqs: Items[SampledSequence],
        rules: Items[TokenRules | None],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self.num_words = -(-vocab_size // 32)
        self.grammars = [seq.features.grammar for seq in seqs if seq.features.grammar is not None]
        self.allowed = [
            (index, rule.allowed)
            for index, rule in enumerate(rules)
            if rule is not None and rule.allowed is not None
        ]
        self.num_masked = max([len(self.grammars), *(index + 1 for index, _ in self.allowed)])
        if not self.grammars and self.allowed:
            self.static_bitmask = upload_one(np.stack([bits for _, bits in self.allowed]), device)

    def apply(self, logits: torch.Tensor) -> None:
        """Mask `logits` [P, W] float32 in place."""
        if self.num_masked:
            bitmask = self._next_bitmask() if self.grammars else self.static_bitmask
            apply_bitmask(logits[: self.num_masked], bitmask)

    def _next_bitmask(self) -> torch.Tensor:
        """[M, words] int32 on the device, from the grammars as they are now."""
        # Each step has memory of its own, given back to torch's allocator of pinned memory.
        shape = (self.num_masked, self.num_words)
        bitmask = torch.empty(shape, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        fill_bitmasks(self.grammars, bitmask[: len(self.grammars)])
        rows = bitmask.numpy()
        rows[len(self.grammars) :] = ANY_TOKEN  # all bits
        for index, bits in self.allowed:
            rows[index] &= bits
        return bitmask.to(self.device, non_blocking=True)


class ForbiddenTokens:
    """Bad words and early ends: F tokens, each forbidden while its condition holds."""

    def __init__(
        self, seqs: Items[SampledSequence], rules: Items[TokenRules | None], device: torch.device
    ) -> None:
        ruled = [(i, rule) for i, rule in enumerate(rules) if rule and rule.num_forbidden]
        self.count = sum(rule.num_forbidden for _, rule in ruled)
        self.prefix_length = max((rule.prefixes.shape[1] for _, rule in ruled), default=0)
        if not self.count:
            return
        indices = np.repeat([i for i, _ in ruled], [rule.num_forbidden for _, rule in ruled])
        packed = np.vstack((indices, np.concatenate([rule.forbidden for _, rule in ruled], axis=1)))
        self.indices, self.token_ids, self.starts, self.ends = upload_one(
            packed, device
        )  # [F] each
        if self.prefix_length:
            rows = np.array([seq.row for seq in seqs], dtype=np.int64)
            self.rows = upload_one(rows[indices].reshape(-1, 1), device)
            self.prefixes = upload_one(
                _stack_prefixes([rule for _, rule in ruled]), device
            )  # [F, K]

    def apply(self, logits: torch.Tensor, positions: torch.Tensor, history: TokenHistory) -> None:
        """Forbid them in `logits` [P, W] float32, whose last column is no token's, in place.

        Args:
            logits: contiguous.
            positions: [P] int32, of the newest tokens.
            history: complete up to the positions.
        """
        if not self.count:
            return
        position = positions.index_select(0, self.indices)  # [F]
        is_active = (position >= self.starts) & (position < self.ends)
        if self.prefix_length:
            offsets = torch.arange(1 - self.prefix_length, 1, device=logits.device)
            newest = (position.unsqueeze(1) + offsets).clamp_(min=0)  # [F, K]
            is_equal = (history.tokens[self.rows, newest] == self.prefixes) | (
                self.prefixes == ANY_TOKEN
            )
            is_active &= is_equal.all(1)
        width = logits.shape[1]
        columns = torch.where(is_active, self.token_ids, width - 1)
        logits.view(-1).index_fill_(0, self.indices * width + columns, FORBIDDEN)


def _stack_prefixes(rules: list[TokenRules]) -> np.ndarray:
    """The prefixes of all, as wide as the widest and right-aligned."""
    width = max(rule.prefixes.shape[1] for rule in rules)
    stacked = np.full((sum(rule.num_forbidden for rule in rules), width), ANY_TOKEN, dtype=np.int32)
    begin = 0
    for rule in rules:
        end = begin + rule.num_forbidden
        stacked[begin:end, width - rule.prefixes.shape[1] :] = rule.prefixes
        begin = end
    return stacked


class LogitBias:
    """What is added to N logits of some sequences."""

    def __init__(self, rules: Items[TokenRules | None], width: int, device: torch.device) -> None:
        ruled = [(index, rule) for index, rule in enumerate(rules) if rule and len(rule.biased)]
        self.count = len(ruled)
        if ruled:
            places = np.concatenate([index * width + rule.biased for index, rule in ruled])
            self.places = upload_one(places, device)
            self.biases = upload_one(np.concatenate([rule.biases for _, rule in ruled]), device)

    def apply(self, logits: torch.Tensor) -> None:
        """Add the biases to `logits` [P, W] float32, contiguous, in place."""
        if self.count:
            logits.view(-1).index_add_(0, self.places, self.biases)
