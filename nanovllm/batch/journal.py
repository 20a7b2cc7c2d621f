"""The journal beside the output: which lines were at work, for the run after one that died.

A header of one line, then an entry a line: `take 17 0123456789abcdef` (number and digest) before an
input line is taken, `queued 17` or `left 17` after it, `put_off 17` if it was only looked at;
`alone 17` before a line that is computed alone, and `step` before each of its steps. A crash adds
Python's note, "Fatal Python error: ...", an exception that ends the run `failed ...`; `ended` says
that nothing is to be blamed. Nothing is written in other steps. Which lines have a record is known
from the output.
"""

import faulthandler
import json
import os
import re
import stat
import sys
from dataclasses import asdict
from typing import Any

from nanovllm import __version__
from nanovllm.batch.deaths import Death, History, LineHistory, weigh
from nanovllm.batch.result_file import ResultFile
from nanovllm.errors import ArgumentError, EngineDeadError

SUFFIX = ".journal"
HEADER_START = b'{"journal": "nanovllm.batch"'
ENTRY = re.compile(rb"(take|queued|left|put_off|alone) (\d{1,18})(?: ([0-9a-f]{16}))?")
CRASH = re.compile(rb"(?:Fatal Python error: |failed )(.{1,200})")  # the first is faulthandler's
# What rank 0 is told of a rank that nobody killed from outside.
FAILED_RANK = re.compile(r"\bSIG(SEGV|ABRT|BUS|FPE|ILL)\b|\bstep failed\b")
OUT_OF_MEMORY = "the kernel killed a process for want of memory"
COMPACT_BYTES = 1 << 18
MAX_BYTES = 64 << 20  # more was not written by this program
LINE_KINDS = {name: type(value) for name, value in asdict(LineHistory("")).items()}
# These end a run that can go on as it was; after others the journal stays.
ORDERLY = (KeyboardInterrupt, OSError, ArgumentError)


