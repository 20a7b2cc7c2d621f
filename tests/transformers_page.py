"""What of transformers' causal language models runs: for docs/models.md and README.md.

`python tests/transformers_page.py` tries them all, prints a table and writes both.
"""

import re
from pathlib import Path

import transformers
from tiny_transformers import Outcome, architectures, outcome

REPO = Path(__file__).resolve().parents[1]
MODELS, README = REPO / "docs" / "models.md", REPO / "README.md"
BEGIN, END = "<!-- transformers: made by a script -->", "<!-- transformers: end -->"
NUMBERS = re.compile(r"\d+( of the )\d+(\s+causal language models of transformers )\d+\.\d+\.\d+")


KINDS = ("equal", "refused", "not tried")


def sentence(num_equal: int) -> str:
    """The count, as README.md has it."""
    return (
        f"{num_equal} of the {len(architectures())} causal language models of transformers "
        f"{transformers.__version__}"
    )


def documented() -> dict[str, list[str]]:
    """The architectures that docs/models.md lists, by their kind of outcome."""
    text = MODELS.read_text("utf-8").split(BEGIN)[1].split(END)[0]
    lists = [re.findall(r"`(\w+)`", line) for line in text.splitlines() if line.startswith("`")]
    return dict(zip(KINDS, lists, strict=True))


def documented_limits() -> tuple[set[str], set[str]]:
    """Those that docs/models.md lists as running without CUDA graphs, and on one rank only."""
    text = MODELS.read_text("utf-8").split(BEGIN)[1].split(END)[0]
    lines = [line for line in text.splitlines() if line.startswith("* ")]
    eager = {line.split("`")[1] for line in lines if ": " in line}
    [alone] = [set(re.findall(r"`(\w+)`", line)) for line in lines if ": " not in line]
    return eager, alone


def named(found: dict[str, Outcome], kind: str) -> list[str]:
    """The architectures whose outcome is of a kind."""
    return [name for name, result in found.items() if result.kind == kind]


def section(found: dict[str, Outcome]) -> str:
    """The lists of docs/models.md."""
    parts = [
        "Transformers' own greedy tokens, in float32 and with tiny random weights, come from "
        f"{sentence(len(named(found, 'equal')))}:",
        _listed(named(found, "equal")),
        "Of these, decoding is not captured in CUDA graphs for:",
        "\n".join(
            f"* `{name}`: {re.sub(r':[0-9]+', '', result.eager_reason)}."
            for name, result in found.items()
            if result.eager_reason is not None
        ),
        "And transformers has no plan of tensor parallelism that is supported here for:",
        "* " + _listed([n for n, r in found.items() if r.kind == "equal" and not r.has_plan]),
        "Refused by name, as they mix tokens by other means than attention over a KV cache, do not "
        "take an attention function, or mask in a way of their own:",
        _listed(named(found, "refused")),
        "Not tried, as no tiny model of them could be made. They run if their check passes:",
        _listed(named(found, "not tried")),
    ]
    return "\n\n".join(parts)


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) + "."


def with_section(text: str, found: dict[str, Outcome]) -> str:
    """docs/models.md with the lists in it."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{section(found)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    found = {name: outcome(name) for name in sorted(architectures())}
    for name, result in found.items():
        print(f"{name:45} {result.kind:10} {result.reason}")
    MODELS.write_text(with_section(MODELS.read_text("utf-8"), found), "utf-8")
    num_equal = len(named(found, "equal"))
    numbers = rf"{num_equal}\g<1>{len(found)}\g<2>{transformers.__version__}"
    README.write_text(NUMBERS.sub(numbers, README.read_text("utf-8")), "utf-8")
