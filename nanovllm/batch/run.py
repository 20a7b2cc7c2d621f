"""The run: lines are read as the engine finishes others, results written as they come.

At most 2 * max_num_seqs sequences are queued at a time. SIGINT and SIGTERM end the run after the
step in which they arrive; a second one ends it at once. Whatever a line raises is its error record.
"""

import itertools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from tqdm.auto import tqdm

from nanovllm.batch.journal import Journal, remove_journal
from nanovllm.batch.options import BATCH_DEFAULTS, Options, parse_options
from nanovllm.batch.records import LineInfo, error_record, result_record
from nanovllm.batch.requests import (
    SAMPLING_NAMES,
    LineError,
    LineRequest,
    as_request,
    custom_id_of,
    parse_line,
    seed_of_line,
)
from nanovllm.batch.result_file import DUPLICATE_CODE, WHOLE, Part, ResultFile, read_lines
from nanovllm.errors import ArgumentError, EngineDeadError

ALL_COMPLETED, SOME_ERRORS, USAGE_ERROR, BROKEN_OFF = 0, 1, 2, 3
RATE_SECONDS = 2.0  # over which the bar's rates are taken
# What ends the run, whoever raises it. A panic of a library in Rust is no Exception.
ENDS_RUN = (EngineDeadError, KeyboardInterrupt, SystemExit, GeneratorExit)
KILLED_CODE = "killed_the_process"
MAX_MESSAGE = 1000  # characters of an error record's message
RESUME = "The results so far are kept: the same command goes on where this ended."


def main(
    arguments: Sequence[str] | None = None, make_engine: Callable[..., Any] | None = None
) -> int:
    """Run the command line; the exit status, as `options.EPILOG` lists them.

    Args:
        arguments: of the command line; default `sys.argv[1:]`.
        make_engine: called in place of `LLM`, with its keywords.
    """

    def work() -> int:
        options = parse_options(arguments)
        with ResultFile(options.output_path, options.digest) as results:
            return _run(options, results, make_engine or load_engine)

    return status_of(work)


def status_of(work: Callable[[], int]) -> int:
    """The exit status that `work` returns, or that of its exception, which is told on stderr."""
    try:
        return work()
    except ArgumentError as error:
        return _end(f"error: {error}", USAGE_ERROR)
    except (EngineDeadError, OSError) as error:
        return _end(f"broken off: {error}\n{RESUME}", BROKEN_OFF)
    except KeyboardInterrupt:
        return _end(f"ended at once. {RESUME}", 128 + signal.SIGINT)
    except (SystemExit, GeneratorExit):
        raise
    except BaseException:  # a night's results are kept, whatever happened
        traceback.print_exc()
        return _end(f"broken off. {RESUME}", BROKEN_OFF)


def _run(options: Options, results: ResultFile, make_engine: Callable[..., Any]) -> int:
    num_lines, last_line = results.count_lines(options.input_path)
    if results.num_finished < num_lines:
        engine = options.engine
        if results.num_finished and "record" in engine:
            engine = engine | {"record": unused_path(engine["record"])}
        with (
            Journal(results) as journal,
            make_engine(**engine) as llm,
            StopSignals() as signals,
            Bar(options.shows_progress, num_lines, results.num_finished) as bar,
        ):
            Run(llm, options, results, journal, WHOLE, last_line, bar).work(signals)
            journal.end()
        num_left = num_lines - results.num_finished
        if signals.received is not None and num_left:
            text = f"ended by {signals.received.name}, {num_left} lines left. {RESUME}"
            return _end(text, 128 + signals.received)
        if num_left:
            raise OSError(f"{options.input_path!r} has lost lines while it was read")
    else:
        remove_journal(results.path)
    return all_done(num_lines, results.num_errors)


def unused_path(path: str) -> str:
    """`path`, or "x-2.html" instead of "x.html" and so on: each part of a run keeps its record."""
    stem, suffix = os.path.splitext(path)
    paths = (f"{stem}-{number}{suffix}" for number in itertools.count(2))
    while os.path.exists(path):
        path = next(paths)
    return path


