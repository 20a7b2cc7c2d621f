"""What a request gives back: tokens, texts and log probabilities of its completions."""

from collections import deque
from collections.abc import Mapping
from dataclasses import replace

from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.request import Request
from nanovllm.engine.sequence import Sequence, Wants
from nanovllm.engine.sequence_errors import note_error
from nanovllm.errors import RequestError, describe, is_fault
from nanovllm.inputs.detokenizer import CompletionText, decode, output_text_of
from nanovllm.inputs.tokenizer import Tokenizer
from nanovllm.outputs import (
    CompletionOutput,
    FlatLogprobs,
    PromptLogprobs,
    RequestOutput,
    SampleLogprobs,
)
from nanovllm.sampling.state import LogprobRow, cumulative_logprob
from nanovllm.sampling_params import SamplingParams


class Outputs(set[int]):
    """The outputs of a call, which are made while the device works, and its unfinished requests.

    As a set it has the ids of those that `RequestTable` has not reported as ended.

    Args:
        requests: the call's, numbered.
        tokenizer: as of `make_output`.
    """

    def __init__(self, requests: list[Request], tokenizer: Tokenizer | None) -> None:
        super().__init__(request.request_id for request in requests)
        self._requests = {request.request_id: request for request in requests}
        self._tokenizer = tokenizer
        self._grows_texts = tokenizer is not None
        self._texts: dict[Sequence, CompletionText | None] = {}  # None: it has another, or none
        self._num_grown = 0  # whose turn it is
        self._ended: deque[Request] = deque()  # without an output
        self._outputs: dict[int, RequestOutput] = {}

    def discard(self, request_id: object) -> None:
        """The request has ended."""
        assert isinstance(request_id, int)
        super().discard(request_id)
        request = self._requests[request_id]
        if not request.sequences[0].wants & Wants.POOLING:  # whose output is another
            self._ended.append(request)

    def make_during(self, step: LaunchedStep) -> None:
        """Make outputs of requests that have ended, until the device has done `step`.

        In the time that is left, the texts of the others grow by their newest tokens, in turn.
        """
        while self._ended and not step.is_done():
            request = self._ended.popleft()
            self._outputs[request.request_id] = self._make(request)
        for _ in step.seqs:
            if step.is_done() or not self._grows_texts:
                break
            self._grow(step.seqs[self._num_grown % len(step.seqs)])
            self._num_grown += 1

    def _grow(self, seq: Sequence) -> None:
        """Take the newest tokens of a sequence into its text, if it has one and is of the call."""
        if seq.request_id not in self:
            return
        try:
            if seq not in self._texts:
                self._texts[seq] = _new_text(seq, self._tokenizer)
            if text := self._texts[seq]:
                text.append(seq.token_ids[seq.num_prompt_tokens + text.num_tokens :])
        except BaseException as error:
            if not is_fault(error):
                raise
            self._texts[seq] = None  # `make_output` meets the error again, and tells of it
            self._grows_texts = False

    def _make(self, request: Request) -> RequestOutput:
        return make_output(request, self._tokenizer, self._texts)

    def all(self) -> list[RequestOutput]:
        """Those of all requests, in their order."""
        return [
            self._outputs.get(request_id) or self._make(request)
            for request_id, request in self._requests.items()
        ]


def _new_text(seq: Sequence, tokenizer: Tokenizer | None) -> CompletionText | None:
    """A text for its tokens; None if it has one that follows each token, or needs none."""
    params, features = seq.sampling_params, seq.features
    if not params.detokenize or features.pooler or output_text_of(seq.finish_rules):
        return None
    return CompletionText(tokenizer, params, seq.prompt_token_ids, features.ids_without_text)


Texts = Mapping[Sequence, CompletionText | None]
NO_TEXTS: Texts = {}


