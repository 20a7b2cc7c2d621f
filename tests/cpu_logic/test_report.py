"""The report of a run: sums that stay exact, a page that stands alone, a file that is whole."""

import os
import random
import re
import shutil
import struct
import subprocess
import tempfile
import time
import tracemalloc
import zlib
from dataclasses import make_dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from nanovllm import ArgumentError
from nanovllm.features import report
from nanovllm.features.report import Recorder, settings_of
from nanovllm.features.run_record import MAX_INTERVALS, NUM_SLOWEST, Distribution, RunRecord
from nanovllm.outputs import RequestMetrics
from nanovllm.stats import FinishedRequestStats, StepStats
from nanovllm.validation import check_output_path

NUM_BLOCKS = 100


class Steps:
    """Makes steps one after the other, on a clock of its own.

    It starts long before `perf_counter`'s, so that a recorder never thinks that a page is due.
    """

    def __init__(self, start: float = -1e9) -> None:
        self.time = start
        self.totals = dict.fromkeys(("prompt", "generation", "queries", "hits", "preemptions"), 0)
        self.finished = {"stop": 0, "length": 0, "abort": 0}
        self.num_requests = 0

    def step(
        self,
        seconds=0.01,
        is_prefill=False,
        num_seqs=4,
        num_tokens=None,
        num_waiting=0,
        num_used_blocks=10,
        **added,
    ) -> StepStats:
        self.time += seconds
        added.setdefault("generation", num_seqs)
        for name, number in added.items():
            self.totals[name] += number
        return StepStats(
            is_prefill,
            num_seqs,
            num_seqs if num_tokens is None else num_tokens,
            seconds,
            self.time,
            num_seqs,
            num_waiting,
            num_used_blocks,
            NUM_BLOCKS,
            *self.totals.values(),
            self.finished,
        )

    def request(
        self, running=1.0, waiting=0.5, reasons=("stop",), **fields
    ) -> FinishedRequestStats:
        for reason in reasons:
            self.finished[reason] += 1
        self.num_requests += 1
        metrics = RequestMetrics(100.0, 100.0 + waiting, 100.0 + waiting + running)
        numbers = {"num_prompt_tokens": 8, "num_cached_tokens": 0, "num_generation_tokens": 4}
        return FinishedRequestStats(
            self.num_requests, **(numbers | fields), finish_reasons=list(reasons), metrics=metrics
        )


def recorder_at(path: Path, **settings: str) -> Recorder:
    return Recorder(str(path), "a model", settings, max_num_seqs=8)


def tree_of(page: str) -> ElementTree.Element:
    """The page is XML too, so that nothing in it is left open or unescaped."""
    return ElementTree.fromstring(page)


def numbers_of(page: str) -> dict[str, int]:
    return {data.get("id"): int(data.get("value")) for data in tree_of(page).iter("data")}


def chart_of(page: str, title: str) -> ElementTree.Element:
    [figure] = [
        f for f in tree_of(page).iter("figure") if f.find("figcaption/strong").text == title
    ]
    return figure


def heights_of(figure: ElementTree.Element, kind: str = "line") -> list[float]:
    """The values of a chart's steps, read off its axis."""
    ticks = [text for text in figure.iter("text") if text.get("text-anchor") == "end"]
    factors = {"k": 1e3, "M": 1e6}
    values = [
        float(t.text.rstrip("kM").replace(",", "")) * factors.get(t.text[-1], 1) for t in ticks
    ]
    pixels = [float(t.get("y")) - 4 for t in ticks]
    scale = (values[-1] - values[0]) / (pixels[-1] - pixels[0])
    [path] = [path for path in figure.iter("path") if path.get("class") == kind]
    steps = re.findall(r"V([\d.]+)H", path.get("d"))
    return [values[0] + (float(y) - pixels[0]) * scale for y in steps]


