"""The operations of gated delta nets in plain PyTorch against transformers' module."""

import pytest
import torch
from delta_net_cases import Sizes, random_inputs, random_weights, run_in_steps
from torch import nn
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5GatedDeltaNet,
    torch_recurrent_gated_delta_rule,
)

from nanovllm.kernels import torch_delta_rule
from nanovllm.kernels.torch_ops import TorchOps

CPU = torch.device("cpu")


class Part(nn.Module):
    """Gives some columns of its input: a projection that is computed already."""

    def __init__(self, columns: slice) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., self.columns]


def reference(sizes: Sizes, weights, x: torch.Tensor) -> torch.Tensor:
    """What transformers' layer gives between its projections, for one sequence [T, ...]."""
    config = Qwen3_5TextConfig(
        hidden_size=x.shape[1],
        linear_num_key_heads=sizes.num_key_heads,
        linear_num_value_heads=sizes.num_heads,
        linear_key_head_dim=sizes.key_dim,
        linear_value_head_dim=sizes.value_dim,
        linear_conv_kernel_dim=sizes.kernel_size,
        num_hidden_layers=4,
    )
    layer = Qwen3_5GatedDeltaNet(config, 0)
    ends = torch.tensor([0, sizes.num_channels, sizes.num_heads * sizes.value_dim]).cumsum(0)
    ends = [*ends.tolist(), x.shape[1] - sizes.num_heads, x.shape[1]]
    for i, name in enumerate(("qkv", "z", "b", "a")):
        setattr(layer, f"in_proj_{name}", Part(slice(ends[i], ends[i + 1])))
    layer.out_proj = nn.Identity()
    layer.conv1d.weight.data = weights.conv.unsqueeze(1)
    layer.A_log.data, layer.dt_bias.data = weights.decay_rate, weights.decay_bias
    layer.norm.weight.data = weights.norm
    with torch.inference_mode():
        return layer(x.unsqueeze(0))[0]


@pytest.mark.parametrize("chunk", [200, 7, 1])
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(1, 3, 6, 10, 2), Sizes(3, 3, 8, 8, 5)])
def test_any_steps_give_what_transformers_gives_for_each_sequence(sizes, chunk):
    torch.manual_seed(0)
    weights = random_weights(sizes, torch.float32, CPU)
    inputs = random_inputs(sizes, [140, 5, 67, 4], torch.float32, CPU)
    outputs, _ = run_in_steps(TorchOps(), sizes, weights, inputs, 3, chunk, sums=chunk == 7)
    for x, got in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(got, reference(sizes, weights, x), atol=2e-5, rtol=1e-4)


def test_a_row_that_is_given_anew_starts_from_zero():
    torch.manual_seed(0)
    sizes = Sizes()
    weights = random_weights(sizes, torch.float32, CPU)
    [x] = random_inputs(sizes, [20], torch.float32, CPU)
    [[first], _], [[second], _] = (
        run_in_steps(TorchOps(), sizes, weights, [x], 2, 9) for _ in range(2)
    )
    torch.testing.assert_close(first, second, atol=0, rtol=0)


def test_a_chunk_is_its_tokens_one_by_one():
    torch.manual_seed(0)
    q, k = (nn.functional.normalize(torch.randn(3, 50, 8), dim=-1) for _ in range(2))
    v, state = torch.randn(3, 50, 6), torch.randn(3, 8, 6)
    log_decay, strength = -torch.rand(3, 50) * 3, torch.rand(3, 50)
    got, after = torch_delta_rule.delta_rule_chunk(q, k, v, log_decay, strength, state)
    heads_first = [x.transpose(0, 1).unsqueeze(0) for x in (q * 8**0.5, k, v, log_decay, strength)]
    expected, last = torch_recurrent_gated_delta_rule(
        *heads_first, initial_state=state.unsqueeze(0), output_final_state=True
    )
    torch.testing.assert_close(got.transpose(0, 1), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after, last[0], atol=1e-5, rtol=1e-5)
    for token in range(50):
        step = (x[:, token].unsqueeze(0) for x in (q, k, v, log_decay, strength))
        out, state = torch_delta_rule.delta_rule_step(*step, state.view(1, 3, 8, 6))
        torch.testing.assert_close(out[0], got[:, token], atol=1e-5, rtol=1e-5)
