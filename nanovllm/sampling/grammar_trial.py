"""Tries out grammars: run as a process of its own, which may crash or be killed.

A script that imports nothing of nanovllm and no torch. It reads lines of JSON: first what the
tokenizer is built from, then the grammars; each is answered by a line. It ends with its input.
"""

import ctypes
import json
import random
import resource
import signal
import sys
import threading
import time

MAX_MEMORY = 16 << 30  # bytes of address space
STACK_SIZE = 4 << 20  # half of what a thread has elsewhere, so that what passes here has room there
NUM_STEPS = 24
NUM_SURE_STEPS = 2  # steps in which a grammar that is good for anything meets no error
PR_SET_PDEATHSIG = 1


def try_grammar(tokenizer, job):  # type: ignore[no-untyped-def]
    """The llguidance source, or the error, and the seconds of the slowest step."""
    from llguidance import LLMatcher, LLParserLimits

    source, kind = job["source"], job["kind"]
    if kind == "ebnf":
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            source = LLMatcher.grammar_from_lark(gbnf_to_lark(source))
        except Exception as error:  # it raises nothing more specific
            return {"error": f"{error}" or type(error).__name__}
    limits = LLParserLimits(**job["limits"])
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits)
    if matcher.is_error():
        return {"error": matcher.get_error().strip()[:1000]}
    matcher.compute_bitmask()
    slowest, draw = 0.0, random.Random(0)
    for step in range(NUM_STEPS):  # a walk, as masks may be slower than the compilation
        start = time.thread_time()  # other processes may hold it up
        mask = matcher.compute_bitmask()
        if matcher.is_stopped():
            if matcher.is_error() and 0 < step <= NUM_SURE_STEPS:
                return {"error": f"not even short texts: {matcher.get_error().strip()[:1000]}"}
            break
        matcher.consume_token(_draw(mask, draw))
        slowest = max(slowest, time.thread_time() - start)
    return {"source": source, "slowest": slowest}


def _draw(mask: bytes, draw: random.Random) -> int:
    """A token id of the mask, by chance (near enough)."""
    start = draw.randrange(len(mask))
    index = next((i for i in range(start, start + len(mask)) if mask[i % len(mask)]), 0) % len(mask)
    bits = [bit for bit in range(8) if mask[index] >> bit & 1]
    return 8 * index + (draw.choice(bits) if bits else 0)


def _serve() -> None:
    from llguidance import LLTokenizer

    setup = json.loads(sys.stdin.readline())
    tokenizer = LLTokenizer(
        setup["tokenizer"], n_vocab=setup["vocab_size"], eos_token=setup["end_token_ids"]
    )
    _answer({"ready": True})
    threading.stack_size(STACK_SIZE)
    for line in sys.stdin:
        job = json.loads(line)
        answers: list[dict] = []  # type: ignore[type-arg]
        signal.setitimer(signal.ITIMER_REAL, job["limit"] + 1)  # ends the process
        thread = threading.Thread(
            target=lambda job=job, answers=answers: answers.append(try_grammar(tokenizer, job))
        )
        thread.start()
        thread.join()
        signal.setitimer(signal.ITIMER_REAL, 0)
        _answer(answers[0] if answers else {"error": "llguidance failed"})


def _answer(answer: dict) -> None:  # type: ignore[type-arg]
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.path[:] = json.loads(sys.stdin.readline())
    _serve()
