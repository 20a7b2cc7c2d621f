"""A rank's runner on the device "meta": what the engine would compute, on shapes alone."""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from nanovllm.config import Config
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.sequence import Sequence as EngineSequence
from nanovllm.engine.sequence import Wants
from nanovllm.engine.step_plan import StepPlan
from nanovllm.kernels.ops import Ops
from nanovllm.parallel.tensor_parallel import TensorParallel

if TYPE_CHECKING:
    from nanovllm.kernels.triton.peer_memory import PeerMemory

META = torch.device("meta")


class DryRunner(ModelRunner):
    """A runner whose weights have shapes and no values; Triton's kernels are not launched.

    Args:
        config: the engine's configuration.
        ops: Triton's, for the device "meta".
        rank: this rank's number.
        peers: on "meta", if the ranks would share memory.
    """

    def __init__(
        self, config: Config, ops: Ops, rank: int = 0, peers: "PeerMemory | None" = None
    ) -> None:
        size = config.tensor_parallel_size
        group = _LoneGroup() if size > 1 else None
        super().__init__(config, META, TensorParallel(rank, size, group, peers), ops)

    def reload_weights(self) -> None:
        """Leave the parameters without values."""
        self.has_lm_head = True

    def use_adapters(self) -> None:
        """Run the next steps with adapters of all layers, if the engine takes any."""
        if self.adapters is not None:
            layers = enumerate(self.adapters.layers)
            self.adapters.allocate([i for i, layer in layers if not layer.is_allocated])
            self.adapters.step.is_on = True

    @torch.inference_mode()
    def execute(self, plan: StepPlan, seqs: Iterable[EngineSequence] = ()) -> LaunchedStep:
        """Run a prefill plan; no token reaches the host."""
        step = LaunchedStep(plan, list(seqs))
        if self.adapters is not None and plan.has(Wants.PROMPT | Wants.STATES):
            number = int(plan.is_last.sum())
            self.adapters.step.head_tokens = torch.empty(number, dtype=torch.int32, device=META)
        self._execute_prefill(step)
        if self.adapters is not None:
            self.adapters.step.head_tokens = None
        return step

    def _give(self, want: int, step: LaunchedStep, values: torch.Tensor) -> None:
        """No consumer has anything to compute on."""


class _Done:
    """A sum over the ranks that has ended."""

    def wait(self, timeout: timedelta | None = None) -> None:
        """Return at once."""


class _LoneGroup:
    """The group of a dry run's rank: sums stay this rank's terms."""

    def allreduce(self, tensors: Sequence[torch.Tensor], options: object) -> _Done:
        """As of torch's process groups."""
        return _Done()