# ---- sums ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_sums_are_exact_however_long_the_run_and_its_steps_are(seed):
    rng, steps, run = random.Random(seed), Steps(), RunRecord()
    num_steps = {True: 0, False: 0}
    seconds = {True: 0.0, False: 0.0}
    num_prefill_tokens = most_waiting = 0
    for _ in range(3000):
        is_prefill = rng.random() < 0.2
        if rng.random() < 0.01:
            steps.time += 10 ** rng.uniform(-2, 4)  # nothing runs
        step = steps.step(
            seconds=10 ** rng.uniform(-4, 1),
            is_prefill=is_prefill,
            num_seqs=rng.randrange(1, 500),
            num_tokens=rng.randrange(1, 20000) if is_prefill else None,
            num_waiting=rng.randrange(1000),
            queries=rng.randrange(100),
            hits=rng.randrange(50),
            preemptions=rng.randrange(3),
        )
        num_steps[is_prefill] += 1
        seconds[is_prefill] += step.seconds
        num_prefill_tokens += step.num_tokens if is_prefill else 0
        most_waiting = max(most_waiting, step.num_waiting)
        run.add(step, [])
    assert run.seconds > 3600
    assert len(run.intervals) <= MAX_INTERVALS
    for width, intervals in ((run.width, run.intervals), run.merged(100), run.merged(1)):
        sums = {name: sum(getattr(i, name) for i in intervals) for name in intervals[0].__slots__}
        assert sums["num_generation_tokens"] == steps.totals["generation"]
        assert sums["num_prefill_tokens"] == num_prefill_tokens == run.num_prefill_tokens
        assert sums["num_prefix_cache_queries"] == steps.totals["queries"]
        assert sums["num_prefix_cache_hits"] == steps.totals["hits"]
        assert sums["num_preemptions"] == steps.totals["preemptions"]
        assert (sums["num_prefills"], sums["num_decodes"]) == (num_steps[True], num_steps[False])
        assert sums["prefill_seconds"] == pytest.approx(seconds[True])
        assert sums["decode_seconds"] == pytest.approx(seconds[False])
        assert sums["seconds"] == pytest.approx(seconds[True] + seconds[False])
        assert max(i.max_waiting for i in intervals) == most_waiting
        assert (len(intervals) - 1) * width <= run.seconds < len(intervals) * width
    assert len(run.merged(1)[1]) == 1


def test_merging_for_a_chart_leaves_the_record_alone(tmp_path):
    steps, recorder = Steps(), recorder_at(tmp_path / "run.html")
    for _ in range(500):
        recorder.record(steps.step(), [])
    assert recorder.page("ended")
    before = list(map(repr, recorder.run.intervals))
    assert recorder.page("ended") and recorder.run.merged(3)
    assert list(map(repr, recorder.run.intervals)) == before


def test_a_long_steps_tokens_are_spread_over_its_time():
    steps, run = Steps(), RunRecord()
    run.add(steps.step(seconds=1.0, is_prefill=True, num_tokens=6400, generation=2), [])
    tokens = [interval.num_prefill_tokens for interval in run.intervals]
    assert len(tokens) == 65  # of 1/64 s each; the last one only begins
    assert set(tokens[:64]) == {100} and tokens[64] == 0
    assert [interval.num_prefills for interval in run.intervals] == [0] * 64 + [1]


def test_queue_and_blocks_are_means_over_time():
    steps, run = Steps(), RunRecord()
    run.add(steps.step(seconds=3.0, num_waiting=10, num_used_blocks=40), [])
    run.add(steps.step(seconds=1.0, num_waiting=2, num_used_blocks=80), [])
    [interval] = run.merged(1)[1]
    assert interval.waiting_seconds / interval.seconds == pytest.approx((3 * 10 + 2) / 4)
    assert interval.block_seconds / interval.seconds == pytest.approx((3 * 40 + 80) / 4)
    assert (interval.max_waiting, interval.max_used_blocks) == (10, 80)


