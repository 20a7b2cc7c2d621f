"""The runner of an engine with LoRA adapters: it knows of each step whether any of them is in it.

Steps without an adapter run as in an engine without adapters, and have CUDA graphs of their own.
"""

from collections.abc import Iterable

import numpy as np

from nanovllm.engine.cuda_graphs import DecodeGraphs
from nanovllm.engine.launched_step import LaunchedStep
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.sequence import Sequence, Wants
from nanovllm.engine.step_plan import StepPlan
from nanovllm.kernels import row_state
from nanovllm.kernels.copies import upload_one
from nanovllm.models.lora import AdapterModel


class AdapterRunner(ModelRunner):
    """A `ModelRunner` with `adapters`; arguments are the same."""

    # By whether a step has an adapter; empty: there are none.
    _graph_sets: "dict[bool, DecodeGraphs | None]"

    @property
    def _adapters(self) -> AdapterModel:
        assert self.adapters is not None
        return self.adapters

    def execute(self, plan: StepPlan, seqs: Iterable[Sequence] = ()) -> LaunchedStep:
        """See `ModelRunner.execute`."""
        self.sent_rows.reshape(-1)[plan.updates[:, 0]] = plan.updates[:, 1]
        self._switch(bool(self.sent_rows[plan.rows, row_state.ADAPTER].any()))
        head_tokens = None
        if plan.is_prefill and plan.has(Wants.PROMPT | Wants.STATES) and plan.is_last.any():
            ends = np.cumsum(plan.lengths, dtype=np.int32)[plan.is_last != 0]
            head_tokens = upload_one(ends - 1, self.device)
        self._adapters.step.head_tokens = head_tokens
        return super().execute(plan, seqs)

    def _switch(self, is_on: bool) -> None:
        """Run the next steps with adapters or without."""
        self._adapters.step.is_on = is_on
        if self.graphs is not None:
            self.graphs = self._graph_sets[is_on]

    def capture_graphs(self) -> None:
        """See `ModelRunner.capture_graphs`."""
        graph_sets = {}
        for is_on in (True, False):
            self.drop_graphs()
            self._switch(is_on)
            super().capture_graphs()
            graph_sets[is_on] = self.graphs
        self._graph_sets = graph_sets

    def drop_graphs(self) -> None:
        """See `ModelRunner.drop_graphs`."""
        super().drop_graphs()
        self._graph_sets = {}


def allocate_layers(runner: ModelRunner, layers: list[int]) -> None:
    """`AdapterModel.allocate` on a rank, and graphs that know of it."""
    assert runner.adapters is not None
    runner.adapters.allocate(layers)
    if runner.graphs is not None:  # else `wake_up` captures them
        runner.capture_graphs()


def load_adapter(
    runner: ModelRunner, key: int, path: str, slot: int | None, pinned: set[int]
) -> bool:
    """`AdapterModel.load` on a rank."""
    assert runner.adapters is not None
    return runner.adapters.load(key, path, slot, pinned)


def drop_adapter(runner: ModelRunner, key: int) -> None:
    """`AdapterModel.drop` on a rank."""
    assert runner.adapters is not None
    runner.adapters.drop(key)
