"""Whole completions by a `LogitsSampler`, and the same by plain Python, one request at a time.

The "model" is a table: its logits depend on the newest token and the position. As in the engine,
a step is sampled before the host has the tokens of the one before.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nanovllm import SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels import torch_ops
from nanovllm.kernels.select import select_ops
from nanovllm.sampling.logits_sampler import LogitsSampler, Sampled

VOCAB_SIZE = 19
WIDTH = 32  # of the model's logits; the columns behind the vocabulary are never tokens
MAX_NUM_SEQS = 12
MAX_MODEL_LEN = 64
NUM_STEPS = 24


@dataclass
class Spec:
    """A request."""

    prompt: list[int]
    params: dict[str, Any]
    bad_word_ids: list[list[int]] = field(default_factory=list)
    end_token_ids: tuple[int, ...] = ()
    seed: int = 0

    def sampling_params(self) -> SamplingParams:
        return SamplingParams(max_tokens=NUM_STEPS, **self.params)


PENALTIES = {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "presence_penalty": 0.5}
EVERYTHING = {
    "temperature": 1.3,
    "top_p": 0.9,
    "top_k": 6,
    "min_p": 0.02,
    "min_tokens": 15,
    "logit_bias": {3: 1.5, 4: -2.0},
    "allowed_token_ids": [1, 3, 4, 5, 7, 8, 11, 12, 18],
    "logprobs": 2,
    **PENALTIES,
}
BIGRAMS = [[a, b] for a in range(1, 12) for b in range(a % 3, VOCAB_SIZE, 2)]
SPECS = [
    Spec([1, 2, 3], {"temperature": 0.0, **PENALTIES}),
    Spec([4], {"top_p": 0.6}, seed=2**64 - 3),
    Spec([2, 2], EVERYTHING, [[3, 5], [7], [1, 1, 4]], (18, 5), seed=7),
    Spec([5] * 9, {"temperature": 1.5, "top_k": 4, "min_p": 0.1, "logprobs": 0}, seed=8),
    Spec([6, 1], {"temperature": 0.0}, [[9], *BIGRAMS]),
    Spec([6, 1], {"temperature": 2.0, "frequency_penalty": -0.8}, BIGRAMS, seed=9),
    Spec([3, 8, 0, 1], {"min_tokens": 12, "logit_bias": {6: 4.0}}, [], (6, 7), seed=10),
    Spec([3], {"allowed_token_ids": [10]}),
    Spec([0], {"logprobs": 3}, seed=11),
    Spec([7, 7, 2], {"temperature": 0.0, "allowed_token_ids": [2, 5, 9], "presence_penalty": 2.0}),
]


def model_logits(token_id: int, position: int) -> torch.Tensor:
    """[WIDTH] float32."""
    generator = torch.Generator().manual_seed(1000 * position + token_id)
    logits = 3 * torch.randn(WIDTH, generator=generator)
    logits[VOCAB_SIZE:] = 100.0
    return logits


def reference_completion(spec: Spec) -> list[int]:
    """The completion of one request alone, each rule written out."""
    params = spec.sampling_params()
    generated: list[int] = []
    while len(generated) < NUM_STEPS:
        known = spec.prompt + generated
        position = len(known) - 1
        logits = model_logits(known[-1], position)[:VOCAB_SIZE]
        if params.allowed_token_ids:
            others = set(range(VOCAB_SIZE)) - set(params.allowed_token_ids)
            logits[list(others)] = -torch.inf
        for *before, last in spec.bad_word_ids:
            if not before or generated[-len(before) :] == before:
                logits[last] = -torch.inf
        if len(generated) < params.min_tokens:
            logits[list(spec.end_token_ids)] = -torch.inf
        for token_id, bias in (params.logit_bias or {}).items():
            logits[token_id] += bias
        for token_id in set(known):
            factor = params.repetition_penalty
            logits[token_id] *= 1 / factor if logits[token_id] > 0 else factor
        for token_id, count in Counter(generated).items():
            logits[token_id] -= params.frequency_penalty * count + params.presence_penalty
        if params.temperature > 0:
            logits = filtered(logits, params)
        _, drawn = torch_ops.sample(
            logits.unsqueeze(0),
            torch.tensor([params.temperature]),
            torch.from_numpy(np.array([[spec.seed]], dtype=np.uint64).view(np.int32)),
            torch.tensor([position], dtype=torch.int32),
            0,
            VOCAB_SIZE,
        )
        generated.append(int(drawn))
    return generated


def filtered(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """min_p, top_k, top_p in turn, each on what the one before has left."""
    order = logits.argsort(descending=True).tolist()
    odds = (logits.double() / params.temperature).softmax(0).tolist()
    order = [i for i in order if odds[i] >= params.min_p * odds[order[0]] and odds[i] > 0]
    order = order[: params.top_k or None]
    total = sum(odds[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass < params.top_p * total:
            kept.append(i)
        mass += odds[i]
    left = torch.full_like(logits, -torch.inf)
    left[kept] = logits[kept]
    return left


class Run:
    """Sequences that are sampled step after step; the newest token is committed a step later."""

    def __init__(
        self, specs: list[Spec], rows: list[int] | None = None, device: str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        ops = select_ops("auto", self.device, torch.float32, 16, compile_torch_ops=False)
        self.sampler = LogitsSampler(ops, self.device, VOCAB_SIZE, MAX_NUM_SEQS, MAX_MODEL_LEN)
        self.seqs = []
        for spec in specs:
            seq = Sequence(spec.prompt, spec.sampling_params(), seed=spec.seed)
            seq.features.bad_word_ids = spec.bad_word_ids
            seq.end_token_ids = frozenset(spec.end_token_ids)
            self.seqs.append(seq)
        self.pending: list[int | None] = [None] * len(specs)
        self.sampled: list[Sampled] = []
        self.begin(rows or list(range(len(specs))))

    def begin(self, rows: list[int]) -> None:
        """Give the sequences rows, as a prefill of all their tokens does."""
        self.commit()
        for seq, row in zip(self.seqs, rows, strict=True):
            seq.row = row
            seq.num_computed_tokens = len(seq) - 1
        self.sampler.begin(self.seqs)

    def commit(self) -> None:
        for seq, token_id in zip(self.seqs, self.pending, strict=True):
            if token_id is not None:
                seq.token_ids.append(token_id)
        self.pending = [None] * len(self.seqs)

    def step(self, order: list[int] | None = None) -> None:
        """Sample all sequences, batched in the given order."""
        order = order or list(range(len(self.seqs)))
        newest = [
            seq.token_ids[-1] if token_id is None else token_id
            for seq, token_id in zip(self.seqs, self.pending, strict=True)
        ]
        for seq in self.seqs:
            seq.num_computed_tokens += 1
        positions = [seq.num_computed_tokens - 1 for seq in self.seqs]
        logits = torch.stack([model_logits(newest[i], positions[i]) for i in order])
        positions_in_order = torch.tensor([positions[i] for i in order], dtype=torch.int32)
        sampled = self.sample(
            logits.to(self.device),
            [self.seqs[i] for i in order],
            positions_in_order.to(self.device),
        )
        self.sampled.append(sampled)
        self.commit()
        for i, token_id in zip(order, sampled.token_ids.tolist(), strict=True):
            self.pending[i] = token_id

    def sample(
        self, logits: torch.Tensor, seqs: list[Sequence], positions: torch.Tensor
    ) -> Sampled:
        """The sampler's part of a step, for tests to wrap."""
        return self.sampler.sample(logits, seqs, positions)

    def completions(self, num_steps: int = NUM_STEPS) -> list[list[int]]:
        for _ in range(num_steps):
            self.step()
        self.commit()
        return [seq.completion_token_ids for seq in self.seqs]
