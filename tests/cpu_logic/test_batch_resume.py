"""Batch files: killed, torn, interrupted and full, then run again: as if nothing had happened."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from batch_engine import StandInEngine
from forked_python import ForkedPython

import nanovllm.batch.result_file as result_file
from nanovllm import ArgumentError, EngineDeadError
from nanovllm.batch.options import parse_options
from nanovllm.batch.result_file import LineSet, ResultFile, StringSet
from nanovllm.batch.run import main

SCRIPT = Path(__file__).with_name("batch_engine.py")


class PanicError(BaseException):
    """As a panic of a library in Rust reaches Python: no Exception."""


ERRORS = [EngineDeadError("rank 1 was killed"), RuntimeError("no memory"), PanicError("a bug")]


def write_lines(path, num_lines, start=0):
    lines = [
        {"custom_id": f"id-{i}", "prompt": f"prompt {i}", "max_tokens": 1 + i % 5}
        for i in range(start, num_lines)
    ]
    lines[3]["temperature"] = -1  # an error record among the results
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(source, target, engine=None, *options):
    arguments = [str(source), str(target), "--model", "models/tiny", "--no-progress", *options]
    return main(arguments, engine or StandInEngine())


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def results_of(path):
    """The records by custom_id, without what the clock says; each may be there once."""
    records = records_of(path)
    for record in records:
        if record["response"]:
            del record["response"]["body"]["created"]
    assert len({record["line"] for record in records}) == len(records)
    return {record["custom_id"]: record for record in records}


@pytest.fixture
def source(tmp_path):
    return write_lines(tmp_path / "in.jsonl", 30)


@pytest.fixture
def uninterrupted(source, tmp_path):
    """The results of a run that nothing disturbed."""
    target = tmp_path / "uninterrupted.jsonl"
    assert run(source, target) == 1
    return results_of(target)


def test_a_killed_process_goes_on_where_it_was(tmp_path):
    source, target = write_lines(tmp_path / "in.jsonl", 600), tmp_path / "out.jsonl"
    command = [sys.executable, str(SCRIPT), str(source), str(target), "--model", "models/tiny"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), str(SCRIPT.parent)])
    }
    rng, kept = random.Random(0), b""
    for _ in range(3):
        with ForkedPython(command, env=environment, stderr=subprocess.DEVNULL) as process:
            more = len(kept) + rng.randrange(1, 40_000)
            deadline = time.monotonic() + 600
            while not target.exists() or target.stat().st_size < more:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.001)
            process.kill()
        content = target.read_bytes()
        assert content.startswith(kept[: kept.rfind(b"\n") + 1])  # what was written stays
        kept = content
    assert len(kept.splitlines()) < 600
    assert run(source, target) == 1
    assert run(source, tmp_path / "other.jsonl") == 1
    assert results_of(target) == results_of(tmp_path / "other.jsonl")
    assert len(results_of(target)) == 600


def test_a_torn_last_line_is_cut_off_wherever_it_broke(source, tmp_path, uninterrupted):
    target = tmp_path / "out.jsonl"
    assert run(source, target) == 1
    content = target.read_bytes()
    last = content.rfind(b"\n", 0, -1) + 1
    for end in [*range(last, last + 40), *range(last + 40, len(content), 20), len(content) - 1]:
        target.write_bytes(content[:end])
        engine = StandInEngine()
        assert run(source, target, engine) == 1
        assert len(engine.log) <= 1  # 0: the error record
        assert results_of(target) == uninterrupted
    target.write_bytes(content[:last] + b"\0" * 100)  # as a file system may leave it
    assert run(source, target) == 1
    assert results_of(target) == uninterrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step(source, tmp_path, uninterrupted, number, capsys):
    target, engines = tmp_path / "out.jsonl", []
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def press(step):
        if step == 12:
            os.kill(os.getpid(), number)

    status = 128 + number
    while status == 128 + number:
        engines.append(StandInEngine(press))
        status = run(source, target, engines[-1])
        assert engines[-1].is_ended
        message = capsys.readouterr().err
        if status != 1:
            assert engines[-1].num_steps == 12
            num_left = 30 - len(records_of(target))
            assert f"ended by {number.name}, {num_left} lines left" in message
            assert "same command" in message
    assert status == 1
    assert "30 lines: 29 completed, 1 with an error record" in message
    assert len(engines) > 1
    assert results_of(target) == uninterrupted
    generated = [prompt for engine in engines for prompt in engine.log]
    assert len(generated) == len(set(generated)) == 29
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_ends_it_at_once(source, tmp_path, uninterrupted, capsys):
    def press(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)

    target = tmp_path / "out.jsonl"
    assert run(source, target, StandInEngine(press)) == 130
    assert "ended at once" in capsys.readouterr().err
    assert run(source, target) == 1
    assert results_of(target) == uninterrupted


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_engine_that_fails(source, tmp_path, uninterrupted, error, capsys):
    def fail(step):
        if step == 9:
            raise error

    target, engine = tmp_path / "out.jsonl", StandInEngine(fail)
    assert run(source, target, engine) == 3
    assert engine.is_ended
    message = capsys.readouterr().err
    assert str(error) in message and "same command" in message
    assert len(records_of(target)) > 0
    assert run(source, target) == 1
    assert results_of(target) == uninterrupted


def test_a_full_disk(source, tmp_path, uninterrupted, capsys):
    target = tmp_path / "out.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        assert run(source, target) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert "broken off" in capsys.readouterr().err
    assert target.stat().st_size == 2000
    assert run(source, target) == 1
    assert results_of(target) == uninterrupted


def test_all_that_is_queued_ends_in_one_step(source, tmp_path, uninterrupted):
    target, engine = tmp_path / "out.jsonl", StandInEngine()
    engine.ends_all = True
    assert run(source, target, engine) == 1
    assert results_of(target) == uninterrupted


@pytest.mark.parametrize("stage", ["build", "encode"])
def test_a_result_without_a_record_does_not_end_the_run(source, tmp_path, uninterrupted, stage):
    """One of the lines that end in a step; the others of that step are written as well."""
    engine = StandInEngine()
    engine.ends_all = True
    get_output = engine.get_output

    def odd_output(number):
        output = get_output(number)
        if output.prompt == "prompt 7":
            output.outputs[0].stop_reason = float("nan") if stage == "encode" else "a"
            output.outputs[0].token_ids = None if stage == "build" else [1]
        return output

    engine.get_output = odd_output
    target = tmp_path / "out.jsonl"
    assert run(source, target, engine) == 1
    results = results_of(target)
    odd = results.pop("id-7")
    assert odd["response"] is None and odd["error"]["code"] == "internal_error"
    del uninterrupted["id-7"]
    assert results == uninterrupted
    assert run(source, target) == 1  # the record is final
    assert results_of(target)["id-7"] == odd


def test_an_input_that_shrinks_under_way(source, tmp_path, capsys):
    def shrink(step):
        if step == 2:
            os.truncate(source, 0)

    source.write_bytes(source.read_bytes() + b"\n" * 200_000)  # more than is read ahead
    with source.open("a") as file:
        file.write(json.dumps({"custom_id": "last", "prompt": "prompt"}))
    assert run(source, tmp_path / "out.jsonl", StandInEngine(shrink)) == 3
    assert "has lost lines while it was read" in capsys.readouterr().err


def test_a_finished_file_loads_no_model(source, tmp_path, uninterrupted):
    def refuse(**keywords):
        raise AssertionError("nothing is left to do")

    target = tmp_path / "uninterrupted.jsonl"
    content = target.read_bytes()
    assert run(source, target, refuse) == 1
    assert target.read_bytes() == content


def test_lines_may_be_appended(source, tmp_path, uninterrupted):
    target = tmp_path / "uninterrupted.jsonl"
    with source.open("a") as file:
        file.write(json.dumps({"custom_id": "late", "prompt": "prompt"}))  # no newline at the end
        engine = StandInEngine()
        file.flush()
        assert run(source, target, engine) == 1
        assert engine.log == ["prompt"]
        file.write("\n" + json.dumps({"custom_id": "id-3", "prompt": "prompt"}) + "\n")
    engine = StandInEngine()
    assert run(source, target, engine) == 1
    assert engine.log == []
    assert records_of(target)[-1]["error"]["code"] == "duplicate_custom_id"


def test_a_duplicate_that_ended_before_its_original(tmp_path):
    """The record of line 2 must not make line 1 a duplicate after a restart."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = json.dumps({"custom_id": "a", "prompt": "prompt"}) + "\n"
    source.write_text(line * 2)

    def press(step):
        os.kill(os.getpid(), signal.SIGTERM)

    engine = StandInEngine(press)
    engine.rng.randrange = lambda n: 0  # nothing ends in its only step
    assert run(source, target, engine) == 143
    assert [record["line"] for record in records_of(target)] == [2]
    assert run(source, target) == 1
    first, second = sorted(records_of(target), key=lambda record: record["line"])
    assert first["error"] is None and second["error"]["code"] == "duplicate_custom_id"


