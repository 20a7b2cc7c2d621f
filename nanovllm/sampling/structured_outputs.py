"""Structured outputs: which tokens a JSON schema, regex, list of choices or grammar allows next.

llguidance does the matching: unlike xgrammar it depends on nothing, compiles a schema in 1 to 3 ms
(xgrammar: up to 500) and masks a row in 5 to 20 us (a regex with long bounded repeats: 170).
Compiled once for equal parameters; each sequence advances a `Grammar` of its own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from nanovllm.engine.token_bytes import token_bytes
from nanovllm.errors import ArgumentError
from nanovllm.sampling_params import StructuredOutputsParams

if TYPE_CHECKING:
    import torch
    from llguidance import LLExecutor, LLMatcher

MAX_COMPILED = 256  # distinct structured outputs of which the compiled form is kept
EBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


class Grammar:
    """How far one sequence's text has come in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fill_bitmask(self, bitmask: torch.Tensor, index: int) -> None:
        """Write which token ids may come next to `bitmask[index]`.

        An end token is allowed exactly where the text so far is complete; once nothing else can
        follow, or after an error, only end tokens are.

        Args:
            bitmask: [rows, ceil(vocab_size / 32)] int32, contiguous, on the CPU; bit j % 32 of word
                j // 32 is 1 if token j is allowed.
        """
        assert bitmask.is_contiguous() and 0 <= index < bitmask.shape[0]
        row_bytes = bitmask.shape[1] * bitmask.element_size()
        self._matcher.unsafe_compute_mask_ptr(bitmask.data_ptr() + index * row_bytes, row_bytes)

    def accept(self, token_id: int) -> None:
        """Advance by one token. One that is not allowed, as when `allowed_token_ids` or `bad_words`
        leave none of the allowed tokens, sets `error` and so ends the grammar."""
        self._matcher.consume_token(token_id)

    @property
    def is_terminated(self) -> bool:
        """Whether nothing but an end token may follow: the text is complete, or see `error`."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """Why the text is not and cannot become complete: no token of the vocabulary can follow, a
        token was not allowed, or the grammar is too complex; None while all is well."""
        if not self._matcher.is_error():
            return None
        message = self._matcher.get_error().partition("\n")[0]  # the parser's state follows
        return "no token can follow" if message == "NoExtensionBias" else message

    def fork(self) -> Grammar:
        """An independent copy in the same state; takes about a microsecond."""
        return Grammar(self._matcher.deep_copy())


class GrammarCompiler:
    """Turns `StructuredOutputsParams` into grammars over one tokenizer's vocabulary.

    Building it takes about a second for 150,000 tokens, so an engine does it on first use.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        vocab_size: of the model; ids beyond the tokenizer's are never allowed.
        end_token_ids: every id of the tokenizer that ends a text; allowed only where the text is
            complete.

    Raises:
        ArgumentError: llguidance is not installed or cannot use the tokenizer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_token_ids: Collection[int]) -> None:
        try:
            import llguidance.hf
        except ImportError:
            raise ArgumentError(
                "structured outputs need llguidance: pip install 'nanovllm[structured-outputs]'"
            ) from None
        table = token_bytes(tokenizer)
        try:
            # It encodes what a grammar leaves no choice about: the middle of a text.
            self._tokenizer = (
                llguidance.hf.from_tokenizer(tokenizer, vocab_size, sorted(end_token_ids))
                if table is None
                else llguidance.LLTokenizer(
                    table.form_of_encoder(), n_vocab=vocab_size, eos_token=sorted(end_token_ids)
                )
            )
        except ValueError as error:
            raise ArgumentError(f"structured outputs, tokenizer: {error}") from error
        self._compiled = functools.lru_cache(MAX_COMPILED)(self._compile)

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """A grammar at its start, from the cache if equal `params` were compiled before.

        Raises:
            ArgumentError: malformed, not supported (JSON schema keywords too), or such that no text
                satisfies it.
        """
        return self._compiled(params).fork()

    def _compile(self, params: StructuredOutputsParams) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        kind, source = _llguidance_source(params)
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        if matcher.is_error():
            raise ArgumentError(f"structured outputs, {kind}: {matcher.get_error().strip()}")
        matcher.compute_bitmask()  # only this finds out that no token can come first
        if matcher.is_error():
            raise ArgumentError(
                f"structured outputs, {kind}: no text of this vocabulary satisfies it"
            )
        return Grammar(matcher)


def fill_bitmasks(grammars: Sequence[Grammar], bitmask: torch.Tensor) -> None:
    """`grammars[i].fill_bitmask(bitmask, i)` for all i, spread over the CPU's cores."""
    if len(grammars) == 1:
        grammars[0].fill_bitmask(bitmask, 0)
        return
    assert bitmask.is_contiguous() and len(grammars) <= bitmask.shape[0]
    matchers = [(grammar._matcher, index) for index, grammar in enumerate(grammars)]
    row_bytes = bitmask.shape[1] * bitmask.element_size()
    _executor().unsafe_compute_mask_ptr(matchers, bitmask.data_ptr(), row_bytes, bitmask.shape[0])


@functools.cache
def _executor() -> LLExecutor:
    from llguidance import LLExecutor

    return LLExecutor()


def _llguidance_source(params: StructuredOutputsParams) -> tuple[str, str]:
    """The field that `params` set, and llguidance's form of it, most of it not checked yet."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if params.json is not None:
        assert isinstance(params.json, str)
        try:
            return "json", LLMatcher.grammar_from_json_schema(params.json)
        except ValueError as error:  # no JSON, or no schema
            raise ArgumentError(f"structured outputs, json: {error}") from error
    if params.regex is not None:
        return "regex", LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        return "choice", LLMatcher.grammar_from_regex("|".join(map(re.escape, params.choice)))
    if params.grammar is None:
        return "json_object", LLMatcher.grammar_from_json_schema({"type": "object"})
    lark = params.grammar
    if EBNF_RULE.search(lark):
        try:
            lark = gbnf_to_lark(lark)
        except Exception as error:  # it raises nothing more specific
            raise ArgumentError(f"structured outputs, grammar: {error}") from error
    return "grammar", LLMatcher.grammar_from_lark(lark)
