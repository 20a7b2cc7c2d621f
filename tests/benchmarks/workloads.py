"""Every workload that has a speed goal: the rows of the benchmark suite and their random draws."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from random import Random

from nanovllm import LLM, SamplingParams


@dataclass(frozen=True)
class Row:
    """A workload's shape; lengths are inclusive bounds, drawn uniformly for each request."""

    name: str
    num_requests: int
    input_len: tuple[int, int]  # without the shared prefix
    output_len: tuple[int, int]
    shared_prefix_len: int = 0
    seed: int = 0  # differs between rows, or the prefix cache would know their first prompts
    unit: str = "output"  # the tokens that tokens/s counts: "output" or "prompt"
    num_turns: int = 1  # calls: the prompts of each are all that was said before and what users add
    added_len: tuple[int, int] = (0, 0)  # of what a user adds

    def scaled(self, scale: float) -> "Row":
        """Numbers and lengths times `scale`, at least 1 (no prefix stays none)."""

        def resize(number: int) -> int:
            return max(1, round(number * scale))

        return replace(
            self,
            num_requests=resize(self.num_requests),
            input_len=(resize(self.input_len[0]), resize(self.input_len[1])),
            output_len=(resize(self.output_len[0]), resize(self.output_len[1])),
            shared_prefix_len=resize(self.shared_prefix_len) if self.shared_prefix_len else 0,
            added_len=(resize(self.added_len[0]), resize(self.added_len[1])),
        )

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence that can be drawn."""
        num_added = self.added_len[1] * (self.num_turns - 1)
        own_len = self.input_len[1] + self.output_len[1] * self.num_turns + num_added
        return self.shared_prefix_len + own_len


ROWS = (
    Row("bench", 256, (100, 1024), (100, 1024), seed=0),  # seed and draws are bench.py's
    Row("1x512", 1, (128, 128), (512, 512), seed=1),
    Row("8x512", 8, (128, 128), (512, 512), seed=2),
    Row("32x512", 32, (128, 128), (512, 512), seed=3),
    Row("1024-short", 1024, (32, 256), (32, 256), seed=4),
    Row("prefill", 128, (2000, 4000), (1, 1), seed=5, unit="prompt"),
    Row("shared-prefix", 256, (30, 30), (32, 32), shared_prefix_len=1000, seed=6),
    # No lengths are known of the conversations that other engines were measured with.
    Row("conversations", 32, (128, 512), (128, 256), seed=7, num_turns=4, added_len=(32, 128)),
    Row("4096", 4096, (100, 1024), (100, 1024), seed=8),
)
ROW_NAMES = tuple(row.name for row in ROWS)
DEFAULT_ROWS = tuple(name for name in ROW_NAMES if name != "4096")  # which takes over a minute
ONE_CALL_ROWS = tuple(row.name for row in ROWS if row.num_turns == 1)


@dataclass(frozen=True)
class Workload:
    """The requests of one repetition, turn after turn.

    Args:
        prompts: of the first turn.
        output_lens: of all turns.
        shared_prefix_len: tokens with which all prompts begin.
        added: what users add in each later turn to each conversation.
    """

    prompts: list[list[int]]
    output_lens: list[int]
    shared_prefix_len: int
    added: tuple[list[list[int]], ...] = ()

    @property
    def prompt_lens(self) -> list[int]:
        """Of all turns."""
        return list(chain.from_iterable(self._lengths()[0]))

    @property
    def known_lens(self) -> list[int]:
        """How many tokens of each prompt were computed before: the prefix cache may know them.

        The newest token of a completion has no K/V.
        """
        first = [0, *[self.shared_prefix_len] * (len(self.prompts) - 1)]
        return first + [length - 1 for turn in self._lengths()[1] for length in turn]

    def _lengths(self) -> tuple[list[list[int]], list[list[int]]]:
        """Of each turn the prompts' lengths, and, but for the last one, with their completions."""
        prompt_lens, whole_lens = [[len(prompt) for prompt in self.prompts]], []
        number = len(self.prompts)
        for turn, added in enumerate(self.added):
            output_lens = self.output_lens[turn * number : (turn + 1) * number]
            whole_lens.append([a + b for a, b in zip(prompt_lens[-1], output_lens, strict=True)])
            prompt_lens.append([a + len(b) for a, b in zip(whole_lens[-1], added, strict=True)])
        return prompt_lens, whole_lens

    @property
    def num_prompt_tokens(self) -> int:
        return sum(self.prompt_lens)

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)

    def num_counted_tokens(self, unit: str) -> int:
        """Tokens of a row's unit."""
        return self.num_prompt_tokens if unit == "prompt" else self.num_output_tokens

    @property
    def sampling_params(self) -> list[SamplingParams]:
        return [
            SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=length)
            for length in self.output_lens
        ]

    def generate(self, llm: LLM, params: list[SamplingParams]) -> list[list[int]]:
        """Complete all turns, one call for each; the completions' ids.

        params: `sampling_params`, made before the clock starts.
        """
        completions: list[list[int]] = []
        prompts = self.prompts
        for added in (*self.added, None):
            start = len(completions)
            own = params[start : start + len(prompts)]
            outputs = llm.generate(prompts, own, use_tqdm=False)
            completions += [output["token_ids"] for output in outputs]
            if added is not None:
                parts = zip(prompts, completions[start:], added, strict=True)
                prompts = [prompt + completion + new for prompt, completion, new in parts]
        return completions


def workloads(row: Row, vocab_size: int) -> Iterator[Workload]:
    """Endless repetitions of `row`: the same lengths, new ids (a new shared prefix too).

    Draws as bench.py does: ids up to 10,000, a prompt's length before its ids, outputs last.
    """
    rng = Random(row.seed)
    max_token_id = min(10000, vocab_size - 1)

    def draw_ids(length: int) -> list[int]:
        return [rng.randint(0, max_token_id) for _ in range(length)]

    prefix = draw_ids(row.shared_prefix_len)
    own = [draw_ids(rng.randint(*row.input_len)) for _ in range(row.num_requests)]
    num_outputs = row.num_requests * row.num_turns
    output_lens = [rng.randint(*row.output_len) for _ in range(num_outputs)]
    added = tuple(
        [draw_ids(rng.randint(*row.added_len)) for _ in range(row.num_requests)]
        for _ in range(row.num_turns - 1)
    )
    while True:
        prompts = [prefix + ids for ids in own]
        yield Workload(prompts, output_lens, row.shared_prefix_len, added)
        prefix = draw_ids(row.shared_prefix_len)
        own = [draw_ids(len(ids)) for ids in own]
        added = tuple([draw_ids(len(ids)) for ids in turn] for turn in added)


def check_fits(rows: Sequence[Row], max_model_len: int) -> None:
    """SystemExit if a row can draw a sequence longer than the model allows."""
    for row in rows:
        if row.max_len > max_model_len:
            raise SystemExit(
                f"row {row.name!r} draws sequences of up to {row.max_len} tokens, the maximum "
                f"model length is {max_model_len}; leave it out by --rows, or lower --scale"
            )
