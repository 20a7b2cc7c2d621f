"""The tables of docs/migrating.md that are made of compat.py and vllm_ports.py.

`python tests/migrating_page.py` writes them between their markers.
"""

import re
from pathlib import Path
from typing import Any

from vllm_ports import examples_table, tests_table

from nanovllm.compat import (
    POOLING_HINTS,
    POOLING_NAMES,
    POOLING_OFF,
    SAMPLING_HINTS,
    SAMPLING_OFF,
    STRUCTURED_HINTS,
    STRUCTURED_OFF,
    VLLM_ABSENT,
)

PATH = Path(__file__).resolve().parents[1] / "docs" / "migrating.md"


def absent_table() -> str:
    """vLLM's parameters of the constructor that are not here, those of one reason in one row."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, (values, why) in VLLM_ABSENT.items():
        taken = "anything" if values is None else ", ".join(f"`{v!r}`" for v in values) or "off"
        groups.setdefault((taken, why), []).append(f"`{name}`")
    rows = ["| vLLM's parameter | taken | else |", "| --- | --- | --- |"]
    rows += [f"| {', '.join(names)} | {taken} | {why} |" for (taken, why), names in groups.items()]
    return "\n".join(rows)


def requests_table() -> str:
    """vLLM's parameters of requests that are not here."""
    rows = ["| of | vLLM's parameter | taken | else |", "| --- | --- | --- | --- |"]
    renamed = {n: f"write {POOLING_NAMES[n]}" for n in POOLING_OFF if n in POOLING_NAMES}
    for owner, off, hints in (
        ("SamplingParams", SAMPLING_OFF, SAMPLING_HINTS),
        ("StructuredOutputsParams", STRUCTURED_OFF, STRUCTURED_HINTS),
        ("PoolingParams", POOLING_OFF, POOLING_HINTS | renamed),
    ):
        for name, values in off.items():
            taken = ", ".join(f"`{getattr(v, 'name', v)!s}`" for v in values)
            rows.append(f"| `{owner}` | `{name}` | {taken} | {hints.get(name, 'nothing')} |")
    return "\n".join(rows)


TABLES = {
    "parameters that are not here": absent_table,
    "parameters of requests that are not here": requests_table,
    "vLLM's examples": examples_table,
    "vLLM's tests": tests_table,
}


def page(text: str) -> str:
    """The page's text with its tables as they should be."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        pattern = re.escape(start) + ".*?" + re.escape(end)

        def made(_: Any, lines: str = start + table() + end) -> str:
            return lines

        text, count = re.subn(pattern, made, text, flags=re.DOTALL)
        assert count == 1, f"no place for the table of {name}"
    return text


if __name__ == "__main__":
    PATH.write_text(page(PATH.read_text("utf-8")), "utf-8")
