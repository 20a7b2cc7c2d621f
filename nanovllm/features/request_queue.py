"""Requests that are queued in one place and waited for, looked at or ended in another."""

from collections.abc import Callable, Iterable
from numbers import Integral
from operator import attrgetter
from typing import Any

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.request_output import make_output
from nanovllm.errors import ArgumentError, shown
from nanovllm.inputs.prompts import as_prompt_list, check_unsupported
from nanovllm.lora_request import LoRARequests
from nanovllm.outputs import RequestOutput
from nanovllm.progress import ProgressBar, check_use_tqdm
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import check_integer


def enqueue(
    llm: LLMEngine,
    prompts: str | list[str] | list[int] | list[list[int]] | list[Any],
    sampling_params: SamplingParams | list[SamplingParams] | None = None,
    lora_request: LoRARequests = None,
    priority: list[int] | None = None,
    use_tqdm: bool | Callable[..., Any] = False,
    tokenization_kwargs: dict[str, Any] | None = None,
    mm_processor_kwargs: None = None,
) -> list[str]:
    """Queue prompts without running them, for `wait_for_completion`; returns their ids.

    Arguments and errors are those of `generate`; `use_tqdm` is accepted, nothing takes long.
    """
    check_unsupported(mm_processor_kwargs=mm_processor_kwargs)
    check_use_tqdm(use_tqdm)
    llm.check_ready()
    requests = llm.input_processor.process(
        as_prompt_list(prompts), sampling_params, priority, tokenization_kwargs, lora_request
    )
    llm.queue(requests)
    return [str(request.request_id) for request in requests]


def wait_for_completion(
    llm: LLMEngine,
    output_type: type | tuple[type, ...] | None = None,
    *,
    use_tqdm: bool | Callable[..., Any] = True,
) -> list[RequestOutput]:
    """Run everything that is queued; the outputs that `step` has not returned, by id.

    Args:
        output_type: None, `RequestOutput` or a tuple with it: there is no other type.
        use_tqdm: as for `generate`.

    After an exception (Ctrl-C too) nothing is lost: call it again.
    """
    types = output_type if isinstance(output_type, tuple) else (output_type,)
    if output_type is not None and RequestOutput not in types:
        raise ArgumentError(f"output_type must be RequestOutput, got {shown(output_type)}")
    check_use_tqdm(use_tqdm)
    llm.check_ready()
    # Those that a loop over `scheduler` and `model_runner` has finished are the engine's all the
    # same; nobody else would deliver them.
    table = llm.requests
    table.finish(table.sequences())
    with ProgressBar(use_tqdm, len(table.unfinished)) as bar:
        while table.unfinished:
            llm.advance(table.unfinished, bar)
    table.forget()
    requests = sorted(table.take(), key=attrgetter("request_id"))
    return [make_output(request, llm.input_processor.tokenizer) for request in requests]


def abort_request(llm: LLMEngine, request_ids: int | str | Iterable[int | str]) -> None:
    """End requests now, with finish reason "abort"; their blocks are free at once.

    `step` does not return them; `get_output` gives what they have. Ids of requests that have
    ended, or never were, are ignored.
    """
    try:
        ids = [request_ids] if isinstance(request_ids, (str, int, Integral)) else list(request_ids)
    except TypeError:
        raise ArgumentError(
            f"request_ids must be an id or a list of ids, got {shown(request_ids)}"
        ) from None
    unfinished = llm.requests.unfinished
    requests = [unfinished.get(_as_request_id(request_id)) for request_id in ids]
    llm.abort([request for request in requests if request is not None])


def get_output(llm: LLMEngine, request_id: int | str) -> RequestOutput:
    """The output of a request: the partial one while it runs, the whole one at its end.

    An output is kept until `step` returns the next finished requests, or `wait_for_completion`
    returns, so that a long night's loop needs no more memory than a short one.

    Raises:
        ArgumentError: there is no such request, or its output is gone.
    """
    llm.check_ready()
    request = llm.requests.find(_as_request_id(request_id))
    if request is None:
        raise ArgumentError(
            f"there is no request {shown(request_id)}: an output is kept until step() or "
            "wait_for_completion() returns the next finished requests"
        )
    return make_output(request, llm.input_processor.tokenizer)


def _as_request_id(request_id: Any) -> int:
    """The number of a request, given as that or, as in outputs, as a string."""
    is_short = isinstance(request_id, str) and len(request_id) <= 1000  # Python reads 4300 digits
    if is_short and request_id.isascii() and request_id.isdigit():
        return int(request_id)
    return check_integer("request_id", request_id, minimum=0)
