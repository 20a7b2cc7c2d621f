"""A report of a run: one HTML page with charts, which needs nothing but itself."""

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import fields
from functools import partial
from html import escape
from math import floor, log10
from typing import TYPE_CHECKING

from nanovllm.errors import describe, shown
from nanovllm.features.run_record import Distribution, Interval, RunRecord, running_seconds
from nanovllm.models.hub import name_of
from nanovllm.stats import FinishedRequestStats, StepStats

if TYPE_CHECKING:
    from nanovllm.config import Config
    from nanovllm.engine.llm_engine import LLMEngine

REFRESH_SECONDS = 30.0
MAX_WRITING_SHARE = 1 / 500  # of the run's time
# Steps that are counted together: one by one, between two steps, each takes ten times as long, as
# neither code nor numbers are in the processor's caches then.
MAX_PENDING = 256
# Shown at their defaults too: what the size of a step and of the cache depends on.
ALWAYS_SHOWN = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_kvcache_blocks")

logger = logging.getLogger("nanovllm")


def start(llm: "LLMEngine", path: str) -> None:
    """Keep a record of all steps from now on, and its page at `path`."""
    config = llm.config
    recorder = Recorder(path, name_of(config.model), settings_of(config), config.max_num_seqs)
    llm.stat_loggers.append(recorder)
    weakref.finalize(llm, recorder.close)  # at the interpreter's end too


def settings_of(config: "Config") -> dict[str, str]:
    """The parameters that differ from their defaults, and those of ALWAYS_SHOWN, as text."""
    return {
        field.name: shown(getattr(config, field.name))
        for field in fields(config)
        if field.init
        and field.name not in ("model", "record")
        and (field.name in ALWAYS_SHOWN or getattr(config, field.name) != field.default)
    }


class Recorder:
    """A stat logger that keeps a page of the run: every half minute, and when it is closed.

    Args:
        path: of the page, whose folder can be written.
        model_name: for the heading.
        settings: parameters of the engine, as text.
        max_num_seqs: the most sequences that a step can have.
    """

    def __init__(
        self, path: str, model_name: str, settings: dict[str, str], max_num_seqs: int
    ) -> None:
        self.path = path
        self.model_name = model_name
        self.settings = settings
        self.max_num_seqs = max_num_seqs
        self.run = RunRecord()
        self.start_time = time.time()
        self._pending: list[tuple[StepStats, list[FinishedRequestStats]]] = []  # not yet in `run`
        self._next_writing = time.perf_counter() + REFRESH_SECONDS
        self._is_closed = self._has_failed = False
        self._pid = os.getpid()

    def record(self, step: StepStats, finished: list[FinishedRequestStats]) -> None:
        """Take a step; from time to time count what was taken, and write the page."""
        self._pending.append((step, finished))
        if len(self._pending) >= MAX_PENDING:
            self._count_pending()
        if step.time >= self._next_writing:
            self._write("goes on")
            seconds = time.perf_counter() - step.time
            pause = max(REFRESH_SECONDS, seconds / MAX_WRITING_SHARE)
            self._next_writing = time.perf_counter() + pause

    def close(self) -> None:
        """Write the page once more; in a forked child, or when it was closed before, nothing."""
        if not self._is_closed and os.getpid() == self._pid:
            self._is_closed = True
            self._write("ended")

    def _count_pending(self) -> None:
        for step, finished in self._pending:
            self.run.add(step, finished)
        self._pending.clear()

    def _write(self, state: str) -> None:
        """Replace the page. A failure is told at first and at the end, and hurts no run."""
        temporary = f"{self.path}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(self.page(state))
            os.replace(temporary, self.path)
        except Exception as error:
            if self._is_closed or not self._has_failed:
                logger.warning("the report %s was not written: %s", self.path, describe(error))
            self._has_failed = True
            with suppress(OSError):
                os.unlink(temporary)

    def page(self, state: str) -> str:
        """The page as of now; `state` says whether the run goes on."""
        self._count_pending()
        run, last = self.run, self.run.last
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        begin = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.start_time))
        parts = [
            f"<h1>A run of {escape(self.model_name)}</h1>",
            f"<p>Engine ready at {begin}. The run {state}: written at {now}.</p>",
        ]
        if last is None:
            parts.append("<p>No step was computed.</p>")
        else:
            parts += [
                _tiles(run, last),
                *(f"<p class='hint'>{hint}</p>" for hint in _hints(run, last, self.max_num_seqs)),
                _shares(run),
                "<div class='charts'>",
                *_charts(run, last, self.max_num_seqs),
                _finish_table(last),
                "</div>",
                _step_table(run),
                _request_table(run),
                _slowest_table(run.slowest),
            ]
        settings = [(name, escape(value)) for name, value in sorted(self.settings.items())]
        parts.append(_table("Parameters", ["Name", "value"], settings))
        return PAGE.format(title=escape(self.model_name), style=STYLE, body="\n".join(parts))


