"""Structured outputs: which tokens a JSON schema, regex, list of choices or grammar allows next.

llguidance does the matching: unlike xgrammar it depends on nothing, compiles a schema in 1 to 3 ms
(xgrammar: up to 500) and masks a row in 5 to 20 us (a regex with long bounded repeats: 170).
Compiled once for equal parameters; each sequence advances a `Grammar` of its own.

What is asked for comes from anywhere, and llguidance can crash or compute for ever. So sizes are
bounded, and all but small common schemas, regexes and choices are tried in a process of their own
before they are compiled here.
"""

from __future__ import annotations

import functools
import math
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nanovllm.errors import MAX_SHOWN, ArgumentError, shown
from nanovllm.guards.versions import MIN_LLGUIDANCE, older_than
from nanovllm.inputs.plain_tokenizer import in_full
from nanovllm.inputs.token_bytes import token_bytes
from nanovllm.sampling.grammar_process import TrialProcess
from nanovllm.sampling.grammar_text import EBNF_RULE, check_lark, check_regex, plain_ebnf
from nanovllm.sampling.json_schema import check_schema
from nanovllm.sampling.unique_keys import QuoteTokens, UniqueKeys, clear_bits
from nanovllm.sampling_params import StructuredOutputsParams

if TYPE_CHECKING:
    import torch
    from llguidance import LLExecutor, LLMatcher

MAX_COMPILED = 256  # distinct structured outputs of which the compiled form is kept
MAX_LARGE_COMPILED = 8  # of those of more than LARGE characters, which may take megabytes each
LARGE = 20_000
MAX_CHARACTERS = 2_000_000  # of a schema, a regex, a grammar or all choices together
MAX_CHOICE = 10_000  # characters of one choice
MAX_PLAIN_REGEX = 300  # characters of a regex that is not tried first
MAX_PLAIN_COUNT = 10_000  # the product of its counts
COUNT = re.compile(r"(?:\{|(?<=\d,))([1-9]\d*)")  # of a repetition
MAX_STEP_SHARE = 0.05  # of the time limit, for one step of a grammar
MAX_PROBES = (
    1000  # beginnings of keys that are looked at to find out whether a token has any after it
)
INSTALLATION = "pip install 'nanovllm[structured-outputs]'"
LIMITS = {"verbose_errors": False}
# JSON strings without \\uXXXX, so that each string has one spelling and each text is Unicode.
JSON_OPTIONS: Any = {"json_allowed_escapes": 'nrbtf\\"'}


