"""vLLM's `AsyncLLM`: requests are coroutines, and a thread of the engine's own does the steps."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from nanovllm.errors import ArgumentError, RequestError, shown
from nanovllm.inputs.prompts import check_unsupported
from nanovllm.lora_request import LoRARequests
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import check_bool, check_choice
from nanovllm.vllm_engine import LLMEngine

Result = TypeVar("Result")
PAUSE_MODES = ("abort", "wait", "keep")
HAND_OVER = 0.01  # seconds in which waiting coroutines get what the last step gave


class AsyncLLM:
    """An engine for one event loop of asyncio, which goes on while the engine computes.

    Arguments and errors are those of `LLMEngine`. The methods are vLLM's; those of `LLM` that
    change the engine are coroutines here. `engine` is the `LLMEngine` behind it, which nobody may
    call while requests run.
    """

    def __init__(self, model: str | None = None, **kwargs: Any) -> None:
        self.engine = LLMEngine(model, **kwargs)
        self._thread = ThreadPoolExecutor(1, "nanovllm-steps")  # makes all calls of the engine
        self._waiting: dict[str, asyncio.Queue[RequestOutput | BaseException]] = {}
        self._steps: asyncio.Task[None] | None = None
        # Set at the end of a pause, whose event loop may be another than the one before.
        self._may_enter: asyncio.Event | None = None
        self._may_step: asyncio.Event | None = None

    @classmethod
    def from_engine_args(cls, engine_args: Any, *_: Any, **__: Any) -> "AsyncLLM":
        """An engine whose parameters are the attributes of an object, such as `AsyncEngineArgs`.

        vLLM's further arguments (`usage_context`, `stat_loggers`) change nothing.
        """
        if not hasattr(engine_args, "__dict__"):
            raise ArgumentError(
                f"engine_args must be an object with attributes, got {shown(engine_args)}"
            )
        return cls(**vars(engine_args))

    async def _call(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Call the engine in its thread, after the calls that were made before."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(function, *args, **kwargs))

    # ---- requests -----------------------------------------------------------------------------

    async def generate(
        self,
        prompt: str | list[int] | dict[str, Any],
        sampling_params: SamplingParams | None,
        request_id: str,
        *,
        prompt_text: None = None,
        lora_request: LoRARequests = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: None = None,
        priority: int = 0,
        data_parallel_rank: None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one prompt as it goes on, one for each step that gave it tokens.

        Args:
            prompt, sampling_params, lora_request, tokenization_kwargs, priority: as for
                `LLM.generate`, of one prompt. `output_kind` says what each output has.
            request_id: a string that no unfinished request has.
            prompt_text, trace_headers, data_parallel_rank: only None.

        Yields:
            Outputs, the last of which is `finished`. Leaving the loop over them, or cancelling
            its task, ends the request.

        Raises:
            ArgumentError: an argument is wrong; nothing was queued then.
            RequestError: the request failed; its `outputs` have what there is.
            EngineDeadError: a tensor-parallel worker died or the GPU failed.
        """
        check_unsupported(data_parallel_rank=data_parallel_rank)
        if request_id in self._waiting:
            raise ArgumentError(f"there is an unfinished request {shown(request_id)} already")
        outputs = asyncio.Queue[RequestOutput | BaseException]()
        self._waiting[request_id] = outputs
        is_finished = False
        try:
            if self._may_enter is not None:
                await self._may_enter.wait()
            await self._call(
                self.engine.add_request,
                request_id,
                prompt,
                sampling_params,
                lora_request=lora_request,
                tokenization_kwargs=tokenization_kwargs,
                trace_headers=trace_headers,
                priority=priority,
                prompt_text=prompt_text,
            )
            self._keep_stepping()
            while not is_finished:
                output = await outputs.get()
                if isinstance(output, BaseException):
                    raise output
                is_finished = output.finished
                if output.error is not None:
                    raise RequestError(f"request {shown(request_id)}: {output.error}", [output])
                yield output
        finally:
            del self._waiting[request_id]
            if not is_finished:
                await self._call(self.engine.abort_request, request_id)

    def _keep_stepping(self) -> None:
        if self._steps is None or self._steps.done():
            self._steps = asyncio.create_task(self._step_until_done())

    async def _step_until_done(self) -> None:
        try:
            while self.engine.has_unfinished_requests():
                if self._may_step is not None:
                    await self._may_step.wait()
                self._deliver(await self._call(self.engine.step))
        except BaseException as error:
            for waiting in self._waiting.values():
                waiting.put_nowait(error)
            if not isinstance(error, Exception):
                raise

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            if output.request_id in self._waiting:
                self._waiting[output.request_id].put_nowait(output)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests now, with the finish reason "abort"; other ids are ignored."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self._deliver(await self._call(self.engine.end_requests, ids))

    # ---- pauses -------------------------------------------------------------------------------

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        """Let nothing be computed until `resume_generation`, for instance to change the weights.

        Requests that come meanwhile wait.

        Args:
            mode: what happens to requests that run: "abort" ends them, "wait" lets them end,
                "keep" stops them where they are.
            clear_cache: forget all cached K/V. That of stopped requests is computed anew.
        """
        check_choice("mode", mode, PAUSE_MODES)
        check_bool("clear_cache", clear_cache)
        if mode != "keep" and self._may_enter is None:
            self._may_enter = asyncio.Event()
        if mode == "abort":
            await self.abort([*self._waiting])
        elif mode == "wait" and self._steps is not None:
            await asyncio.wait([self._steps])
        if self._may_step is None:
            self._may_step = asyncio.Event()
        if clear_cache:  # after the step that runs
            await self._call(self.engine.reset_prefix_cache, reset_running_requests=True)
        else:
            await self._call(self.engine.has_unfinished_requests)
        await asyncio.sleep(HAND_OVER)

    async def resume_generation(self) -> None:
        """End a pause."""
        paused = [self._may_enter, self._may_step]
        self._may_enter = self._may_step = None
        for event in paused:
            if event is not None:
                event.set()

    async def is_paused(self) -> bool:
        """Whether there is a pause."""
        return self._may_step is not None

    # ---- the engine ---------------------------------------------------------------------------

    async def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """As `LLM.reset_prefix_cache`, between two steps."""
        return await self._call(
            self.engine.reset_prefix_cache, reset_running_requests, reset_connector
        )

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """`pause_generation(mode=mode)`, then as `LLM.sleep`."""
        await self.pause_generation(mode=mode)
        await self._call(self.engine.llm.sleep, level, mode)

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        """As `LLM.wake_up`; the pause ends when all is awake."""
        is_awake = await self._call(self.engine.llm.wake_up, tags)
        if not self.engine.is_sleeping():
            await self.resume_generation()
        return is_awake

    async def is_sleeping(self) -> bool:
        """Whether anything is off."""
        return self.engine.is_sleeping()

    async def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """As `LLM.collective_rpc`, between two steps."""
        return await self._call(self.engine.llm.collective_rpc, method, timeout, args, kwargs)

    def get_num_unfinished_requests(self) -> int:
        """The number of requests that have not ended, or whose last output was not returned."""
        return self.engine.get_num_unfinished_requests()

    def get_tokenizer(self) -> Any:
        """As `LLM.get_tokenizer`."""
        return self.engine.llm.get_tokenizer()

    def shutdown(self, timeout: float | None = None) -> None:
        """End the engine, after the step that runs. `timeout` changes nothing."""
        if self._steps is not None:
            self._steps.cancel()
        self._thread.submit(self.engine.llm.exit).result()
        self._thread.shutdown()