# ---- numbers ----------------------------------------------------------------------------------


def _short(value: float) -> str:
    """A number in a few characters: 0.25, 83.1, 4,812, 12.3k, 1.53M."""
    for least, factor, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            scaled = value / factor
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{letter}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _time(seconds: float) -> str:
    """A duration with its unit."""
    if seconds < 1:
        return f"{_short(seconds * 1000)} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 120 else f"{seconds / 60:.1f} min"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _count(name: str, value: int) -> str:
    """An exact number, which programs find under its name."""
    return f"<data id='{name}' value='{value}'>{value:,}</data>"


# ---- tables -----------------------------------------------------------------------------------


def _table(title: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """`names` and the first cell of each row are plain text, the other cells are HTML."""
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr><th scope='row'>{escape(first)}</th>"
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for first, *cells in rows
    )
    return (
        f"<section><h2>{title}</h2><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></section>"
    )


def _tiles(run: RunRecord, last: StepStats) -> str:
    seconds = max(run.seconds, 1e-9)
    num_seqs = sum(interval.num_decoded_seqs for interval in run.intervals)
    peak = max(interval.max_used_blocks for interval in run.intervals)
    tiles = [
        (f"{_short(last.num_generation_tokens / seconds)} tok/s", "generated, over the whole run"),
        (_count("generation_tokens", last.num_generation_tokens), "tokens generated"),
        (_count("prompt_tokens", last.num_prompt_tokens), "prompt tokens"),
        (_count("requests", run.latencies.count), "requests finished"),
        (_time(run.seconds), "from the first step to the last"),
        (_short(num_seqs / max(run.decodes.count, 1)), "sequences in a decode step, on average"),
        (_percent(peak, last.num_blocks), f"of {last.num_blocks:,} KV blocks in use at most"),
        (
            _percent(last.num_prefix_cache_hits, last.num_prefix_cache_queries),
            f"of prompt tokens spared by the prefix cache: "
            f"{_count('prefix_cache_hits', last.num_prefix_cache_hits)} of "
            f"{_count('prefix_cache_queries', last.num_prefix_cache_queries)}",
        ),
        (_count("preemptions", last.num_preemptions), "preemptions"),
    ]
    items = "".join(f"<li><strong>{number}</strong> {text}</li>" for number, text in tiles)
    return f"<ul class='tiles'>{items}</ul>"


