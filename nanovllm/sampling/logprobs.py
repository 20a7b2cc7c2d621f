"""Log probabilities of the sampled and the most probable tokens: device, host, and user's form.

They are those of the model alone, from its raw logits in float32, whatever sampling does to these.
"""

from itertools import chain
from typing import Any, NamedTuple

import torch

from nanovllm.inputs.detokenizer import token_texts
from nanovllm.kernels.copies import Download
from nanovllm.outputs import FlatLogprobs, Logprob
from nanovllm.sampling.state import LogprobRow

MAX_FLOAT32_LOGITS = 2**24  # in float32 at a time
ALL_TOKENS = -1  # as a number of logprobs: the whole vocabulary


class LogprobTensors(NamedTuple):
    """The log probabilities at R positions, on the device; K is the largest number asked for."""

    token_ids: torch.Tensor  # [R, 1 + K] int32: the sampled (or the prompt's) token first
    logprobs: torch.Tensor  # [R, 1 + K] float32
    ranks: torch.Tensor  # [R] int32, of the first
    counts: list[int | None]  # asked for by each sequence; None: it has no row. -1: all

    def download(self) -> "LogprobsDownload":
        """Start copying them to the host."""
        return LogprobsDownload(self)


class LogprobsDownload:
    """Log probabilities on their way to the host; `rows` gives them."""

    def __init__(self, tensors: LogprobTensors) -> None:
        self._counts = tensors.counts
        self._download = Download(tensors.token_ids, tensors.logprobs, tensors.ranks)

    def rows(self) -> list[LogprobRow | None]:
        """What each sequence asked for, None if nothing; blocks until it has arrived."""
        token_ids, logprobs, ranks = self._download.wait()
        arrived = zip(token_ids, logprobs, ranks.tolist(), strict=True)
        rows: list[LogprobRow | None] = []
        for count in self._counts:
            if count is None:
                rows.append(None)
                continue
            ids, values, rank = next(arrived)
            if count != ALL_TOKENS and 1 + count < len(ids):
                # A view of the widest row's width must not stay behind.
                ids, values = ids[: 1 + count].copy(), values[: 1 + count].copy()
            rows.append(LogprobRow(ids, values, rank))
        return rows


def logprob_tensors(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    counts: list[int | None],
    others: torch.Tensor | None = None,
) -> LogprobTensors:
    """Log probabilities of given tokens, and of the most probable ones or of others.

    Args:
        logits: [R, V] of any float dtype.
        token_ids: [R] int32 or int64, each row's own token.
        counts: what each sequence asks for; R of them are not None, in the order of the rows.
        others: [R, K] int64, the others of each row, as many as it asks for, then any ids.
    """
    num_rows, vocab_size = logits.shape
    asked = [vocab_size if count == ALL_TOKENS else count for count in counts if count is not None]
    num_best = min(max(asked), vocab_size)
    rows_at_once = max(1, MAX_FLOAT32_LOGITS // vocab_size)
    parts = []
    for begin in range(0, num_rows, rows_at_once):
        part = slice(begin, begin + rows_at_once)
        chosen = None if others is None else others[part]
        parts.append(_logprobs_of(logits[part], token_ids[part], num_best, chosen))
    ids, values, ranks = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return LogprobTensors(ids, values, ranks, counts)


def _logprobs_of(
    logits: torch.Tensor, token_ids: torch.Tensor, num_best: int, other_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if other_ids is None:
        other_ids = logits.topk(num_best, dim=1).indices
    all_ids = torch.cat((token_ids.long().unsqueeze(1), other_ids), dim=1)  # [R, 1 + K]
    everything = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    logprobs = everything.gather(1, all_ids)
    ranks = 1 + (everything > logprobs[:, :1]).sum(1, dtype=torch.int32)
    return all_ids.int(), logprobs, ranks


def to_logprobs(
    rows: list[LogprobRow], tokenizer: Any = None, are_best: bool = True
) -> list[dict[int, Logprob]]:
    """What a user gets for each position: `{token id: Logprob}`, the position's own token first.

    Then the k best that differ from it, so k or k + 1 entries. The k best have the ranks 1 to k,
    another token 1 + the number of tokens that are strictly more probable. `decoded_token` is the
    text that the token adds in the middle of a text, U+FFFD for a part of a character; None without
    a tokenizer.

    are_best: the other tokens are the k best. Else they were asked for by id and have no ranks.
    """
    lists = [(row.token_ids.tolist(), row.logprobs.tolist()) for row in rows]
    texts = _texts([token_ids for token_ids, _ in lists], tokenizer)
    positions = []
    for row, (token_ids, logprobs) in zip(rows, lists, strict=True):
        own_id, *best_ids = token_ids
        own_logprob, *best_logprobs = logprobs
        position = {own_id: Logprob(own_logprob, row.rank, texts.get(own_id))}
        # Among the k best the own token has its place as its rank, so that 1 to k are all there.
        for rank, (token_id, logprob) in enumerate(zip(best_ids, best_logprobs, strict=True), 1):
            if are_best:
                position[token_id] = Logprob(logprob, rank, texts.get(token_id))
            elif token_id != own_id:
                position[token_id] = Logprob(logprob, None, texts.get(token_id))
        positions.append(position)
    return positions


def to_flat_logprobs(
    rows: list[LogprobRow], tokenizer: Any = None, are_best: bool = True
) -> FlatLogprobs:
    """`to_logprobs` in flat lists; each position has its own token and then all k others."""
    id_lists = [row.token_ids.tolist() for row in rows]
    texts = _texts(id_lists, tokenizer)
    flat = FlatLogprobs()
    for row, token_ids in zip(rows, id_lists, strict=True):
        own_id, *other_ids = token_ids
        ranks: list[int | None] = [row.rank]
        if are_best:
            ranks += range(1, len(token_ids))
        else:
            ranks += [row.rank if token_id == own_id else None for token_id in other_ids]
        flat.append_fast(token_ids, row.logprobs.tolist(), ranks, map(texts.get, token_ids))
    return flat


def _texts(id_lists: list[list[int]], tokenizer: Any) -> dict[int, str]:
    if tokenizer is None:
        return {}
    return token_texts(tokenizer, dict.fromkeys(chain.from_iterable(id_lists)))
