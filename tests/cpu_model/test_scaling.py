"""tests/benchmarks/scaling.py on a tiny model: both series, what their tables say, and the plot."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import scaling
from timing import RowResult
from workloads import ROWS

RESULT = RowResult(
    name="context 1024",
    unit="output",
    seconds=5.0,
    tokens_per_second=12.0,
    prefill_seconds=2.0,
    decode_seconds=3.0,
    prefill_steps=1,
    decode_steps=9,
    mean_decode_batch=4.0,
    prompt_tokens=4 * 1024,
    computed_prompt_tokens=4 * 1000,
    output_tokens=40,
    preemptions=0,
    kv_bytes_read=6 * 10**12,
    kv_bytes_per_second=0.0,
    prefill_flops=0,
    limit_seconds=1.0,
    share_of_limit=0.25,
    all_seconds=[5.0],
)


@pytest.fixture
def output(shallow_dir, monkeypatch, capsys):
    assert scaling.BENCH_LEN == ROWS[0].input_len == ROWS[0].output_len
    monkeypatch.setattr(scaling, "BENCH_LEN", (10, 40))
    options = "--device cpu --num-kvcache-blocks 64 --requests 1 2 --output-len 6"
    contexts = "--contexts 30 60 5000 --batch-size 3".split()
    scaling.main(["--model", str(shallow_dir), *options.split(), *contexts])
    return capsys.readouterr().out


def test_both_series_and_what_does_not_fit(output):
    *lines, last_line = output.splitlines()
    summary = json.loads(last_line)
    assert [row["name"] for row in summary["requests"]] == ["1 requests", "2 requests"]
    assert [row["name"] for row in summary["contexts"]] == ["context 30", "context 60"]
    assert "context 5000: 5006 tokens, the limit is 2048" in lines
    for row, length in zip(summary["contexts"], (30, 60), strict=True):
        assert row["prompt_tokens"] == 3 * length
        assert (row["decode_steps"], row["mean_decode_batch"]) == (5, 3)
    for row, count in zip(summary["requests"], (1, 2), strict=True):
        assert 10 * count <= row["prompt_tokens"] <= 40 * count
        assert 10 * count <= row["output_tokens"] <= 40 * count


def test_tables():
    rows = [replace(RESULT, name="2048 requests")]
    assert scaling.format_requests(rows).splitlines()[-1] == "| 2,048 | 40 | 5.00 | 12 | 4 | 25% |"
    assert scaling.format_contexts([RESULT]).splitlines()[-1] == "| 1,024 | 2,000 | 12 | 2.00 |"


def saved(tmp_path):
    path = tmp_path / "earlier.json"
    series = {"requests": [], "contexts": []}
    for i in range(7):
        speed = 1000.0 * (i + 1)
        request = replace(RESULT, name=f"{64 << i} requests", tokens_per_second=speed)
        series["requests"].append(vars(request))
        series["contexts"].append(vars(replace(RESULT, name=f"context {1024 << i}")))
    path.write_text("a line before\n" + json.dumps(series) + "\n")
    return path


def test_the_plot_is_drawn_from_an_earlier_output(tmp_path):
    pytest.importorskip("matplotlib")
    svg = tmp_path / "scaling.svg"
    scaling.main(["--from-json", str(saved(tmp_path)), "--svg", str(svg)])
    assert svg.stat().st_size < 60_000
    text = " ".join(ElementTree.parse(svg).getroot().itertext())
    for label in ("4 requests", "4,096", "32,768", "output tokens/s", "decode, tokens/s"):
        assert label in text


def test_without_matplotlib_there_is_a_message_and_no_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    svg = tmp_path / "scaling.svg"
    scaling.main(["--from-json", str(saved(tmp_path)), "--svg", str(svg)])
    assert not svg.exists()
    assert "matplotlib is not installed" in capsys.readouterr().out