def test_quantiles_are_within_five_percent():
    rng, durations = random.Random(1), Distribution()
    values = sorted(10 ** rng.uniform(-5, 2) for _ in range(2000))
    for value in rng.sample(values, len(values)):
        durations.add(value)
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = values[round(share * len(values)) - 1]
        assert durations.quantile(share) == pytest.approx(exact, rel=0.05)
    assert durations.highest == values[-1] >= durations.quantile(1.0)
    assert durations.mean == pytest.approx(sum(values) / len(values))
    assert Distribution().quantile(0.5) == Distribution().mean == 0


def test_the_slowest_are_kept_by_the_time_from_the_first_token():
    steps, run, rng = Steps(), RunRecord(), random.Random(2)
    times = [rng.random() for _ in range(300)]
    for seconds in times:
        run.add(steps.step(), [steps.request(running=seconds, waiting=rng.uniform(0, 9))])
    expected = sorted(range(300), key=times.__getitem__, reverse=True)[:NUM_SLOWEST]
    assert [request.request_id - 1 for request in run.slowest] == expected
    assert run.latencies.count == run.first_token_times.count == 300


def test_a_night_takes_no_more_memory_than_an_hour():
    steps, run = Steps(), RunRecord()

    def pass_time(hours):
        for _ in range(1000 * hours):
            run.add(steps.step(seconds=3.6), [steps.request()])

    pass_time(1)
    tracemalloc.start()
    pass_time(12)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert run.seconds == pytest.approx(13 * 3600)
    # 1024 intervals of 16 numbers; the steps and requests themselves would take 8 MB.
    assert grown < 1024 * (16 * 8 + 16 * 32 + 100)


# ---- the page -----------------------------------------------------------------------------------


def test_the_numbers_of_the_page_are_those_of_the_run(tmp_path):
    steps, recorder = Steps(), recorder_at(tmp_path / "run.html")
    recorder.record(
        steps.step(0.5, True, 3, 120, generation=3, prompt=150, queries=150, hits=30), []
    )
    recorder.record(steps.step(0.25, num_seqs=3, preemptions=1), [steps.request()])
    recorder.record(
        steps.step(0.25, num_seqs=2), [steps.request(reasons=("stop", "length", "length"))]
    )
    steps.finished["abort"] += 2  # after the last step
    page = recorder.page("ended")
    assert numbers_of(page) == {
        "generation_tokens": 8,
        "prompt_tokens": 150,
        "requests": 2,
        "prefix_cache_hits": 30,
        "prefix_cache_queries": 150,
        "preemptions": 1,
        "prefill_steps": 1,
        "prefill_step_tokens": 120,
        "decode_steps": 2,
        "decode_step_tokens": 5,
        "finished_stop": 2,
        "finished_length": 2,
        "finished_abort": 2,
    }
    assert "<strong>8 tok/s</strong> generated" in page  # within one second
    assert "20.0 %" in page  # of the prompt tokens were hits
    assert "prefill steps: 500 ms, 50.0 %" in page and "decode steps: 500 ms, 50.0 %" in page


def test_charts_show_what_was(tmp_path):
    steps, recorder = Steps(), recorder_at(tmp_path / "run.html")
    for number in range(2000):
        at_end = number >= 1000
        step = steps.step(
            0.01,
            num_seqs=6 if at_end else 3,
            num_waiting=0 if at_end else 50,
            num_used_blocks=90 if at_end else 60,
        )
        recorder.record(step, [])
    page = recorder.page("ended")
    for title, begin, end in (
        ("Tokens generated", 300, 600),
        ("Batch size of decode steps", 3, 6),
        ("Queue", 50, 0),
        ("KV blocks in use", 60, 90),
        ("Time of a decode step", 10, 10),
    ):
        heights = heights_of(chart_of(page, title))
        assert len(heights) > 100
        size = max(begin, end)
        middle = len(heights) // 2
        for found, expected in ((heights[2 : middle - 2], begin), (heights[middle + 2 : -2], end)):
            # A step more or less falls into an interval; and half a pixel.
            assert found == pytest.approx([expected] * len(found), abs=0.2 * size), title
            assert sum(found) / len(found) == pytest.approx(expected, abs=0.01 * size), title
    queue = chart_of(page, "Queue")
    assert queue.find("figcaption/small").text == "mean 25, highest 50"
    assert heights_of(queue, "peak")[2] == pytest.approx(50, abs=0.5)
    [limit] = [
        p for p in chart_of(page, "KV blocks in use").iter("path") if p.get("class") == "limit"
    ]
    assert limit is not None
    # Nothing was prefilled: all gap, and no number that was not measured.
    prefill = chart_of(page, "Time of a prefill step")
    assert prefill.find("figcaption/small").text == "none"
    assert heights_of(prefill) == [] if len(list(prefill.iter("text"))) > 9 else True


