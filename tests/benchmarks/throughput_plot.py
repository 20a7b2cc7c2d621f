"""Draws the benchmark table of README.md as bars; run by hand after the table has changed:

    python tests/benchmarks/throughput_plot.py

It needs nothing but Python. Every row of speeds becomes a panel of docs/throughput.svg.
"""

import re
from pathlib import Path
from textwrap import wrap
from xml.sax.saxutils import escape

REPO = Path(__file__).resolve().parents[2]
PICTURE = REPO / "docs" / "throughput.svg"
COLUMNS = 4  # of panels
PANEL_WIDTH, PANEL_TOP, BAR_STEP, BAR_HEIGHT = 212, 44, 16, 11
NAME_WIDTH, NUMBER_WIDTH = 76, 50  # left and right of the bars
OURS, OTHERS = "#1f77b4", "#b8bcc2"
FONT = "font-family=\"'DejaVu Sans', Verdana, Arial, sans-serif\""

Panel = tuple[str, dict[str, int]]  # a workload, tokens/s of each engine that was measured


def read_table(text: str) -> list[Panel]:
    """The rows of the table of workloads, without cells that are no integers."""
    table = text[text.index("| workload ") :].partition("\n\n")[0]
    heading, _, *rows = (
        [cell.strip(" *`") for cell in line.split("|")[1:-1]] for line in table.splitlines()
    )
    panels = []
    for workload, *cells in rows:
        speeds = {
            engine: int(cell.replace(",", ""))
            for engine, cell in zip(heading[1:], cells, strict=True)
            if re.fullmatch(r"[\d,]+", cell)
        }
        if speeds:
            panels.append((workload.replace("`", ""), speeds))
    return panels


def draw(panels: list[Panel]) -> str:
    """The panels as an SVG."""
    num_bars = max(len(speeds) for _, speeds in panels)
    height = PANEL_TOP + num_bars * BAR_STEP + 12
    num_rows = -(-len(panels) // COLUMNS)
    width, total = COLUMNS * PANEL_WIDTH + 8, num_rows * height + 8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" '
        f'width="{width}" height="{total}" {FONT} font-size="10">',
        "<title>Tokens per second of each workload in README.md's table</title>",
        f'<rect width="{width}" height="{total}" fill="#ffffff"/>',
    ]
    for number, (workload, speeds) in enumerate(panels):
        left = 8 + number % COLUMNS * PANEL_WIDTH
        lines += _panel(left, number // COLUMNS * height, workload, speeds)
    return "\n".join([*lines, "</svg>", ""])


def _panel(left: int, top: int, workload: str, speeds: dict[str, int]) -> list[str]:
    title = wrap(workload, 34)
    first = top + 34 - 13 * (len(title) - 1)
    lines = [
        f'<text x="{left}" y="{first + 13 * i}" font-size="11" fill="#000000">{escape(line)}</text>'
        for i, line in enumerate(title)
    ]
    scale = (PANEL_WIDTH - NAME_WIDTH - NUMBER_WIDTH) / max(speeds.values())
    for i, (engine, speed) in enumerate(speeds.items()):
        y = top + PANEL_TOP + i * BAR_STEP
        bar, length = left + NAME_WIDTH, speed * scale
        name = engine.split(" ")[0]
        lines += [
            f'<text x="{bar - 4}" y="{y + 9}" text-anchor="end" fill="#333333">{name}</text>',
            f'<rect x="{bar}" y="{y}" width="{length:.1f}" height="{BAR_HEIGHT}" '
            f'fill="{OTHERS if i else OURS}"/>',
            f'<text x="{bar + length + 3:.1f}" y="{y + 9}" fill="#333333">{speed:,}</text>',
        ]
    return lines


if __name__ == "__main__":
    PICTURE.write_text(draw(read_table((REPO / "README.md").read_text("utf-8"))), "utf-8")
