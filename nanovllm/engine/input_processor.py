"""Makes requests of what a user gives: checked, tokenised, readied for what they want.

Everything that can be wrong about them is found here, before anything is queued.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from nanovllm.config import Config
from nanovllm.engine.adapters import AdapterTable
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.repetition import RepetitionRule
from nanovllm.engine.request import Request
from nanovllm.engine.sequence import Wants
from nanovllm.engine.thinking import ThinkingBudget
from nanovllm.errors import ArgumentError, shown
from nanovllm.inputs.detokenizer import OutputText, output_text_of
from nanovllm.inputs.prompts import (
    as_lora_list,
    as_params_list,
    as_priority_list,
    check_params,
    encode_prompts,
)
from nanovllm.inputs.tokenizer import Tokenizer
from nanovllm.lora_request import LoRARequest, LoRARequests
from nanovllm.sampling.request_processors import OutputTokenIds, RequestProcessors, maker_of
from nanovllm.sampling.structured_outputs import Grammar, GrammarCompiler
from nanovllm.sampling.vocabulary import check_against_vocab, encode_bad_words, encode_mark
from nanovllm.sampling_params import (
    RepetitionDetectionParams,
    RequestLogitsProcessor,
    SamplingParams,
    StructuredOutputsParams,
)

logger = logging.getLogger("nanovllm")

MAX_BAD_WORD_TABLE = 2**22  # int32: 16 MiB for each request


def follow_text(request: Request, tokenizer: Tokenizer | None) -> None:
    """Let the texts of the completions grow with their tokens, and end at stop strings."""
    for seq in request.sequences:
        if output_text_of(seq.finish_rules) is None:
            silent = seq.features.ids_without_text
            text = OutputText(tokenizer, request.params, seq.prompt_token_ids, silent)
            seq.finish_rules.append(text)


class InputProcessor:
    """Prompts and parameters in, requests out.

    Args:
        config: the engine's configuration, with its number of KV blocks.
        tokenizer: the engine's; None: requests that need text are refused.
        default_params: of requests without parameters.
        model_runner: rank 0's, whose weights may change.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer | None,
        default_params: SamplingParams,
        model_runner: ModelRunner,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.default_params = default_params
        self.model_runner = model_runner
        self.adapters: AdapterTable | None = None  # set by `features.lora`
        self._compiler: GrammarCompiler | None = None  # made when the first request needs it

    def process(
        self,
        prompts: list[object],
        sampling_params: SamplingParams | list[SamplingParams] | None,
        priority: list[int] | None,
        tokenization_kwargs: Mapping[str, object] | None,
        lora_request: LoRARequests = None,
        *,
        pooler: Callable[[np.ndarray], object] | None = None,
        pooling_type: str = "LAST",
    ) -> list[Request]:
        """Checked requests, not yet numbered or queued; arguments and errors as of `generate`.

        pooler, pooling_type: as of `FeatureState`; no pooler: tokens are generated.
        """
        if pooler is None and not self.model_runner.has_lm_head:
            why = "was saved without an LM head: it can embed, not generate"
            if head := self.config.model_config.head:
                why = (
                    f"has a classification head: it answers {head.tasks[0]}, and generates nothing"
                )
            raise ArgumentError(f"{self.config.model!r} {why}")
        if sampling_params is None:
            sampling_params = self.default_params
        params_list = as_params_list(sampling_params, len(prompts))
        if pooling_type != "LAST":  # a cached block has no hidden states
            params_list = [replace(p, skip_reading_prefix_cache=True) for p in params_list]
        priorities = as_priority_list(priority, len(prompts))
        adapters = as_lora_list(lora_request, len(prompts))
        # Usually one object serves all prompts: checked, and copied, once.
        distinct = {id(params): params for params in params_list}
        checked = {key: check_params(params) for key, params in distinct.items()}
        encoded = encode_prompts(
            prompts,
            self.tokenizer,
            self.config.model_config.vocab_size,
            tokenization_kwargs,
            [self._limit(checked[id(params)]) for params in params_list],
        )
        requests = [
            self._new_request(*prompt, checked[id(params)], priority, pooler)
            for prompt, params, priority in zip(encoded, params_list, priorities, strict=True)
        ]
        self._attach_adapters(requests, adapters)
        if pooling_type != "LAST":
            for [seq] in (request.sequences for request in requests):
                seq.features.pooling_type = pooling_type
                seq.wants |= Wants.STATES
        return requests

    def _limit(self, params: SamplingParams) -> int | None:
        """How many tokens of a prompt are kept; None: all."""
        limit = params.truncate_prompt_tokens
        return self.config.max_model_len - 1 if limit == -1 else limit

    def _attach_adapters(self, requests: list[Request], adapters: list[LoRARequest | None]) -> None:
        """Let a call's requests use their adapters, and the engine know them."""
        named = dict.fromkeys(adapter for adapter in adapters if adapter is not None)
        if not named:
            return
        if self.adapters is None:
            raise ArgumentError(
                f"lora_request needs LLM(..., enable_lora=True), got {shown(next(iter(named)))}"
            )
        for adapter in named:
            self.adapters.register(adapter)
        for request, own in zip(requests, adapters, strict=True):
            if own is not None:
                self.adapters.attach(request, own)

    def _new_request(
        self,
        text: str | None,
        token_ids: list[int],
        params: SamplingParams,
        priority: int,
        pooler: Callable[[np.ndarray], object] | None,
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
        if pooler is not None:
            [seq] = request.sequences
            seq.wants |= Wants.POOLING
            seq.features.pooler = pooler
        self._prepare(request)
        return request

    def _prepare(self, request: Request) -> None:
        """Set up the sequences of a new request."""
        params = request.params
        if params.structured_outputs is not None and not params.include_stop_str_in_output:
            for seq in request.sequences:
                seq.features.ids_without_text = self.config.eos_token_ids
        if params.stop:
            self._need_tokenizer("stop")
            follow_text(request, self.tokenizer)
        detection = params.repetition_detection
        if isinstance(detection, RepetitionDetectionParams) and detection.max_pattern_size:
            for seq in request.sequences:  # behind the stop strings, which come first
                seq.finish_rules.append(RepetitionRule(seq, detection))
        if params.prompt_logprobs is not None:
            self._check_num_logprobs("prompt_logprobs", params.prompt_logprobs)
            first = request.sequences[0]
            if first.num_prompt_tokens > 1:  # the first token has none
                first.wants |= Wants.PROMPT
                first.features.num_prompt_logprobs = first.num_prompt_tokens - 1
        if params.stop_token_ids or params.needs_logits:
            self._prepare_sampling(request)
        if request.sequences[0].features.pooler is None:
            self._prepare_processors(request)
            if params.thinking_token_budget is not None:
                self._limit_thinking(request, params.thinking_token_budget)

    def close(self) -> None:
        """Release what requests needed; the next one that needs it makes it anew."""
        if self._compiler is not None:
            self._compiler.close()
            self._compiler = None
        if self.config.engine_processors is not None:
            self.config.engine_processors.restart()

    def _prepare_sampling(self, request: Request) -> None:
        params, vocab_size = request.params, self.config.model_config.vocab_size
        check_against_vocab(params, vocab_size)
        if params.logprobs is not None and not params.logprob_token_ids:
            self._check_num_logprobs("logprobs", params.logprobs)
        if params.bad_words:
            self._need_tokenizer("bad_words")
            bad_word_ids = encode_bad_words(params.bad_words, self.tokenizer, vocab_size)
            self._check_table(params, bad_word_ids)
            for seq in request.sequences:
                seq.features.bad_word_ids = bad_word_ids
        if params.structured_outputs is not None:
            grammar = self._compile(params.structured_outputs)
            for seq in request.sequences:
                seq.features.grammar = grammar.fork() if seq.index else grammar
                seq.wants |= Wants.CONFIRMED  # a mask needs all tokens before it
                seq.finish_rules.insert(0, seq.features.grammar)

    def _prepare_processors(self, request: Request) -> None:
        """Give the sequences their own logits processors, and the engine's."""
        params, engine_processors = request.params, self.config.engine_processors
        if self.config.data_parallel_size > 1:
            _check_travels(params)
        if engine_processors is not None:
            engine_processors.validate(params)
        elif params.extra_args:
            logger.debug("extra_args change nothing: the engine has no logits processors")
        if engine_processors is None and not params.logits_processors:
            return
        for seq in request.sequences:
            makers: list[Callable[[], RequestLogitsProcessor | None]]
            makers = [maker_of(processor) for processor in params.logits_processors or ()]
            if engine_processors is not None:
                makers += engine_processors.makers(params)
            if not makers and not (engine_processors and engine_processors.is_batched):
                continue
            output_token_ids = OutputTokenIds()
            seq.finish_rules.insert(0, output_token_ids)
            seq.features.output_token_ids = output_token_ids
            if makers:
                seq.features.processors = RequestProcessors(
                    makers, seq.prompt_token_ids, output_token_ids
                )
            seq.wants |= Wants.LOGITS | Wants.CONFIRMED  # they see all tokens before

    def _limit_thinking(self, request: Request, budget: int) -> None:
        texts = self.config.reasoning_config
        if not isinstance(texts, tuple):
            raise ArgumentError(
                "thinking_token_budget needs LLM(..., reasoning_config=ReasoningConfig("
                "reasoning_start_str=..., reasoning_end_str=...)), got none"
            )
        if request.params.structured_outputs is not None:
            raise ArgumentError(
                "thinking_token_budget is not supported with structured_outputs, which count from "
                "the first token: there is no reasoning"
            )
        start, end = map(self._reasoning_ids, texts)
        for seq in request.sequences:
            seq.finish_rules.insert(0, ThinkingBudget(seq, budget, start, end))

    def _reasoning_ids(self, text: str) -> list[int]:
        tokenizer = self._need_tokenizer("thinking_token_budget")
        return encode_mark(text, tokenizer, self.config.model_config.vocab_size)

    def _compile(self, params: StructuredOutputsParams) -> Grammar:
        tokenizer = self._need_tokenizer("structured_outputs")
        if self._compiler is None:
            end_token_ids = {i for i in self.config.eos_token_ids if i < len(tokenizer)}
            self._compiler = GrammarCompiler(
                tokenizer,
                self.config.model_config.vocab_size,
                end_token_ids,
                self.config.structured_outputs_timeout,
            )
        if self.config.disable_any_whitespace:
            params = replace(params, disable_any_whitespace=True)
        return self._compiler.compile(params)

    def _check_table(self, params: SamplingParams, bad_word_ids: list[list[int]]) -> None:
        """Each step compares the newest tokens with a table, as wide as the longest word."""
        width = max(map(len, bad_word_ids))
        height = len(bad_word_ids)
        if params.min_tokens:
            height += len(self.config.eos_token_ids) + len(params.stop_token_ids or ())
        if width * height > MAX_BAD_WORD_TABLE:
            raise ArgumentError(
                f"bad_words must take at most {MAX_BAD_WORD_TABLE} tokens if all words (with "
                "min_tokens, all end tokens too) are as long as the longest, got "
                f"{height} * {width}"
            )

    def _check_num_logprobs(self, name: str, value: int) -> None:
        limit = self.config.max_logprobs
        num_logprobs = self.config.model_config.vocab_size if value == -1 else value
        if limit != -1 and num_logprobs > limit:
            raise ArgumentError(
                f"{name} must be at most max_logprobs ({limit}), got {value}"
                + (f", which is the whole vocabulary ({num_logprobs})" if value == -1 else "")
            )

    def _need_tokenizer(self, name: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ArgumentError(f"{name} needs a tokenizer, but skip_tokenizer_init=True")
        return self.tokenizer


def _check_travels(params: SamplingParams) -> None:
    """ArgumentError for what cannot go to a replica, which is another process."""
    if params.logits_processors:
        raise ArgumentError(
            "logits_processors of a request are not supported with data_parallel_size > 1: they do "
            "not travel to the replicas; LLM(logits_processors=[class]) has them there"
        )
    try:
        json.dumps(params.extra_args)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"extra_args must be numbers, strings, lists and dicts with data_parallel_size > 1: "
            f"{error}"
        ) from None