class Journal:
    """Context of a run; what follows from the death of the last one.

    Without a journal that can be written the run works as it does with one, but lines that kill the
    process are not passed; a warning says so.

    Attributes:
        is_kept: the journal can be written.
        suspects: numbers of the lines that are to be computed first, each alone.
    """

    def __init__(self, results: ResultFile) -> None:
        self.path = results.path + SUFFIX
        self.results = results
        self.is_kept = False
        self.suspects: frozenset[int] = frozenset()
        self._history = History()
        self._digests: dict[int, str] = {}  # of the lines queued since the last compaction
        self._fd = -1
        self._size = 0
        self._has_faulthandler = False

    def __enter__(self) -> "Journal":
        try:
            notice = self._read_back()
            self._rewrite()
        except (OSError, ValueError) as error:
            self._give_up(error)
            return self
        self.is_kept = True
        if not faulthandler.is_enabled():  # else it is somebody's own, and its file is not known
            faulthandler.enable(self._fd, all_threads=False)
            self._has_faulthandler = True
        lines = self._history.lines
        self.suspects = frozenset(n for n, h in lines.items() if h.is_suspect and not h.verdict)
        if notice:
            plan = []
            if self.suspects:
                plan.append(f"lines tried alone, first: {len(self.suspects)}")
            num_put_off = sum(1 for h in lines.values() if h.strikes and not h.verdict)
            if num_put_off:
                plan.append(f"lines tried alone, last: {num_put_off}")
            _tell("; ".join([notice, *plan]))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None or issubclass(kind, ORDERLY) or not self._digests:
            self.end()
        elif issubclass(kind, SystemExit):
            pass  # no sign of a crash
        elif not issubclass(kind, EngineDeadError) or FAILED_RANK.search(str(error)):
            text = " ".join(f"{kind.__name__}: {error}".split())[:100]
            self._write(b"failed " + text.encode("ascii", "replace") + b"\n")
        self._close()

    def end(self) -> None:
        """The run ends by itself: the journal is removed, or keeps what is known of some lines."""
        if not self.is_kept:
            return
        self._digests.clear()
        self._drop_finished()
        self._history.settle()
        try:
            if self._history.lines:
                self._rewrite(b"ended\n")
            else:
                os.unlink(self.path)
        except OSError as failure:
            self._give_up(failure)
        self._close()

    def history(self, number: int, digest: str) -> LineHistory | None:
        """Earlier runs' experience with a line; None for nearly every line."""
        line = self._history.lines.get(number)
        return line if line is not None and line.digest == digest else None

    def take(self, number: int, digest: str) -> None:
        """A line is about to be taken: if the process dies now, it may be the reason."""
        if self.is_kept:
            self._digests[number] = digest
        self._write(b"take %d %b\n" % (number, digest.encode()))

    def queued(self, number: int) -> None:
        """The line is queued."""
        self._write(b"queued %d\n" % number)
        self._was_taken(number)
        if self._size > COMPACT_BYTES:
            self._compact()

    def left(self, number: int) -> None:
        """The line was taken, and is not queued."""
        self._write(b"left %d\n" % number)
        self._was_taken(number)
        self._digests.pop(number, None)

    def put_off(self, number: int) -> None:
        """The line was looked at, to be taken later."""
        self._write(b"put_off %d\n" % number)
        self._digests.pop(number, None)

    def alone(self, number: int) -> None:
        """The line that is taken next is computed alone, and `step` is called before each step."""
        self._write(b"alone %d\n" % number)

    def step(self) -> None:
        """A step of the line that is computed alone begins."""
        self._write(b"step\n")

    def _was_taken(self, number: int) -> None:
        line = self._history.lines.get(number)
        if line is not None:
            line.strikes = 0

    def _write(self, entry: bytes) -> None:
        if not self.is_kept:
            return
        try:
            if os.write(self._fd, entry) != len(entry):
                raise OSError("a short write")
        except OSError as error:
            self._give_up(error)
        self._size += len(entry)

    def _give_up(self, error: Exception) -> None:
        """Work without a journal; one that is not kept up to date would blame the wrong lines."""
        _tell(
            f"warning: {self.path!r} cannot be written ({error}): a line that kills the process "
            "will not be passed"
        )
        if self.is_kept:
            try:
                os.unlink(self.path)
            except OSError:
                pass
        self._history = History()
        self._digests.clear()
        self._close()

    def _close(self) -> None:
        self.is_kept = False
        if self._has_faulthandler:
            faulthandler.disable()
            self._has_faulthandler = False
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # ---- the file -----------------------------------------------------------------------------

    def _compact(self) -> None:
        try:
            self._drop_finished()
            finished = self.results.finished
            self._digests = {n: d for n, d in self._digests.items() if n not in finished}
            self._rewrite()
        except OSError as error:
            self._give_up(error)

    def _drop_finished(self) -> None:
        lines, finished = self._history.lines, self.results.finished
        self._history.lines = {n: line for n, line in lines.items() if n not in finished}

    def _rewrite(self, last: bytes = b"") -> None:
        """A new file with the history, the lines in flight and `last`."""
        header = {
            "journal": "nanovllm.batch",
            "version": __version__,
            "settings": self.results.settings,
            "results": self.results.num_finished,
            "errors": self.results.num_errors,
            "boot": _boot_id(),
            "oom_kills": _num_oom_kills(),
            "barren_deaths": self._history.barren_deaths,
            "kills": self._history.kills,
            "verdicts": self._history.verdicts,
            "lines": {number: asdict(line) for number, line in self._history.lines.items()},
        }
        rows = [json.dumps(header).encode() + b"\n"]
        for number, digest in self._digests.items():
            rows.append(b"take %d %b\nqueued %d\n" % (number, digest.encode(), number))
        content = b"".join([*rows, last])
        temporary = self.path + ".tmp"
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        try:
            if os.write(fd, content) != len(content):
                raise OSError("a short write")
            os.replace(temporary, self.path)
        except BaseException:
            os.close(fd)
            os.unlink(temporary)
            raise
        if self._has_faulthandler:
            faulthandler.enable(fd, all_threads=False)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._size = 0

    def _read_back(self) -> str:
        """Weigh the death of the last run; a sentence for the user, or nothing.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not of this program.
        """
        header, _, entries = read_journal(self.path).partition(b"\n")
        try:
            values = json.loads(header)
            is_of_this = (
                values["version"] == __version__
                and values["settings"] == self.results.settings
                and values["results"] <= self.results.num_finished
            )
            if not is_of_this:
                return ""
            history = _history_of(values)
            death = self._death_of(values, history, entries)
            num_results = self.results.num_finished - self.results.num_errors
            if num_results > values["results"] - values["errors"]:
                history.verdicts = 0
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return ""  # torn, or of another version
        self._history = history
        self._drop_finished()
        return "" if death is None else weigh(history, death)

    def _death_of(self, header: dict[str, Any], history: History, entries: bytes) -> Death | None:
        """How the run died that wrote the journal; None if it ended by itself.

        Takes that succeeded clear their lines' strikes in the history.
        """
        taken = lone = lone_steps = None
        crash = ""
        digests: dict[int, str] = {}
        in_flight: dict[int, None] = {}  # in their order
        for row in entries.split(b"\n")[:-1]:  # what follows the last line end is torn
            if row == b"ended":
                return None
            if match := CRASH.match(row):
                crash = match[1].decode("ascii", "replace")
            elif row == b"step" and lone is not None:
                lone_steps, crash = (lone_steps or 0) + 1, ""
            elif match := ENTRY.fullmatch(row):
                crash = ""  # it was of a child: this process went on
                kind, number = match[1], int(match[2])
                if kind == b"alone":
                    lone, lone_steps = number, 0
                elif kind == b"take" and match[3]:
                    digests[number], taken = match[3].decode(), number
                    if number != lone:
                        lone = lone_steps = None
                else:
                    taken = None
                    if kind == b"queued" and number in digests:
                        in_flight[number] = None
                    if kind != b"put_off" and number in history.lines:
                        history.lines[number].strikes = 0
        finished = self.results.finished
        is_of_machine = header["boot"] != _boot_id()
        if not crash and not is_of_machine and _num_oom_kills() > header["oom_kills"]:
            crash = OUT_OF_MEMORY
        return Death(
            digests=digests,
            taken=None if taken is None or taken in finished else taken,
            in_flight=[number for number in in_flight if number not in finished],
            lone_steps=lone_steps,
            crash=crash,
            is_of_machine=is_of_machine,
            has_results=self.results.num_finished > header["results"],
        )


