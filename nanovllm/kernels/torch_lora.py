"""The terms of LoRA adapters in plain PyTorch, adapter after adapter."""

import torch
import torch.nn.functional as F

from nanovllm.kernels.types import LinearOutput, LoRAWeights

# Slot and tokens [N] int64 of each adapter that a step has.
Plan = list[tuple[int, torch.Tensor]]


def plan_adapters(slots: torch.Tensor, num_slots: int) -> Plan:
    """See `Ops.plan_adapters`."""
    words = [word for word in slots.unique().tolist() if word > 0]
    return [(word - 1, (slots == word).nonzero().squeeze(1)) for word in words]


def add_adapters(out: LinearOutput, x: torch.Tensor, weights: LoRAWeights, plan: object) -> None:
    """See `Ops.add_adapters`."""
    assert isinstance(plan, list)
    target = out if isinstance(out, torch.Tensor) else out.parts[0]
    rank = weights.rank
    for slot, tokens in plan:
        inner = x.index_select(0, tokens)
        if weights.a is not None:
            inner = F.linear(inner, weights.a[slot])
        for number, (first, end) in enumerate(weights.rows):
            part = inner[:, number * rank : (number + 1) * rank]
            term = F.linear(part, weights.b[slot, first:end])
            target[:, first:end].index_add_(0, tokens, term.to(target.dtype))
