"""Completions as they grow: one item for each completion that a step gave new tokens.

What a stream has queued is driven by its iteration, by `step` and by other calls alike; its items
are what is new since the last look.
"""

import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from threading import get_ident
from typing import Any, NoReturn

from nanovllm.engine.input_processor import follow_text
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.request import Request
from nanovllm.engine.request_output import make_output
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.sequence_errors import note_error
from nanovllm.inputs.detokenizer import output_text_of
from nanovllm.inputs.prompts import as_prompt_list
from nanovllm.lora_request import LoRARequests
from nanovllm.outputs import RequestOutput
from nanovllm.progress import ProgressBar, check_use_tqdm
from nanovllm.sampling_params import SamplingParams


@dataclass
class StreamOutput:
    """What one completion has got since its last item.

    Args:
        request_id: the request's number in its engine, as a string.
        prompt_index: which of the call's prompts, from 0.
        index: which of the request's `n` completions, from 0.
        text: the new text. It may be empty although there are tokens: what is no whole character
            yet, or may become a stop string, comes later. All pieces together are the final text.
        token_ids: the new ids. All together are the final ones.
        finish_reason: "stop", "length", "repetition" or "abort" in the completion's last item, else
            None.
        stop_reason: the stop string or stop token id that ended it.
        finished: whether this is the request's last item.
        output: the whole result, in the request's last item; else None.
    """

    request_id: str
    prompt_index: int
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    finished: bool
    output: RequestOutput | None


class Stream(Iterator[StreamOutput]):
    """An iterator over the items of some requests, queued from the beginning.

    Whatever ends it (its last item, an exception, `close`, the end of a `with` block, or that
    nobody refers to it any more) ends those of its requests that are not finished.
    """

    def __init__(
        self, llm: LLMEngine, requests: list[Request], use_tqdm: bool | Callable[..., Any]
    ) -> None:
        # Neither of these refers to the stream: it is freed as soon as it is dropped.
        own_ids: set[int] = set()
        self._owner = llm.owner
        self._items = _items(llm, requests, own_ids, use_tqdm)
        self._finalizer = weakref.finalize(self, _abandon, llm, requests)
        self._finalizer.atexit = False
        try:
            llm.queue(requests)
            own_ids.update(request.request_id for request in requests)
            llm.requests.claim(own_ids)
        except BaseException:
            self._end()
            raise

    def __next__(self) -> StreamOutput:
        visit = get_ident(), "generate_stream"
        try:
            self._owner.enter(visit)
            return self._next()
        finally:
            self._owner.leave(visit)

    def _next(self) -> StreamOutput:
        try:
            return next(self._items)
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        """End the unfinished requests; there are no more items. May be called again.

        In a forked child it does nothing.
        """
        if self._owner.is_foreign:
            return
        visit = get_ident(), "close"
        try:
            self._owner.enter(visit)
            self._end()
        finally:
            self._owner.leave(visit)

    def _end(self) -> None:
        self._finalizer()
        self._items.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a stream cannot be pickled or copied: its engine works on it")

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _abandon(llm: LLMEngine, requests: list[Request]) -> None:
    """End requests that nobody waits for, and forget them; the garbage collector may call it."""

    def end() -> None:
        llm.abort(requests)
        llm.requests.forget(requests)

    llm.owner.defer(end)


class _StreamedRequest:
    """What of a request's completions has been given out."""

    def __init__(self, request: Request, prompt_index: int) -> None:
        self.request = request
        self.prompt_index = prompt_index
        self.open = list(request.sequences)  # those whose last item is still to come
        self.num_taken = [0] * len(self.open)  # completion tokens given out

    def items(self, tokenizer: Any) -> Iterator[StreamOutput]:
        for seq in list(self.open):
            start = seq.num_prompt_tokens + self.num_taken[seq.index]
            token_ids = seq.token_ids[start:]
            if token_ids or seq.is_finished:
                self.num_taken[seq.index] += len(token_ids)
                yield self._item(seq, token_ids, tokenizer)

    def _item(self, seq: Sequence, token_ids: list[int], tokenizer: Any) -> StreamOutput:
        if seq.is_finished:
            self.open.remove(seq)
            _end_text(seq)
        output_text = output_text_of(seq.finish_rules)
        return StreamOutput(
            str(self.request.request_id),
            self.prompt_index,
            seq.index,
            "" if output_text is None else output_text.take_text(),
            token_ids,
            seq.finish_reason,
            seq.stop_reason,
            finished=not self.open,
            output=None if self.open else make_output(self.request, tokenizer),
        )


def _end_text(seq: Sequence) -> None:
    """Let `take_text` give the rest of a text that has ended."""
    try:
        if (output_text := output_text_of(seq.finish_rules)) is not None:
            output_text.final_text()
    except BaseException as error:
        note_error(seq, error)


def _items(
    llm: LLMEngine,
    requests: list[Request],
    own_ids: set[int],
    use_tqdm: bool | Callable[..., Any],
) -> Generator[StreamOutput, None, None]:
    streamed = [_StreamedRequest(request, index) for index, request in enumerate(requests)]
    with ProgressBar(use_tqdm, len(requests)) as bar:
        while True:
            for request in streamed:
                # Thousands may wait. Completions of a request are admitted in order.
                first = request.open[0]
                if first.was_admitted or first.is_finished:
                    yield from request.items(llm.input_processor.tokenizer)
            streamed = [request for request in streamed if request.open]
            if not streamed:
                return
            llm.advance(own_ids, bar)


def generate_stream(
    llm: LLMEngine,
    prompts: str | list[str] | list[int] | list[list[int]] | list[Any],
    sampling_params: SamplingParams | list[SamplingParams] | None = None,
    *,
    use_tqdm: bool | Callable[..., Any] = False,
    priority: list[int] | None = None,
    tokenization_kwargs: dict[str, Any] | None = None,
    lora_request: LoRARequests = None,
) -> Stream:
    """Complete prompts, and give out text and tokens as they come.

    Arguments are those of `generate`. All prompts are queued at the call; iterating runs the
    engine. Requests queued otherwise run along, and `step` returns those that finished.

    Returns:
        An iterator of `StreamOutput`: after each step one for each completion with new tokens.
        Dropping it (`break`, an exception), its `close()` or the end of a `with` block over it
        end the requests that are not finished. `abort_request` ends a single one: its last item
        has the finish reason "abort".

    Raises:
        ArgumentError: at the call; a prompt or parameter is wrong, and nothing was queued.
        EngineDeadError: a tensor-parallel worker died.
    """
    check_use_tqdm(use_tqdm)
    llm.check_ready()
    requests = llm.input_processor.process(
        as_prompt_list(prompts), sampling_params, priority, tokenization_kwargs, lora_request
    )
    for request in requests:
        if llm.input_processor.tokenizer is not None and request.params.detokenize:
            follow_text(request, llm.input_processor.tokenizer)
    return Stream(llm, requests, use_tqdm)