def read_journal(path: str) -> bytes:
    """The journal's contents; nothing if there is none, or it is torn before its header.

    Raises:
        OSError: it cannot be read.
        ValueError: it is another program's file, or no file.
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ValueError("it is no regular file")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES)
    except FileNotFoundError:
        return b""
    start = content[: len(HEADER_START)]
    if not HEADER_START.startswith(start) and start.strip(b"\0"):
        raise ValueError("it is another program's file")
    return content


def remove_journal(output: str) -> None:
    """Remove what a run left that was killed when all was done."""
    path = output + SUFFIX
    try:
        read_journal(path)
        os.unlink(path)
    except (OSError, ValueError):
        pass


def _history_of(header: dict[str, Any]) -> History:
    """The history that a header holds; ValueError or another error if a value is wrong."""
    lines = {}
    for number, values in header["lines"].items():
        line = LineHistory(**values)
        kinds = {name: type(value) for name, value in asdict(line).items()}
        if kinds != LINE_KINDS:
            raise ValueError
        lines[int(number)] = line
    counts = {name: int(header[name]) for name in ("barren_deaths", "kills", "verdicts")}
    return History(lines, **counts)


def _boot_id() -> str:
    """Differs when the machine has started anew; empty where that cannot be told."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def _num_oom_kills() -> int:
    """How often the kernel has killed a process for want of memory; 0 where it does not tell."""
    try:
        with open("/proc/vmstat") as file:
            return next((int(row[9:]) for row in file if row.startswith("oom_kill ")), 0)
    except (OSError, ValueError):
        return 0


def _tell(message: str) -> None:
    print(f"nanovllm.batch: {message}", file=sys.stderr)
