"""Answers two questions with Qwen3-0.6B if it is on this machine, else goes on with two novels."""

import os
import sys
from pathlib import Path

from transformers import AutoTokenizer

import nanovllm
from nanovllm import LLM, SamplingParams

QWEN3 = os.path.expanduser("~/huggingface/Qwen3-0.6B/")
SHIPPED = str(Path(nanovllm.__file__).parent / "assets" / "austen-7m")


def main() -> None:
    """Complete the prompts and print them with their completions."""
    path = QWEN3 if os.path.isdir(QWEN3) else SHIPPED
    print(f"Model: {path}", file=sys.stderr)
    llm = LLM(path, enforce_eager=True, tensor_parallel_size=1)

    sampling_params = SamplingParams(temperature=0.6, max_tokens=256)
    if path == QWEN3:
        tokenizer = AutoTokenizer.from_pretrained(path)
        prompts = [
            "introduce yourself",
            "list all prime numbers within 100",
        ]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for prompt in prompts
        ]
    else:  # a model of 7 M parameters that goes on with prose and answers nothing
        prompts = [
            "It was a cold morning, and",
            "Elizabeth was sitting by the window when",
        ]
    outputs = llm.generate(prompts, sampling_params)

    for prompt, output in zip(prompts, outputs, strict=True):
        print("\n")
        print(f"Prompt: {prompt!r}")
        print(f"Completion: {output['text']!r}")


if __name__ == "__main__":
    main()
