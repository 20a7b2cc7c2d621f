"""Ends completions that repeat themselves: vLLM's `repetition_detection`."""

from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import RepetitionDetectionParams


def is_repetitive(token_ids: list[int], params: RepetitionDetectionParams) -> bool:
    """Whether the last tokens are one piece, of a length in the limits, `min_count` times over."""
    newest = token_ids[-1]
    for size in range(max(params.min_pattern_size, 1), params.max_pattern_size + 1):
        length = size * params.min_count
        if length > len(token_ids):
            return False
        if token_ids[-1 - size] != newest:
            continue
        tail = token_ids[-length:]
        if tail[size:] == tail[:-size]:
            return True
    return False


class RepetitionRule:
    """A `FinishRule`. EOS, stop ids, the length and `min_tokens` go before it, as in vLLM."""

    def __init__(self, seq: Sequence, params: RepetitionDetectionParams) -> None:
        self.seq = seq
        self.params = params

    def on_token(self, token_id: int) -> tuple[str, str | None] | None:
        """See `FinishRule.on_token`."""
        seq, params = self.seq, self.params
        if (
            seq.num_completion_tokens < seq.sampling_params.min_tokens
            or token_id in seq.end_token_ids
            or seq.num_tokens >= seq.max_length
        ):
            return None
        start = seq.num_tokens - params.max_pattern_size * params.min_count
        newest = seq.token_ids[max(start, seq.num_prompt_tokens) :]
        return ("repetition", "repetition_detected") if is_repetitive(newest, params) else None
