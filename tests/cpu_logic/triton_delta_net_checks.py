"""Run by test_triton_interpreter.py in a process with TRITON_INTERPRET=1: gated delta nets."""

import pytest
import torch
from delta_net_cases import Sizes, in_parts, random_inputs, random_weights, run_in_steps

from nanovllm.kernels import torch_delta_rule
from nanovllm.kernels.torch_ops import TorchOps
from nanovllm.kernels.triton import delta_rule_chunks, gated_delta_net
from nanovllm.kernels.triton.ops import TritonOps

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("sizes", "chunk", "dtype", "tolerance"),
    [
        (Sizes(1, 2), 6, torch.float32, 1e-5),
        (Sizes(1, 3, 6, 5, 2), 3, torch.float32, 1e-5),
        (Sizes(1, 1, 16, 8, 4), 5, torch.float16, 5e-3),
    ],
)
def test_steps(sizes, chunk, dtype, tolerance, monkeypatch):
    """Chunks shorter and longer than a program's tokens, several tiles of a head."""
    monkeypatch.setattr(gated_delta_net, "VALUE_TILE", 4)
    monkeypatch.setattr(gated_delta_net, "CONV_CHANNELS", 32)
    monkeypatch.setattr(gated_delta_net, "CONV_TOKENS", 4)
    torch.manual_seed(0)
    weights = random_weights(sizes, dtype, CPU)
    inputs = random_inputs(sizes, [7, 2, 4], dtype, CPU)
    results = [
        run_in_steps(ops, sizes, weights, inputs, 1, chunk, sums)
        for ops, sums in ((TritonOps(False), True), (TorchOps(), False))
    ]
    (got, state), (expected, expected_state) = results
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(state, expected_state, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("sizes", "chunk", "dtype", "tolerance"),
    [
        (Sizes(1, 2, 12, 8, 3), 18, torch.float32, 1e-5),
        (Sizes(1, 1, 16, 20, 2), 90, torch.float16, 5e-3),
    ],
)
def test_long_prefills(sizes, chunk, dtype, tolerance, monkeypatch):
    """Several chunks of a program, the last of them cut off, and a state to go on from."""
    monkeypatch.setattr(gated_delta_net, "MIN_CHUNKED_TOKENS", 16)
    monkeypatch.setattr(delta_rule_chunks, "CHUNK", 16)
    monkeypatch.setattr(delta_rule_chunks, "VALUE_TILE", 16)
    torch.manual_seed(0)
    weights = random_weights(sizes, dtype, CPU)
    inputs = random_inputs(sizes, [37, 5, 20], dtype, CPU)
    results = [
        run_in_steps(ops, sizes, weights, inputs, 1, chunk)
        for ops in (TritonOps(False), TorchOps())
    ]
    (got, state), (expected, expected_state) = results
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(state, expected_state, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gates(dtype):
    torch.manual_seed(0)
    x, gate = (torch.randn(3, 40).to(dtype) for _ in range(2))
    for given in (gate, in_parts(gate)):
        got = gated_delta_net.sigmoid_gate(x, given)
        torch.testing.assert_close(got, torch_delta_rule.sigmoid_gate(x, gate))