class Grammar:
    """How far one sequence's text has come in its grammar.

    Nothing is raised while it advances: what goes wrong is its `error`, which ends it.

    Args:
        matcher: llguidance's, in the same state.
        end_row: [words] int32, the bitmask that allows the end tokens alone.
        keys: of the text's JSON objects, if they could be repeated.
    """

    def __init__(
        self, matcher: LLMatcher, end_row: np.ndarray, keys: UniqueKeys | None = None
    ) -> None:
        self._matcher = matcher
        self._end_row = end_row
        self._keys = keys
        self._failure: str | None = None  # then the matcher is used no more

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
        if self._failure is None:
            try:
                address = bitmask.data_ptr() + index * row_bytes
                self._matcher.unsafe_compute_mask_ptr(address, row_bytes)
            except BaseException as error:
                self._fail(error)
        self._finish_row(bitmask, index)

    def _finish_row(self, bitmask: torch.Tensor, index: int) -> None:
        """Enter, in the row that the matcher filled, what it does not know."""
        if self._failure is None and self._keys is None:
            return
        row = bitmask[index].numpy()
        if self._failure is None and self._keys is not None:
            self._keys.forbid(row)
            if self._keys.may_run_out:
                ends = [i for i in self._keys.along(row) if self._is_dead_end(i)]
                clear_bits(row, np.array(ends, dtype=np.int64))
            if not row.any():
                self._failure = "no token can follow: each would repeat a key of the object"
        if self._failure is not None:
            row[:] = self._end_row

    def _is_dead_end(self, token_id: int) -> bool:
        """Whether after this token nothing is left but to repeat a key."""
        pending = [(self, token_id)]
        seen: set[tuple[int, bytes]] = set()
        while pending and len(seen) < MAX_PROBES:
            before, next_id = pending.pop()
            after = before.fork()
            after.accept(next_id)
            if after.error is not None:
                return False
            assert after._keys is not None
            if (place := after._keys.place) in seen:
                continue
            seen.add(place)
            row = np.frombuffer(after._matcher.compute_bitmask(), dtype=np.int32).copy()
            after._keys.forbid(row)
            along = after._keys.along(row)
            clear_bits(row, np.array(along, dtype=np.int64))
            if row.any():
                return False
            pending += [(after, other) for other in along]
        return not pending

    def accept(self, token_id: int) -> None:
        """Advance by one token. One that is not allowed, as when `allowed_token_ids` or `bad_words`
        leave none of the allowed tokens, sets `error` and so ends the grammar."""
        if self._failure is not None:
            return
        try:
            self._matcher.consume_token(token_id)
        except BaseException as error:
            self._fail(error)
        if self._keys is not None:
            self._keys.accept(token_id)

    def on_token(self, token_id: int) -> tuple[str, str | None] | None:
        """`accept` it; "abort" if there is an `error`, "stop" if the text can only end, or None."""
        self.accept(token_id)
        if (error := self.error) is not None:
            return "abort", error  # why no token can follow
        return ("stop", None) if self.is_terminated else None

    def _fail(self, error: BaseException) -> None:
        """Note a failure of llguidance. Its panics derive from BaseException alone."""
        if not isinstance(error, Exception) and not _is_panic(error):
            raise error  # Ctrl-C
        self._failure = f"llguidance failed: {shown(str(error))}"

    @property
    def is_terminated(self) -> bool:
        """Whether nothing but an end token may follow: the text is complete, or see `error`."""
        return self._failure is not None or self._matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """Why the text is not and cannot become complete: no token of the vocabulary can follow, a
        token was not allowed, or the grammar is too complex; None while all is well."""
        if self._failure is not None:
            return self._failure
        if not self._matcher.is_error():
            return None
        message = self._matcher.get_error().partition("\n")[0]  # the parser's state follows
        return "no token can follow" if message == "NoExtensionBias" else message

    def fork(self) -> Grammar:
        """An independent copy in the same state; takes about a microsecond."""
        keys = self._keys and self._keys.fork()
        return Grammar(self._matcher.deep_copy(), self._end_row, keys)


class Source(NamedTuple):
    """A text for llguidance to compile.

    Args:
        kind: the field of the parameters that was set.
        text: llguidance's form of it; of a grammar in EBNF its text.
        is_plain: whether it need not be tried first.
        has_free_names: whether it is JSON whose objects could repeat a key.
        has_name_patterns: whether a part of a key may allow few keys only.
    """

    kind: str
    text: str
    is_plain: bool = False
    has_free_names: bool = False
    has_name_patterns: bool = False
    is_ebnf: bool = False