def all_done(num_lines: int, num_errors: int) -> int:
    """The exit status of a finished run, after a line on stderr."""
    text = (
        f"{num_lines} lines: {num_lines - num_errors} completed, {num_errors} with an error record"
    )
    return _end(text, SOME_ERRORS if num_errors else ALL_COMPLETED)


def load_engine(**keywords: Any) -> Any:
    """An `LLM`."""
    from nanovllm import LLM  # after every other check: it loads torch

    return LLM(**keywords)


def _end(message: str, status: int) -> int:
    print(f"nanovllm.batch: {message}", file=sys.stderr)
    return status


class Run:
    """The loop between the input, the engine and the output.

    Args:
        part: of the input.
        last_line: the number of its last line; what is appended meanwhile is left alone.
    """

    def __init__(
        self,
        llm: Any,
        options: Options,
        results: ResultFile,
        journal: Journal,
        part: Part,
        last_line: int,
        bar: "Bar",
    ) -> None:
        self.llm = llm
        self.tokenizer = getattr(getattr(llm, "input_processor", None), "tokenizer", None)
        self.options = options
        self.results = results
        self.journal = journal
        self.part = part
        self.last_line = last_line
        self.bar = bar
        # OpenAI's texts hold no special tokens; the library keeps them unless told otherwise.
        model_defaults = llm.get_default_sampling_params()
        values = {name: getattr(model_defaults, name) for name in SAMPLING_NAMES}
        self.defaults = values | BATCH_DEFAULTS | options.defaults
        self.pending: dict[int, LineInfo] = {}  # by the engine's id
        self.num_queued = 0  # sequences
        self.put_off: set[int] = set()  # lines that are taken last
        self.lines = self._in_order()
        self.next_line: tuple[int, bytes, bool] | None = None
        self.is_alone = False  # what is pending is to stay alone

    def work(self, signals: "StopSignals") -> None:
        """Until every line has a record, or a signal came."""
        self._feed(signals)
        while self.pending and signals.received is None:
            self._step()
            self.results.flush()
            self._feed(signals)
        self.results.flush()

    def _in_order(self) -> Iterator[tuple[int, bytes, bool]]:
        """Number and content of the lines without a record, and whether each is taken alone.

        First the suspects of an earlier run's death, last the lines that were put off.
        """
        if self.journal.suspects:
            for number, line in self._unfinished():
                if number in self.journal.suspects:
                    yield number, line, True
        for number, line in self._unfinished():
            if number not in self.put_off:
                yield number, line, False
        if self.put_off:
            for number, line in self._unfinished():
                if number in self.put_off:
                    yield number, line, True

    def _unfinished(self) -> Iterator[tuple[int, bytes]]:
        for number, line in read_lines(self.options.input_path, self.part):
            if number > self.last_line:
                return
            if number not in self.results.finished:
                yield number, line

    def _feed(self, signals: "StopSignals") -> None:
        """Take lines while there is room; nothing is pending beside one that is taken alone."""
        config = self.llm.config
        enough = 2 * config.max_num_seqs * config.data_parallel_size
        while self.num_queued < enough and signals.received is None:
            if self.pending and self.is_alone:
                return
            self.next_line = self.next_line or next(self.lines, None)
            if self.next_line is None:
                return
            number, line, is_alone = self.next_line
            if self.pending and is_alone:
                return
            self.next_line, self.is_alone = None, is_alone
            self._take(number, line)

    def _take(self, number: int, line: bytes) -> None:
        """Queue a line, write its error record, or put it off."""
        info = LineInfo(self.results.record_id(number, line), number)
        digest = info.record_id.rpartition("_")[2]
        past = self.journal.history(number, digest)
        if self.is_alone:
            self.journal.alone(number)
        self.journal.take(number, digest)
        try:
            if past is not None and past.is_unreadable:
                raise LineError(KILLED_CODE, past.verdict)
            record = parse_line(line)
            custom_id = info.custom_id = custom_id_of(record)
            if number not in self.put_off and not self.results.custom_ids.add(custom_id):
                raise LineError(
                    DUPLICATE_CODE, f"an earlier line has custom_id {custom_id[:100]!r} too"
                )
            if past is not None and past.verdict:
                raise LineError(KILLED_CODE, past.verdict)
            if past is not None and past.strikes and number not in self.put_off:
                self.put_off.add(number)
                self.journal.put_off(number)
                return
            seed = seed_of_line(self.options.seed, number)
            request = as_request(record, self.defaults, self.options.return_token_ids, seed)
            request_id = self._queue(request)
        except ENDS_RUN as error:
            if isinstance(error, EngineDeadError):
                self.journal.put_off(number)
            raise
        except BaseException as error:
            self._refuse(info, error)
            self.journal.left(number)
        else:
            self.journal.queued(number)
            info.params = request.params
            info.is_chat = request.messages is not None
            info.return_token_ids = request.return_token_ids
            self.pending[request_id] = info
            self.num_queued += request.params.n

    def _refuse(self, info: LineInfo, error: BaseException) -> None:
        """Write the error record of a line, whatever it raised."""
        code = "invalid_request" if isinstance(error, ArgumentError) else "internal_error"
        if isinstance(error, LineError):
            code = error.code
        message = _described(error)
        try:
            self.results.append(error_record(info, code, message))
        except (*ENDS_RUN, OSError):  # OSError: the write failed
            raise
        except BaseException:  # no memory for a custom_id of that size
            info.custom_id = None
            self.results.append(error_record(info, code, message))
        self.bar.count_line()

    def _queue(self, request: LineRequest) -> int:
        prompt = request.prompt
        if request.messages is not None:
            from nanovllm.inputs.chat import render_prompts  # after the engine: loads torch

            prompts = render_prompts(self.llm, request.messages, **request.chat_options)
            if len(prompts) != 1:
                raise ArgumentError(f"messages must be one conversation, got {len(prompts)}")
            [prompt] = prompts
        return self.llm.add_request(prompt, request.params)

    def _step(self) -> None:
        if self.is_alone:
            self.journal.step()
        finished, num_tokens = self.llm.step()
        for request_id, _ in finished:
            info = self.pending.pop(request_id)
            self.num_queued -= info.params.n
            try:
                record = self._record_of(request_id, info)
            except ENDS_RUN:
                raise
            except BaseException as error:
                self._refuse(info, error)
                continue
            try:
                self.results.append(record)
            except (*ENDS_RUN, OSError):  # OSError: the write failed
                raise
            except BaseException as error:
                self._refuse(info, error)
            else:
                self.bar.count_line()
        self.bar.count_tokens(num_tokens)

    def _record_of(self, request_id: int, info: LineInfo) -> dict[str, Any]:
        output = self.llm.get_output(request_id)
        if output.error is not None:
            raise LineError("request_failed", output.error)
        return result_record(info, output, self.options.model_name, self.tokenizer)


