"""The request sampler on the GPU: the tokens of the CPU's reference, and nothing waits."""

import pytest
import torch
from sampler_runs import SPECS, Run, reference_completion

from nanovllm import SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels.select import select_ops
from nanovllm.sampling.logits_sampler import LogitsSampler
from nanovllm.sampling.request_processors import EditReport

VOCAB_SIZE = 151_936


class NeverWaiting(Run):
    """A run whose sampler must not synchronise."""

    def sample(self, *args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            sampled = super().sample(*args)
            for tensors in sampled.logprobs:
                tensors.download()
            return sampled
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_mixed_batch_equals_the_reference_and_never_waits():
    completions = NeverWaiting(SPECS, device="cuda").completions()
    assert completions == [reference_completion(spec) for spec in SPECS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_is_edited_as_on_the_cpu(dtype):
    torch.manual_seed(0)
    settings = [
        {"repetition_penalty": 1.3, "frequency_penalty": 0.7},
        {"allowed_token_ids": list(range(0, VOCAB_SIZE, 3)), "presence_penalty": -1.0},
        {"logit_bias": {VOCAB_SIZE - 1: 5.0, 0: -3.0}, "min_tokens": 50},
    ] * 40  # more rows than are edited at once
    logits = torch.randn(len(settings), VOCAB_SIZE).to(dtype)
    prompts = torch.randint(VOCAB_SIZE, (len(settings), 30)).tolist()
    edited, tokens = {}, {}
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        seqs = []
        for row, (prompt, params) in enumerate(zip(prompts, settings, strict=True)):
            seq = Sequence(prompt[:10], SamplingParams(temperature=0, max_tokens=60, **params))
            seq.token_ids += prompt[10:]
            seq.row, seq.num_computed_tokens = row, 30
            seq.features.bad_word_ids = [[prompt[-1], 7], [8]]
            seq.end_token_ids = frozenset((1, VOCAB_SIZE - 2))
            seqs.append(seq)
        ops = select_ops("auto", device, dtype, 16, compile_torch_ops=False)
        sampler = LogitsSampler(ops, device, VOCAB_SIZE, len(seqs), 128)
        sampler.begin(seqs)
        positions = torch.full((len(seqs),), 29, dtype=torch.int32, device=device)
        on_device = logits.to(device)
        tokens[device.type] = sampler.sample(on_device, seqs, positions).token_ids.tolist()
        first = sampler._batch.edited[0]
        rows = on_device.index_select(0, first.indices)
        edited[device.type] = first.edit(rows, positions[: len(rows)], EditReport())[
            :, :VOCAB_SIZE
        ].cpu()
    torch.testing.assert_close(edited["cuda"], edited["cpu"], rtol=1e-5, atol=1e-5)
    assert tokens["cuda"] == tokens["cpu"]