def _hints(run: RunRecord, last: StepStats, max_num_seqs: int) -> list[str]:
    """What held the run back, and which parameter moves it."""
    hints = []
    seconds = max(sum(interval.seconds for interval in run.intervals), 1e-9)
    waiting = sum(interval.waiting_seconds for interval in run.intervals) / seconds
    most_blocks = max(interval.max_used_blocks for interval in run.intervals) / last.num_blocks
    most_seqs = max(interval.max_decoded_seqs for interval in run.intervals)
    if last.num_preemptions > 0.01 * sum(last.num_finished.values()):
        hints.append(
            "KV blocks ran out, and what was preempted is computed again: more blocks "
            "(<code>gpu_memory_utilization</code>, <code>kv_cache_dtype='fp8'</code>), a higher "
            "<code>watermark</code> or a lower <code>max_num_seqs</code> spare that."
        )
    if waiting >= 1 and most_seqs >= max_num_seqs and most_blocks < 0.7:
        hints.append(
            f"Sequences waited while the batch was full and {1 - most_blocks:.0%} of the KV blocks "
            f"were never used: a <code>max_num_seqs</code> above {max_num_seqs:,} may be faster."
        )
    if waiting >= 1 and most_seqs < max_num_seqs and most_blocks > 0.9:
        hints.append(
            "KV blocks, not <code>max_num_seqs</code>, limited the batch: more of them "
            "(<code>gpu_memory_utilization</code>, <code>kv_cache_dtype='fp8'</code>) make it "
            "larger."
        )
    return hints


def _shares(run: RunRecord) -> str:
    """A bar of where the time went."""
    whole = max(run.seconds, run.prefills.total + run.decodes.total, 1e-9)
    parts = {
        "decode": run.decodes.total,
        "prefill": run.prefills.total,
        "between": whole - run.prefills.total - run.decodes.total,
    }
    words = {
        "decode": "decode steps",
        "prefill": "prefill steps",
        "between": "between steps (scheduling, the calling program, an empty queue)",
    }
    label = ", ".join(
        f"{words[name]} {_percent(seconds, whole)}" for name, seconds in parts.items()
    )
    rects, legend, x = "", "", 0.0
    for name, seconds in parts.items():
        width = 1000 * seconds / whole
        title = f"{words[name]}: {_time(seconds)}, {_percent(seconds, whole)}"
        rects += (
            f"<rect class='{name}' x='{x:.1f}' y='0' width='{width:.1f}' height='24'>"
            f"<title>{title}</title></rect>"
        )
        legend += f"<li><span class='{name}'></span>{title}</li>"
        x += width
    return (
        f"<section><h2>Where the time went</h2>"
        f"<svg class='shares' role='img' aria-label='{label}' viewBox='0 0 1000 24' "
        f"preserveAspectRatio='none'>{rects}</svg><ul class='legend'>{legend}</ul></section>"
    )


def _quantiles(durations: Distribution) -> list[str]:
    if not durations.count:
        return ["–"] * 5
    shares = [_time(durations.quantile(share)) for share in (0.5, 0.9, 0.99)]
    return [_time(durations.mean), *shares, _time(durations.highest)]


QUANTILES = ["mean", "median", "90 %", "99 %", "longest"]


def _step_table(run: RunRecord) -> str:
    num_tokens = {
        "Prefill": run.num_prefill_tokens,
        "Decode": run.num_decode_tokens,
    }
    rows = []
    for name, steps in (("Prefill", run.prefills), ("Decode", run.decodes)):
        rate = _short(num_tokens[name] / steps.total) if steps.total else "–"
        cells = [_count(f"{name.lower()}_steps", steps.count), *_quantiles(steps)]
        tokens = _count(f"{name.lower()}_step_tokens", num_tokens[name])
        rows.append([name, *cells, _time(steps.total), tokens, rate])
    names = ["Kind", "steps", *QUANTILES, "total", "tokens computed", "tok/s"]
    return _table("Time of a step", names, rows)


def _finish_table(last: StepStats) -> str:
    whole = sum(last.num_finished.values())
    rows = [
        [reason, _count(f"finished_{reason}", number), _percent(number, whole)]
        for reason, number in last.num_finished.items()
    ]
    return _table("Finish reasons", ["Reason", "completions", "share"], rows)


