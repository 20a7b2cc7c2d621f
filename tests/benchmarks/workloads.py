"""Every workload that has a speed goal: the rows of the benchmark suite and their random draws."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from nanovllm import SamplingParams


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
        )

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence that can be drawn."""
        return self.shared_prefix_len + self.input_len[1] + self.output_len[1]


ROWS = (
    Row("bench", 256, (100, 1024), (100, 1024), seed=0),  # seed and draws are bench.py's
    Row("1x512", 1, (128, 128), (512, 512), seed=1),
    Row("8x512", 8, (128, 128), (512, 512), seed=2),
    Row("32x512", 32, (128, 128), (512, 512), seed=3),
    Row("1024-short", 1024, (32, 256), (32, 256), seed=4),
    Row("prefill", 128, (2000, 4000), (1, 1), seed=5, unit="prompt"),
    Row("shared-prefix", 256, (30, 30), (32, 32), shared_prefix_len=1000, seed=6),
)


@dataclass(frozen=True)
class Workload:
    """The requests of one repetition."""

    prompts: list[list[int]]
    output_lens: list[int]
    shared_prefix_len: int

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

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
    output_lens = [rng.randint(*row.output_len) for _ in range(row.num_requests)]
    while True:
        yield Workload([prefix + ids for ids in own], output_lens, row.shared_prefix_len)
        prefix = draw_ids(row.shared_prefix_len)
        own = [draw_ids(len(ids)) for ids in own]


def check_fits(rows: Sequence[Row], max_model_len: int) -> None:
    """SystemExit if a row can draw a sequence longer than the model allows."""
    for row in rows:
        if row.max_len > max_model_len:
            raise SystemExit(
                f"row {row.name!r} draws sequences of up to {row.max_len} tokens, the maximum "
                f"model length is {max_model_len}; leave it out by --rows, or lower --scale"
            )