# ---- what does not fit together ---------------------------------------------------------------


@pytest.mark.parametrize("change", ["edit", "remove", "insert"])
def test_a_changed_input_is_noticed(source, tmp_path, uninterrupted, change, capsys):
    lines = source.read_text().splitlines(keepends=True)
    if change == "edit":
        lines[7] = lines[7].replace("prompt 7", "prompt 8")
    elif change == "remove":
        lines.pop()
    else:
        lines.insert(0, "\n")
    source.write_text("".join(lines))
    target = tmp_path / "uninterrupted.jsonl"
    content = target.read_bytes()
    assert run(source, target) == 2
    assert "has changed since" in capsys.readouterr().err
    assert target.read_bytes() == content


@pytest.mark.parametrize(
    "options", [["--seed", "1"], ["--temperature", "0.3"], ["--return-token-ids"], ["--model", "b"]]
)
def test_other_settings_are_noticed(source, tmp_path, uninterrupted, options, capsys):
    assert run(source, tmp_path / "uninterrupted.jsonl", None, *options) == 2
    assert "begun with another model, seed or default parameter" in capsys.readouterr().err


def test_engine_options_may_change(source, tmp_path, uninterrupted):
    target = tmp_path / "uninterrupted.jsonl"
    assert run(source, target, None, "--max-num-seqs", "8", "--no-async-scheduling") == 1
    defaults = ["--generation-config", "auto", "--override-generation-config", "{}"]
    assert run(source, target, None, *defaults) == 1


