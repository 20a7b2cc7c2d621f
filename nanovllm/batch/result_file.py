"""The output file: whole lines appended by one process at a time, read back to resume.

A record's id holds a digest of the run's settings and of the input line, so a file that belongs to
another input or other parameters is noticed. Which lines are done is kept as a bit each.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from nanovllm.batch.records import encode
from nanovllm.errors import ArgumentError

RECORD_START = b'{"id": "batch_req_'
RECORD_ID = re.compile(r"batch_req_([0-9a-f]{8})_([0-9a-f]{16})")
DUPLICATE_CODE = "duplicate_custom_id"
SYNC_SECONDS = 5.0  # results that a power failure may lose; a killed process loses none
MERGE_SIZE = 1 << 16


class Part(NamedTuple):
    """Lines `first` to `last` of an input, `offset` bytes after its begin; else all of it."""

    first: int = 1
    last: int | None = None
    offset: int = 0


WHOLE = Part()


class LineSet:
    """Line numbers, a bit each."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, number: int) -> None:
        if number >> 3 >= len(self._bits):
            self._bits.extend(bytes(max(1024, (number >> 3) + 1 - len(self._bits))))
        self._bits[number >> 3] |= 1 << (number & 7)

    def __contains__(self, number: int) -> bool:
        index = number >> 3
        return index < len(self._bits) and bool(self._bits[index] >> (number & 7) & 1)


class StringSet:
    """Strings by their 64-bit hashes, 8 bytes each: a sorted array, and the newest in a set."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._newest: set[int] = set()

    def add(self, text: str) -> bool:
        """Add a string; False if it was there."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = int.from_bytes(digest, "little")
        index = int(self._sorted.searchsorted(np.uint64(value)))
        is_sorted_in = index < len(self._sorted) and int(self._sorted[index]) == value
        if is_sorted_in or value in self._newest:
            return False
        self._newest.add(value)
        if len(self._newest) > MERGE_SIZE + len(self._sorted) // 16:
            newest = np.fromiter(self._newest, np.uint64, len(self._newest))
            self._sorted = np.concatenate([self._sorted, newest])
            self._sorted.sort(kind="stable")
            self._newest.clear()
        return True


class ResultFile:
    """The output, locked for this process until `close`.

    A torn last line, as a killed process leaves it, is cut off.

    Attributes:
        finished: numbers of the input lines that have a record.
        num_finished, num_errors: how many, and how many of them are errors.
        custom_ids: those of the lines that were read, duplicates counted once.

    Raises:
        ArgumentError: the file cannot be written, another process has it, it is no output of this
            program, or it was written with other settings.
    """

    def __init__(self, path: str, settings: str) -> None:
        self.path = path
        self.settings = settings
        self.finished = LineSet()
        self.num_finished = self.num_errors = 0
        self.custom_ids = StringSet()
        self._checksum = 0  # of the finished lines' digests, by exclusive or
        self._synced = time.monotonic()
        try:
            self._file = open(path, "a+b")  # noqa: SIM115  # closed by `close`
        except OSError as error:
            raise ArgumentError(f"output {path!r} cannot be written: {error.strerror}") from None
        try:
            self._lock()
            self._read_back()
        except BaseException:
            self._file.close()
            raise

    def record_id(self, number: int, line: bytes) -> str:
        """The id of the record of an input line."""
        return f"batch_req_{self.settings}_{_line_digest(number, line):016x}"

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def count_lines(self, source: str, part: Part = WHOLE) -> tuple[int, int]:
        """How many lines of the input's part are not blank, and the number of the last one.

        Raises:
            ArgumentError: a line that has a record is not what it was.
        """
        num_lines = checksum = number = 0
        for number, line in read_lines(source, part):
            num_lines += 1
            if number in self.finished:
                checksum ^= _line_digest(number, line)
        if checksum != self._checksum:
            raise ArgumentError(
                f"{source!r} has changed since {self.path!r} was begun: lines that have a result "
                "are gone or different (lines may be appended); choose another output"
            )
        return num_lines, number

    def append(self, record: dict[str, Any]) -> None:
        """Add a record, which `flush` hands to the system.

        Raises:
            OSError: it cannot be written.
            Exception: JSON cannot hold it, and nothing was added.
        """
        self._file.write(encode(record))
        self._count(record)

    def flush(self) -> None:
        """Hand over what was appended, and have it on the disk every few seconds."""
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()

    def close(self) -> None:
        """Write everything to the disk and unlock."""
        with self._file:
            self._file.flush()
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # not on this system: two runs at once stay unnoticed
            return
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArgumentError(f"another process is writing to {self.path!r}") from None
        except OSError:  # a file system without locks
            pass

    def _read_back(self) -> None:
        self._file.seek(0)
        end = 0
        for row_number, row in enumerate(self._file, 1):
            if not row.endswith(b"\n"):
                if not (RECORD_START.startswith(row[: len(RECORD_START)]) or not row.strip(b"\0")):
                    raise self._is_foreign(row_number)
                self._file.truncate(end)
                break
            end += len(row)
            self._read_record(row_number, row)

    def _read_record(self, row_number: int, row: bytes) -> None:
        try:
            record = json.loads(row)
            match = RECORD_ID.fullmatch(record["id"])
            number, custom_id, error = record["line"], record["custom_id"], record["error"]
            is_duplicate = error is not None and error["code"] == DUPLICATE_CODE
            if match is None or type(number) is not int or number < 1:
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise self._is_foreign(row_number) from None
        if match[1] != self.settings:
            raise ArgumentError(
                f"{self.path!r} was begun with another model, seed or default parameter "
                "(or other --part-lines): repeat its command, or choose another output"
            )
        if number in self.finished:
            raise ArgumentError(f"{self.path!r} has two records of line {number}")
        self._checksum ^= int(match[2], 16)
        self._count(record)
        # The line that such a record repeats may not have one yet.
        if isinstance(custom_id, str) and not is_duplicate:
            self.custom_ids.add(custom_id)

    def _is_foreign(self, row_number: int) -> ArgumentError:
        return ArgumentError(
            f"line {row_number} of {self.path!r} is no record of nanovllm.batch; choose another "
            "output"
        )

    def _count(self, record: dict[str, Any]) -> None:
        self.finished.add(record["line"])
        self.num_finished += 1
        self.num_errors += record["error"] is not None


def read_lines(path: str, part: Part = WHOLE) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and content of every line that is not blank, read as they are asked for."""
    with open(path, "rb") as file:
        file.seek(part.offset)
        for number, line in enumerate(file, part.first):
            if part.last is not None and number > part.last:
                return
            content = line.strip()
            if content:
                yield number, content


def _line_digest(number: int, line: bytes) -> int:
    digest = hashlib.blake2b(b"%d:" % number, digest_size=8)
    digest.update(line)  # not copied: it may be very long
    return int.from_bytes(digest.digest(), "big")
