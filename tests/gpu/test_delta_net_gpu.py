"""Gated delta nets on CUDA: the kernels against torch, states in CUDA graphs and while asleep."""

import random

import pytest
import torch
from delta_net_cases import Sizes, random_inputs, random_weights, run_in_steps
from tiny_models import VOCAB_SIZE, reference_greedy, save_family

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import torch_delta_rule
from nanovllm.kernels.torch_ops import TorchOps
from nanovllm.kernels.triton import gated_delta_net
from nanovllm.kernels.triton.ops import TritonOps

CUDA = torch.device("cuda")
# Qwen3.5's with few heads; a width that is no power of 2.
SIZES = [Sizes(2, 2, 128, 128, 4), Sizes(1, 2, 128, 128, 4), Sizes(2, 6, 24, 40, 3)]


@pytest.mark.parametrize("chunk", [1000, 130, 5])
@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_steps_in_float32(sizes, chunk, sums):
    torch.manual_seed(0)
    weights = random_weights(sizes, torch.float32, CUDA)
    inputs = random_inputs(sizes, [700, 6, 129, 64], torch.float32, CUDA)
    got, state = run_in_steps(TritonOps(False), sizes, weights, inputs, 3, chunk, sums)
    expected, expected_state = run_in_steps(TorchOps(), sizes, weights, inputs, 3, chunk)
    for name, x, y in (("out", got, expected), ("state", state, expected_state)):
        for one, other in zip(x, y, strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-3, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_half_precision_is_about_as_close_to_the_truth_as_torch(sizes, dtype):
    torch.manual_seed(0)
    weights = random_weights(sizes, dtype, CUDA)
    inputs = random_inputs(sizes, [700, 6, 129, 64], dtype, CUDA)
    exact = weights._replace(conv=weights.conv.float(), norm=weights.norm.float())
    truth, _ = run_in_steps(TorchOps(), sizes, exact, [x.float() for x in inputs], 3, 1000)
    errors = []
    for ops in (TritonOps(False), TorchOps()):
        outputs, _ = run_in_steps(ops, sizes, weights, inputs, 3, 1000)
        difference = torch.cat(outputs).float() - torch.cat(truth)
        errors.append(difference.square().mean().sqrt())
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates(dtype):
    x, gate = (torch.randn(5, 2048, device=CUDA).to(dtype) for _ in range(2))
    got = gated_delta_net.sigmoid_gate(x, gate)
    torch.testing.assert_close(got, torch_delta_rule.sigmoid_gate(x, gate))


def random_prompts(lengths):
    rng = random.Random(0)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def test_graphs_chunks_preemptions_and_sleep_change_no_token(tmp_path):
    path = save_family(tmp_path / "m", "qwen3.5")
    prompts = random_prompts((1, 3, 60, 200, 257, 520, 33))
    reference = reference_greedy(path, prompts, 16)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    settings = {"max_model_len": 1024, "max_num_seqs": 5, "num_kvcache_blocks": 6}
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 90}
    for options in ({}, {"enforce_eager": True}, chunks, {"attention_backend": "torch"}):
        with LLM(str(path), **settings, **options) as llm:
            for _ in range(2):
                outputs = llm.generate(prompts, params, use_tqdm=False)
                assert [output["token_ids"] for output in outputs] == reference
                llm.sleep(level=1)
                llm.wake_up()