def test_other_generation_configs_are_noticed(source, tmp_path, monkeypatch):
    """Where default parameters come from too; another way to the same directory is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a")

    def digest(*options):
        return parse_options([str(source), "out.jsonl", "--model", "m", *options]).digest

    config, override = "--generation-config", "--override-generation-config"
    kinds = [[], [config, "vllm"], [config, "a"], [config, "b"], [config, "b", "--seed", "1"]]
    kinds += [[override, '{"temperature": 0, "top_k": 5}'], [override, '{"temperature": 2.0}']]
    assert len({digest(*options) for options in kinds}) == len(kinds)
    assert digest(config, "./link/") == digest(*kinds[2])
    assert digest(override, '{"top_k": 5, "temperature": 0}') == digest(*kinds[5])

    assert run(source, "out.jsonl", None, *kinds[5]) == 1
    assert run(source, "out.jsonl", None, *kinds[6]) == 2
    assert run(source, "out.jsonl", None, *kinds[5]) == 1


def test_digests_of_earlier_versions_are_kept(source, tmp_path):
    arguments = [str(source), str(tmp_path / "out.jsonl"), "--model", "models/tiny"]
    assert parse_options([*arguments, "--max-num-seqs", "8"]).digest == "1b645a61"
    assert parse_options([*arguments, "--temperature", "0", "--stop", "a"]).digest == "9b928327"


@pytest.mark.parametrize(
    "content",
    [
        "precious notes",
        '{"id": 5}\n',
        '{"custom_id": "a", "prompt": "b"}\n',
        '{"id": "batch_req_5"}\n',
        "[" * 100_000 + "\n",
        "1\n",
        '{"id": "batch_req_01234567_0123456789abcdef", "line": 1, "custom_id": null, "error": 5}\n',
    ],
)
def test_a_foreign_output_is_not_touched(source, tmp_path, content, capsys):
    target = tmp_path / "out.jsonl"
    target.write_text(content)
    assert run(source, target) == 2
    assert "line 1 of" in capsys.readouterr().err
    assert target.read_text() == content


def test_a_line_twice_in_the_output(source, tmp_path, uninterrupted, capsys):
    target = tmp_path / "uninterrupted.jsonl"
    lines = target.read_text().splitlines(keepends=True)
    target.write_text("".join([*lines, lines[0]]))
    assert run(source, target) == 2
    assert "two records of line" in capsys.readouterr().err


def test_one_process_at_a_time(source, tmp_path, capsys):
    target = tmp_path / "out.jsonl"
    with ResultFile(str(target), "01234567"):
        assert run(source, target) == 2
        assert "another process is writing" in capsys.readouterr().err
    assert run(source, target) == 1


# ---- memory -----------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_files(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with source.open("w") as file:
        for i in range(600):
            file.write(json.dumps({"custom_id": str(i), "prompt": "x" * 20_000}) + "\n")
    engine = StandInEngine(max_num_seqs=16)
    engine.log = _Nothing()
    tracemalloc.start()
    try:
        assert run(source, target, engine) == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert engine.most_queued == 32
    assert source.stat().st_size > 12e6
    assert peak < 3e6


class _Nothing(list):
    def __iadd__(self, other):
        return self


def test_sequences_count_in_the_queue(tmp_path):
    source = tmp_path / "in.jsonl"
    line = {"prompt": "prompt", "n": 3, "temperature": 1}
    source.write_text("".join(json.dumps(line | {"custom_id": str(i)}) + "\n" for i in range(20)))
    engine = StandInEngine()
    assert run(source, tmp_path / "out.jsonl", engine) == 0
    assert engine.most_queued == 9  # 8 are reached by the third


def test_line_set():
    numbers = set(random.Random(0).sample(range(1, 100_000), 500))
    lines = LineSet()
    for number in numbers:
        lines.add(number)
    assert {number for number in range(200_000) if number in lines} == numbers


def test_string_set(monkeypatch):
    monkeypatch.setattr(result_file, "MERGE_SIZE", 10)
    strings, reference, rng = StringSet(), set(), random.Random(0)
    for _ in range(3000):
        text = str(rng.randrange(2000))
        assert strings.add(text) == (text not in reference)
        reference.add(text)


def test_each_part_of_a_batch_that_was_broken_off_keeps_its_page(tmp_path):
    source, target = write_lines(tmp_path / "in.jsonl", 100), tmp_path / "out.jsonl"
    page = tmp_path / "run.html"

    def stop(number):
        if number == 12:
            raise KeyboardInterrupt

    paths = []
    for on_step in (stop, stop, lambda number: None):
        engine = StandInEngine(on_step=on_step)
        run(source, target, engine, "--record", str(page))
        paths.append(Path(engine.keywords["record"]))
        assert not paths[-1].exists()
        paths[-1].write_text("a page")
    assert [path.name for path in paths] == ["run.html", "run-2.html", "run-3.html"]


@pytest.mark.parametrize("name", ["in.jsonl", "out.jsonl"])
def test_a_record_never_replaces_the_batchs_own_files(tmp_path, name):
    write_lines(tmp_path / "in.jsonl", 5)
    arguments = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--model", "m"]
    with pytest.raises(ArgumentError, match="the record would replace"):
        parse_options([*arguments, "--record", str(tmp_path / "." / name)])
    assert parse_options(arguments).engine == {"model": "m", "seed": 0}
