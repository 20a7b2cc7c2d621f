"""Greedy completions by transformers, in few calls. Apart, as scripts import none of it."""

from pathlib import Path

from engine_checks import generate, greedy, tiny_engine
from tiny_models import reference_greedy


def quick_reference(model_dir: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """`reference_greedy`, faster: transformers is told what a plain engine gives."""
    with tiny_engine(model_dir, dtype="float32") as llm:
        guesses = generate(llm, prompts, greedy(max_tokens))
    return reference_greedy(model_dir, prompts, max_tokens, guesses)