def _request_table(run: RunRecord) -> str:
    rows = [
        ["from queue to end", *_quantiles(run.latencies)],
        ["from queue to first token", *_quantiles(run.first_token_times)],
    ]
    return _table("Time of a request", ["Time", *QUANTILES], rows)


def _slowest_table(requests: list[FinishedRequestStats]) -> str:
    rows = []
    for request in requests:
        first_token_time = request.metrics.time_to_first_token
        seconds, num_tokens = running_seconds(request), request.num_generation_tokens
        rows.append(
            [
                str(request.request_id),
                _time(seconds),
                "–" if first_token_time is None else _time(first_token_time),
                f"{request.num_prompt_tokens:,}",
                f"{request.num_cached_tokens:,}",
                f"{num_tokens:,}",
                f"{_short(num_tokens / seconds)} tok/s" if seconds > 0 else "–",
                ", ".join(sorted({reason or "–" for reason in request.finish_reasons})),
            ]
        )
    names = ["Request", "first token to end", "queue to first token", "prompt tokens"]
    names += ["cached", "tokens", "rate", "finish reason"]
    return _table("The slowest requests", names, rows)


# ---- charts -----------------------------------------------------------------------------------

MAX_DRAWN = 240  # intervals of a chart
WIDTH, HEIGHT = 560, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22  # margins of the plot
UNITS = ((7200, 3600, "h"), (120, 60, "min"), (0, 1, "s"))  # from so many seconds on

Span = tuple[float, float, Interval]  # start and end in seconds
# Of an interval and its seconds: a sum of values, and of how many; of none: a gap.
Value = Callable[[Interval, float], tuple[float, float]]


def _charts(run: RunRecord, last: StepStats, max_num_seqs: int) -> list[str]:
    chart = partial(_chart, _spans(run))
    return [
        chart("Tokens generated", "tok/s", lambda i, seconds: (i.num_generation_tokens, seconds)),
        chart("Tokens prefilled", "tok/s", lambda i, seconds: (i.num_prefill_tokens, seconds)),
        chart(
            "Batch size of decode steps",
            "sequences",
            lambda i, _: (i.num_decoded_seqs, i.num_decodes),
            lambda i, _: (i.max_decoded_seqs, i.num_decodes > 0),
            max_num_seqs,
        ),
        chart(
            "Queue",
            "sequences waiting",
            lambda i, _: (i.waiting_seconds, i.seconds),
            lambda i, _: (i.max_waiting, i.seconds > 0),
        ),
        chart(
            "KV blocks in use",
            "blocks",
            lambda i, _: (i.block_seconds, i.seconds),
            lambda i, _: (i.max_used_blocks, i.seconds > 0),
            last.num_blocks,
        ),
        chart(
            "Prefix cache hits",
            "% of prompt tokens",
            lambda i, _: (100 * i.num_prefix_cache_hits, i.num_prefix_cache_queries),
        ),
        chart("Preemptions", "per minute", lambda i, seconds: (60 * i.num_preemptions, seconds)),
        chart("Time of a decode step", "ms", lambda i, _: (1e3 * i.decode_seconds, i.num_decodes)),
        chart(
            "Time of a prefill step", "ms", lambda i, _: (1e3 * i.prefill_seconds, i.num_prefills)
        ),
    ]