def _described(error: BaseException) -> str:
    """A line's error as text for its record."""
    try:
        text = str(error) if isinstance(error, ArgumentError) else repr(error)
    except ENDS_RUN:
        raise
    except BaseException:
        text = type(error).__name__
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."


class StopSignals:
    """Context in which the first SIGINT or SIGTERM is only noted, in `received`.

    The second is a KeyboardInterrupt.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


class Bar:
    """A tqdm bar on stderr of the lines that have a record, with the rates of the last seconds."""

    def __init__(self, is_shown: bool, total: int, num_finished: int) -> None:
        self.bar = tqdm(
            total=total,
            initial=num_finished,
            desc="Batch",
            unit="line",
            dynamic_ncols=True,
            smoothing=0,  # the time left by the mean of the whole run
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file gets a line at a time
            disable=not is_shown,
        )
        self.rates = {"Prefill": 0, "Decode": 0}  # tokens since `start`
        self.start = time.monotonic()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def count_line(self) -> None:
        """One more line has a record."""
        self.bar.update(1)

    def count_tokens(self, num_tokens: int) -> None:
        """Count a step by its number of tokens, as `LLM.step` returns it."""
        self.rates["Prefill" if num_tokens > 0 else "Decode"] += abs(num_tokens)
        seconds = time.monotonic() - self.start
        if seconds > RATE_SECONDS:
            postfix = {name: f"{int(n / seconds)}tok/s" for name, n in self.rates.items()}
            self.bar.set_postfix(postfix, refresh=False)
            self.rates = dict.fromkeys(self.rates, 0)
            self.start = time.monotonic()
