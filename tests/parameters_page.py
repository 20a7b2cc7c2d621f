"""docs/parameters.md, made of the declarations: `python tests/parameters_page.py` writes it."""

from dataclasses import MISSING
from pathlib import Path

from nanovllm.config import Config
from nanovllm.parameters import parameters
from nanovllm.pooling_params import PoolerConfig, PoolingParams
from nanovllm.sampling_params import BeamSearchParams, SamplingParams

PATH = Path(__file__).resolve().parents[1] / "docs" / "parameters.md"
INTRODUCTION = """\
# Parameters

This page is made of the declarations in `nanovllm/config.py`, `nanovllm/sampling_params.py` and
`nanovllm/pooling_params.py`, as are `help(nanovllm.LLM)`, `help(nanovllm.SamplingParams)` and
`python -m nanovllm.batch --help`. A value of another type or outside the limits is refused with an
`ArgumentError`.
"""
SECTIONS = (
    (
        "Engine parameters",
        "Keywords of `LLM(model, ...)`. A name in parentheses is vLLM's, and means the same.",
        Config,
    ),
    (
        "Sampling parameters",
        "Of `SamplingParams(temperature, max_tokens, ignore_eos, ...)`. All but these three are "
        "given by name.",
        SamplingParams,
    ),
    (
        "Beam search",
        "Of `BeamSearchParams(beam_width, max_tokens, ...)`, for `beam_search`.",
        BeamSearchParams,
    ),
    (
        "Pooling parameters",
        "Of `PoolingParams(...)`: arguments of `embed`, `encode`, `classify`, `reward`, `score`.",
        PoolingParams,
    ),
    (
        "Pooler configuration",
        "Of `PoolerConfig(...)`, or of a dict with these keys: the engine's `pooler_config`.",
        PoolerConfig,
    ),
)


def page() -> str:
    """The text of docs/parameters.md."""
    parts = [INTRODUCTION]
    for title, introduction, declared in SECTIONS:
        rows = ["| parameter | default | values | meaning |", "| --- | --- | --- | --- |"]
        for p in parameters(declared):
            name = f"`{p.name}`" + "".join(f" (`{alias}`)" for alias in p.aliases)
            default = "required" if p.default is MISSING else f"`{p.shown_default}`"
            rows.append(f"| {name} | {default} | {p.limits} | {p.help} |")
        parts.append(f"## {title}\n\n{introduction}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PATH.write_text(page())