def test_a_page_stands_alone_and_says_everything_in_words_too(tmp_path):
    steps = Steps()
    name = "<script src='http://evil.invalid/x.js'>&\"'"
    recorder = Recorder(str(tmp_path / "x.html"), name, {"chat_template": shown_tag()}, 8)
    for _ in range(30):
        recorder.record(steps.step(), [steps.request()])
    page = recorder.page("ended")
    tree = tree_of(page)
    tags = {element.tag for element in tree.iter()}
    assert not tags & {"script", "img", "link", "iframe", "object", "image", "use", "a"}
    attributes = {key for element in tree.iter() for key in element.keys()}  # noqa: SIM118
    assert not attributes & {"src", "href", "srcset", "data", "onload", "onclick"}
    assert "url(" not in page and "@import" not in page
    assert tree.find("body/h1").text == f"A run of {name}"
    assert tree.get("lang") == "en" and tree.find("head/title").text
    for svg in tree.iter("svg"):
        assert svg.get("role") == "img" and svg.get("aria-label")
    for table in tree.iter("table"):
        widths = {len(list(row)) for row in table.iter("tr")}
        assert len(widths) == 1
        assert all(cell.get("scope") for cell in table.iter("th"))
    ids = [data.get("id") for data in tree.iter("data")]
    assert len(ids) == len(set(ids))


def shown_tag() -> str:
    return "'</td><img src=x onerror=alert(1)>'"


def test_hints_name_the_parameter_that_held_the_run_back(tmp_path):
    def hints(**step):
        steps, recorder = Steps(), recorder_at(tmp_path / "run.html")
        for _ in range(20):
            recorder.record(steps.step(**step), [steps.request()])
        found = [p for p in tree_of(recorder.page("ended")).iter("p") if p.get("class") == "hint"]
        return ["".join(hint.itertext()) for hint in found]

    assert hints() == []
    [full] = hints(num_seqs=8, num_waiting=5, num_used_blocks=40)
    assert "60% of the KV blocks were never used: a max_num_seqs above 8" in full
    [blocks] = hints(num_seqs=5, num_waiting=5, num_used_blocks=99)
    assert blocks.startswith("KV blocks, not max_num_seqs, limited the batch")
    [preempted] = hints(preemptions=1)
    assert "watermark" in preempted


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_the_shortest_runs_have_a_page(tmp_path, num_steps):
    steps, recorder = Steps(), recorder_at(tmp_path / "run.html")
    for _ in range(num_steps):
        recorder.record(steps.step(seconds=0.0), [])
    page = recorder.page("ended")
    assert ("No step was computed" in page) == (num_steps == 0)
    assert numbers_of(page).get("decode_steps", 0) == num_steps


def test_settings_are_what_differs_and_what_matters():
    names = [("model", str), ("max_num_seqs", int, 512), ("dtype", str, "auto"), ("seed", int, 0)]
    config = make_dataclass("Config", names)("m", dtype="float16")
    assert settings_of(config) == {"max_num_seqs": "512", "dtype": "'float16'"}


