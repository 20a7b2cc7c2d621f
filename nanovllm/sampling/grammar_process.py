"""The process in which grammars are tried out, as the engine sees it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanovllm.errors import ArgumentError

SCRIPT = Path(__file__).with_name("grammar_trial.py")
START_LIMIT = 120.0  # seconds; it reads the vocabulary, which takes about one
# Somebody else ended it, or the system for want of memory: it may be no fault of the grammar.
KILLED = (-signal.SIGKILL, -signal.SIGTERM)


class TrialProcess:
    """Compiles grammars where a crash or an endless computation hurts nothing.

    It is started with the first grammar and serves all that follow. It ends with this object, with
    the engine's process, and at each crash or passed limit, after which the next grammar starts
    another.

    Args:
        setup: returns what the tokenizer is built from.
    """

    def __init__(self, setup: Callable[[], dict[str, Any]]) -> None:
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._owner = (0, 0)  # the process and thread that started it

    def try_grammar(self, job: dict[str, Any], limit: float, kind: str) -> dict[str, Any]:
        """The result of `grammar_trial.try_grammar` in the other process.

        Args:
            limit: seconds for trying it and compiling it afterwards, which takes about as long.

        Raises:
            ArgumentError: it takes longer than `limit` seconds, crashed or ran out of memory.
        """
        with self._lock:
            for is_last in (False, True):
                try:
                    self._start()
                    answer = self._ask({**job, "limit": limit / 2}, limit / 2)
                except BaseException:  # Ctrl-C too: an answer that nobody waits for is never read
                    self.close()
                    raise
                if answer is not None:
                    return answer
                code = self._end()
                if code in (None, -signal.SIGALRM):
                    raise ArgumentError(
                        f"structured outputs, {kind}: compiling it takes longer than "
                        f"structured_outputs_timeout ({limit:g} s)"
                    )
                if code not in KILLED or is_last:
                    break
            assert code is not None
            raise ArgumentError(
                f"structured outputs, {kind}: too deep or too large for llguidance, which "
                f"crashed on it in a process of its own ({_code_name(code)})"
            )

    def _start(self) -> None:
        owner = (os.getpid(), threading.get_ident())
        if self._process is not None and self._owner == owner and self._process.poll() is None:
            return
        if self._process is not None and self._owner[0] == owner[0]:
            self.close()
        # Linux ends it with the thread that starts it, so another thread starts its own.
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the engine
            )
        except OSError as error:
            raise RuntimeError(f"the process that tries grammars did not start: {error}") from error
        self._owner = owner
        self._read = b""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([p for p in sys.path if p]).encode() + b"\n")
        except BrokenPipeError:
            pass  # _ask finds out
        if self._ask(self._setup(), START_LIMIT) is None:
            code = self._end()
            raise RuntimeError(
                "the process that tries grammars did not start: "
                + ("no answer" if code is None else _code_name(code))
            )

    def _ask(self, message: dict[str, Any], limit: float) -> dict[str, Any] | None:
        """The answer; None if the process ended or `limit` seconds passed."""
        assert self._process is not None
        assert self._process.stdin is not None and self._process.stdout is not None
        deadline = time.monotonic() + limit
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        out = self._process.stdout.fileno()
        poll = select.poll()  # takes descriptors of any number, unlike select()
        poll.register(out, select.POLLIN)
        while b"\n" not in self._read:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return None
            if not (part := os.read(out, 1 << 16)):
                return None
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)

    def _end(self) -> int | None:
        """End the process; its exit code if it had ended by itself."""
        process = self._process
        assert process is not None
        try:
            code: int | None = process.wait(0.05)  # its pipe closes a little before it is gone
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        return code

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner[0] != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                assert pipe is not None
                pipe.close()
            except BrokenPipeError:
                pass

    def __del__(self) -> None:
        self.close()


def _code_name(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
