"""The engine: takes requests, steps the scheduler and the model in turn, returns completions."""

import hashlib
import json
import os
import weakref
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from nanovllm.config import Config
from nanovllm.engine import kv_cache
from nanovllm.engine.interrupts import DeferredInterrupt
from nanovllm.engine.model_runner import LaunchedStep, ModelRunner, choose_ops
from nanovllm.engine.progress import ProgressBar
from nanovllm.engine.prompts import as_params_list, as_prompt_list, check_params, encode_prompt
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.workers import WorkerGroup
from nanovllm.errors import ArgumentError, EngineDeadError
from nanovllm.layers.tensor_parallel import TensorParallel
from nanovllm.sampling_params import SamplingParams

StepOutput = tuple[list[tuple[int, list[int]]], int]


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
        enforce_eager: no CUDA graphs, no torch.compile. Default False.
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
        dtype: "auto" (the model's), "bfloat16", "float16", "float32".
        device: "auto" (CUDA if there is one), "cuda", "cpu".
        seed: keys the sampling of every request, with the request's number. Default 0.
        load_format: "auto", or "dummy" for random weights (config and tokenizer are still read).

    An engine has no lock: use it from one thread at a time.

    Raises:
        ArgumentError: a value is wrong; before any process is started or GPU memory taken, except
            what only loading can show (weights that do not fit, no memory left for the cache).
        TypeError: an unknown keyword.
        EngineDeadError: a tensor-parallel worker died during start-up.
    """

    def __init__(self, model: str, **kwargs: Any) -> None:
        config = Config.from_kwargs(model, kwargs)
        device = config.resolve_device()
        self.config = config
        # What cannot run is refused before anything is started.
        choose_ops(config, device)
        if config.kv_cache_memory_bytes is not None:
            kv_cache.decide_num_blocks(config, config.tensor_parallel_size, None)
        self.tokenizer = _load_tokenizer(config.model)
        config.eos_token_ids = _eos_token_ids(config, self.tokenizer)
        self._workers = None
        if config.tensor_parallel_size > 1:
            self._workers = WorkerGroup(config, device.type)
        self.model_runner = self._start_model_runner(device)
        config.num_kvcache_blocks = self.model_runner.num_kvcache_blocks
        self.scheduler = Scheduler(config)
        self._in_flight: LaunchedStep | None = None
        self._sequences: dict[int, Sequence] = {}  # unfinished requests
        self._undelivered: list[tuple[int, list[int]]] = []  # finished, for `step` to return
        self._generating: set[int] = set()  # unfinished requests of the `generate` that runs
        self._step_seconds = 0.0  # spent on launching the last committed step and waiting for it
        self._next_seq_id = 0
        self._cause_of_death = "the engine was ended by exit()"
        # Not bound to self, so that dropping the engine releases everything.
        self._finalizer = weakref.finalize(self, _release, self.model_runner, self._workers)

    def _start_model_runner(self, device: torch.device) -> ModelRunner:
        workers = self._workers
        if workers is None:
            return ModelRunner(self.config, device, TensorParallel())
        try:
            assert workers.tp is not None
            return ModelRunner(self.config, device, workers.tp, workers.agree, workers)
        except BaseException as error:
            # A rank that fails takes the collectives of the others with it: name the first.
            is_own = isinstance(error, ArgumentError) or not isinstance(error, Exception)
            cause = None if is_own else workers.wait_for_death(1.0)
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
    ) -> list[dict[str, Any]]:
        """Complete every prompt.

        Args:
            prompts: strings and lists of token ids, mixed at will, or dicts with "prompt" or
                "prompt_token_ids". A bare string or list of ids is one prompt.
            sampling_params: one for all prompts or one for each; None: `SamplingParams()`.
            use_tqdm: show a progress bar on stderr; a callable is used in place of tqdm.

        Returns:
            A dict for each prompt, in their order: "text" (the decoded completion, special tokens
            kept) and "token_ids" (the completion, a list of ints).

        Raises:
            ArgumentError: a prompt or parameter is wrong; nothing was queued then.
            EngineDeadError: a tensor-parallel worker died.

        If anything is raised half-way (Ctrl-C too), the requests of this call are dropped and the
        engine is ready for the next. Requests queued by `add_request` before go on meanwhile;
        `step` returns those that finished.
        """
        prompt_list = as_prompt_list(prompts)
        params_list = as_params_list(sampling_params, len(prompt_list))
        self._check_alive()
        # All are checked before any is queued.
        sequences = [
            self._new_sequence(prompt, params)
            for prompt, params in zip(prompt_list, params_list, strict=True)
        ]
        try:
            for seq in sequences:
                self._queue(seq)
            with ProgressBar(use_tqdm, len(sequences)) as bar:
                self._drain({seq.seq_id for seq in sequences}, bar)
        except BaseException:
            self._abort(sequences)
            raise
        return [
            {
                "text": self.tokenizer.decode(seq.completion_token_ids),
                "token_ids": seq.completion_token_ids,
            }
            for seq in sequences
        ]

    def add_request(
        self, prompt: str | list[int] | Any, sampling_params: SamplingParams | None = None
    ) -> int:
        """Queue one request, to be driven by `step` until `is_finished`; returns its id.

        Ids are integers that rise by one with every request of the engine. The token list and the
        parameters are copied.

        Raises:
            ArgumentError: the prompt or a parameter is wrong, or the request can never fit.
        """
        self._check_alive()
        [params] = as_params_list(sampling_params, 1)
        seq = self._new_sequence(prompt, params)
        self._queue(seq)
        return seq.seq_id

    def is_finished(self) -> bool:
        """Whether every request has completed and `step` has nothing left to return."""
        return self.scheduler.is_finished() and not self._undelivered

    # ---- steps --------------------------------------------------------------------------------

    def step(self) -> StepOutput:
        """Compute one step, a prefill or a decode pass.

        Returns:
            `(seq_id, completion_token_ids)` of every sequence that finished in it, and the number
            of tokens: > 0, the prompt tokens that a prefill computed; < 0, minus the sequences of a
            decode pass; 0 if there was nothing to do. With `async_scheduling` the step is the
            oldest one launched; the next one runs on the device already.

        Raises:
            EngineDeadError: a tensor-parallel worker died. After any other error the unfinished
                requests are queued again, to be computed anew, and the engine is usable.
        """
        num_tokens = self._advance()
        outputs, self._undelivered = self._undelivered, []
        return outputs, num_tokens

    def _advance(self) -> int:
        """`step`, but what finishes is left in `_undelivered`, or counted off `_generating`."""
        self._check_alive()
        with DeferredInterrupt():
            try:
                if self.config.async_scheduling:
                    return self._step_overlapped()
                return self._step_synchronous()
            except BaseException as error:
                self._recover(error)
                raise

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

    def _launch(self, in_flight: bool) -> LaunchedStep | None:
        seqs, is_prefill = self.scheduler.schedule(in_flight)
        return self.model_runner.call("launch", seqs, is_prefill) if seqs else None

    def _commit(self, launched: LaunchedStep) -> int:
        """Wait for a step's tokens and settle its sequences; its number of tokens as in `step`."""
        start = perf_counter()
        if self._workers is not None:
            while not launched.is_done():
                self._workers.check()
        token_ids = launched.wait()
        self._step_seconds = launched.seconds + perf_counter() - start
        alive = self.scheduler.postprocess(launched.seqs, token_ids)
        self._deliver(alive)
        return len(launched.plan.token_ids) if launched.plan.is_prefill else -len(alive)

    def _deliver(self, seqs: list[Sequence]) -> None:
        """Keep the completions of those of `seqs` that have ended for `step`, or for `generate`."""
        for seq in seqs:
            if seq.is_finished:
                del self._sequences[seq.seq_id]
                if seq.seq_id in self._generating:
                    self._generating.remove(seq.seq_id)
                else:
                    self._undelivered.append((seq.seq_id, seq.completion_token_ids))

    def _drop_dead_step(self) -> None:
        """Forget the step in flight if all its sequences have ended: nobody wants its tokens."""
        if self._in_flight and all(seq.is_finished for seq in self._in_flight.seqs):
            self._in_flight = None

    def _drain(self, own_ids: set[int], bar: ProgressBar) -> None:
        """Step until all of `own_ids` have finished; `step` will return what else finished."""
        self._generating = own_ids
        try:
            while own_ids:
                num_left = len(own_ids)
                num_tokens = self._advance()
                bar.update(num_left - len(own_ids), num_tokens, self._step_seconds)
        finally:
            self._generating = set()

    # ---- errors and the end -------------------------------------------------------------------

    def exit(self) -> None:
        """End the workers and release all memory. May be called again."""
        self._finalizer()
        self._abort(list(self._sequences.values()))
        self._in_flight = None
        self._undelivered.clear()

    def __enter__(self) -> "LLMEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.exit()

    def _new_sequence(self, prompt: Any, sampling_params: SamplingParams) -> Sequence:
        """A checked sequence, not yet numbered or queued."""
        params = check_params(sampling_params)
        config = self.config
        token_ids = encode_prompt(prompt, self.tokenizer, config.hf_config.vocab_size)
        if len(token_ids) >= config.max_model_len:
            raise ArgumentError(
                f"prompt length {len(token_ids)} plus at least 1 output token is longer than the "
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
        return Sequence(token_ids, params, max_length=max_length)

    def _queue(self, seq: Sequence) -> None:
        seq.seq_id = self._next_seq_id
        self._next_seq_id += 1
        seq.seed = _request_seed(self.config.seed, seq.seq_id)
        self._sequences[seq.seq_id] = seq
        self.scheduler.add(seq)

    def _abort(self, seqs: list[Sequence]) -> None:
        """End those of `seqs` that are queued and not finished."""
        queued = [seq for seq in seqs if self._sequences.get(seq.seq_id) is seq]
        for seq in queued:
            del self._sequences[seq.seq_id]
        self.scheduler.abort(queued)
        self._drop_dead_step()

    def _recover(self, error: BaseException) -> None:
        """After a failed step: queue all requests anew, trust nothing in the cache."""
        self._in_flight = None
        unfinished = list(self._sequences.values())
        self.scheduler.restart(unfinished)
        self._deliver(unfinished)
        if self._workers is not None:
            # The ranks are out of step, whatever happened.
            cause = self._workers.wait_for_death(1.0)
            self._cause_of_death = cause or f"a tensor-parallel step failed: {error!r}"
            self._workers.is_broken = True
            self.exit()
            if isinstance(error, Exception):
                raise EngineDeadError(self._cause_of_death) from error

    def _check_alive(self) -> None:
        if not self._finalizer.alive:
            raise EngineDeadError(self._cause_of_death)


def _load_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # of many types
        raise ArgumentError(f"cannot load the tokenizer of {model!r}: {error}") from error
    if len(tokenizer) <= 1:  # transformers makes up an empty one where the files are missing
        raise ArgumentError(f"model directory {model!r} holds no tokenizer")
    return tokenizer


def _eos_token_ids(config: Config, tokenizer: Any) -> frozenset[int]:
    """Ids that end a completion: the tokenizer's, and all in generation_config.json."""
    ids = [tokenizer.eos_token_id]
    path = os.path.join(config.model, "generation_config.json")
    if os.path.isfile(path):
        try:
            with open(path, encoding="utf-8") as file:
                listed = json.load(file).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ArgumentError(f"cannot read {path}: {error}") from error
        ids += listed if isinstance(listed, list) else [listed]
    if not all(token_id is None or type(token_id) is int for token_id in ids):
        raise ArgumentError(f"{path}: eos_token_id must be integers, got {ids[1:]!r}")
    return frozenset(token_id for token_id in ids if token_id is not None)


def _request_seed(engine_seed: int, seq_id: int) -> int:
    """64 bits that differ for every request of an engine, and between engine seeds."""
    message = engine_seed.to_bytes(8, "little", signed=True) + seq_id.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")


def _release(model_runner: ModelRunner, workers: WorkerGroup | None) -> None:
    model_runner.drop_graphs()
    if workers is not None:
        workers.close()
    model_runner.close()
