"""The operations of gated delta nets in plain PyTorch, on any device.

A prefill takes its sequences one after another, each in chunks of tokens. A decode step takes all
its rows at once. Rounding follows the order of Hugging Face's Qwen3.5; the recurrent state is
computed in float32.
"""

import torch
import torch.nn.functional as F

from nanovllm.kernels.types import (
    AttentionMetadata,
    DecodeMetadata,
    LinearOutput,
    PrefillMetadata,
    summed,
)

CHUNK = 64  # tokens
L2_EPS = 1e-6


def sigmoid_gate(x: torch.Tensor, gate: LinearOutput) -> torch.Tensor:
    """x [T, N], gate [T, N] -> x * sigmoid(gate)."""
    return x * summed(gate).sigmoid()


def gated_rms_norm(
    x: torch.Tensor, gate: LinearOutput, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """x [T, Hv, Dv], gate [T, Hv * Dv] -> norm(x) * silu(gate) [T, Hv * Dv]."""
    x32 = x.float()
    normed = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    return (normed.flatten(1) * F.silu(summed(gate).float())).to(x.dtype)


# The convolution


def causal_conv1d(
    x: LinearOutput, weight: torch.Tensor, state: torch.Tensor, metadata: AttentionMetadata
) -> torch.Tensor:
    """See `Ops.causal_conv1d`."""
    x = summed(x)
    assert metadata.rows is not None
    if isinstance(metadata, DecodeMetadata):
        rows = metadata.rows.long()
        out, state[rows] = _convolve(x.unsqueeze(2), weight, state[rows])
        return out.squeeze(2).masked_fill(metadata.context_lens.unsqueeze(1) == 0, 0)
    out = torch.empty_like(x)
    for row, begin, end, is_new in _sequences(metadata):
        before = torch.zeros_like(state[row]) if is_new else state[row]
        result, after = _convolve(x[None, begin:end].transpose(1, 2), weight, before[None])
        out[begin:end], state[row] = result[0].t(), after[0]
    return out


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, C, L] and what came before it [N, C, K - 1] -> [N, C, L] and what comes before next."""
    whole = torch.cat([before, x], dim=2)
    convolved = F.conv1d(whole, weight.unsqueeze(1), groups=len(weight))
    return F.silu(convolved), whole[:, :, x.shape[2] :]


def _sequences(metadata: PrefillMetadata) -> list[tuple[int, int, int, bool]]:
    """Of each sequence its row, where its tokens begin and end, whether it has none before them."""
    assert metadata.rows is not None
    q_ends, k_ends = metadata.cu_seqlens_q.tolist(), metadata.cu_seqlens_k.tolist()
    return [
        (row, q_ends[i], q_ends[i + 1], k_ends[i + 1] - k_ends[i] == q_ends[i + 1] - q_ends[i])
        for i, row in enumerate(metadata.rows.tolist())
    ]


# The delta rule


def gated_delta_rule(
    qkv: torch.Tensor,
    beta: LinearOutput,
    decay: LinearOutput,
    decay_rate: torch.Tensor,
    decay_bias: torch.Tensor,
    state: torch.Tensor,
    metadata: AttentionMetadata,
) -> torch.Tensor:
    """See `Ops.gated_delta_rule`."""
    _, num_heads, key_dim, value_dim = state.shape
    assert metadata.rows is not None
    q, k, v = split_heads(qkv, num_heads, key_dim, value_dim)
    strength = summed(beta).sigmoid().float()
    log_decay = -decay_rate.exp() * F.softplus(summed(decay).float() + decay_bias)
    if isinstance(metadata, DecodeMetadata):
        rows = metadata.rows.long()
        out, state[rows] = delta_rule_step(q, k, v, log_decay, strength, state[rows])
        out = out.masked_fill(metadata.context_lens.view(-1, 1, 1) == 0, 0)
        return out.to(qkv.dtype)
    out = torch.empty_like(v)
    for row, begin, end, is_new in _sequences(metadata):
        if is_new:
            state[row] = 0
        for first in range(begin, end, CHUNK):
            part = slice(first, min(first + CHUNK, end))
            heads, state[row] = delta_rule_chunk(
                q[part].transpose(0, 1),
                k[part].transpose(0, 1),
                v[part].transpose(0, 1),
                log_decay[part].t(),
                strength[part].t(),
                state[row],
            )
            out[part] = heads.transpose(0, 1)
    return out.to(qkv.dtype)


def split_heads(
    qkv: torch.Tensor, num_heads: int, key_dim: int, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """qkv [T, 2 Hk Dk + Hv Dv] -> q and k [T, Hv, Dk], v [T, Hv, Dv], float32.

    q and k have length 1, q divided by sqrt(Dk) then. Key heads are repeated for their value heads.
    """
    value_size = num_heads * value_dim
    key_size = (qkv.shape[1] - value_size) // 2
    q, k, v = qkv.float().split([key_size, key_size, value_size], dim=1)

    def normed(x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(1, (-1, key_dim))
        heads = heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + L2_EPS)
        return heads.repeat_interleave(num_heads // heads.shape[1], dim=1)

    return normed(q) * key_dim**-0.5, normed(k), v.unflatten(1, (num_heads, value_dim))


def delta_rule_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    strength: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of each of B rows, as `Ops.gated_delta_rule` writes it.

    Args:
        q: [B, Hv, Dk].
        k: [B, Hv, Dk].
        v: [B, Hv, Dv].
        log_decay: [B, Hv], <= 0.
        strength: [B, Hv], how far a key's value is moved to the new one.
        state: [B, Hv, Dk, Dv].

    Returns:
        The outputs [B, Hv, Dv] and the states after the token.
    """
    state = state * log_decay.exp()[..., None, None]
    delta = strength.unsqueeze(-1) * (v - (k.unsqueeze(-2) @ state).squeeze(-2))
    state = state + k.unsqueeze(-1) * delta.unsqueeze(-2)
    return (q.unsqueeze(-2) @ state).squeeze(-2), state