class GrammarCompiler:
    """Turns `StructuredOutputsParams` into grammars over one tokenizer's vocabulary.

    Building it takes about a second for 150,000 tokens, so an engine does it on first use.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        vocab_size: of the model; ids beyond the tokenizer's are never allowed.
        end_token_ids: every id of the tokenizer that ends a text; allowed only where the text is
            complete.
        timeout: seconds that one compilation may take.

    Raises:
        ArgumentError: llguidance is not installed, is too old or cannot use the tokenizer.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        end_token_ids: Collection[int],
        timeout: float = 10.0,
    ) -> None:
        try:
            import llguidance.hf
        except ImportError:
            raise ArgumentError(f"structured outputs need llguidance: {INSTALLATION}") from None
        if installed := older_than(MIN_LLGUIDANCE, "llguidance"):
            raise ArgumentError(
                f"structured outputs need llguidance {MIN_LLGUIDANCE} or newer, {installed} is "
                f"installed: {INSTALLATION}"
            )
        self._end_token_ids = sorted(end_token_ids)
        table = token_bytes(tokenizer)
        try:
            # It encodes what a grammar leaves no choice about: the middle of a text.
            self._tokenizer = (
                llguidance.hf.from_tokenizer(in_full(tokenizer), vocab_size, self._end_token_ids)
                if table is None
                else llguidance.LLTokenizer(
                    table.form_of_encoder(), n_vocab=vocab_size, eos_token=self._end_token_ids
                )
            )
        except ValueError as error:
            raise ArgumentError(f"structured outputs, tokenizer: {error}") from error
        self._seconds = timeout
        self._end_row = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
        for token_id in self._end_token_ids:
            self._end_row[token_id // 32] |= np.uint32(1 << token_id % 32)
        self._end_row = self._end_row.view(np.int32)
        setup = functools.partial(_trial_setup, tokenizer, vocab_size, self._end_token_ids)
        self._trials = TrialProcess(setup)
        # The least recently used first; what a value is, `_compile` says.
        self._compiled: OrderedDict[StructuredOutputsParams, Grammar | str] = OrderedDict()
        self._large_compiled: OrderedDict[StructuredOutputsParams, Grammar | str] = OrderedDict()

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """A grammar at its start, from the cache if equal `params` were compiled before.

        Raises:
            ArgumentError: malformed, not supported (JSON schema keywords too), too large, not
                compiled in time, or such that no text satisfies it.
        """
        is_large = _check_size(params) > LARGE
        cache = self._large_compiled if is_large else self._compiled
        if params not in cache:
            cache[params] = self._compile(params)
            if len(cache) > (MAX_LARGE_COMPILED if is_large else MAX_COMPILED):
                cache.popitem(last=False)
        cache.move_to_end(params)
        compiled = cache[params]
        if isinstance(compiled, str):
            raise ArgumentError(compiled)
        return compiled.fork()

    def _compile(self, params: StructuredOutputsParams) -> Grammar | str:
        """The grammar or, to be kept as well, why there is none."""
        try:
            with _panics_named():
                return self._compile_source(_llguidance_source(params))
        except ArgumentError as error:
            return str(error)

    def _compile_source(self, source: Source) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        text = source.text if source.is_plain else self._try(source)
        limits = LLParserLimits(**LIMITS)
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(source.kind, matcher.get_error())
        matcher.compute_bitmask()  # only this finds out that no token can come first
        if matcher.is_error():
            message = matcher.get_error()
            if message.startswith("NoExtension"):
                message = "no text of this vocabulary satisfies it"
            raise _refused(source.kind, message)
        keys = None
        if source.has_free_names:
            keys = UniqueKeys(self._quote_tokens, source.has_name_patterns)
        return Grammar(matcher, self._end_row, keys)

    def _try(self, source: Source) -> str:
        """Compile in the other process; what is to be compiled here, or ArgumentError."""
        kind = "ebnf" if source.is_ebnf else source.kind
        job = {"kind": kind, "source": source.text, "limits": LIMITS}
        answer = self._trials.try_grammar(job, self._seconds, source.kind)
        if "error" in answer:
            raise _refused(source.kind, answer["error"])
        if answer["slowest"] > MAX_STEP_SHARE * self._seconds:
            raise ArgumentError(
                f"structured outputs, {source.kind}: a single token takes "
                f"{answer['slowest']:.2f} s, more than {MAX_STEP_SHARE} of "
                f"structured_outputs_timeout ({self._seconds:g} s)"
            )
        return answer["source"]

    def close(self) -> None:
        """End the other process; the next grammar that needs it starts it again."""
        self._trials.close()

    @functools.cached_property
    def _quote_tokens(self) -> QuoteTokens:
        decode, is_special = self._tokenizer.decode_bytes, self._tokenizer.is_special_token
        ids = range(self._tokenizer.vocab_size)
        return QuoteTokens({i: decode([i]) for i in ids if not is_special(i)})


def fill_bitmasks(grammars: Sequence[Grammar], bitmask: torch.Tensor) -> None:
    """`grammars[i].fill_bitmask(bitmask, i)` for all i, spread over the CPU's cores."""
    if len(grammars) == 1:
        grammars[0].fill_bitmask(bitmask, 0)
        return
    assert bitmask.is_contiguous() and len(grammars) <= bitmask.shape[0]
    matchers = [
        (grammar._matcher, index)
        for index, grammar in enumerate(grammars)
        if grammar._failure is None
    ]
    row_bytes = bitmask.shape[1] * bitmask.element_size()
    try:
        _executor().unsafe_compute_mask_ptr(
            matchers, bitmask.data_ptr(), row_bytes, bitmask.shape[0]
        )
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        for index, grammar in enumerate(grammars):  # finds out whose failure it is
            grammar.fill_bitmask(bitmask, index)
        return
    for index, grammar in enumerate(grammars):
        grammar._finish_row(bitmask, index)


