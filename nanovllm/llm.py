"""The public entry point."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from nanovllm.compat import explain_keywords
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ArgumentError, shown
from nanovllm.features import (
    metrics,
    pooling,
    prefix_cache,
    profiling,
    report,
    request_queue,
    rpc,
    sleep,
    streaming,
    weight_update,
)
from nanovllm.guards.ownership import one_thread_at_a_time
from nanovllm.inputs.chat import render_prompts, takes_chat_options
from nanovllm.inputs.prompts import check_unsupported
from nanovllm.outputs import EmbeddingRequestOutput, RequestOutput, ScoringRequestOutput
from nanovllm.pooling_params import PoolingParams
from nanovllm.progress import check_use_tqdm
from nanovllm.sampling_params import SAMPLING_FIELDS, SamplingParams


@one_thread_at_a_time(
    free=["get_tokenizer", "get_default_sampling_params", "get_world_size", "shutdown"]
)
class LLM(LLMEngine):
    __doc__ = LLMEngine.__doc__

    def __init__(self, model: str | None = None, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        if self.config.record is not None:
            report.start(self, self.config.record)

    generate = explain_keywords(SAMPLING_FIELDS)(LLMEngine.generate)
    add_request = explain_keywords(SAMPLING_FIELDS)(LLMEngine.add_request)

    @explain_keywords(SAMPLING_FIELDS)
    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Answer conversations: `generate` on what the chat template makes of them.

        Args:
            messages: a conversation, or a list of them. It is a list of dicts with "role" and
                "content": a string, or a list of {"type": "text", "text": ...}.
            sampling_params, use_tqdm: as for `generate`.
            chat_template: a Jinja template, or the path of a file with one; None: that of `LLM(...,
                chat_template=...)`, else the tokenizer's.
            chat_template_content_format: what the template is given as content: "string" ("auto"),
                text parts joined by newlines; "openai", a list of text parts.
            add_generation_prompt: end with the header of the model's answer.
            continue_final_message: leave the final message open, for the model to continue; needs
                `add_generation_prompt=False`.
            tools: what the model may call: dicts with JSON schemas, or documented functions.
            chat_template_kwargs: variables for the template, such as `enable_thinking` of Qwen3.
            tokenization_kwargs: for the tokenizer's `encode` of the rendered text; by default it
                adds no special tokens, as the template has written them.
            lora_request, mm_processor_kwargs: only None.

        Returns:
            A `RequestOutput` for each conversation, whose `prompt` is the rendered text.

        Raises:
            ArgumentError: an argument is wrong, or the template refuses a conversation; nothing
                was queued then.
        """
        check_unsupported(lora_request=lora_request)
        prompts = render_prompts(
            self,
            messages,
            chat_template,
            chat_template_content_format,
            add_generation_prompt,
            continue_final_message,
            tools,
            chat_template_kwargs,
            tokenization_kwargs,
            mm_processor_kwargs,
        )
        return self.generate(prompts, sampling_params, use_tqdm)

    @explain_keywords(SAMPLING_FIELDS)
    @takes_chat_options
    def enqueue_chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        priority: list[int] | None = None,
        *options: Any,
        **named_options: Any,
    ) -> list[str]:
        """Queue conversations without running them, for `wait_for_completion`; returns their ids.

        Arguments and errors are those of `chat`, and the priorities of `generate`.
        """
        check_unsupported(lora_request=lora_request)
        prompts = render_prompts(self, messages, *options, **named_options)
        return self.enqueue(prompts, sampling_params, priority=priority, use_tqdm=use_tqdm)

    @explain_keywords(SAMPLING_FIELDS)
    def generate_stream(
        self,
        prompts: str | list[str] | list[int] | list[list[int]] | list[Any],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = False,
        priority: list[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> streaming.Stream:
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
        return streaming.generate_stream(
            self,
            prompts,
            sampling_params,
            use_tqdm=use_tqdm,
            priority=priority,
            tokenization_kwargs=tokenization_kwargs,
        )

    def embed(
        self,
        prompts: str | list[str] | list[int] | list[list[int]] | list[Any],
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: PoolingParams | None = None,
        truncate_prompt_tokens: int | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        priority: list[int] | None = None,
        lora_request: None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Embed prompts: the final hidden state of each one's last token, scaled to length 1.

        That is how Qwen3-Embedding works; the token that its prompts end with is added by the
        tokenizer that it comes with. Nothing is generated. Requests queued otherwise run along.

        Args:
            prompts, priority, use_tqdm, tokenization_kwargs: as for `generate`; a prompt may have
                `max_model_len` tokens.
            pooling_params: fewer dimensions, or embeddings as they come.
            truncate_prompt_tokens: cut texts to so many tokens, as the tokenizer does it (the
                tokens that it adds stay); -1: to `max_model_len`.
            lora_request: only None.

        Returns:
            For each prompt an output whose `outputs.embedding` is a list of floats.

        Raises:
            ArgumentError: a prompt or parameter is wrong, or the model's files for
                sentence-transformers ask for another pooling or a further module; nothing was
                queued then.
            EngineDeadError: a tensor-parallel worker died.
        """
        check_unsupported(lora_request=lora_request)
        return pooling.embed(
            self,
            prompts,
            use_tqdm=use_tqdm,
            pooling_params=pooling_params,
            truncate_prompt_tokens=truncate_prompt_tokens,
            tokenization_kwargs=tokenization_kwargs,
            priority=priority,
        )

    def score(
        self,
        data_1: str | list[str],
        data_2: str | list[str],
        /,
        *,
        method: str = "reranker",
        instruction: str | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        truncate_prompt_tokens: int | None = None,
        lora_request: None = None,
    ) -> list[ScoringRequestOutput]:
        """Score pairs of texts: one with one, one with each of several, or each with its own.

        Args:
            data_1: queries.
            data_2: documents, as many; any number for a single query.
            method: "reranker" asks the model as Qwen3-Reranker was trained to be asked, whether the
                document meets the query; the score is the probability of "yes" against "no".
                "embedding": the cosine of the two texts' embeddings, as of Qwen3-Embedding.
            instruction: what the reranker looks for; None: passages that answer a web search.
            use_tqdm: as for `generate`.
            truncate_prompt_tokens: cut texts so that a prompt has so many tokens at most; the
                reranker loses the end of the document. -1: `max_model_len`.
            lora_request: only None.

        Returns:
            For each pair an output whose `outputs.score` is a float.

        Raises:
            ArgumentError: an argument is wrong, the model has no LM head, or its tokenizer lacks
                one of the tokens that the reranker's question or answer is made of.
            EngineDeadError: a tensor-parallel worker died.
        """
        check_unsupported(lora_request=lora_request)
        return pooling.score(
            self,
            data_1,
            data_2,
            method=method,
            instruction=instruction,
            use_tqdm=use_tqdm,
            truncate_prompt_tokens=truncate_prompt_tokens,
        )

    def get_tokenizer(self) -> Any:
        """The engine's tokenizer; ArgumentError if `skip_tokenizer_init=True` left it out."""
        if self.tokenizer is None:
            raise ArgumentError("there is no tokenizer: skip_tokenizer_init=True left it out")
        return self.tokenizer

    @explain_keywords(SAMPLING_FIELDS)
    def enqueue(
        self,
        prompts: str | list[str] | list[int] | list[list[int]] | list[Any],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        priority: list[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        lora_request: None = None,
        mm_processor_kwargs: None = None,
        use_tqdm: bool | Callable[..., Any] = False,
    ) -> list[str]:
        """Queue prompts without running them, for `wait_for_completion`; returns their ids.

        Arguments and errors are those of `generate`; `use_tqdm` is accepted, nothing takes long.
        """
        check_unsupported(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        check_use_tqdm(use_tqdm)
        return request_queue.enqueue(self, prompts, sampling_params, priority, tokenization_kwargs)

    def wait_for_completion(
        self, output_type: None = None, *, use_tqdm: bool | Callable[..., Any] = True
    ) -> list[RequestOutput]:
        """Run everything that is queued; the outputs that `step` has not returned, by id.

        Args:
            output_type: only None: there is one type.
            use_tqdm: as for `generate`.

        After an exception (Ctrl-C too) nothing is lost: call it again.
        """
        check_unsupported(output_type=output_type)
        return request_queue.wait_for_completion(self, use_tqdm)

    def abort_request(self, request_ids: int | str | Iterable[int | str]) -> None:
        """End requests now, with finish reason "abort"; their blocks are free at once.

        `step` does not return them; `get_output` gives what they have. Ids of requests that have
        ended, or never were, are ignored.
        """
        request_queue.abort_request(self, request_ids)

    def get_output(self, request_id: int | str) -> RequestOutput:
        """The output of a request: the partial one while it runs, the whole one at its end.

        An output is kept until `step` returns the next finished requests, or `wait_for_completion`
        returns, so that a long night's loop needs no more memory than a short one.

        Raises:
            ArgumentError: there is no such request, or its output is gone.
        """
        return request_queue.get_output(self, request_id)

    def has_unfinished_requests(self) -> bool:
        """vLLM's name for `not is_finished()`."""
        return not self.is_finished()

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses without parameters: those of the model's generation_config.json."""
        return self.input_processor.default_params.clone()

    # ---- inside knowledge ---------------------------------------------------------------------

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

    def get_world_size(self, include_dp: bool = True) -> int:
        """The number of ranks; there is no data parallelism to include."""
        return self.config.tensor_parallel_size

    def __repr__(self) -> str:
        """One line; `print(llm.model_runner.model)` shows the model's tree of modules."""
        if "_finalizer" not in vars(self):
            return "LLM(not started)"
        config, num_queued = self.config, len(self.requests.unfinished)
        if not self._finalizer.alive:
            return f"LLM(model={config.model!r})"  # nothing else is left of it
        state = "asleep" if self.asleep else f"{num_queued} requests" if num_queued else "idle"
        return (
            f"LLM(model={config.model!r}, dtype={str(config.resolve_dtype())[6:]!r}, "
            f"device={self.model_runner.device.type!r}, "
            f"tensor_parallel_size={config.tensor_parallel_size}, state={state!r})"
        )

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Call a method on every worker, one for each rank, between two steps.

        Args:
            method: the name of a method of `ModelRunner`, or a callable, which gets the worker as
                its first argument: a `ModelRunner`, with `rank`, `model`, `device` and `config`.
                With several ranks callable and arguments are pickled: the callable must be defined
                at the top level of a module, and tensors travel by value.
            timeout: seconds for the workers to answer; None: for ever. The call on rank 0 runs in
                this process and is not broken off.
            args: positional arguments.
            kwargs: keyword arguments.

        Returns:
            The results in rank order. Tensors should be on the CPU.

        Raises:
            ArgumentError: there is no such method, or call or result cannot be pickled.
            TimeoutError: a worker has not answered in time; the engine has ended then.
            EngineDeadError: a worker died.
            Exception: what the call raised on the lowest rank where it failed; its cause shows the
                traceback on that rank. The engine stays usable, but a call that uses collectives
                must not fail on some ranks only: the others would wait for it.

        If the call changes the weights, call `reset_prefix_cache` after it.
        """
        return rpc.collective_rpc(self, method, timeout, args, kwargs)

    def apply_model(self, func: Callable[[nn.Module], Any]) -> list[Any]:
        """`func(model)` on every rank's model; results and errors are those of `collective_rpc`.

        `llm.apply_model(print)` shows the tree of modules on each.
        """
        return rpc.apply_model(self, func)

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Give memory back until `wake_up`. Requests can be queued meanwhile, but nothing runs.

        Args:
            level: 0 only stops the scheduling, all memory stays. 1 moves the weights to host
                memory and drops the KV cache and the CUDA graphs. 2 drops the weights too.
            mode: what becomes of unfinished requests: "abort" ends them, "wait" finishes them
                first (`step` returns them), "keep" lets them go on after `wake_up`; from level 1
                on their K/V is computed anew then.

        Whatever runs a step, such as `generate`, raises a RuntimeError until `wake_up`.
        """
        sleep.sleep(self, level, mode)

    def wake_up(self, tags: Iterable[str] | None = None) -> bool:
        """Undo `sleep`.

        Args:
            tags: what to wake: "weights" and "kv_cache" (levels 1 and 2), "scheduling" (level 0);
                None: everything. CUDA graphs are captured with the last of weights and cache.

        Returns:
            Whether everything is awake.

        After level 2 all weights are zero: follow with `load_weights` or `reload_weights`, before
        or after waking the cache.

        Raises:
            ArgumentError: there is no such tag.
            RuntimeError: the memory is taken by now. The engine sleeps on; try again later.
        """
        return sleep.wake_up(self, tags)

    @property
    def is_sleeping(self) -> bool:
        """Whether anything is off, so that steps are refused."""
        return bool(self.asleep)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Replace weights in place, all or some, as after a step of training.

        Args:
            weights: (name, tensor) pairs or a state dict, under the names and in the shapes of the
                model's checkpoint, whole dense tensors of 16, 32 or 64 bits on any device; each is
                converted to its parameter's dtype, and quantised where quantization="fp8" quantises
                weights. `lm_head.weight` of a model with tied embeddings is left out.

        Returns:
            The names that were loaded.

        The prefix cache is emptied. Running requests go on with the new weights: the tokens they
        have stay, their K/V is computed anew.

        Raises:
            ArgumentError: a name is unknown, or a shape or type is wrong. Of a list or dict nothing
                is loaded then; what an iterator gave before stays loaded. Or the engine's own
                checkpoint is fp8: it takes no new weights.
        """
        return weight_update.load_weights(self, weights)

    def reload_weights(self) -> None:
        """Load all weights from the model's directory again; as for `load_weights` otherwise."""
        weight_update.reload_weights(self)

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Forget all cached K/V.

        Args:
            reset_running_requests: put running requests back in the queue first; they go on, and
                their K/V is computed anew.
            reset_connector: changes nothing, there is no outside cache.

        Returns:
            True; or False if a request still holds blocks, and nothing has changed.
        """
        return prefix_cache.reset_prefix_cache(self, reset_running_requests)

    def get_metrics(self) -> metrics.Metrics:
        """A snapshot of the engine's counters under vLLM's names.

        Returns:
            A list of metrics, each with `name`, `labels` and `value`; `.get(name, default)` gives
            a value by name.
        """
        return metrics.get_metrics(self)

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """Start torch's profiler on every rank.

        Args:
            profile_prefix: the beginning of the traces' paths; None: "nanovllm-trace". A relative
                one starts at the folder VLLM_TORCH_PROFILER_DIR, if that is set.

        Raises:
            ArgumentError: it runs already.
        """
        profiling.start_profile(self, profile_prefix)

    def stop_profile(self) -> list[str]:
        """Write the traces, for chrome://tracing or Perfetto, and stop.

        Returns:
            The paths, `<prefix>-rank<r>.json` for each rank r. Older files there are replaced.

        Raises:
            ArgumentError: the profiler does not run.
        """
        return profiling.stop_profile(self)