# ---- the file -----------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch) -> Steps:
    """Steps whose clock is the recorder's too."""
    made = Steps(time.perf_counter())
    clock = SimpleNamespace(
        perf_counter=lambda: made.time,
        time=time.time,
        strftime=time.strftime,
        localtime=time.localtime,
    )
    monkeypatch.setattr(report, "time", clock)
    return made


def test_the_page_is_refreshed_now_and_then_and_written_at_the_end(tmp_path, steps):
    path = tmp_path / "run.html"
    recorder = recorder_at(path)
    recorder.record(steps.step(seconds=20), [])
    assert not path.exists()
    recorder.record(steps.step(seconds=20), [])
    assert "The run goes on" in path.read_text()
    assert numbers_of(path.read_text())["decode_steps"] == 2
    recorder.record(steps.step(seconds=20), [])
    assert numbers_of(path.read_text())["decode_steps"] == 2
    recorder.close()
    assert "The run ended" in path.read_text()
    assert numbers_of(path.read_text())["decode_steps"] == 3
    path.write_text("somebody else's")
    recorder.close()
    assert path.read_text() == "somebody else's"
    assert os.listdir(tmp_path) == ["run.html"]


def test_writing_takes_a_small_share_of_the_time(tmp_path, steps):
    """On a slow disk the pauses grow."""
    pages = []
    recorder = recorder_at(tmp_path / "run.html")

    def write(state):
        pages.append(steps.time)
        steps.time += 2.0

    recorder._write = write
    for _ in range(10_000):
        recorder.record(steps.step(seconds=1.0), [])
    pauses = [after - before for before, after in pairwise(pages)]
    assert len(pages) > 5
    assert all(1000 <= pause <= 1010 for pause in pauses)


def test_a_page_that_cannot_be_written_hurts_no_run(tmp_path, steps, caplog):
    folder = tmp_path / "gone"
    folder.mkdir()
    recorder = recorder_at(folder / "run.html")
    folder.rmdir()
    for _ in range(10):
        recorder.record(steps.step(seconds=40), [])
    recorder.close()
    assert len(caplog.messages) == 2  # at first and at the end
    assert all("run.html was not written: FileNotFoundError" in text for text in caplog.messages)


def test_the_older_page_stays_whole_if_the_new_one_fails(tmp_path, caplog, monkeypatch):
    path = tmp_path / "run.html"
    path.write_text("older")
    recorder = recorder_at(path)
    monkeypatch.setattr(recorder, "page", lambda state: 1 / 0)
    recorder.close()
    assert path.read_text() == "older"
    assert "ZeroDivisionError" in caplog.text
    assert os.listdir(tmp_path) == ["run.html"]


def test_a_forked_child_writes_nothing(tmp_path):
    path = tmp_path / "run.html"
    recorder = recorder_at(path)
    if not (process_id := os.fork()):
        try:
            recorder.close()
        finally:
            os._exit(0)
    os.waitpid(process_id, 0)
    assert not path.exists()
    recorder.close()
    assert path.exists()


def test_paths_are_checked_before_anything_else(tmp_path):
    older = tmp_path / "older.html"
    older.write_text("older")
    (tmp_path / "link.html").symlink_to(older)
    assert check_output_path("record", older) == str(older)
    assert check_output_path("record", str(tmp_path / "link.html")) == str(older)
    assert check_output_path("record", str(tmp_path / "new.html")) == str(tmp_path / "new.html")
    assert older.read_text() == "older"
    assert sorted(os.listdir(tmp_path)) == ["link.html", "older.html"]
    for wrong in (
        *("", str(tmp_path), str(tmp_path / "no" / "x.html"), str(older / "x.html"), "/dev/null"),
        *("\ud800", "a\0b", "x" * 300, b"run.html", 1, True, [], object()),
    ):
        with pytest.raises(ArgumentError, match="^record cannot be written, got ") as raised:
            check_output_path("record", wrong)
        assert len(str(raised.value)) < 500


# ---- in a browser -------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
WIDTH, HEIGHT = 640, 1100


