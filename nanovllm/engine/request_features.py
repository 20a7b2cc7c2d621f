"""Readies a request's sequences for the parameters that need more than numbers.

Everything that can be wrong about them is found here, before the request is queued.
"""

from typing import Any

from nanovllm.config import Config
from nanovllm.engine.request import Request
from nanovllm.errors import ArgumentError
from nanovllm.inputs.detokenizer import OutputText
from nanovllm.sampling_params import SamplingParams

MAX_BAD_WORD_TABLE = 2**22  # int32: 16 MiB for each request


class RequestFeatures:
    """Checks against the model, and what stop strings, bad words and grammars are turned into.

    Args:
        config: the engine's configuration.
        tokenizer: the engine's; None: requests that need text are refused.
    """

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._compiler: Any = None  # of grammars; made when the first request needs it

    def prepare(self, request: Request) -> None:
        """Set up the sequences of a new request.

        Raises:
            ArgumentError: a parameter does not fit the model, or needs what is not there.
        """
        params = request.params
        if params.stop:
            self._need_tokenizer("stop")
            for seq in request.sequences:
                seq.detokenizer = OutputText(self.tokenizer, params, seq.prompt_token_ids)
        if params.prompt_logprobs is not None:
            self._check_num_logprobs("prompt_logprobs", params.prompt_logprobs)
        if params.stop_token_ids or params.is_sampled_apart:
            self._prepare_sampling(request)

    def close(self) -> None:
        """Release what requests needed; the next one that needs it makes it anew."""
        if self._compiler is not None:
            self._compiler.close()
            self._compiler = None

    def _prepare_sampling(self, request: Request) -> None:
        from nanovllm.sampling.vocabulary import check_against_vocab, encode_bad_words

        params, vocab_size = request.params, self.config.model_config.vocab_size
        check_against_vocab(params, vocab_size)
        if params.logprobs is not None:
            self._check_num_logprobs("logprobs", params.logprobs)
        if params.bad_words:
            self._need_tokenizer("bad_words")
            bad_word_ids = encode_bad_words(params.bad_words, self.tokenizer, vocab_size)
            self._check_table(params, bad_word_ids)
            for seq in request.sequences:
                seq.bad_word_ids = bad_word_ids
        if params.structured_outputs is not None:
            grammar = self._compile(params)
            for seq in request.sequences:
                seq.grammar = grammar.fork() if seq.index else grammar

    def _compile(self, params: SamplingParams) -> Any:
        self._need_tokenizer("structured_outputs")
        if self._compiler is None:
            from nanovllm.sampling.structured_outputs import GrammarCompiler

            end_token_ids = {i for i in self.config.eos_token_ids if i < len(self.tokenizer)}
            self._compiler = GrammarCompiler(
                self.tokenizer,
                self.config.model_config.vocab_size,
                end_token_ids,
                self.config.structured_outputs_timeout,
            )
        return self._compiler.compile(params.structured_outputs)

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

    def _need_tokenizer(self, name: str) -> None:
        if self.tokenizer is None:
            raise ArgumentError(f"{name} needs a tokenizer, but skip_tokenizer_init=True")
