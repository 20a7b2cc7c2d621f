"""The engine: takes requests, steps the scheduler and the model in turn, returns completions."""

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager, suppress
from copy import copy
from ctypes import py_object, pythonapi
from threading import get_ident
from time import perf_counter
from typing import Any, NoReturn

import torch

from nanovllm.config import Config
from nanovllm.engine import kv_cache
from nanovllm.engine.model_runner import LaunchedStep, ModelRunner, choose_ops
from nanovllm.engine.recovery import Isolation
from nanovllm.engine.request import Request, raise_failed
from nanovllm.engine.request_features import RequestFeatures
from nanovllm.engine.request_table import RequestTable
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_stats import request_stats, step_stats
from nanovllm.errors import ArgumentError, EngineDeadError, describe, is_fault
from nanovllm.guards.interrupts import DeferredInterrupt
from nanovllm.guards.ownership import Owner, bind_to_process, one_thread_at_a_time
from nanovllm.inputs.generation_config import default_sampling_params, eos_token_ids
from nanovllm.inputs.prompts import (
    as_params_list,
    as_priority_list,
    as_prompt_list,
    check_params,
    check_unsupported,
    encode_prompts,
)
from nanovllm.inputs.tokenizer import load_tokenizer
from nanovllm.models.size import check_size
from nanovllm.outputs import RequestOutput
from nanovllm.parallel.tensor_parallel import TensorParallel
from nanovllm.parallel.workers import WorkerGroup
from nanovllm.progress import ProgressBar, check_use_tqdm
from nanovllm.sampling_params import SamplingParams
from nanovllm.stats import StatLogger

StepOutput = tuple[list[tuple[int, list[int]]], int]


