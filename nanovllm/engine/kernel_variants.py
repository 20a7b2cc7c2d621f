"""Every variant of a kernel that an engine can launch, found by a dry run of all kinds of steps.

A kernel is compiled for dtypes, alignments and constants, some of which follow from the number of
tokens or rows. So steps of many sizes are run, through one layer of each kind.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from nanovllm.config import Config
from nanovllm.engine.backend import choose_ops
from nanovllm.engine.dry_runner import META, DryRunner
from nanovllm.engine.dry_shapes import ShapesAlone
from nanovllm.engine.layer_kinds import kinds_of_layers
from nanovllm.engine.sequence import Wants
from nanovllm.engine.step_plan import StepPlan
from nanovllm.kernels.device import DeviceLimits, meta_stands_for
from nanovllm.kernels.ops import Ops
from nanovllm.kernels.triton import hopper_experts
from nanovllm.kernels.triton.compilation import Variants
from nanovllm.kernels.triton.linear import PIECES, SHARES
from nanovllm.kernels.triton.moe import FP8_TILES, PACKED_TILES, SORT_CHUNK, TILES
from nanovllm.kernels.triton.peer_memory import PeerMemory, num_memory_bytes
from nanovllm.models.model_config import ModelConfig
from nanovllm.sampling.batch import edited_width

MAX_TILED_TOKENS = 512  # from there on only shares differ between powers of 2
FEW = 3  # of the largest and of the smallest sizes, for what does not depend on the size


def record_variants(
    config: Config, limits: DeviceLimits, rank: int = 0, shares_memory: bool = True
) -> Variants:
    """What the engine with `config` can launch on a GPU, which need not be there.

    Args:
        config: of a model that does not run on transformers' own module.
        limits: of the GPU.
        rank: whose launches.
        shares_memory: whether several ranks share memory for their sums.

    Raises:
        ArgumentError: the configuration does not suit the GPU.
    """
    variants = Variants()
    # What weights wait in host memory, and whose attention is not Triton's, launches no other ones.
    config = config.replace(cpu_offload_gb=0.0, attention_backend="triton")
    with meta_stands_for(limits), variants.recording(), ShapesAlone():
        ops = choose_ops(config, META, limits.capability)
        runner = _new_runner(config, ops, rank, shares_memory)
        ends = _ends_with_experts(config.model_config)
        counts = token_counts(config.max_num_batched_tokens, ends)
        for num_tokens in counts:
            _prefill(runner, num_tokens, Wants.PROMPT)
        for num_tokens in {*counts[:FEW], *counts[-FEW:]}:
            _prefill(runner, num_tokens, 0)
        counts = token_counts(config.max_num_seqs, ends)
        for num_rows in counts:
            _decode(runner, num_rows)
            # A prefill's last layer attends as a decode step does, with kernels of its own.
            _prefill(runner, num_rows, 0, longest=1)
        for num_rows in {*counts[:FEW], *counts[-FEW:]}:
            _sample(runner, num_rows)
    return variants


def token_counts(most: int, further_ends: Iterable[int] = ()) -> list[int]:
    """Numbers up to `most`, ascending: both ends of each range of tokens with the same tiles.

    They change after powers of 2, multiples of 64, those of PIECES and of its SHARES, and
    `further_ends`. In each is a multiple of 16, if there is one, and another number: what the
    number multiplies may be aligned or not.
    """
    ends = {2**power for power in range(most.bit_length())} | {*range(64, MAX_TILED_TOKENS, 64)}
    ends |= {share * end for share in (1, *SHARES) for end in PIECES}
    ends |= {most, *further_ends}
    counts = {1, 2, 3, *ends, *(end + 1 for end in ends), *(end // 16 * 16 for end in ends)}
    return sorted(count for count in counts if 1 <= count <= most)


def _ends_with_experts(model: ModelConfig) -> set[int]:
    """The most tokens for each choice that depends on the pairs of tokens and experts."""
    if not model.num_experts:
        return set()
    tables = TILES, FP8_TILES, PACKED_TILES, hopper_experts.TILES
    means = {mean for table in tables for mean in table} | {hopper_experts.MIN_GUESSED}
    pairs = [mean * model.num_experts for mean in means if mean < math.inf]
    pairs += [2**power for power in range(SORT_CHUNK.bit_length())]
    return {int(number) // model.num_experts_per_tok for number in pairs}


def new_peers(config: Config, rank: int) -> PeerMemory:
    """Memory that the ranks share, on "meta"."""
    width, dtype = config.model_config.hidden_size, config.resolve_dtype()
    size = config.tensor_parallel_size
    memory = torch.empty(num_memory_bytes(size, width, dtype), dtype=torch.uint8, device=META)
    abort = torch.empty(1, dtype=torch.int32, device=META)
    return PeerMemory(rank, [0] * size, memory, width, dtype, abort)


def _new_runner(config: Config, ops: Ops, rank: int, shares_memory: bool) -> DryRunner:
    has_peers = config.tensor_parallel_size > 1 and shares_memory
    runner = DryRunner(config, ops, rank, new_peers(config, rank) if has_peers else None)
    runner.allocate_kv_cache(num_blocks=1)
    decoder = runner.model.model
    layers = decoder.layers
    assert isinstance(layers, nn.ModuleList)
    decoder.layers = kinds_of_layers(layers)
    runner.use_adapters()  # steps without any launch nothing else
    return runner


def _prefill(runner: DryRunner, num_tokens: int, want: int, longest: int | None = None) -> None:
    """Steps of so many tokens, of whole prompts and of chunks whose contexts windows cut.

    want: 0: only the last tokens pass through the end of the model; `Wants.PROMPT`: all do.
    longest: tokens of a prompt at most.
    """
    config = runner.config
    longest = min(num_tokens, config.max_model_len, longest or num_tokens)
    num_seqs = -(-num_tokens // longest)
    if num_seqs > config.max_num_seqs:
        return
    lengths = np.full(num_seqs, longest, dtype=np.int32)
    lengths[-1] = num_tokens - longest * (num_seqs - 1)
    for start in {0, config.max_model_len - longest if runner.has_windows else 0}:
        runner.execute(
            StepPlan(
                is_prefill=True,
                rows=np.arange(num_seqs, dtype=np.int32),
                updates=np.empty((0, 2), dtype=np.int32),
                wants=np.full(num_seqs, want, dtype=np.int32),
                token_ids=np.zeros(num_tokens, dtype=np.int32),
                starts=np.full(num_seqs, start, dtype=np.int32),
                lengths=lengths,
                shared=np.zeros(num_seqs, dtype=np.int32),
                is_last=np.ones(num_seqs, dtype=np.int32),
                copies=np.zeros((num_seqs, 2), dtype=np.int32),
            )
        )


@torch.inference_mode()
def _decode(runner: DryRunner, num_rows: int) -> None:
    """Decode steps of so many rows."""
    rows = runner.decode_rows[:num_rows]
    runner.decode(rows)
    if runner.reads_common_blocks_once:
        runner.decode(rows, has_common_blocks=True)


@torch.inference_mode()
def _sample(runner: DryRunner, num_rows: int) -> None:
    """What logits processing does: of the model's logits and of edited ones, filtered or not."""
    ops, vocab_size = runner.ops, runner.config.model_config.vocab_size

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    numbers, integers = empty(num_rows), empty(num_rows, dtype=torch.int32)
    seeds = empty(num_rows, 2, dtype=torch.int32)
    own = empty(
        num_rows, runner.tp.size * runner.decode_logits.shape[1], dtype=runner.decode_logits.dtype
    )
    for logits in (own, empty(num_rows, edited_width(vocab_size))):
        thresholds = ops.filter_thresholds(logits, numbers, integers, numbers, numbers, vocab_size)
        for limits in (None, thresholds):
            ops.sample(logits, numbers, seeds, integers, 0, vocab_size, limits)
    ops.write_back(runner.row_table, integers, integers, integers)