def _spans(run: RunRecord) -> list[Span]:
    """The intervals to draw: not too many, and of some steps each."""
    num_steps = run.prefills.count + run.decodes.count
    width, intervals = run.merged(max(1, min(MAX_DRAWN, num_steps // 4)))
    intervals = [copy(interval) for interval in intervals]
    # The last interval is not complete: its rates are by its own length, unless that is short.
    if len(intervals) > 1 and run.seconds - (len(intervals) - 1) * width < width / 2:
        rest = intervals.pop()
        intervals[-1].add(rest)
    spans = [(n * width, (n + 1) * width, interval) for n, interval in enumerate(intervals)]
    start, _, interval = spans.pop()
    return [*spans, (start, max(run.seconds, start + 1e-9), interval)]


def _chart(
    spans: list[Span],
    title: str,
    unit: str,
    value: Value,
    peak: Value | None = None,
    limit: int | None = None,
) -> str:
    """A chart over time with a step for each span, and a line at `limit` if it is near.

    Args:
        value: its mean over the span is drawn.
        peak: the highest in the span, a thin line above.
    """
    sums = [value(interval, end - begin) for begin, end, interval in spans]
    values = _ratios(sums)
    peaks = _ratios([peak(i, end - begin) for begin, end, i in spans]) if peak else values
    highest = max((v for v in peaks if v is not None), default=0)
    [mean] = _ratios([(sum(total for total, _ in sums), sum(count for _, count in sums))])
    caption = "none" if mean is None else f"mean {_short(mean)}, highest {_short(highest)}"
    if limit is not None:
        caption += f", limit {_short(limit)}"
    near_limit = limit if limit is not None and limit <= 4 * highest else 0
    ticks = _ticks(max(highest, near_limit))
    plot = Plot(spans[-1][1], max(1.05 * highest, 1.05 * near_limit, ticks[-1]) or 1)
    parts = [plot.axes(ticks)]
    if peak:
        parts.append(f"<path class='peak' d='{plot.steps(spans, peaks)}'/>")
    parts.append(f"<path class='line' d='{plot.steps(spans, values)}'/>")
    if near_limit:
        parts.append(f"<path class='limit' d='M{LEFT} {plot.y(near_limit):.1f}H{WIDTH - RIGHT}'/>")
    parts += [
        plot.hover(span, "–" if v is None else f"{_short(v)} {unit}")
        for span, v in zip(spans, values, strict=True)
    ]
    return (
        f"<figure><figcaption><strong>{title}</strong>, {unit} <small>{caption}</small>"
        f"</figcaption><svg role='img' aria-label='{title}, {unit}: {caption}' "
        f"viewBox='0 0 {WIDTH} {HEIGHT}'>{''.join(parts)}</svg></figure>"
    )


def _ratios(sums: list[tuple[float, float]]) -> list[float | None]:
    return [total / count if count else None for total, count in sums]


class Plot:
    """The plot of a chart: seconds from 0 to `end`, values from 0 to `top`."""

    def __init__(self, end: float, top: float) -> None:
        self.end = end
        self.top = top

    def x(self, seconds: float) -> float:
        """The pixel of a time."""
        return LEFT + (WIDTH - LEFT - RIGHT) * seconds / self.end

    def y(self, value: float) -> float:
        """The pixel of a value."""
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / self.top

    def steps(self, spans: list[Span], values: list[float | None]) -> str:
        """A path through the values, at 0 before and after a gap."""
        path, is_gap = "", True
        for (begin, end, _), value in zip(spans, values, strict=True):
            if value is not None:
                path += f"M{self.x(begin):.1f} {self.y(0):.1f}" if is_gap else ""
                path += f"V{self.y(value):.1f}H{self.x(end):.1f}"
            elif not is_gap:
                path += f"V{self.y(0):.1f}"
            is_gap = value is None
        return path if is_gap else f"{path}V{self.y(0):.1f}"

    def axes(self, ticks: list[float]) -> str:
        """Lines and numbers at the ticks, and the time below."""
        parts = [
            f"<path class='grid' d='M{LEFT} {self.y(tick):.1f}H{WIDTH - RIGHT}'/>"
            f"<text x='{LEFT - 6}' y='{self.y(tick) + 4:.1f}' text-anchor='end'>"
            f"{_short(tick)}</text>"
            for tick in ticks
        ]
        _, factor, unit = next(u for u in UNITS if self.end >= u[0])
        *times, latest = _ticks(self.end / factor, 6)
        base = HEIGHT - BOTTOM
        parts += [
            f"<path class='grid' d='M{self.x(t * factor):.1f} {base}v4'/>"
            f"<text x='{self.x(t * factor):.1f}' y='{base + 17}' text-anchor='middle'>"
            f"{_short(t)}{f' {unit}' if t == latest else ''}</text>"
            for t in (*times, latest)
        ]
        return "".join(parts)

    def hover(self, span: Span, text: str) -> str:
        """An unseen rectangle over a span, whose title the browser shows."""
        begin, end, _ = span
        x = self.x(begin)
        return (
            f"<rect class='hover' x='{x:.1f}' y='{TOP}' width='{self.x(end) - x:.1f}' "
            f"height='{HEIGHT - TOP - BOTTOM}'><title>{_time(begin)} to {_time(end)}: {text}"
            "</title></rect>"
        )


def _ticks(highest: float, count: int = 4) -> list[float]:
    """0 and up to `count` round numbers up to `highest`."""
    if highest <= 0:
        return [0.0]
    power = 10.0 ** floor(log10(highest / count))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * count >= highest * 0.999)
    return [step * n for n in range(floor(highest / step * 1.001) + 1)]


STYLE = """
:root { color-scheme: light dark; --fg: #1c2430; --dim: #5b6675; --bg: #f6f7f9; --card: #fff;
  --grid: #dfe3e8; --line: #1f6feb; --peak: #8db7f7; --prefill: #d9822b; --between: #b8c0ca;
  --limit: #c93c37; }
@media (prefers-color-scheme: dark) { :root { --fg: #e4e8ee; --dim: #9aa5b4; --bg: #12161c;
  --card: #1b2129; --grid: #323b47; --line: #5b9cff; --peak: #35619f; --prefill: #e39a4f;
  --between: #556070; --limit: #f0716b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1.5rem 1rem 3rem; background: var(--bg);
  color: var(--fg); font: 15px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.05rem; margin: 0 0 .6rem; }
h1 + p { margin: .2rem 0 1rem; color: var(--dim); }
section, figure, .hint, .tiles li { background: var(--card); border: 1px solid var(--grid);
  border-radius: 8px; margin: 0 0 1rem; padding: .8rem 1rem; }
.hint { border-left: 4px solid var(--prefill); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: .8rem;
  list-style: none; margin: 0 0 1rem; padding: 0; }
.tiles li { margin: 0; color: var(--dim); font-size: .87rem; }
.tiles strong { display: block; color: var(--fg); font-size: 1.35rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr));
  gap: 0 1rem; }
figcaption small { color: var(--dim); float: right; font-size: .87rem; }
svg { display: block; width: 100%; overflow: visible; }
svg text { fill: var(--dim); font-size: 11.5px; }
.grid { stroke: var(--grid); } .peak, .limit { fill: none; stroke: var(--peak); }
.line { fill: var(--line); fill-opacity: .16; stroke: var(--line); stroke-width: 1.5; }
.limit { stroke: var(--limit); stroke-dasharray: 6 4; stroke-width: 1.2; }
.hover { fill: transparent; } .hover:hover { fill: var(--dim); opacity: .25; }
.shares { height: 24px; border-radius: 4px; }
.decode { fill: var(--line); background: var(--line); }
.prefill { fill: var(--prefill); background: var(--prefill); }
.between { fill: var(--between); background: var(--between); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; list-style: none; margin: .6rem 0 0;
  padding: 0; }
.legend span { border-radius: 2px; display: inline-block; height: .75em; margin-right: .45em;
  width: .75em; }
section { overflow-x: auto; } td { white-space: nowrap; }
table { border-collapse: collapse; width: 100%; }
th, td { border-top: 1px solid var(--grid); padding: .3rem .8rem .3rem 0; text-align: right; }
th:first-child { text-align: left; } thead th { border: 0; color: var(--dim); font-weight: 400; }
tbody th { font-weight: 500; } code { font-size: .95em; }
"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>A run of {title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