@one_thread_at_a_time(free=["exit"])
class LLMEngine:
    """Offline inference on one model.

    Args:
        model: path of a local model directory: config.json, tokenizer and *.safetensors. Nothing is
            downloaded and "~" is not expanded.
        max_num_batched_tokens: tokens that one step computes at most; >= `max_model_len` unless
            chunked prefill is on. Default 16384.
        max_num_seqs: sequences in flight at most. Default 512.
        max_model_len: tokens of a sequence at most, prompt and completion; capped to the model's
            max_position_embeddings; None: that maximum. Default 4096.
        gpu_memory_utilization: share of the GPU's memory, in (0, 1], for weights, activations and
            KV cache together. Default 0.9.
        tensor_parallel_size: ranks that share the model, 1 to 8; each has a process. Default 1.
        disable_custom_all_reduce: sum over the ranks by NCCL alone instead of, for few rows, in
            memory that the GPUs share. Default False.
        worker_timeout: seconds, 1 to 86400, that a rank may keep rank 0 waiting in a step before
            the engine gives it up. Both compute the same, so this is not the length of a step.
            Raise it where a CPU is so overloaded that one rank falls behind. Default 8.
        enforce_eager: no CUDA graphs (and no torch.compile, which only `attention_backend="torch"`
            uses on CUDA). Default False.
        kvcache_block_size (block_size): tokens per KV block, a multiple of 256. Default 256.
        num_kvcache_blocks (num_gpu_blocks_override): KV blocks; None: as memory allows.
        kv_cache_memory_bytes: bytes of KV cache per rank, instead of `gpu_memory_utilization`.
        kv_cache_dtype: "auto" (that of the activations), or "fp8" ("fp8_e4m3"): about half the
            bytes, with a scale for each token and KV head; slightly less exact. Default "auto".
        watermark: KV blocks kept free for each running sequence when a waiting one is admitted;
            they spare preemptions when memory is short. 0: none. Default 0.25.
        enable_prefix_caching: share equal prefixes of whole blocks. Default True.
        enable_chunked_prefill: split prompts that exceed what is left of a step. Default False.
        async_scheduling: prepare step n + 1 while n runs. Default True.
        attention_backend: "auto" (triton on CUDA, torch elsewhere), "torch", "triton" or
            "flash-attn".
        dtype: "auto" (the model's), "bfloat16", "float16" ("half"), "float32" ("float"), or one of
            these as a torch.dtype.
        quantization: "fp8": weights of linear layers in fp8 (e4m3), quantised on load with a scale
            for each row; embedding, LM head and norms stay as they are. Default None: as in the
            checkpoint, which may be fp8 itself.
        device: "auto" (CUDA if there is one), "cuda", "cpu".
        seed: keys the sampling of every request, with the request's number. Default 0.
        load_format: "auto", or "dummy" for random weights (config and tokenizer are still read).
        hf_overrides: a dict of fields that replace those of config.json, or a callable that gets
            the `PretrainedConfig` and returns one.
        tokenizer: path of another tokenizer's directory, or a tokenizer object; None: the model's.
        tokenizer_mode: only "auto".
        skip_tokenizer_init: no tokenizer: prompts are token ids, texts are empty. Default False.
        trust_remote_code: let the tokenizer's directory bring Python code of its own. Default
            False.
        chat_template: Jinja template of `chat`, or the path of a file with one; None: the
            tokenizer's.
        generation_config: where `get_default_sampling_params` reads: "auto" (the model's
            directory), "vllm" (nowhere), or the path of another directory.
        override_generation_config: keys of a generation_config.json that win over the file's.
        max_logprobs: the most `logprobs` and `prompt_logprobs` may ask for; -1: no limit. Default
            20.
        structured_outputs_timeout: seconds that a schema, regex, choice list or grammar may take to
            compile; a request whose takes longer is refused. Default 10.
        scheduling_policy: "fcfs", or "priority": by the requests' `priority`. Default "fcfs".
        record: path of an HTML page with charts of the run, for a look at any time: refreshed every
            half minute and at `exit`. An older file there is replaced. None: no page.
        runner ("auto", "generate" or "pooling"), enable_sleep_mode, disable_log_stats: vLLM's; they
            change nothing: pooling, sleep and metrics are always there.

    Use an engine from one thread at a time: a call while another thread is inside raises an
    EngineUseError. It belongs to the process that made it: in a forked child its methods raise that
    error too (`exit` does nothing), and it can be neither copied nor pickled.

    Raises:
        ArgumentError: a value is wrong; before any process is started or GPU memory taken, except
            what only loading can show (weights that do not fit, no memory left for the cache).
        TypeError: an unknown keyword.
        EngineDeadError: a tensor-parallel worker died during start-up.
    """

    def __init__(self, model: str | None = None, **kwargs: Any) -> None:
        config = Config.from_kwargs(model, kwargs)
        device = config.resolve_device()
        self.config = config
        # What cannot run is refused before anything is started.
        choose_ops(config, device)
        self.tokenizer = load_tokenizer(config)
        ids = eos_token_ids(
            config.model,
            self.tokenizer,
            config.generation_config,
            fallback=getattr(config.hf_config, "eos_token_id", None),
        )
        # A tokenizer may name one that the model does not have: it is never sampled.
        config.eos_token_ids = frozenset(i for i in ids if 0 <= i < config.hf_config.vocab_size)
        self._default_params = default_sampling_params(
            config.model, config.generation_config, config.override_generation_config
        )
        self._request_features = RequestFeatures(config, self.tokenizer)
        check_size(config, device)
        kv_cache.check_fits(config, device)
        self._owner = Owner()
        self._workers: WorkerGroup | None = None
        if config.tensor_parallel_size > 1:
            self._workers = WorkerGroup(_for_workers(config), device.type)
        self.model_runner = self._start_model_runner(device)
        config.num_kvcache_blocks = self.model_runner.num_kvcache_blocks
        self.scheduler = Scheduler(config)
        self._in_flight: LaunchedStep | None = None
        self._step_seqs: list[Sequence] | None = None  # of what is launched or committed just now
        self._requests = RequestTable()
        self._isolation = Isolation(self._requests, self.scheduler)
        self._abandoned: deque[Request] = deque()  # to be aborted as soon as possible
        self._step_seconds = 0.0  # spent on launching the last committed step and waiting for it
        self.stat_loggers: list[StatLogger] = []
        self._next_request_id = 0
        self._asleep: frozenset[str] = frozenset()  # what `LLM.sleep` has switched off
        self._cause_of_death = "the engine was ended by exit()"
        # Not bound to self, so that dropping the engine releases everything.
        self._finalizer = weakref.finalize(
            self, _release, self._owner, self.model_runner, self._workers
        )
        bind_to_process(self.model_runner)

    def _start_model_runner(self, device: torch.device) -> ModelRunner:
        workers = self._workers
        if workers is None:
            return ModelRunner(self.config, device, TensorParallel())
        try:
            assert workers.tp is not None
            runner = ModelRunner(self.config, device, workers.tp, workers.agree, workers)
            workers.finish_start()
            return runner
        except BaseException as error:
            # A rank that fails takes the collectives of the others with it: name the first.
            is_own = isinstance(error, ArgumentError) or not isinstance(error, Exception)
            cause = None if is_own else workers.wait_for_death(1.0)
            workers.is_broken = True  # they may be anywhere
            workers.close()
            if cause:
                raise EngineDeadError(cause) from error
            raise

    # ---- requests -----------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | list[str] | list[int] | list[list[int]] | list[Any],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        priority: list[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        lora_request: None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt.

        Args:
            prompts: strings and lists of token ids, mixed at will, or dicts with "prompt" or
                "prompt_token_ids". A bare string, dict or list of ids is one prompt.
            sampling_params: one for all prompts or one for each; None: the model's own, see
                `get_default_sampling_params`.
            use_tqdm: show a progress bar on stderr; a callable is used in place of tqdm.
            priority: one for each prompt, the lower the earlier; needs
                `scheduling_policy="priority"`, else it changes nothing.
            tokenization_kwargs: for the tokenizer's `encode` of strings.
            lora_request, mm_processor_kwargs: only None; there are no adapters and no images.

        Returns:
            A `RequestOutput` for each prompt, in their order: a dict of "text" (the decoded
            completion, special tokens kept) and "token_ids" (the completion, a list of ints),
            whose attributes tell the rest.

        Raises:
            ArgumentError: a prompt or parameter is wrong; nothing was queued then.
            RequestError: some of the requests failed while they ran; the others were completed, and
                all outputs are in its `outputs`.
            EngineDeadError: a tensor-parallel worker died.

        If anything else is raised half-way (Ctrl-C too), the requests of this call are dropped and
        the engine is ready for the next. Requests queued by `add_request` before go on meanwhile;
        `step` returns those that finished.
        """
        check_unsupported(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        check_use_tqdm(use_tqdm)
        self._check_awake()
        requests = self._new_requests(
            as_prompt_list(prompts), sampling_params, priority, tokenization_kwargs
        )
        self._run(requests, use_tqdm)
        outputs = [request.output(self.tokenizer) for request in requests]
        raise_failed(requests, outputs)
        return outputs

    def add_request(
        self,
        prompt: str | list[int] | Any,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> int:
        """Queue one request, to be driven by `step` until `is_finished`; returns its id.

        Ids are integers that rise by one with every request of the engine. The token list and the
        parameters are copied.

        Raises:
            ArgumentError: the prompt or a parameter is wrong, or the request can never fit.
        """
        [request] = self._new_requests([prompt], sampling_params, [priority], tokenization_kwargs)
        self._queue(request)
        return request.request_id

    def is_finished(self) -> bool:
        """Whether every request has completed and `step` has nothing left to return."""
        return self.scheduler.is_finished() and not self._requests.has_finished

    # ---- steps --------------------------------------------------------------------------------

    def step(self) -> StepOutput:
        """Compute one step, a prefill or a decode pass.

        Returns:
            `(request_id, completion_token_ids)` of every request that finished in it (with `n` > 1
            those of its first completion; `get_output` has all), and the number of tokens: > 0,
            the prompt tokens that a prefill computed; < 0, minus the sequences of a decode pass; 0
            if there was nothing to do. With `async_scheduling` the step is the oldest one
            launched; the next one runs on the device already.

        Raises:
            EngineDeadError: a tensor-parallel worker died, the GPU failed, or a step of several
                ranks failed on one of them, which may be out of step then.

        A request that makes a step fail ends alone, with "abort"; `get_output` says why. To find
        it, the requests of a failed step are run in parts, so that steps return 0 tokens or fewer
        sequences for a while.
        """
        num_tokens = self._advance()
        finished = self._requests.take()
        return [(r.request_id, r.completion_token_ids) for r in finished], num_tokens

    def _advance(self) -> int:
        """`step`, but what finishes is left for its owner in the table."""
        self._check_awake()
        num_tokens = 0
        with DeferredInterrupt(), self._stepping():
            if self.config.async_scheduling:
                num_tokens = self._step_overlapped()
            else:
                num_tokens = self._step_synchronous()
            if self._isolation.has_passed():
                self._in_flight = None
                self._isolation.go_on()
        return num_tokens

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Within it, requests that are abandoned are kept; they are aborted at its end.

        A failure in it that some request may have caused is that request's end, and not raised.
        """
        self._owner.is_stepping = True
        try:
            yield
        except BaseException as error:
            self._recover(error)
        finally:
            self._owner.is_stepping = False
            self._abort_abandoned()

    def _step_synchronous(self) -> int:
        launched = self._launch(in_flight=False)
        return 0 if launched is None else self._commit(launched)

    def _step_overlapped(self) -> int:
        current = self._in_flight or self._launch(in_flight=False)
        if current is None:
            return 0
        self._in_flight = self._launch(in_flight=True)
        num_tokens = self._commit(current)
        self._drop_dead_step()
        return num_tokens

    def _settle(self) -> None:
        """Commit the step in flight, if any: the device is idle then, and nothing is pending."""
        launched, self._in_flight = self._in_flight, None
        if launched is not None:
            with DeferredInterrupt(), self._stepping():
                self._commit(launched)

    def _launch(self, in_flight: bool) -> LaunchedStep | None:
        self._step_seqs = None
        seqs, is_prefill = self.scheduler.schedule(in_flight)
        self._step_seqs = seqs
        return self.model_runner.call("launch", seqs, is_prefill) if seqs else None

    def _commit(self, launched: LaunchedStep) -> int:
        """Wait for a step's tokens and settle its sequences; its number of tokens as in `step`."""
        start = perf_counter()
        self._step_seqs = launched.seqs
        if self._workers is not None:
            while not launched.is_done():
                self._workers.check()
        token_ids = launched.wait()
        launched.extras.keep()
        self._step_seconds = launched.seconds + perf_counter() - start
        alive = self.scheduler.postprocess(launched.seqs, token_ids)
        if launched.plan.is_prefill:
            self._requests.note_first_tokens(alive)
        ended = self._requests.finish(alive)
        num_tokens = len(launched.plan.token_ids) if launched.plan.is_prefill else -len(alive)
        if self.stat_loggers:
            self._log_stats(launched, abs(num_tokens), ended)
        return num_tokens

    def _log_stats(self, launched: LaunchedStep, num_tokens: int, ended: list[Request]) -> None:
        step = step_stats(self.scheduler, launched, num_tokens, self._step_seconds)
        finished = [request_stats(request) for request in ended]
        for stat_logger in self.stat_loggers:
            stat_logger.record(step, finished)

    def _drop_dead_step(self) -> None:
        """Forget the step in flight if all its sequences have ended: nobody wants its tokens."""
        if self._in_flight and all(seq.is_finished for seq in self._in_flight.seqs):
            self._in_flight = None

    def _run(self, requests: list[Request], use_tqdm: bool | Callable[..., Any]) -> None:
        """Queue requests and step until they have finished; they are dropped if that fails."""
        try:
            for request in requests:
                self._queue(request)
            with ProgressBar(use_tqdm, len(requests)) as bar:
                self._drain({request.request_id for request in requests}, bar)
        except BaseException:
            self._abort(requests)
            raise

    def _drain(self, own_ids: set[int], bar: ProgressBar) -> None:
        """Step until all of `own_ids` have finished; `step` will return what else finished."""
        self._requests.claim(own_ids)
        while own_ids:
            self._advance_shown(bar, own_ids)

    def _advance_shown(self, bar: ProgressBar, unfinished: Sized) -> None:
        """`_advance`, and `bar` counts what leaves `unfinished`."""
        num_left = len(unfinished)
        num_tokens = self._advance()
        assert not unfinished or not self.scheduler.is_finished(), "requests that no queue holds"
        bar.update(num_left - len(unfinished), num_tokens, self._step_seconds)

    # ---- errors and the end -------------------------------------------------------------------

    def exit(self) -> None:
        """End the workers and release all memory. May be called again.

        In a forked child it does nothing.
        """
        if self._owner.is_foreign:
            return
        visit = get_ident(), "exit"
        try:
            self._owner.enter(visit)
            self._finalizer()
            self._abort(list(self._requests.unfinished.values()))
            self._in_flight = None
            self._requests.clear()
            self._request_features.close()
            for stat_logger in self.stat_loggers:
                stat_logger.close()
        finally:
            self._owner.leave(visit)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied, as it holds a model and perhaps "
            "processes: make a new one where it is needed, or pass prompts and outputs"
        )

    def __enter__(self) -> "LLMEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.exit()

    def _new_requests(
        self,
        prompts: list[Any],
        sampling_params: Any,
        priority: Any,
        tokenization_kwargs: Any,
        pooler: Callable[[Any], Any] | None = None,
    ) -> list[Request]:
        """Checked requests, not yet numbered or queued; `pooler` as of `Sequence`."""
        self._check_ready()
        if pooler is None and not self.model_runner.has_lm_head:
            raise ArgumentError(
                f"{self.config.model!r} was saved without an LM head: it can embed, not generate"
            )
        if sampling_params is None:
            sampling_params = self._default_params
        params_list = as_params_list(sampling_params, len(prompts))
        priorities = as_priority_list(priority, len(prompts))
        encoded = encode_prompts(
            prompts, self.tokenizer, self.config.hf_config.vocab_size, tokenization_kwargs
        )
        # Usually one object serves all prompts: checked, and copied, once.
        checked = {id(params): check_params(params) for params in params_list}
        return [
            self._new_request(*prompt, checked[id(params)], priority, pooler)
            for prompt, params, priority in zip(encoded, params_list, priorities, strict=True)
        ]

    def _new_request(
        self,
        text: str | None,
        token_ids: list[int],
        params: SamplingParams,
        priority: int,
        pooler: Callable[[Any], Any] | None,
    ) -> Request:
        config = self.config
        num_new_tokens, new_tokens = (0, "") if pooler else (1, " plus at least 1 output token")
        if len(token_ids) + num_new_tokens > config.max_model_len:
            raise ArgumentError(
                f"prompt length {len(token_ids)}{new_tokens} is longer than the "
                f"maximum model length of {config.max_model_len}"
            )
        assert config.num_kvcache_blocks is not None
        pool_size = config.num_kvcache_blocks * config.kvcache_block_size
        if len(token_ids) > pool_size:
            raise ArgumentError(
                f"prompt length {len(token_ids)} can never fit in the KV cache of {pool_size} "
                f"tokens ({config.num_kvcache_blocks} blocks of {config.kvcache_block_size}); "
                "raise num_kvcache_blocks"
            )
        # The newest token's K/V is never needed: a lone sequence may exceed the pool by one token.
        max_length = min(config.max_model_len, pool_size + 1)
        if params.max_tokens is not None:
            max_length = min(max_length, len(token_ids) + params.max_tokens)
        if pooler is not None:
            max_length = len(token_ids) + 1  # it is pooled before it has so many
        request = Request(text, token_ids, params, max_length, priority)
        for seq in request.sequences:
            seq.pooler = pooler
        self._request_features.prepare(request)
        return request

    def _queue(self, request: Request) -> None:
        request.number(self._next_request_id, self.config.seed)
        self._next_request_id += 1
        self._requests.add(request)
        for seq in request.sequences:
            self.scheduler.add(seq)

    def _abort(self, requests: list[Request]) -> None:
        """End those of `requests` that are queued and not finished."""
        dropped = self._requests.drop(requests)
        seqs = [seq for request in dropped for seq in request.sequences if not seq.is_finished]
        self.scheduler.abort(seqs)
        self._drop_dead_step()

    def _abandon(self, requests: list[Request]) -> None:
        """`_abort`, or leave it to the next call if this thread is outside, or in mid-step.

        The garbage collector may call it anywhere, as the finalizer of a stream. Outputs are not
        kept: many streams whose requests are aborted take no more memory than one.
        """
        if self._owner.is_foreign:
            return
        self._abandoned += requests
        if self._owner.is_inside and not self._owner.is_stepping:
            self._abort_abandoned()

    def _abort_abandoned(self) -> None:
        requests = [self._abandoned.popleft() for _ in range(len(self._abandoned))]
        if requests:
            self._requests.forget(requests)
            self._abort(requests)

    def _recover(self, error: BaseException) -> None:
        """After a failed step: queue all requests anew, trust nothing in the cache.

        Returns if a request may have caused it, whose end this is; else raises `error`, or an
        EngineDeadError if the engine can not go on.
        """
        self._in_flight = None
        if not is_fault(error):
            self._isolation.restart()
            if self._workers is not None:
                self._die(f"a tensor-parallel step was broken off: {error!r}")
            raise error
        rank_failure = self._rank_failure(error)
        cause = rank_failure or self._device_failure()
        if cause is not None:
            self._isolation.restart()
            self._die(cause, is_device_lost=rank_failure is None)
            raise EngineDeadError(cause) from error
        seqs = self._step_seqs
        self._isolation.fail(error, self._requests.sequences() if seqs is None else seqs)

    def _rank_failure(self, error: BaseException) -> str | None:
        """Why the ranks cannot go on after `error`; None: they are in step, or there is but one."""
        if self._workers is None:
            return None
        is_mid_step = self.model_runner.is_mid_step
        cause = self._workers.wait_for_death(1.0) if is_mid_step else None
        if isinstance(error, EngineDeadError):
            return cause or str(error)
        return cause or (f"a tensor-parallel step failed: {error!r}" if is_mid_step else None)

    def _device_failure(self) -> str | None:
        """How a kernel has failed, after which nothing runs on this GPU; None: it works."""
        if self.model_runner.is_cuda:
            try:
                torch.cuda.synchronize(self.model_runner.device)
            except Exception as error:
                return f"the GPU failed: {describe(error)}"
        return None

    def _die(self, cause: str, is_device_lost: bool = False) -> None:
        """End the engine, whose ranks are out of step or whose device is lost."""
        self._cause_of_death = cause
        if self._workers is not None:
            self._workers.is_broken = True
        if is_device_lost:
            # torch ends the process when memory of a GPU that failed is given back: it never is.
            self._finalizer.detach()
            pythonapi.Py_IncRef(py_object(self))
            if self._workers is not None:
                with suppress(Exception):
                    self._workers.close()
        self.exit()

    def _check_ready(self) -> None:
        """EngineDeadError if the engine has ended."""
        if not self._finalizer.alive:
            raise EngineDeadError(self._cause_of_death)

    def _check_awake(self) -> None:
        """RuntimeError while the engine sleeps, EngineDeadError if it has ended."""
        self._check_ready()
        if self._asleep:
            off = ", ".join(sorted(self._asleep))
            raise RuntimeError(f"the engine sleeps ({off}): call wake_up() first")


def _for_workers(config: Config) -> Config:
    """The configuration without what only rank 0 needs, and what may not be pickled."""
    config = copy(config)
    config.tokenizer = config.hf_overrides = None
    return config


def _release(owner: Owner, model_runner: ModelRunner, workers: WorkerGroup | None) -> None:
    if owner.is_foreign:  # a forked child ends: everything is its parent's
        return
    if workers is not None and workers.is_broken:
        model_runner.tp.stop_waiting()  # what is in flight may wait for a rank that does not come
    model_runner.drop_graphs()
    if workers is not None:
        workers.close()
    model_runner.close()