@functools.cache
def _executor() -> LLExecutor:
    from llguidance import LLExecutor

    return LLExecutor()


def _trial_setup(tokenizer: Any, vocab_size: int, end_token_ids: list[int]) -> dict[str, Any]:
    """The message from which the other process builds the same vocabulary."""
    table = token_bytes(tokenizer)
    if table is None:
        backend = copy(tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
    return {
        "tokenizer": backend.to_str() if table is None else table.form_of_encoder(),
        "vocab_size": vocab_size,
        "end_token_ids": end_token_ids,
    }


def _check_size(params: StructuredOutputsParams) -> int:
    """The characters of what is asked for; ArgumentError if they are too many."""
    if params.choice is not None:
        size = sum(map(len, params.choice))
        longest = max(params.choice, key=len)
        if len(longest) > MAX_CHOICE:
            raise ArgumentError(
                f"structured outputs, choice: a choice may have {MAX_CHOICE} characters, got "
                f"{len(longest)}: {shown(longest)}"
            )
    else:
        text = params.json or params.regex or params.grammar or ""
        assert isinstance(text, str)
        size = len(text)
    if size > MAX_CHARACTERS:
        kind = next(n for n in ("json", "regex", "choice", "grammar") if getattr(params, n))
        raise ArgumentError(
            f"structured outputs, {kind}: at most {MAX_CHARACTERS} characters, got {size}"
        )
    return size


def _llguidance_source(params: StructuredOutputsParams) -> Source:
    """The field that `params` set, and llguidance's form of it."""
    from llguidance import LLMatcher

    if params.json is not None:
        assert isinstance(params.json, str)
        schema = check_schema(params.json)
        try:
            text = LLMatcher.grammar_from_json_schema(schema.text, overrides=JSON_OPTIONS)
        except ValueError as error:  # no JSON, or no schema
            raise _refused("json", str(error)) from error
        return Source(
            "json", text, schema.is_plain, schema.has_free_names, schema.has_name_patterns
        )
    if params.regex is not None:
        check_regex(params.regex, "regex")
        text = LLMatcher.grammar_from_regex(params.regex)
        counts = [int(count) for count in COUNT.findall(params.regex[:MAX_PLAIN_REGEX])]
        is_plain = len(params.regex) <= MAX_PLAIN_REGEX and math.prod(counts) <= MAX_PLAIN_COUNT
        return Source("regex", text, is_plain)
    if params.choice is not None:
        text = LLMatcher.grammar_from_regex("|".join(map(re.escape, params.choice)))
        return Source("choice", text, sum(map(len, params.choice)) <= LARGE)
    if params.grammar is None:
        text = LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=JSON_OPTIONS)
        return Source("json_object", text, is_plain=True, has_free_names=True)
    if EBNF_RULE.search(params.grammar):
        return Source("grammar", plain_ebnf(params.grammar), is_ebnf=True)
    check_lark(params.grammar)
    return Source("grammar", LLMatcher.grammar_from_lark(params.grammar))


def _refused(kind: str, message: str) -> ArgumentError:
    message = message.strip()
    if len(message) > MAX_SHOWN:  # it may quote all of what was given
        message = f"{message[:100]}...{message[-97:]}"
    return ArgumentError(f"structured outputs, {kind}: {message}")


def _is_panic(error: BaseException) -> bool:
    """Whether it is what pyo3 makes of a panic in Rust: no Exception, and of no public class."""
    return type(error).__name__ == "PanicException"


@contextmanager
def _panics_named() -> Iterator[None]:
    """A panic of llguidance as an ArgumentError."""
    try:
        yield
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise ArgumentError(
            f"structured outputs: llguidance failed: {shown(str(error))}"
        ) from error
