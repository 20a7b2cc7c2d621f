"""A stand-in for LLM in the tests of nanovllm.batch; run as a script, a batch run with it."""

import hashlib
import itertools
import os
import random
import signal
import sys
import time
from types import SimpleNamespace

from nanovllm import ArgumentError, EngineDeadError, SamplingParams
from nanovllm.batch.run import main
from nanovllm.outputs import CompletionOutput, RequestOutput

DEADLY = "die in "  # "die in take: KILL", "die in step 2: SEGV"
SEEDS = itertools.count()  # another order in every run


class StandInEngine:
    """Completions are a function of prompt, seed and length; they end in a random order.

    With `ends_all` every step ends all that are queued. A prompt "too long" is refused. `on_step`
    is called with the number of each step. The prompt of every completion is appended to `log`, and
    the most sequences ever queued are in `most_queued`. A prompt "die in ..." ends the process.
    """

    def __init__(self, on_step=lambda number: None, step_seconds=0.0, max_num_seqs=4):
        self.config = SimpleNamespace(max_num_seqs=max_num_seqs, data_parallel_size=1)
        self.on_step = on_step
        self.step_seconds = step_seconds
        self.queue: dict[int, tuple] = {}
        self.returned: dict[int, tuple] = {}
        self.first_steps: dict[int, int] = {}
        self.log: list[str] = []
        self.most_queued = self.num_requests = self.num_steps = 0
        self.is_ended = self.ends_all = False
        self.rng = random.Random(next(SEEDS))

    def __call__(self, **keywords):
        """In place of the class: the keywords of LLM are kept."""
        self.keywords = keywords
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.is_ended = True

    def get_default_sampling_params(self):
        return SamplingParams(temperature=0.6, top_p=0.95)

    def add_request(self, prompt, sampling_params):
        if prompt == "too long":
            raise ArgumentError("prompt length 9 is too long")
        if prompt == "odd":
            raise KeyError("odd")
        if str(prompt).startswith(DEADLY + "take"):
            die(prompt)
        self.queue[self.num_requests] = (prompt, sampling_params)
        self.first_steps[self.num_requests] = self.num_steps + 1
        self.num_requests += 1
        num_queued = sum(params.n for _, params in self.queue.values())
        self.most_queued = max(self.most_queued, num_queued)
        return self.num_requests - 1

    def step(self):
        self.num_steps += 1
        self.on_step(self.num_steps)
        time.sleep(self.step_seconds)
        deadly = [number for number in self.queue if str(self.queue[number][0]).startswith(DEADLY)]
        for number in deadly:
            _, _, where = self.queue[number][0].partition("step ")
            if self.num_steps - self.first_steps[number] + 1 == int(where.partition(":")[0]):
                die(self.queue[number][0])
        most = len(self.queue) if self.ends_all else self.rng.randrange(3)
        ids = sorted(self.queue.keys() - deadly)
        ids = self.rng.sample(ids, min(len(ids), most))
        if ids:
            self.returned = {number: self.queue.pop(number) for number in ids}
        self.log += [str(self.returned[number][0]) for number in ids]
        return [(number, []) for number in ids], -len(ids)

    def get_output(self, number):
        prompt, params = self.returned[number]
        completions = []
        for index in range(params.n):
            key = f"{prompt}:{params.seed}:{index}".encode()
            token_ids = list(hashlib.blake2b(key, digest_size=16).digest())[: params.max_tokens]
            text = " ".join(map(str, token_ids))
            completion = CompletionOutput(index, text, token_ids, finish_reason="length")
            completions.append(completion)
        return RequestOutput(str(number), prompt, [1, 2, 3], None, completions, True)


def die(prompt):
    """End as the last word of the prompt says."""
    word = prompt.split()[-1]
    if word == "exit":
        os._exit(139)  # without a trace
    if word == "raise":
        raise RuntimeError("a broken device")
    if word == "rank":
        raise EngineDeadError("tensor-parallel rank 1 was killed by SIGSEGV")
    if word == "sys.exit":
        sys.exit(7)
    os.kill(os.getpid(), getattr(signal, f"SIG{word}"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], StandInEngine(step_seconds=0.002)))
