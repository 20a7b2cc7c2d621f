"""perplexity.py: its numbers are those of transformers, by prefill and by decode steps."""

import json
import math
import sys

import perplexity
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, Qwen3ForCausalLM

WINDOW, STRIDE = 288, 32
MAX_TOKENS = 576  # more than one group of windows


@pytest.fixture(scope="module")
def result(tiny_dir):
    """The parsed last line; smaller windows than the script's, so that it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "WINDOW": WINDOW,
            "STRIDE": STRIDE,
            "CONTEXT": WINDOW - STRIDE,
            "CHUNK": 32,
            "BLOCKS_PER_WINDOW": 2,
        }.items():
            patch.setattr(perplexity, name, value)
        lines: list[str] = []
        patch.setattr("builtins.print", lambda line: lines.append(line))
        arguments = ["--model", str(tiny_dir), "--device", "cpu", "--max-tokens", str(MAX_TOKENS)]
        patch.setattr(sys, "argv", ["perplexity.py", *arguments])
        perplexity.main()
    assert len(lines) == 2 + 2 * len(perplexity.CONFIGURATIONS) + 1
    return json.loads(lines[-1])


@torch.inference_mode()
def test_float32_without_quantisation_is_what_transformers_computes(result, tiny_dir):
    model = Qwen3ForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    paths = (perplexity.REPO / "README.md", perplexity.REPO / "LICENSE")
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in paths)
    token_ids = torch.tensor(tokenizer.encode(text)[: MAX_TOKENS + 1])
    nats, scored = 0.0, []
    for begin in range(0, len(token_ids) - WINDOW, STRIDE):
        window = token_ids[begin : begin + WINDOW + 1]
        targets = window[-STRIDE:]
        logits = model(window[None, :-1]).logits[0, -STRIDE:]
        nats += F.cross_entropy(logits, targets, reduction="sum").item()
        scored += targets.tolist()
    score = result["scores"][0]
    assert (score["dtype"], score["kv_cache_dtype"]) == ("float32", "auto")
    bits = nats / math.log(2) / len(tokenizer.decode(scored).encode())
    for steps in ("prefill", "decode"):
        assert score[f"{steps}_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        assert score[f"{steps}_perplexity"] == pytest.approx(math.exp(nats / len(scored)), rel=1e-5)


def test_quantisation_costs_little_and_something(result):
    """Random weights are no model of text, but prefill and decode must lose alike."""
    plain, fp8 = result["scores"][:2]
    assert (fp8["dtype"], fp8["kv_cache_dtype"]) == ("float32", "fp8")
    assert fp8["prefill_bits_per_byte"] != plain["prefill_bits_per_byte"]
    assert fp8["prefill_bits_per_byte"] == pytest.approx(plain["prefill_bits_per_byte"], rel=0.02)
    assert fp8["decode_bits_per_byte"] == pytest.approx(fp8["prefill_bits_per_byte"], rel=1e-3)
    assert plain["kv_bytes_per_token"] == 2 * 3 * 4 * 16 * 4
    assert fp8["kv_bytes_per_token"] == 2 * 3 * 4 * (16 + 4)
