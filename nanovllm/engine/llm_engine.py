"""The engine: takes requests, steps the scheduler and the model in turn, returns completions."""

from collections.abc import Callable, Iterator, Mapping, Sized
from collections.abc import Sequence as Items
from contextlib import contextmanager
from time import perf_counter

from nanovllm.config import Config
from nanovllm.engine.executor import LaunchedStep
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.queue_order import queue_order
from nanovllm.engine.recovery import Recovery
from nanovllm.engine.request import Request, RequestTable
from nanovllm.engine.request_output import Outputs, raise_failed
from nanovllm.engine.startup import prepare
from nanovllm.engine.step_stats import log_step
from nanovllm.guards.lifecycle import Lifecycle
from nanovllm.guards.ownership import one_thread_at_a_time
from nanovllm.inputs.prompts import as_prompt_list, check_unsupported
from nanovllm.lora_request import LoRARequests
from nanovllm.outputs import RequestOutput
from nanovllm.parallel.executor import start_executor
from nanovllm.parameters import document
from nanovllm.progress import ProgressBar, check_use_tqdm
from nanovllm.sampling_params import SamplingParams
from nanovllm.stats import StatLogger


@one_thread_at_a_time(free=[])
class LLMEngine(Lifecycle):
    """Offline inference on one model.

    {parameters}

    Use an engine from one thread at a time: a call while another thread is inside raises an
    EngineUseError. It belongs to the process that made it: in a forked child its methods raise that
    error too (`exit` does nothing), and it can be neither copied nor pickled.

    Raises:
        ArgumentError: a value is wrong; before any process is started or GPU memory taken but for
            CUDA's own, except what only loading can show (weights that do not fit, no memory left
            for the cache).
        TypeError: an unknown keyword.
        EngineDeadError: a tensor-parallel worker or a replica died during start-up.
    """

    _start_executor = staticmethod(start_executor)

    def __init__(self, model: str | Config | None = None, **kwargs: object) -> None:
        # What cannot run is refused before anything is started.
        config, device, tokenizer, default_params = prepare(model, kwargs)
        self.executor = self._start_executor(config, device)
        self.config = config.replace(num_kvcache_blocks=self.executor.num_kvcache_blocks)
        self.input_processor = InputProcessor(
            self.config, tokenizer, default_params, self.model_runner
        )
        self.scheduler = self.executor.new_scheduler(self.config)
        self.requests = RequestTable()
        self.stat_loggers: list[StatLogger] = []
        self._recovery = Recovery(self.requests, self.scheduler, self.executor)
        self._in_flight: LaunchedStep | None = None
        self._step_seconds = 0.0  # spent on launching the last committed step and waiting for it
        self._next_request_id = 0
        super().__init__(self.executor)

    @property
    def model_runner(self) -> ModelRunner:
        """Rank 0's."""
        return self.executor.model_runner

    # ---- requests -----------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | list[str] | list[int] | list[list[int]] | Items[object],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., object] = True,
        *,
        priority: list[int] | None = None,
        tokenization_kwargs: Mapping[str, object] | None = None,
        lora_request: LoRARequests = None,
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
            lora_request: the adapter, one for all prompts or one or none for each; needs
                `enable_lora=True`.
            mm_processor_kwargs: only None; there are no images.

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
        check_unsupported(mm_processor_kwargs=mm_processor_kwargs)
        check_use_tqdm(use_tqdm)
        self.check_awake()
        requests = self.input_processor.process(
            as_prompt_list(prompts), sampling_params, priority, tokenization_kwargs, lora_request
        )
        outputs = self.run(requests, use_tqdm).all()
        raise_failed(requests, outputs)
        return outputs

    def add_request(
        self,
        prompt: str | list[int] | object,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        tokenization_kwargs: Mapping[str, object] | None = None,
        lora_request: LoRARequests = None,
    ) -> int:
        """Queue one request, to be driven by `step` until `is_finished`; returns its id.

        Ids are integers that rise by one with every request of the engine. The token list and the
        parameters are copied.

        Raises:
            ArgumentError: the prompt or a parameter is wrong, or the request can never fit.
        """
        self.check_ready()
        [request] = self.input_processor.process(
            [prompt], sampling_params, [priority], tokenization_kwargs, lora_request
        )
        self.queue([request])
        return request.request_id

    def is_finished(self) -> bool:
        """Whether every request has completed and `step` has nothing left to return."""
        return self.scheduler.is_finished() and not self.requests.has_finished

    # ---- what features are made of ------------------------------------------------------------

    def queue(self, requests: list[Request]) -> None:
        """Number requests and put them into the queue."""
        for request in requests:
            request.number(self._next_request_id, self.config.seed)
            self._next_request_id += 1
            self.requests.add(request)
        seqs = [seq for request in requests for seq in request.sequences]
        for seq in queue_order(seqs, self.scheduler):
            self.scheduler.add(seq)

    def run(self, requests: list[Request], use_tqdm: bool | Callable[..., object]) -> Outputs:
        """Queue requests and step until they have finished; they are dropped if that fails.

        `step` will return what else finished.
        """
        try:
            self.queue(requests)
            outputs = Outputs(requests, self.input_processor.tokenizer)
            with ProgressBar(use_tqdm, len(requests)) as bar:
                self.requests.claim(outputs)
                while outputs:
                    self.advance(outputs, bar)
            return outputs
        except BaseException:
            self._abort(requests)
            raise

    def abort(self, requests: list[Request]) -> None:
        """End those of `requests` that are not finished; `requests.find` gives what they have."""
        self._abort(requests)
        self.requests.keep(requests)

    # ---- steps --------------------------------------------------------------------------------

    def step(self) -> tuple[list[tuple[int, list[int]]], int]:
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
        return [(r.request_id, r.sequences[0].completion_token_ids) for r in finished], num_tokens

    def advance(self, unfinished: Sized = (), bar: ProgressBar | None = None) -> int:
        """`step`, but what finishes is left for its owner in `requests`; the number of tokens.

        Args:
            unfinished: what the caller waits for: its ids leave it as requests finish. `Outputs`
                are made while the device works.
            bar: counts what leaves `unfinished`.
        """
        self.check_awake()
        num_left, num_tokens = len(unfinished), 0
        current, self._in_flight = self._in_flight, None
        with self._stepping():
            ahead = None
            if current := current or self._launch(in_flight=False):
                if self.config.async_scheduling:
                    ahead = self._launch(in_flight=True)
                if isinstance(unfinished, Outputs):
                    unfinished.make_during(current)
                num_tokens = self._commit(current)
            if self._recovery.has_passed():
                ahead = None
                self._recovery.go_on()
            self._in_flight = ahead
            self._drop_dead_step()
        assert not unfinished or not self.scheduler.is_finished(), "requests that no queue holds"
        if bar is not None:
            bar.update(num_left - len(unfinished), num_tokens, self._step_seconds)
        return num_tokens

    def drain(self) -> None:
        """Commit the step in flight, if any: the device is idle then, and nothing is pending."""
        launched, self._in_flight = self._in_flight, None
        if launched is not None:
            with self._stepping():
                self._commit(launched)

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Around a step: if it fails, only the request that is to blame ends, if any is."""
        try:
            with self._recovery.stepping(self.owner):
                yield
        finally:
            if self.executor.cause_of_death is not None:
                self.exit()

    def _launch(self, in_flight: bool) -> LaunchedStep | None:
        self._recovery.suspects = None  # everybody, until it is known who takes part
        seqs, is_prefill = self.scheduler.schedule(in_flight)
        self._recovery.suspects = seqs
        return self.executor.launch(seqs, is_prefill) if seqs else None

    def _commit(self, launched: LaunchedStep) -> int:
        """Wait for a step's tokens and give them to its sequences; their number as in `step`."""
        start = perf_counter()
        self._recovery.suspects = launched.seqs
        token_ids = self.executor.wait(launched)
        launched.commit()
        self._step_seconds = seconds = launched.seconds + perf_counter() - start
        alive = self.scheduler.postprocess(launched.seqs, token_ids)
        if launched.plan.is_prefill:
            self.requests.note_first_tokens(alive)
        ended = self.requests.finish(alive)
        num_tokens = len(launched.plan.token_ids) if launched.plan.is_prefill else -len(alive)
        if self.stat_loggers:
            log_step(self.stat_loggers, self.scheduler, launched, num_tokens, seconds, ended)
        return num_tokens

    def _drop_dead_step(self) -> None:
        """Forget the step in flight if all its sequences have ended: nobody wants its tokens."""
        if self._in_flight and all(seq.is_finished for seq in self._in_flight.seqs):
            self._in_flight = None

    def _abort(self, requests: list[Request]) -> None:
        """End those of `requests` that are queued and not finished."""
        dropped = self.requests.drop(requests)
        seqs = [seq for request in dropped for seq in request.sequences if not seq.is_finished]
        self.scheduler.abort(seqs)
        self._drop_dead_step()

    def _end(self) -> None:
        self._abort(list(self.requests.unfinished.values()))
        self._in_flight = None
        self.requests.clear()
        self.input_processor.close()
        for stat_logger in self.stat_loggers:
            stat_logger.close()


document(LLMEngine, Config)
