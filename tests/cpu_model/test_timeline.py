"""timeline.py on a tiny model: every moment of a call is in its table once."""

import pytest
import timeline
from engine_checks import tiny_engine
from workloads import Row, workloads

ROW = Row("small", 6, (3, 40), (2, 12), seed=3)
SECONDS = {"process": 1000, "schedule": 1, "build": 2, "launch": 100, "wait": 10}
OUTPUT_SECONDS = 5000


class Clock:
    """Runs only inside the engine's methods, so that every part is known."""

    def __init__(self):
        self.now = 0
        self.counts = dict.fromkeys([*SECONDS, "make_output"], 0)

    def slow(self, name, seconds, method):
        def slow_method(*args, **kwargs):
            self.now += seconds
            self.counts[name] += 1
            return method(*args, **kwargs)

        return slow_method


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_every_part_of_a_call(tiny_dir, monkeypatch, async_scheduling):
    clock = Clock()
    monkeypatch.setattr(timeline, "perf_counter", lambda: clock.now)
    settings = {"async_scheduling": async_scheduling, "max_num_seqs": 4, "enforce_eager": True}
    with tiny_engine(tiny_dir, **settings) as llm:
        owners = {
            "process": llm.input_processor,
            "schedule": llm.scheduler,
            "build": llm.executor.plan_builder,
            "launch": llm.executor,
            "wait": llm.executor,
        }
        for name, owner in owners.items():
            slow = clock.slow(name, SECONDS[name], getattr(owner, name))
            monkeypatch.setattr(owner, name, slow)
        module = timeline.request_output
        slow = clock.slow("make_output", OUTPUT_SECONDS, module.make_output)
        monkeypatch.setattr(module, "make_output", slow)
        workload = next(workloads(ROW, vocab_size=384))
        recorder = timeline.record_call(llm, workload)
        assert "schedule" in vars(llm.scheduler)  # the slow one
        assert "_commit" not in vars(llm)

    counts, intervals = clock.counts, recorder.intervals
    assert recorder.seconds == clock.now == sum(interval.total for interval in intervals)
    before, *steps, after = intervals
    assert (before.kind, before.seconds["in, out"]) == (timeline.BEFORE, SECONDS["process"])
    assert after.kind == timeline.AFTER
    assert before.total + after.total == SECONDS["process"] + 6 * OUTPUT_SECONDS
    assert len(steps) == counts["launch"] == counts["wait"] > 12
    parts = {part: sum(step.seconds[part] for step in steps) for part in timeline.PARTS}
    assert parts == {
        "plan": counts["schedule"] * SECONDS["schedule"] + counts["build"] * SECONDS["build"],
        "launch": counts["launch"] * SECONDS["launch"],
        "wait": counts["wait"] * SECONDS["wait"],
        "commit": 0,
        "in, out": 0,
        "else": 0,
    }
    kinds = [step.kind for step in steps]
    assert kinds[0] == timeline.PREFILL and kinds.count(timeline.PREFILL) > 1
    assert (timeline.DECODE_BEFORE_PREFILL in kinds) == async_scheduling
    num_tokens = sum(step.num_rows for step in steps if step.kind != timeline.PREFILL)
    assert num_tokens == workload.num_output_tokens - len(workload.prompts)


def test_the_table_adds_up(tiny_dir, capsys):
    options = ["--device", "cpu", "--rows", "8x512", "--scale", "0.03", "--repeat", "1"]
    timeline.main(["--model", str(tiny_dir), "--num-kvcache-blocks", "8", *options])
    title, header, *lines, last = capsys.readouterr().out.splitlines()
    assert title == "8x512: 1 requests, 4 tokens in, 15 out"
    names = [line[:21].strip() for line in lines]
    assert names == [timeline.BEFORE, timeline.PREFILL, "decode, rows 1", timeline.AFTER]
    assert lines[2].split()[3:5] == ["14", "1"]
    start = header.index("total") - 3
    totals = [float(line[start:].split()[0]) for line in (*lines, last)]
    assert sum(totals[:-1]) == pytest.approx(totals[-1], abs=0.05 * len(lines) + 0.05)
    for line in lines:
        each, *parts = map(float, line[start:].split()[1:])
        assert sum(parts) == pytest.approx(each, abs=0.005 * len(parts) + 0.005)


def test_decode_steps_are_grouped_by_powers_of_two():
    kinds = [timeline.decode_kind(n) for n in (1, 2, 3, 4, 5, 64, 65, 128, 129)]
    ends = ["1", "2", "3-4", "3-4", "5-8", "33-64", "65-128", "65-128", "129-256"]
    assert kinds == [f"decode, rows {end}" for end in ends]