def delta_rule_chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    strength: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """L tokens of one sequence, by matrix products.

    With D_t the product of the decays up to token t, the state before the chunk S and the changes
    d_t = strength_t * (v_t - what the decayed state holds for k_t), each state is
    D_t S + sum over j <= t of D_t / D_j * k_j d_j^T. So the changes solve the triangular system

        d_t + strength_t * sum over j < t of D_t / D_j * (k_t k_j) d_j
            = strength_t * (v_t - D_t S^T k_t)

    Args:
        q: [Hv, L, Dk].
        k: [Hv, L, Dk].
        v: [Hv, L, Dv].
        log_decay: [Hv, L], <= 0.
        strength: [Hv, L].
        state: [Hv, Dk, Dv].

    Returns:
        The outputs [Hv, L, Dv] and the state after the chunk.
    """
    log_decay = log_decay.cumsum(1)
    ratio = log_decay.unsqueeze(2) - log_decay.unsqueeze(1)  # [Hv, t, j]
    later = torch.ones_like(ratio[0], dtype=torch.bool).triu(1)
    ratio = ratio.masked_fill(later, -torch.inf).exp()
    decay, strength = log_decay.exp().unsqueeze(2), strength.unsqueeze(2)
    keys = k.transpose(1, 2)
    delta = torch.linalg.solve_triangular(
        strength * ratio * (k @ keys),
        strength * (v - decay * (k @ state)),
        upper=False,
        unitriangular=True,
    )
    out = decay * (q @ state) + (ratio * (q @ keys)) @ delta
    remaining = ratio[:, -1:].transpose(1, 2)  # [Hv, L, 1], the last token's D / D_j
    return out, decay[:, -1:] * state + (k * remaining).transpose(1, 2) @ delta
