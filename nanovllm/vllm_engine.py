"""vLLM's engine loop: the caller names the requests, and each step returns outputs."""

from dataclasses import replace
from typing import Any

from nanovllm.engine.input_processor import follow_text
from nanovllm.engine.request import Request
from nanovllm.engine.request_output import make_output
from nanovllm.errors import ArgumentError, shown
from nanovllm.inputs.prompts import check_unsupported
from nanovllm.llm import LLM
from nanovllm.lora_request import LoRARequests
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams


class _Given:
    """What `step` has returned of a request by now.

    Attributes:
        num_tokens: completion tokens of all completions.
        ends: of each completion the numbers of its tokens and characters, and whether it had ended.
    """

    def __init__(self, num_completions: int) -> None:
        self.num_tokens = 0
        self.ends = [(0, 0, False)] * num_completions

    def new_of(self, output: RequestOutput) -> RequestOutput:
        """The output without what was returned before: `output_kind` DELTA."""
        completions = []
        for completion in output.outputs:
            start, start_of_text, had_ended = self.ends[completion.index]
            ended = completion.finished()
            num_tokens, length = len(completion.token_ids), len(completion.text)
            self.ends[completion.index] = num_tokens, length, ended
            if num_tokens > start or (ended and not had_ended):
                logprobs = completion.logprobs
                new = replace(
                    completion,
                    text=completion.text[start_of_text:],
                    token_ids=completion.token_ids[start:],
                    logprobs=None if logprobs is None else logprobs[start:],
                )
                completions.append(new)
        of_prompt = None if self.num_tokens else output.prompt_logprobs
        attributes = vars(output) | {"outputs": completions, "prompt_logprobs": of_prompt}
        return RequestOutput(**attributes)


def _num_tokens(request: Request) -> int:
    """Completion tokens of all its completions."""
    return sum(seq.num_completion_tokens for seq in request.sequences)


class LLMEngine:
    """An `LLM` that is driven by steps as vLLM's `LLMEngine` is.

    Arguments and errors are those of `LLM`, except that a `max_num_batched_tokens` below
    `max_model_len` splits prompts, as in vLLM. All other methods are those of `LLM`, which is
    `engine.llm`.
    """

    def __init__(self, model: str | None = None, **kwargs: Any) -> None:
        self.llm = LLM(model, **({"enable_chunked_prefill": None} | kwargs))
        self._requests: dict[str, Request] = {}  # unfinished, in the order in which they came
        self._given: dict[str, _Given] = {}

    @classmethod
    def from_engine_args(cls, engine_args: Any, *_: Any, **__: Any) -> "LLMEngine":
        """An engine whose parameters are the attributes of an object, such as `EngineArgs`.

        vLLM's further arguments (`usage_context`, `stat_loggers`) change nothing.
        """
        if not hasattr(engine_args, "__dict__"):
            raise ArgumentError(
                f"engine_args must be an object with attributes, got {shown(engine_args)}"
            )
        return cls(**vars(engine_args))

    def __getattr__(self, name: str) -> Any:
        if name == "llm":  # the constructor failed
            raise AttributeError(name)
        return getattr(self.llm, name)

    def add_request(
        self,
        request_id: str,
        prompt: str | list[int] | dict[str, Any],
        params: SamplingParams | None = None,
        arrival_time: float | None = None,
        lora_request: LoRARequests = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: None = None,
        priority: int = 0,
        prompt_text: None = None,
    ) -> str:
        """Queue a request under an id of the caller's, which is returned.

        Args:
            request_id: a string that no unfinished request has.
            prompt, params, tokenization_kwargs, priority: as for `LLM.generate`, of one prompt.
            arrival_time: None or a time, which changes nothing: the engine takes its own.
            lora_request: as for `LLM.generate`.
            trace_headers, prompt_text: only None.

        Raises:
            ArgumentError: an argument is wrong; nothing was queued then.
        """
        check_unsupported(trace_headers=trace_headers, prompt_text=prompt_text)
        if not isinstance(request_id, str):
            raise ArgumentError(f"request_id must be a string, got {shown(request_id)}")
        if request_id in self._requests:
            raise ArgumentError(f"there is an unfinished request {shown(request_id)} already")
        llm = self.llm
        llm.check_ready()
        [request] = llm.input_processor.process(
            [prompt], params, [priority], tokenization_kwargs, lora_request
        )
        if llm.input_processor.tokenizer is not None and request.params.detokenize:
            follow_text(request, llm.input_processor.tokenizer)
        llm.queue([request])
        llm.requests.claim({request.request_id})
        self._requests[request_id] = request
        self._given[request_id] = _Given(len(request.sequences))
        return request_id

    def step(self) -> list[RequestOutput]:
        """Compute one step.

        Returns:
            The outputs of the requests that got tokens or ended in it, with what their
            `output_kind` says. The last output of a request is `finished`; a request that failed
            has an `error`.

        Raises:
            EngineDeadError: a tensor-parallel worker died or the GPU failed.
        """
        self.llm.advance()
        outputs = []
        for request_id, request in list(self._requests.items()):
            first = request.sequences[0]  # completions are admitted in order
            if not (first.was_admitted or first.is_finished):
                continue
            has_news = _num_tokens(request) > self._given[request_id].num_tokens
            if request.params.output_kind == RequestOutputKind.FINAL_ONLY:
                has_news = False
            if has_news or request.is_finished:
                outputs.append(self._output(request_id, request))
        return outputs

    def abort_request(self, request_ids: str | list[str]) -> None:
        """End requests now; `step` does not return them. Other ids are ignored."""
        self.end_requests([request_ids] if isinstance(request_ids, str) else request_ids)

    def end_requests(self, request_ids: list[str]) -> list[RequestOutput]:
        """`abort_request`; returns the last outputs, with the finish reason "abort"."""
        ended = {name: self._requests[name] for name in request_ids if name in self._requests}
        requests = list(ended.values())
        self.llm.abort(requests)
        self.llm.requests.forget(requests)
        return [self._output(name, request) for name, request in ended.items()]

    def _output(self, request_id: str, request: Request) -> RequestOutput:
        """What `step` returns of a request; one that has ended is forgotten."""
        given = self._given[request_id]
        output = make_output(request, self.llm.input_processor.tokenizer)
        output.request_id = request_id
        if request.params.output_kind == RequestOutputKind.DELTA:
            output = given.new_of(output)
        given.num_tokens = _num_tokens(request)
        if request.is_finished:
            del self._given[request_id], self._requests[request_id]
        return output

    def has_unfinished_requests(self) -> bool:
        """Whether a request has not ended, or its last output was not returned."""
        return bool(self._requests)

    def get_num_unfinished_requests(self) -> int:
        """The number of these."""
        return len(self._requests)

    def is_sleeping(self) -> bool:
        """Whether anything is off, so that steps are refused."""
        return self.llm.is_sleeping
