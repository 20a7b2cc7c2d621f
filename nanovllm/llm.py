"""The public entry point: an engine with every feature, each documented where it is written."""

from typing import Any

from nanovllm.compat import explain_keywords
from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ArgumentError, shown
from nanovllm.features import beam_search as beams
from nanovllm.features import chat as chats
from nanovllm.features import (
    lora,
    metrics,
    pooling,
    prefix_cache,
    profiling,
    renderer,
    report,
    request_queue,
    rpc,
    scoring,
    sleep_mode,
    streaming,
    weight_transfer,
    weight_update,
    worker,
)
from nanovllm.features.data_parallel import start_any_executor
from nanovllm.features.estimate import estimate as estimate_memory
from nanovllm.guards.garbage import rare_collections
from nanovllm.guards.ownership import one_thread_at_a_time
from nanovllm.inputs.plain_tokenizer import in_full
from nanovllm.sampling_params import SAMPLING_FIELDS, SamplingParams
from nanovllm.validation import check_class_name

explained = explain_keywords(SAMPLING_FIELDS)  # says what a keyword of the parameters is for


@one_thread_at_a_time(
    free=["get_tokenizer", "get_default_sampling_params", "get_world_size", "shutdown"]
)
class LLM(LLMEngine):
    __doc__ = LLMEngine.__doc__
    _start_executor = staticmethod(start_any_executor)

    def __init__(self, model: str | None = None, **kwargs: Any) -> None:
        if extension := kwargs.get("worker_extension_cls"):  # before anything starts
            worker.find_extension(check_class_name("worker_extension_cls", extension))
        super().__init__(model, **kwargs)
        lora.start(self)
        if self.config.record is not None:
            report.start(self, self.config.record)
        if not self.config.disable_log_stats:
            self.stat_loggers.append(metrics.RequestHistograms(self.config.max_model_len))

    generate = explained(rare_collections()(LLMEngine.generate))
    generate_stream = explained(streaming.generate_stream)
    chat = explained(chats.chat)
    beam_search = beams.beam_search
    embed = pooling.embed
    classify = pooling.classify
    encode = pooling.encode
    reward = pooling.reward
    score = scoring.score

    add_request = explained(LLMEngine.add_request)
    enqueue = explained(request_queue.enqueue)
    enqueue_chat = explained(chats.enqueue_chat)
    wait_for_completion = request_queue.wait_for_completion
    abort_request = request_queue.abort_request
    get_output = request_queue.get_output

    add_lora = lora.add_lora
    remove_lora = lora.remove_lora
    list_loras = lora.list_loras
    pin_lora = lora.pin_lora

    sleep = sleep_mode.sleep
    wake_up = sleep_mode.wake_up
    load_weights = weight_update.load_weights
    reload_weights = weight_update.reload_weights
    reset_prefix_cache = prefix_cache.reset_prefix_cache
    init_weight_transfer_engine = weight_transfer.init_weight_transfer_engine
    start_weight_update = weight_transfer.start_weight_update
    update_weights = weight_transfer.update_weights
    finish_weight_update = weight_transfer.finish_weight_update
    collective_rpc = worker.collective_rpc
    apply_model = rpc.apply_model
    get_metrics = metrics.get_metrics
    estimate = staticmethod(estimate_memory)
    start_profile = profiling.start_profile
    stop_profile = profiling.stop_profile

    @property
    def is_sleeping(self) -> bool:
        """Whether anything is off, so that steps are refused."""
        return bool(self.asleep)

    @property
    def tokenizer(self) -> Any:
        """The engine's tokenizer, of transformers unless another was given; None: there is none.

        Where the engine could do without transformers, it is loaded when first asked for.
        """
        return in_full(self.input_processor.tokenizer)

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.input_processor.tokenizer = tokenizer

    def get_tokenizer(self) -> Any:
        """`tokenizer`; ArgumentError if `skip_tokenizer_init=True` left it out."""
        if self.tokenizer is None:
            raise ArgumentError("there is no tokenizer: skip_tokenizer_init=True left it out")
        return self.tokenizer

    def has_unfinished_requests(self) -> bool:
        """vLLM's name for `not is_finished()`."""
        return not self.is_finished()

    def get_num_unfinished_requests(self) -> int:
        """The number of requests that have not ended."""
        return len(self.requests.unfinished)

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        """What the model answers: "generate", or tasks of `encode`."""
        has_lm_head = self.model_runner.has_lm_head
        return ("generate",) * has_lm_head + pooling.tasks_of(self)

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses without parameters: those of the model's generation_config.json."""
        return self.input_processor.default_params.clone()

    @property
    def model_config(self) -> Config:
        """The engine's configuration; `max_model_len`, `hf_config` and others as vLLM's."""
        return self.config

    @classmethod
    def from_engine_args(cls, engine_args: Any) -> "LLM":
        """An engine whose parameters are the attributes of an object, `model` among them."""
        if not hasattr(engine_args, "__dict__"):
            hint = "; a dict goes into LLM(**{...})" if isinstance(engine_args, dict) else ""
            raise ArgumentError(
                f"engine_args must be an object with attributes, got {shown(engine_args)}{hint}"
            )
        return cls(**vars(engine_args))

    def shutdown(self) -> None:
        """vLLM's name of `exit`."""
        self.exit()

    @property
    def llm_engine(self) -> "LLM":
        """The engine itself, for scripts that drive vLLM's `llm.llm_engine`."""
        return self

    @property
    def renderer(self) -> renderer.Renderer:
        """Makes token ids of prompts ahead of `generate`, as vLLM's does."""
        return renderer.Renderer(self)

    @property
    def model_executor(self) -> Any:
        """vLLM's way to the model: `.driver_worker.model_runner.model`, with its `load_weights`."""
        return worker.model_executor(self, self.load_weights, self.collective_rpc)

    @property
    def vllm_config(self) -> Any:
        """vLLM's: has `model_config`, `parallel_config`, `cache_config`, `scheduler_config`."""
        return worker.vllm_config(self)

    @property
    def engine_core(self) -> Any:
        """vLLM's: has `model_executor` and `shutdown`."""
        return worker.engine_core(self.model_executor)

    def get_world_size(self, include_dp: bool = True) -> int:
        """The number of ranks: of all replicas, or of one without `include_dp`."""
        num_replicas = self.config.data_parallel_size if include_dp else 1
        return num_replicas * self.config.tensor_parallel_size

    def __repr__(self) -> str:
        """One line; `print(llm.model_runner.model)` shows the model's tree of modules."""
        if "_finalizer" not in vars(self):
            return "LLM(not started)"
        config, num_queued = self.config, len(self.requests.unfinished)
        if not self._finalizer.alive:
            return f"LLM(model={config.model!r})"  # nothing else is left of it
        state = "asleep" if self.asleep else f"{num_queued} requests" if num_queued else "idle"
        size = config.data_parallel_size
        replicas = f"data_parallel_size={size}, " if size > 1 else ""
        return (
            f"LLM(model={config.model!r}, dtype={str(config.resolve_dtype())[6:]!r}, "
            f"device={self.model_runner.device.type!r}, "
            f"tensor_parallel_size={config.tensor_parallel_size}, {replicas}state={state!r})"
        )
