"""One request: its prompt, its sequences (one for each of `n` completions), and its output."""

import hashlib
import time
from dataclasses import replace
from typing import Any

from nanovllm.engine.sequence import Sequence
from nanovllm.errors import RequestError, describe, is_fault
from nanovllm.inputs.detokenizer import decode
from nanovllm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nanovllm.sampling_params import SamplingParams


class Request:
    """What `generate` makes of each prompt; numbered and given seeds when it is queued.

    Args:
        prompt: the prompt's text; None if token ids were given.
        token_ids: the prompt's ids.
        params: checked parameters, which nobody else changes.
        max_length: tokens at which a sequence ends with reason "length", prompt included.
        priority: the lower, the earlier under `scheduling_policy="priority"`.
    """

    def __init__(
        self,
        prompt: str | None,
        token_ids: list[int],
        params: SamplingParams,
        max_length: int,
        priority: int = 0,
    ) -> None:
        self.request_id = -1
        self.prompt = prompt
        self.params = params
        self.metrics = RequestMetrics(arrival_time=time.time())
        self.sequences = [
            Sequence(token_ids, params, max_length=max_length, index=index, priority=priority)
            for index in range(params.n)
        ]

    def number(self, request_id: int, engine_seed: int) -> None:
        """Give the request its number, and with it the sequences their seeds."""
        self.request_id = request_id
        self.metrics.arrival_time = time.time()
        for seq in self.sequences:
            seq.seq_id = request_id
            if self.params.seed is None:
                seq.seed = _derived_seed(engine_seed, request_id, seq.index)
            else:
                seq.seed = (self.params.seed + seq.index) % 2**64

    @property
    def is_finished(self) -> bool:
        """Whether all its sequences have ended."""
        return all(seq.is_finished for seq in self.sequences)

    @property
    def completion_token_ids(self) -> list[int]:
        """The ids of its first completion, a new list."""
        return self.sequences[0].completion_token_ids

    @property
    def error(self) -> BaseException | None:
        """What one of its sequences raised, if any did."""
        return next((seq.error for seq in self.sequences if seq.error is not None), None)

    def output(self, tokenizer: Any) -> RequestOutput:
        """What there is by now; `tokenizer` is None if the engine has none.

        A tokenizer that fails leaves all texts out, and the output's `error` says so.
        """
        try:
            return self._output(tokenizer, self.error)
        except BaseException as error:
            if not is_fault(error):
                raise
            if self.is_finished:
                for seq in self.sequences:
                    seq.note_error(error)
            return self._output(None, error)

    def _output(self, tokenizer: Any, error: BaseException | None) -> RequestOutput:
        first = self.sequences[0]
        prompt_logprobs: Any = None
        if self.params.prompt_logprobs is not None:
            from nanovllm.sampling.logprobs import to_logprobs

            decoding = tokenizer if self.params.detokenize else None
            prompt_logprobs = [None, *to_logprobs(first.prompt_logprob_rows, decoding)]
        return RequestOutput(
            str(self.request_id),
            self.prompt,
            first.prompt_token_ids,
            prompt_logprobs,
            [_completion(seq, tokenizer) for seq in self.sequences],
            self.is_finished,
            replace(self.metrics),
            num_cached_tokens=first.num_cached_prompt_tokens,
            error=None if error is None else describe(error),
        )


def raise_failed(requests: list[Request], outputs: list[RequestOutput] | None = None) -> None:
    """RequestError if some of a call's requests failed; `outputs` are those of all of them."""
    failed = [index for index, request in enumerate(requests) if request.error is not None]
    if failed:
        first = requests[failed[0]].error
        assert first is not None
        others = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        text = f"prompts[{failed[0]}] failed{others}: {describe(first)}"
        if outputs:
            text += f" (`outputs` of this error has the results of all {len(outputs)} prompts)"
        raise RequestError(text, outputs) from first


def _completion(seq: Sequence, tokenizer: Any) -> CompletionOutput:
    params, token_ids = seq.sampling_params, seq.completion_token_ids
    logprobs, cumulative_logprob = None, None
    if params.logprobs is not None:
        from nanovllm.sampling.logprobs import cumulative_logprob as sum_of
        from nanovllm.sampling.logprobs import to_logprobs

        logprobs = to_logprobs(seq.logprob_rows, tokenizer if params.detokenize else None)
        cumulative_logprob = sum_of(seq.logprob_rows)
    return CompletionOutput(
        seq.index,
        _text(seq, token_ids, tokenizer),
        token_ids,
        cumulative_logprob,
        logprobs,
        seq.finish_reason,
        seq.stop_reason,
    )


def _text(seq: Sequence, token_ids: list[int], tokenizer: Any) -> str:
    if seq.detokenizer is None or tokenizer is None:
        return decode(tokenizer, token_ids, seq.sampling_params, seq.prompt_token_ids)
    return seq.detokenizer.final_text() if seq.is_finished else seq.detokenizer.text


def _derived_seed(engine_seed: int, request_id: int, index: int) -> int:
    """64 bits that differ for every sequence of an engine, and between engine seeds."""
    message = engine_seed.to_bytes(8, "little", signed=True) + request_id.to_bytes(8, "little")
    if index:
        message += index.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")
