"""The engine: takes requests, steps the scheduler and the model in turn, returns completions."""

import weakref
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from time import perf_counter
from typing import Any, NoReturn

from nanovllm.config import Config
from nanovllm.engine.executor import Executor, LaunchedStep, UniProcExecutor
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.recovery import Recovery
from nanovllm.engine.request import Request, RequestTable
from nanovllm.engine.request_output import make_output, raise_failed
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.startup import check_fits, choose_ops
from nanovllm.errors import EngineDeadError
from nanovllm.guards.interrupts import DeferredInterrupt
from nanovllm.guards.ownership import Owner, bind_to_process, one_thread_at_a_time
from nanovllm.inputs.generation_config import default_sampling_params, eos_token_ids
from nanovllm.inputs.prompts import as_prompt_list, check_unsupported
from nanovllm.inputs.tokenizer import load_tokenizer
from nanovllm.models.size import check_size
from nanovllm.outputs import RequestOutput
from nanovllm.parallel.executor import MultiprocExecutor
from nanovllm.progress import ProgressBar, check_use_tqdm
from nanovllm.sampling_params import SamplingParams

ENDED = "the engine was ended by exit()"
StepOutput = tuple[list[tuple[int, list[int]]], int]


@one_thread_at_a_time(free=["abandon", "check_awake", "check_ready", "exit"])
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
        default_params = default_sampling_params(
            config.model, config.generation_config, config.override_generation_config
        )
        check_size(config, device)
        check_fits(config, device)
        self.owner = Owner()
        form = MultiprocExecutor if config.tensor_parallel_size > 1 else UniProcExecutor
        self.executor: Executor = form(config, device)
        config.num_kvcache_blocks = self.executor.num_kvcache_blocks
        self.input_processor = InputProcessor(
            config, self.tokenizer, default_params, self.model_runner.has_lm_head
        )
        self.scheduler = Scheduler(config)
        self._in_flight: LaunchedStep | None = None
        self._step_seqs: list[Sequence] | None = None  # of what is launched or committed just now
        self.requests = RequestTable()
        self._recovery = Recovery(self.requests, self.scheduler, self.executor)
        self._step_seconds = 0.0  # spent on launching the last committed step and waiting for it
        self._next_request_id = 0
        self.asleep: frozenset[str] = frozenset()  # what `LLM.sleep` has switched off
        # Not bound to self, so that dropping the engine releases everything.
        self._finalizer = weakref.finalize(self, _release, self.owner, self.executor)
        bind_to_process(self.executor)

    @property
    def model_runner(self) -> ModelRunner:
        """Rank 0's."""
        return self.executor.model_runner

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
        self.check_awake()
        requests = self.new_requests(
            as_prompt_list(prompts), sampling_params, priority, tokenization_kwargs
        )
        self.run(requests, use_tqdm)
        outputs = [make_output(request, self.tokenizer) for request in requests]
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
        [request] = self.new_requests([prompt], sampling_params, [priority], tokenization_kwargs)
        self.queue([request])
        return request.request_id

    def is_finished(self) -> bool:
        """Whether every request has completed and `step` has nothing left to return."""
        return self.scheduler.is_finished() and not self.requests.has_finished

    # ---- what features are made of ------------------------------------------------------------

    def check_ready(self) -> None:
        """EngineDeadError if the engine has ended."""
        if not self._finalizer.alive:
            raise EngineDeadError(self.executor.cause_of_death or ENDED)

    def check_awake(self) -> None:
        """RuntimeError while the engine sleeps, EngineDeadError if it has ended."""
        self.check_ready()
        if self.asleep:
            off = ", ".join(sorted(self.asleep))
            raise RuntimeError(f"the engine sleeps ({off}): call wake_up() first")

    def new_requests(
        self,
        prompts: list[Any],
        sampling_params: SamplingParams | list[SamplingParams] | None,
        priority: list[int] | None,
        tokenization_kwargs: dict[str, Any] | None,
        pooler: Callable[[Any], Any] | None = None,
    ) -> list[Request]:
        """Checked requests, not yet numbered or queued; arguments and errors as of `generate`.

        pooler: as of `Sequence`; None: tokens are generated.
        """
        self.check_ready()
        return self.input_processor.process(
            prompts, sampling_params, priority, tokenization_kwargs, pooler
        )

    def queue(self, requests: list[Request]) -> None:
        """Number requests and put them into the queue."""
        for request in requests:
            request.number(self._next_request_id, self.config.seed)
            self._next_request_id += 1
            self.requests.add(request)
            for seq in request.sequences:
                self.scheduler.add(seq)

    def run(self, requests: list[Request], use_tqdm: bool | Callable[..., Any]) -> None:
        """Queue requests and step until they have finished; they are dropped if that fails.

        `step` will return what else finished.
        """
        try:
            self.queue(requests)
            own_ids = {request.request_id for request in requests}
            with ProgressBar(use_tqdm, len(requests)) as bar:
                self.requests.claim(own_ids)
                while own_ids:
                    self.advance(own_ids, bar)
        except BaseException:
            self._abort(requests)
            raise

    def abort(self, requests: list[Request]) -> None:
        """End those of `requests` that are not finished; `requests.find` gives what they have."""
        self._abort(requests)
        self.requests.keep(requests)

    def abandon(self, requests: list[Request]) -> None:
        """End requests that nobody waits for, and forget them; any thread may call it, at any time.

        It happens now, or in the next call if this thread is outside, or in mid-step. The garbage
        collector calls it as the finalizer of a stream.
        """
        self.owner.defer(partial(self._forget, requests))

    def call_ranks(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """`Executor.collective_rpc` between two steps; ends the engine if ranks cannot go on."""
        self.check_ready()
        self.drain()
        with DeferredInterrupt():
            self.owner.is_stepping = self.executor.has_busy_ranks
            try:
                return self.executor.collective_rpc(method, timeout, args, kwargs or {})
            except BaseException:
                if self.executor.cause_of_death is not None:
                    self.exit()
                raise
            finally:
                self.owner.is_stepping = False

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
        num_tokens = self.advance()
        finished = self.requests.take()
        return [(r.request_id, r.completion_token_ids) for r in finished], num_tokens

    def advance(self, unfinished: Sized = (), bar: ProgressBar | None = None) -> int:
        """`step`, but what finishes is left for its owner in `requests`; the number of tokens.

        Args:
            unfinished: what the caller waits for: its ids leave it as requests finish.
            bar: counts what leaves `unfinished`.
        """
        self.check_awake()
        num_left, num_tokens = len(unfinished), 0
        with self._stepping():
            current = self._in_flight or self._launch(in_flight=False)
            if current is not None:
                if self.config.async_scheduling:
                    self._in_flight = self._launch(in_flight=True)
                num_tokens = self._commit(current)
                self._drop_dead_step()
            if self._recovery.has_passed():
                self._in_flight = None
                self._recovery.go_on()
        assert not unfinished or not self.scheduler.is_finished(), "requests that no queue holds"
        if bar is not None:
            bar.update(num_left - len(unfinished), num_tokens, self._step_seconds)
        return num_tokens

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Around a step: a failure that some request may have caused is that request's end.

        Any other is raised. Ctrl-C, and what else wants the engine, waits until the end.
        """
        with DeferredInterrupt(), self.owner.stepping():
            try:
                yield
            except BaseException as error:
                self._in_flight = None
                self._recovery.recover(error, self._step_seqs)
            finally:
                if self.executor.cause_of_death is not None:
                    self.exit()

    def drain(self) -> None:
        """Commit the step in flight, if any: the device is idle then, and nothing is pending."""
        launched, self._in_flight = self._in_flight, None
        if launched is not None:
            with self._stepping():
                self._commit(launched)

    def _launch(self, in_flight: bool) -> LaunchedStep | None:
        self._step_seqs = None
        seqs, is_prefill = self.scheduler.schedule(in_flight)
        self._step_seqs = seqs
        return self.executor.launch(seqs, is_prefill) if seqs else None

    def _commit(self, launched: LaunchedStep) -> int:
        """Wait for a step's tokens and settle its sequences; its number of tokens as in `step`."""
        start = perf_counter()
        self._step_seqs = launched.seqs
        token_ids = self.executor.wait(launched)
        launched.commit()
        self._step_seconds = launched.seconds + perf_counter() - start
        alive = self.scheduler.postprocess(launched.seqs, token_ids)
        if launched.plan.is_prefill:
            self.requests.note_first_tokens(alive)
        self.requests.finish(alive)
        return len(launched.plan.token_ids) if launched.plan.is_prefill else -len(alive)

    def _drop_dead_step(self) -> None:
        """Forget the step in flight if all its sequences have ended: nobody wants its tokens."""
        if self._in_flight and all(seq.is_finished for seq in self._in_flight.seqs):
            self._in_flight = None

    # ---- errors and the end -------------------------------------------------------------------

    def exit(self) -> None:
        """End the workers and release all memory. May be called again.

        In a forked child it does nothing.
        """
        if self.owner.is_foreign:
            return
        visit = get_ident(), "exit"
        try:
            self.owner.enter(visit)
            self._finalizer()
            self._abort(list(self.requests.unfinished.values()))
            self._in_flight = None
            self.requests.clear()
            self.input_processor.close()
        finally:
            self.owner.leave(visit)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied, as it holds a model and perhaps "
            "processes: make a new one where it is needed, or pass prompts and outputs"
        )

    def __enter__(self) -> "LLMEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.exit()

    def _abort(self, requests: list[Request]) -> None:
        """End those of `requests` that are queued and not finished."""
        dropped = self.requests.drop(requests)
        seqs = [seq for request in dropped for seq in request.sequences if not seq.is_finished]
        self.scheduler.abort(seqs)
        self._drop_dead_step()

    def _forget(self, requests: list[Request]) -> None:
        self.requests.forget(requests)
        self._abort(requests)


def _release(owner: Owner, executor: Executor) -> None:
    if not owner.is_foreign:  # a forked child ends: everything is its parent's
        executor.close()