def look_at(page: Path, folder: Path, *options: str) -> tuple[list[str], dict[str, int]]:
    """What a browser tells on its console, and how many pixels have which color."""
    picture = folder / "picture.png"
    # The path of its socket must be short, so its own files do not lie in pytest's folder.
    with tempfile.TemporaryDirectory() as own:
        command = [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND"),
            *("--enable-logging=stderr", f"--user-data-dir={own}"),
            f"--window-size={WIDTH},{HEIGHT}",
            *(f"--screenshot={picture}", *options, page.as_uri()),
        ]
        environment = os.environ | {"HOME": own, "TMPDIR": own}
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=600
        )
    assert result.returncode == 0, result.stderr
    console = [line for line in result.stderr.splitlines() if ":CONSOLE" in line]
    return console, colors_of(picture.read_bytes())


def colors_of(png: bytes) -> dict[str, int]:
    """How many pixels of a PNG have which color, as "1f6feb"."""
    data, offset = b"", 8
    while offset < len(png):
        length, kind = struct.unpack_from(">I4s", png, offset)
        if kind == b"IHDR":
            width, height, depth, color_type = struct.unpack_from(">IIBB", png, offset + 8)
        elif kind == b"IDAT":
            data += png[offset + 8 : offset + 8 + length]
        offset += length + 12
    assert (width, height, depth) == (WIDTH, HEIGHT, 8) and color_type in (2, 6)
    step = {2: 3, 6: 4}[color_type]
    raw, size = zlib.decompress(data), width * step
    above, counts = bytes(size), {}
    for y in range(height):
        kind = raw[y * (size + 1)]
        row = bytearray(raw[y * (size + 1) + 1 : (y + 1) * (size + 1)])
        for x in range(size) if kind else ():
            left, up = row[x - step] if x >= step else 0, above[x]
            corner = above[x - step] if x >= step else 0
            if kind == 4:  # the neighbour that is closest to left + up - corner
                guess = min((left, up, corner), key=lambda n: abs(left + up - corner - n))
            else:
                guess = {1: left, 2: up, 3: (left + up) // 2}[kind]
            row[x] = (row[x] + guess) & 255
        for x in range(0, size, step):
            color = row[x : x + 3].hex()
            counts[color] = counts.get(color, 0) + 1
        above = bytes(row)
    return counts


@pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)}")
def test_a_browser_draws_the_page_and_asks_for_nothing_else(tmp_path):
    steps, rng = Steps(), random.Random(3)
    recorder = recorder_at(tmp_path / "run.html", max_num_seqs="8")
    for number in range(600):
        is_prefill = number % 10 == 0
        step = steps.step(
            0.03,
            is_prefill=is_prefill,
            num_seqs=rng.randrange(1, 9),
            num_tokens=500 if is_prefill else None,
            num_waiting=600 - number,
            num_used_blocks=rng.randrange(100),
            queries=500 * is_prefill,
            hits=200 * is_prefill,
        )
        recorder.record(step, [steps.request()])
    recorder.close()
    page = tmp_path / "run.html"
    console, colors = look_at(page, tmp_path, "--blink-settings=preferredColorScheme=1")
    assert console == []
    total = WIDTH * HEIGHT
    assert sum(colors.values()) == total
    assert colors["f6f7f9"] > 0.05 * total and colors["ffffff"] > 0.2 * total  # page and cards
    assert colors["1f6feb"] > 3000  # decode steps, lines
    assert colors["d9822b"] > 500  # prefill steps
    assert len(colors) > 100  # letters
    console, colors = look_at(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert console == []
    assert colors["12161c"] > 0.05 * total and "f6f7f9" not in colors
    # What this test would see if the page asked for more.
    asking = tmp_path / "asking.html"
    image = "<img src='http://example.invalid/x.png'/></body>"
    asking.write_text(page.read_text().replace("</body>", image))
    console, _ = look_at(asking, tmp_path)
    assert len(console) == 1 and "http://example.invalid/x.png" in console[0]
