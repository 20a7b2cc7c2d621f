"""What a dtype costs in accuracy: perplexity of a text by weights' and KV cache's dtype; by hand:

    python tests/benchmarks/perplexity.py [--novels Rdata.rdb | --text FILE] [--max-tokens 4608]

Windows of 1024 tokens move by 512, whose second halves are scored twice: computed by prefill steps
over the cache in chunks, and by decode steps, a token at a time. The last line is a JSON object.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nanovllm import LLM
from nanovllm.assets.prepare import TEST_BOOK, novels
from nanovllm.kernels.types import AttentionMetadata, DecodeMetadata, PrefillMetadata

REPO = Path(__file__).resolve().parents[2]
WINDOW, STRIDE = 1024, 512
CONTEXT = WINDOW - STRIDE  # tokens that a window only reads
CHUNK = 128  # tokens of a window that a prefill step computes
GROUP = 8  # windows computed side by side
BLOCK_SIZE = 256
BLOCKS_PER_WINDOW = WINDOW // BLOCK_SIZE
# (dtype, kv_cache_dtype, quantization)
CONFIGURATIONS = (
    ("float32", "auto", None),
    ("float32", "fp8", None),
    ("bfloat16", "auto", None),
    ("bfloat16", "fp8", None),
    ("bfloat16", "auto", "fp8"),
)


@dataclass(frozen=True)
class Score:
    """How well one configuration predicts the text; bits are those of all scored bytes."""

    dtype: str
    kv_cache_dtype: str
    quantization: str | None
    kv_bytes_per_token: int
    prefill_bits_per_byte: float
    prefill_perplexity: float  # a token
    decode_bits_per_byte: float
    decode_perplexity: float


def held_out_text(args: argparse.Namespace) -> tuple[str, str]:
    """The text to score and its name."""
    if args.novels:
        documents = novels(args.novels)[TEST_BOOK]
        return "\n\n".join(document.text for document in documents), TEST_BOOK.title()
    if args.text:
        return args.text.read_text(encoding="utf-8"), args.text.name
    paths = (REPO / "README.md", REPO / "LICENSE")
    return "\n\n".join(path.read_text(encoding="utf-8") for path in paths), "README and LICENSE"


def windows_of(token_ids: list[int], max_tokens: int) -> torch.Tensor:
    """[number of windows, WINDOW + 1] int32: inputs, and targets one place further on."""
    stream = torch.tensor(token_ids[: max_tokens + 1], dtype=torch.int32)
    if len(stream) <= WINDOW:
        raise SystemExit(f"the text has {len(stream)} tokens; {WINDOW + 1} are needed")
    return stream.unfold(0, WINDOW + 1, STRIDE)


class Windows:
    """Up to GROUP windows in an engine's KV cache, computed in step: all at the same position."""

    def __init__(self, llm: LLM, token_ids: torch.Tensor) -> None:
        """token_ids [S, WINDOW + 1] int32."""
        self.runner = llm.model_runner
        device = self.runner.device
        self.token_ids = token_ids.to(device)
        self.num_seqs = len(token_ids)
        self.block_tables = torch.arange(
            self.num_seqs * BLOCKS_PER_WINDOW, dtype=torch.int32, device=device
        ).view(self.num_seqs, BLOCKS_PER_WINDOW)

    def prefill(self, start: int, end: int) -> float:
        """Compute the positions [start, end) in one step; the targets' nats."""
        num_tokens = end - start
        sequence = torch.arange(
            self.num_seqs + 1, dtype=torch.int32, device=self.block_tables.device
        )
        metadata = PrefillMetadata(
            slot_mapping=self._slots(start, end),
            block_tables=self.block_tables,
            cu_seqlens_q=sequence * num_tokens,
            cu_seqlens_k=sequence * end,
            max_seqlen_q=num_tokens,
            max_seqlen_k=end,
        )
        return self._step(start, end, metadata)

    def decode(self, position: int) -> float:
        """Compute one position in a decode step; the targets' nats."""
        metadata = DecodeMetadata(
            slot_mapping=self._slots(position, position + 1),
            block_tables=self.block_tables,
            context_lens=torch.full_like(self.block_tables[:, 0], position + 1),
        )
        return self._step(position, position + 1, metadata)

    def _slots(self, start: int, end: int) -> torch.Tensor:
        position = torch.arange(start, end, device=self.block_tables.device)
        blocks = self.block_tables[:, position // BLOCK_SIZE].long()
        return (blocks * BLOCK_SIZE + position % BLOCK_SIZE).flatten()

    @torch.inference_mode()
    def _step(self, start: int, end: int, metadata: AttentionMetadata) -> float:
        positions = torch.arange(start, end, dtype=torch.int32, device=self.token_ids.device)
        model = self.runner.model
        hidden_states = model.model(
            self.token_ids[:, start:end].flatten(), positions.repeat(self.num_seqs), metadata
        )
        logits = model.lm_head(hidden_states)[:, : model.lm_head.vocab_size].float()
        targets = self.token_ids[:, start + 1 : end + 1].flatten().long()
        return F.cross_entropy(logits, targets, reduction="sum").item()


def nats(llm: LLM, windows: torch.Tensor) -> tuple[float, float]:
    """Negative log-likelihood of the windows' second halves, by prefill and by decode steps."""
    by_prefill = by_decode = 0.0
    for token_ids in windows.split(GROUP):
        group = Windows(llm, token_ids)
        for start in range(0, CONTEXT, CHUNK):
            group.prefill(start, start + CHUNK)
        # Each writes the same slots anew before it reads them.
        by_prefill += sum(group.prefill(n, n + CHUNK) for n in range(CONTEXT, WINDOW, CHUNK))
        by_decode += sum(group.decode(n) for n in range(CONTEXT, WINDOW))
    return by_prefill, by_decode


def score(
    args: argparse.Namespace, text: str, dtype: str, kv_cache_dtype: str, quantization: str | None
) -> Score:
    """Score the text with one configuration."""
    with LLM(
        args.model,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        quantization=quantization,
        device=args.device,
        enforce_eager=True,
        max_model_len=WINDOW,
        max_num_batched_tokens=GROUP * CHUNK,
        max_num_seqs=GROUP,
        enable_chunked_prefill=True,
        kvcache_block_size=BLOCK_SIZE,
        num_kvcache_blocks=GROUP * BLOCKS_PER_WINDOW,
    ) as llm:
        windows = windows_of(llm.tokenizer.encode(text, verbose=False), args.max_tokens)
        by_prefill, by_decode = nats(llm, windows)
        scored = windows[:, CONTEXT + 1 :].flatten().tolist()
        num_bytes = len(llm.tokenizer.decode(scored).encode())
        runner = llm.model_runner
        scales = runner.kv_scales
        kv_bytes = runner.kv_cache.nbytes + (0 if scales is None else scales.nbytes)
        return Score(
            dtype,
            kv_cache_dtype,
            quantization,
            kv_bytes // (GROUP * BLOCKS_PER_WINDOW * BLOCK_SIZE),
            by_prefill / math.log(2) / num_bytes,
            math.exp(by_prefill / len(scored)),
            by_decode / math.log(2) / num_bytes,
            math.exp(by_decode / len(scored)),
        )


def print_table(scores: list[Score]) -> None:
    """One line each; changes are those of the bits per byte against the first."""
    columns = ("dtype", "weights", "KV cache", "KV B/token", "bits/byte", "perplexity", "change")
    template = "{:<9} {:<8} {:<9} {:<8} {:>10} {:>10} {:>10} {:>10}"
    print(template.format("steps", *columns))
    for steps in ("prefill", "decode"):
        for entry in scores:
            bits = getattr(entry, f"{steps}_bits_per_byte")
            change = bits / scores[0].prefill_bits_per_byte - 1
            values: list[Any] = [
                f"{bits:.5f}",
                f"{getattr(entry, f'{steps}_perplexity'):.3f}",
                f"{change:+.3%}",
            ]
            print(
                template.format(
                    steps,
                    entry.dtype,
                    entry.quantization or entry.dtype,
                    entry.kv_cache_dtype,
                    entry.kv_bytes_per_token,
                    *values,
                )
            )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(REPO / "nanovllm/assets/austen-7m"))
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--novels",
        type=Path,
        help="data/Rdata.rdb of Debian's r-cran-janeaustenr: the novel that austen-7m never saw",
    )
    source.add_argument(
        "--text", type=Path, help="a UTF-8 file; without either, this repository's README"
    )
    parser.add_argument("--max-tokens", type=int, default=4608, help="of the text's beginning")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def main() -> None:
    """Score the text with every configuration and print the table."""
    args = parse_arguments()
    text, name = held_out_text(args)
    scores = [score(args, text, *configuration) for configuration in CONFIGURATIONS]
    print(f"{name}, the first {args.max_tokens} tokens at most")
    print_table(scores)
    print(json.dumps({"text": name, "scores": [asdict(entry) for entry in scores]}))


if __name__ == "__main__":
    main()
