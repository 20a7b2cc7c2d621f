"""CUDA graphs of decode steps, where the model's module allows their capture; else none."""

import logging

import torch
from torch import nn

from nanovllm.engine.cuda_graphs import Decode, DecodeGraphs
from nanovllm.engine.layer_kinds import FewLayers
from nanovllm.models.base import CausalLM
from nanovllm.models.families import Model
from nanovllm.models.host_reads import HostReads, described, errors_on_waits

logger = logging.getLogger("nanovllm")


class _NotCapturableError(RuntimeError):
    """A decode step does what no CUDA graph can."""


def new_graphs(
    model: Model,
    max_num_seqs: int,
    rows: torch.Tensor,
    decode: Decode,
    is_uniform: bool = False,
) -> DecodeGraphs | None:
    """`DecodeGraphs`; None, and one line in the log that says why, if a module of transformers
    cannot be captured.

    Args:
        model: whose steps are captured. Families of this library have no such fallback.
        max_num_seqs: see `DecodeGraphs`, as for the others.
        rows: see there.
        decode: see there.
        is_uniform: whether layers of one kind launch the same, so that a layer of each is enough
            before a capture.

    All ranks come to the same result, as their modules run the same code.
    """
    if isinstance(model, CausalLM):
        rehearse = _with_few_layers(decode, model.model) if is_uniform else None
        return DecodeGraphs(max_num_seqs, rows, decode, rehearse)
    reason = model.eager_reason
    if reason is None:
        stream = torch.cuda.current_stream()
        try:
            step = decode if model.was_captured else _checked(decode)
            graphs = DecodeGraphs(max_num_seqs, rows, step)
            model.was_captured = True
            return graphs
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = described(error)
            # A capture that fails may leave its own stream the current one.
            torch.cuda.set_stream(stream)
            torch.cuda.synchronize()
        model.eager_reason = reason
    if model.context.tp.rank == 0:
        logger.warning("%s decodes without CUDA graphs: %s", model.name, reason)
    return None


def _with_few_layers(decode: Decode, decoder: nn.Module) -> Decode:
    """`decode` through one layer of each kind; its token ids mean nothing."""
    few = FewLayers(decoder)

    def run(rows: torch.Tensor, has_common_blocks: bool) -> torch.Tensor:
        with few.alone():
            return decode(rows, has_common_blocks)

    return run


def _checked(decode: Decode) -> Decode:
    """`decode` that raises before a capture begins if the module would break it.

    A capture that is broken leaves torch's generator and memory pools in the middle of it. Steps
    with common blocks, whose module is the same, are captured while the engine runs: unchecked.
    """

    def checked(rows: torch.Tensor, has_common_blocks: bool) -> torch.Tensor:
        if has_common_blocks or torch.cuda.is_current_stream_capturing():
            return decode(rows, has_common_blocks)
        with HostReads() as reads, errors_on_waits():
            token_ids = decode(rows, has_common_blocks)
        if reads.found is not None:
            raise _NotCapturableError(f"the host waits for {reads.found}")
        return token_ids

    return checked