def make_output(
    request: Request, tokenizer: Tokenizer | None, texts: Texts = NO_TEXTS
) -> RequestOutput:
    """What there is by now; `tokenizer` is None if the engine has none.

    texts: what was made ahead of the texts of sequences that have ended; they are completed here.

    A tokenizer that fails leaves all texts out, and the output's `error` says so.
    """
    try:
        return _output(request, tokenizer, error_of(request), texts)
    except BaseException as error:
        if not is_fault(error):
            raise
        if request.is_finished:
            for seq in request.sequences:
                note_error(seq, error)
        return _output(request, None, error, NO_TEXTS)


def _output(
    request: Request, tokenizer: Tokenizer | None, error: BaseException | None, texts: Texts
) -> RequestOutput:
    first = request.sequences[0]
    prompt_token_ids = first.prompt_token_ids
    prompt_logprobs: PromptLogprobs | None = None
    if request.params.prompt_logprobs is not None:
        rows = first.features.prompt_logprobs
        prompt_logprobs = FlatLogprobs() if request.params.flat_logprobs else []
        prompt_logprobs.append(None)
        prompt_logprobs.extend(_logprobs(rows, request.params, tokenizer))
    return RequestOutput(
        str(request.request_id),
        request.prompt,
        prompt_token_ids,
        prompt_logprobs,
        [
            _completion(seq, tokenizer, prompt_token_ids, texts.get(seq))
            for seq in request.sequences
        ],
        request.is_finished,
        replace(request.metrics),
        num_cached_tokens=first.num_cached_prompt_tokens,
        error=None if error is None else describe(error),
        lora_request=first.features.lora_request,
    )


def error_of(request: Request) -> BaseException | None:
    """What one of its sequences raised, if any did."""
    return next((seq.error for seq in request.sequences if seq.error is not None), None)


def raise_failed(requests: list[Request], outputs: list[RequestOutput] | None = None) -> None:
    """RequestError if some of a call's requests failed; `outputs` are those of all of them."""
    failed = [index for index, request in enumerate(requests) if error_of(request) is not None]
    if failed:
        first = error_of(requests[failed[0]])
        assert first is not None
        others = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        text = f"prompts[{failed[0]}] failed{others}: {describe(first)}"
        if outputs:
            text += f" (`outputs` of this error has the results of all {len(outputs)} prompts)"
        raise RequestError(text, outputs) from first


def _completion(
    seq: Sequence,
    tokenizer: Tokenizer | None,
    prompt_token_ids: list[int],
    text: CompletionText | None,
) -> CompletionOutput:
    params, token_ids = seq.sampling_params, seq.completion_token_ids
    logprobs, cumulative = None, None
    if params.num_logprobs is not None:
        rows = seq.features.logprobs
        logprobs = _logprobs(rows, params, tokenizer, are_best=not params.logprob_token_ids)
        cumulative = cumulative_logprob(rows)
    return CompletionOutput(
        seq.index,
        _text(seq, token_ids, tokenizer, prompt_token_ids, text),
        token_ids,
        cumulative,
        logprobs,
        seq.finish_reason,
        seq.stop_reason,
        seq.features.lora_request,
    )


def _logprobs(
    rows: list[LogprobRow],
    params: SamplingParams,
    tokenizer: Tokenizer | None,
    are_best: bool = True,
) -> SampleLogprobs:
    from nanovllm.sampling.logprobs import to_flat_logprobs, to_logprobs

    make = to_flat_logprobs if params.flat_logprobs else to_logprobs
    return make(rows, tokenizer if params.detokenize else None, are_best)


def _text(
    seq: Sequence,
    token_ids: list[int],
    tokenizer: Tokenizer | None,
    prompt_token_ids: list[int],
    text: CompletionText | None,
) -> str:
    if text is not None:
        text.append(token_ids[text.num_tokens :])
        return text.finish()
    output_text = output_text_of(seq.finish_rules)
    if output_text is None or tokenizer is None:
        silent = seq.features.ids_without_text
        return decode(tokenizer, token_ids, seq.sampling_params, prompt_token_ids, silent)
    return output_text.final_text() if seq.is_finished else output_text.text
