"""Batch files: lines that kill the process are passed; runs killed from outside blame nobody."""

import faulthandler
import functools
import gc
import json
import os
import random
import resource
import signal
import tempfile
import time
from pathlib import Path

import pytest
from batch_engine import StandInEngine
from test_batch_resume import records_of, results_of, write_lines

from nanovllm import EngineDeadError
from nanovllm.batch import journal
from nanovllm.batch.deaths import Death, History, weigh
from nanovllm.batch.run import KILLED_CODE, main

DEAD = (-signal.SIGSEGV, -signal.SIGKILL, -signal.SIGABRT, -signal.SIGBUS, 139)


def start(source, target, engine=None, *options):
    """Begin a batch run in a process of its own; its id."""
    arguments = [str(source), str(target), "--model", "models/tiny", "--no-progress", *options]
    process_id = os.fork()
    if process_id:
        return process_id
    status = 99
    gc.disable()  # a collection would touch, and so copy, all pages of pytest's memory
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()  # pytest's
        status = main(arguments, engine or StandInEngine())
    except SystemExit as error:
        status = error.code
    finally:
        os._exit(status)


def run(*arguments):
    """The exit status of a batch run, or minus the signal that killed it."""
    _, status = os.waitpid(start(*arguments), 0)
    return os.waitstatus_to_exitcode(status)


def statuses_of(source, target, most=20):
    """The exit statuses of runs until one is not broken off."""
    statuses = []
    while not statuses or statuses[-1] in (*DEAD, 3, 7):
        assert len(statuses) < most
        statuses.append(run(source, target))
    return statuses


def write_deadly(path, num_lines, prompts):
    """Innocent lines, and by number those with other prompts."""
    write_lines(path, num_lines)
    lines = path.read_text().splitlines()
    for number, prompt in prompts.items():
        lines[number - 1] = json.dumps({"custom_id": f"id-{number - 1}", "prompt": prompt})
    path.write_text("\n".join(lines) + "\n")
    return path


@functools.cache
def expected(num_lines):
    """The results of a number of innocent lines, by custom_id: not to be changed."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        write_lines(source, num_lines)
        arguments = [str(source), str(target), "--model", "models/tiny", "--no-progress"]
        assert main(arguments, StandInEngine()) == 1
        return results_of(target)


def check(target, expected, deadly):
    """The deadly lines, and they alone, have the error record; no journal is left."""
    results = results_of(target)
    assert sorted(record["line"] for record in results.values()) == list(
        range(1, len(expected) + 1)
    )
    for number in deadly:
        record = results.pop(f"id-{number - 1}")
        assert record["line"] == number and record["response"] is None
        assert record["error"]["code"] == KILLED_CODE
        assert "the process" in record["error"]["message"]
    undisturbed = {key: value for key, value in expected.items() if key in results}
    for key, record in results.items():  # their ids hold the lines' digests
        assert record == undisturbed[key]
    names = [path.name for path in target.parent.iterdir()]
    assert not [name for name in names if "journal" in name]


# ---- lines that kill the process --------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "number"),
    [("SEGV", 1), ("SEGV", 20), ("KILL", 40), ("ABRT", 20), ("exit", 1), ("sys.exit", 20)],
)
def test_a_line_that_kills_the_process_when_it_is_taken(tmp_path, kind, number):
    source = write_deadly(tmp_path / "in.jsonl", 40, {number: f"die in take: {kind}"})
    target = tmp_path / "out.jsonl"
    assert run(source, target) not in (0, 1)
    assert run(source, target) not in (0, 1)
    assert len(records_of(target)) == 39  # all the others
    assert run(source, target) == 1
    check(target, expected(40), [number])


@pytest.mark.parametrize(
    ("kind", "number"),
    [("SEGV", 1), ("SEGV", 6), ("ABRT", 40), ("BUS", 6), ("rank", 6), ("raise", 1)],
)
def test_a_line_that_crashes_the_run_in_a_step(tmp_path, kind, number):
    source = write_deadly(tmp_path / "in.jsonl", 40, {number: f"die in step 2: {kind}"})
    target = tmp_path / "out.jsonl"
    statuses = statuses_of(source, target)
    died = {"rank": 3, "raise": 3}.get(kind) or -getattr(signal, f"SIG{kind}")
    assert statuses == [died, died, 1]
    check(target, expected(40), [number])


@pytest.mark.parametrize(
    ("kind", "number"), [("KILL", 1), ("KILL", 6), ("exit", 40), ("sys.exit", 6)]
)
def test_a_line_that_ends_the_run_in_a_step_without_a_sign(tmp_path, kind, number):
    """Two deaths without a result between, or three with the line in flight; then two alone."""
    source = write_deadly(tmp_path / "in.jsonl", 40, {number: f"die in step 1: {kind}"})
    target = tmp_path / "out.jsonl"
    assert len(statuses_of(source, target)) <= 6
    check(target, expected(40), [number])


# Each kind comes first and second, with its like and with another.
TWO_KINDS = [
    ("take", "take"),
    ("step 1", "step 1"),
    ("take", "step 3"),
    ("step 1", "take"),
    ("step 3", "step 1"),
]


@pytest.mark.parametrize("kinds", TWO_KINDS)
def test_two_lines_that_kill_the_process(tmp_path, kinds):
    prompts = [f"die in {kind}: SEGV" for kind in kinds]
    source = write_deadly(tmp_path / "in.jsonl", 30, {7: prompts[0], 8: prompts[1]})
    target = tmp_path / "out.jsonl"
    assert len(statuses_of(source, target)) <= 5  # each kills it twice at most
    check(target, expected(30), [7, 8])


def test_killers_among_many_lines(tmp_path):
    kinds = ["take: SEGV", "step 1: KILL", "step 4: ABRT", "take: KILL", "take: exit"]
    deadly = {20 + 50 * i: f"die in {kind}" for i, kind in enumerate(kinds)}
    source, target = write_deadly(tmp_path / "in.jsonl", 250, deadly), tmp_path / "out.jsonl"
    assert len(statuses_of(source, target)) <= 14
    check(target, expected(250), deadly)


def test_a_file_of_killers_alone(tmp_path):
    deadly = dict.fromkeys(range(1, 4), "die in take: SEGV")
    deadly |= dict.fromkeys(range(4, 6), "die in step 1: SEGV")
    source, target = write_deadly(tmp_path / "in.jsonl", 5, deadly), tmp_path / "out.jsonl"
    assert len(statuses_of(source, target)) <= 11
    check(target, dict.fromkeys(map(str, range(5))), deadly)


@pytest.mark.parametrize("where", ["take", "step"])
def test_an_engine_that_always_dies_does_not_condemn_all_lines(tmp_path, where):
    class Engine(StandInEngine):
        def add_request(self, prompt, sampling_params):
            if where == "take":
                os.kill(os.getpid(), signal.SIGSEGV)
            return super().add_request(prompt, sampling_params)

        def step(self):
            raise RuntimeError("the device is lost")

    source, target = write_lines(tmp_path / "in.jsonl", 12), tmp_path / "out.jsonl"
    for _ in range(14):  # enough for seven verdicts
        assert run(source, target, Engine()) in (3, -signal.SIGSEGV)
    assert statuses_of(source, target) == [1]  # it was repaired
    codes = [record["error"]["code"] for record in records_of(target) if record["error"]]
    assert codes.count(KILLED_CODE) <= 5 and len(codes) <= 6


def test_a_line_that_wants_too_much_memory(tmp_path, monkeypatch):
    """The kernel counts the processes that it kills for want of memory."""
    counter = tmp_path / "oom_kills"
    counter.write_text("3")
    monkeypatch.setattr(journal, "_num_oom_kills", lambda: int(counter.read_text()))

    class Engine(StandInEngine):
        def step(self):
            if any(prompt == "much" for prompt, _ in self.queue.values()):
                counter.write_text(str(int(counter.read_text()) + 1))
                os.kill(os.getpid(), signal.SIGKILL)
            return super().step()

    source = write_deadly(tmp_path / "in.jsonl", 20, {6: "much"})
    target = tmp_path / "out.jsonl"
    statuses = [run(source, target, Engine()) for _ in range(3)]
    assert statuses == [-signal.SIGKILL, -signal.SIGKILL, 1]
    check(target, expected(20), [6])


def test_a_repaired_line_is_tried_again(tmp_path):
    """The history is that of a line with this content."""
    source = write_deadly(tmp_path / "in.jsonl", 20, {6: "die in take: SEGV"})
    target = tmp_path / "out.jsonl"
    assert [run(source, target) for _ in range(2)] == [-signal.SIGSEGV] * 2
    write_lines(source, 20)
    assert run(source, target) == 1
    assert results_of(target) == expected(20)


def test_a_repeated_id_after_a_killer(tmp_path):
    """The killer, though it is tried last, is the first line with its id."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = ["die in take: SEGV", "one", "two"]
    text = [json.dumps({"custom_id": "a", "prompt": prompt}) + "\n" for prompt in lines]
    source.write_text("".join(text))
    assert statuses_of(source, target) == [-signal.SIGSEGV, -signal.SIGSEGV, 1]
    codes = {record["line"]: record["error"]["code"] for record in records_of(target)}
    assert codes == {1: KILLED_CODE, 2: "duplicate_custom_id", 3: "duplicate_custom_id"}


def test_suspects_run_alone(tmp_path):
    class Engine(StandInEngine):
        def step(self):
            self.most_in_step = max(getattr(self, "most_in_step", 0), len(self.queue))
            return super().step()

    source = write_deadly(tmp_path / "in.jsonl", 8, {8: "die in step 1: SEGV"})
    target = tmp_path / "out.jsonl"
    assert run(source, target) == -signal.SIGSEGV
    write_lines(source, 8)  # its crash was no line's fault
    engine = Engine(lambda step: None)
    status = main([str(source), str(target), "--model", "models/tiny", "--no-progress"], engine)
    assert status == 1
    assert engine.most_in_step == 1
    assert len(results_of(target)) == 8


# ---- runs that are killed from outside --------------------------------------------------------


def test_runs_killed_at_random_moments_blame_nobody(tmp_path):
    source, target = write_lines(tmp_path / "in.jsonl", 200), tmp_path / "out.jsonl"
    rng, num_killed = random.Random(5), 0
    longest = 0.2
    while num_killed < 15:  # as an operator does, or a spot market
        process_id = start(source, target, StandInEngine(step_seconds=0.004))
        time.sleep(rng.uniform(0, longest))
        os.kill(process_id, signal.SIGKILL)
        _, status = os.waitpid(process_id, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:  # the file was done
            assert results_of(target) == expected(200)
            target.unlink()
            longest /= 2
        num_killed += 1
    assert run(source, target) == 1
    assert results_of(target) == expected(200)
    check(target, expected(200), [])


def test_runs_killed_before_the_first_result_blame_nobody(tmp_path):
    """Thirty times in a row, in steps; the lines are tried alone then, and are killed again."""
    source, target = write_lines(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"
    rng = random.Random(5)
    for _ in range(5):
        number = rng.randrange(1, 40)

        def on_step(step, number=number):
            if step == number:
                os.kill(os.getpid(), signal.SIGKILL)

        engine = StandInEngine(on_step)
        engine.rng.randrange = lambda n: 0  # nothing ends
        assert run(source, target, engine) == -signal.SIGKILL
    assert run(source, target) == 1
    assert results_of(target) == expected(20)


def test_a_machine_that_goes_down_blames_nobody(tmp_path, monkeypatch):
    source = write_deadly(tmp_path / "in.jsonl", 20, {6: "die in take: KILL"})
    target = tmp_path / "out.jsonl"
    for boot in range(5):
        monkeypatch.setattr(journal, "_boot_id", lambda boot=boot: str(boot))
        assert run(source, target) == -signal.SIGKILL
    write_lines(source, 20)
    assert run(source, target) == 1
    assert results_of(target) == expected(20)


def test_deaths_of_an_engine_at_its_start_blame_nobody(tmp_path):
    source, target = write_lines(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"

    def broken(**keywords):
        os.kill(os.getpid(), signal.SIGSEGV)

    assert [run(source, target, broken) for _ in range(4)] == [-signal.SIGSEGV] * 4
    assert run(source, target) == 1
    assert results_of(target) == expected(20)


def test_a_rank_that_is_killed_from_outside_blames_nobody(tmp_path):
    source, target = write_lines(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"

    class Engine(StandInEngine):
        def add_request(self, prompt, sampling_params):
            if prompt == "prompt 7":
                raise EngineDeadError("tensor-parallel rank 1 was killed by SIGKILL")
            return super().add_request(prompt, sampling_params)

    assert [run(source, target, Engine()) for _ in range(4)] == [3] * 4
    assert run(source, target) == 1
    assert results_of(target) == expected(20)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_no_journal(tmp_path, number):
    source, target = write_lines(tmp_path / "in.jsonl", 30), tmp_path / "out.jsonl"

    def press(step):
        assert (tmp_path / "out.jsonl.journal").exists()
        if step == 3:
            os.kill(os.getpid(), number)

    assert run(source, target, StandInEngine(press)) == 128 + number
    assert not (tmp_path / "out.jsonl.journal").exists()


def test_a_stop_between_two_deaths_keeps_the_strike(tmp_path):
    source = write_deadly(tmp_path / "in.jsonl", 30, {20: "die in take: SEGV"})
    target = tmp_path / "out.jsonl"

    def press(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    assert run(source, target) == -signal.SIGSEGV
    assert run(source, target, StandInEngine(press)) == 130
    assert run(source, target) == -signal.SIGSEGV
    assert run(source, target) == 1


# ---- the journal ------------------------------------------------------------------------------


def test_a_torn_journal_blames_nobody(tmp_path):
    source = write_deadly(tmp_path / "in.jsonl", 12, {6: "die in step 1: SEGV"})
    target, path = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    assert run(source, target) == -signal.SIGSEGV
    content, output = path.read_bytes(), target.read_bytes()
    write_lines(source, 12)
    wanted = expected(12)
    rng = random.Random(1)
    kinds = [content[:end] for end in range(0, len(content), 100)]
    kinds += [b"\0" * len(content), content[:100] + b"\0" * 500, content + b"\xff" * 50]
    for _ in range(12):  # bits that flipped
        garbled = bytearray(content)
        for _ in range(3):
            garbled[rng.randrange(20, len(garbled))] ^= 1 << rng.randrange(8)
        kinds.append(bytes(garbled))
    for kind in kinds:
        path.write_bytes(kind)
        target.write_bytes(output)
        arguments = [str(source), str(target), "--model", "models/tiny", "--no-progress"]
        assert main(arguments, StandInEngine()) == 1
        assert results_of(target) == wanted
        assert not path.exists()


@pytest.mark.parametrize("kind", ["folder", "notes", "pipe", "link"])
def test_a_journal_that_cannot_be_written(tmp_path, kind, capfd):
    """The run works, a warning says what is missing, and nothing of somebody else's is touched."""
    source, target = write_lines(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"
    path, notes = tmp_path / "out.jsonl.journal", tmp_path / "notes"
    notes.write_text("precious")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(notes)
    else:
        path.write_text("precious")
    before = path.lstat()
    assert run(source, target) == 1
    assert capfd.readouterr().err.count("warning") == 1
    assert results_of(target) == expected(20)
    # Not the access time: a look at what the file says is allowed, and sets it.
    after = path.lstat()
    for field in ("st_mode", "st_ino", "st_uid", "st_size", "st_mtime_ns"):
        assert getattr(after, field) == getattr(before, field), field
    assert notes.read_text() == "precious"
    assert path.is_dir() or path.is_fifo() or path.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path, capfd):
    source, target = write_lines(tmp_path / "in.jsonl", 20), tmp_path / "out" / "out.jsonl"
    target.parent.mkdir()
    target.touch()
    target.parent.chmod(0o500)
    try:
        assert run(source, target) == 1
    finally:
        target.parent.chmod(0o700)
    assert capfd.readouterr().err.count("warning") == 1
    assert results_of(target) == expected(20)


def test_a_disk_that_fills_up(tmp_path, capfd, monkeypatch):
    """A journal that is not kept up to date is worse than none."""
    source, target = write_lines(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"
    write = os.write

    def full(fd, data):
        if data.startswith(b"queued 9"):
            raise OSError(28, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(journal.os, "write", full)
    assert run(source, target) == 1
    assert capfd.readouterr().err.count("warning") == 1
    check(target, expected(20), [])


def test_the_journal_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "COMPACT_BYTES", 500)
    sizes = []

    def look(step):
        sizes.append((tmp_path / "out.jsonl.journal").stat().st_size)
        if step == 100:
            os.kill(os.getpid(), signal.SIGSEGV)

    source, target = write_lines(tmp_path / "in.jsonl", 200), tmp_path / "out.jsonl"
    engine = StandInEngine(lambda step: look(step) or (max(sizes) < 2500 or os._exit(98)))
    assert run(source, target, engine) == -signal.SIGSEGV
    assert run(source, target) == 1
    assert results_of(target) == expected(200)


def test_a_journal_of_another_output_or_version_is_ignored(tmp_path):
    source = write_deadly(tmp_path / "in.jsonl", 12, {12: "die in take: SEGV"})
    target, path = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    assert [run(source, target) for _ in range(2)] == [-signal.SIGSEGV] * 2
    content = path.read_bytes()
    for old, new in ((b'"version": "', b'"version": "9'), (b'"settings": "', b'"settings": "a')):
        assert old in content
        path.write_bytes(content.replace(old, new))
        assert run(source, target) == -signal.SIGSEGV  # tried again
    target.unlink()  # its results are gone, so nothing is known of the run before
    path.write_bytes(content)
    assert run(source, target) == -signal.SIGSEGV


def test_a_finished_file_takes_its_journal_away(tmp_path):
    source, target = write_lines(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"
    assert run(source, target) == 1
    path = tmp_path / "out.jsonl.journal"
    path.write_bytes(journal.HEADER_START)
    assert run(source, target) == 1
    assert not path.exists()
    path.write_text("precious")
    assert run(source, target) == 1
    assert path.read_text() == "precious"


def test_the_run_says_what_follows_from_a_death(tmp_path, capfd):
    source = write_deadly(tmp_path / "in.jsonl", 12, {6: "die in take: SEGV"})
    said = []
    for status in (-signal.SIGSEGV, -signal.SIGSEGV, 1):
        assert run(source, tmp_path / "out.jsonl") == status
        said.append(capfd.readouterr().err)
    text = "the last run died while line 6 was being taken (Segmentation fault)"
    assert text + "; lines tried alone, last: 1" in said[1]
    assert text in said[2]


def test_a_faulthandler_of_somebody_else_is_left_alone(tmp_path):
    """In a process where it is enabled; where it is not it is disabled again."""
    source, target = write_lines(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"
    arguments = [str(source), str(target), "--model", "models/tiny", "--no-progress"]
    (process_id := os.fork()) or _check_faulthandler(arguments, tmp_path / "note")
    assert os.waitpid(process_id, 0)[1] == 0
    assert "Fatal Python error: Segmentation fault" in (tmp_path / "note").read_text()


def _check_faulthandler(arguments, note):
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()
        during = []
        main(arguments, StandInEngine(lambda step: during.append(faulthandler.is_enabled())))
        assert all(during) and during and not faulthandler.is_enabled()
        os.unlink(arguments[1])
        with note.open("w") as file:
            faulthandler.enable(file)
            main(arguments, StandInEngine())
            assert faulthandler.is_enabled()
            if not (child := os.fork()):
                os.kill(os.getpid(), signal.SIGSEGV)
            os.waitpid(child, 0)
        status = 0
    finally:
        os._exit(status)


# ---- the rules --------------------------------------------------------------------------------


def death(**values):
    digests = dict.fromkeys(range(1, 9), "0123456789abcdef")
    kinds = {"taken": None, "in_flight": [], "lone_steps": None, "crash": ""}
    return Death(
        **({"digests": digests, "is_of_machine": False, "has_results": False} | kinds | values)
    )


def test_a_take_that_succeeds_clears_the_strikes(tmp_path):
    """Killed in a take, then killed in a step, then in the take again: not twice in a row."""
    source, target = write_lines(tmp_path / "in.jsonl", 12), tmp_path / "out.jsonl"

    class Engine(StandInEngine):
        deaths = iter(["take", "step", "take"])

        def add_request(self, prompt, sampling_params):
            if prompt == "prompt 6" and self.death == "take":
                os.kill(os.getpid(), signal.SIGKILL)
            return super().add_request(prompt, sampling_params)

        def step(self):
            if self.death == "step" and any(p == "prompt 6" for p, _ in self.queue.values()):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().step()

    for kind in ("take", "step", "take"):
        engine = Engine()
        engine.death = kind
        assert run(source, target, engine) == -signal.SIGKILL
    assert run(source, target) == 1
    assert results_of(target) == expected(12)


def test_unexplained_deaths_at_different_steps_are_believed_later():
    history = History()
    for _ in range(2):
        assert weigh(history, death(in_flight=[1, 2]))
    assert history.lines[1].is_suspect and history.lines[2].is_suspect
    for step in range(1, 24):
        weigh(history, death(in_flight=[1], lone_steps=step))
        assert not history.lines[1].verdict
    weigh(history, death(in_flight=[1], lone_steps=9))
    assert "24 times in a row" in history.lines[1].verdict
    assert not history.lines[2].verdict


@pytest.mark.parametrize("is_at_start", [False, True])
def test_deaths_far_from_a_line_speak_for_it(is_at_start):
    """Somebody kills the runs, so more deaths near a line are needed, of each kind."""
    strikes, lone, beside = History(), History(), History()
    for history in (strikes, lone, beside):
        for _ in range(3):
            weigh(history, death(in_flight=[] if is_at_start else [8], has_results=True))
    for count in range(1, 6):
        weigh(strikes, death(taken=1))
        assert bool(strikes.lines[1].verdict) == (count >= 2 + 3)
    for count in range(1, 6):
        weigh(lone, death(in_flight=[1], lone_steps=1))
        assert bool(lone.lines[1].verdict) == (count >= 2 + 3)
    for count in range(1, 6):
        weigh(beside, death(in_flight=[1, 2], has_results=count == 1))
        assert beside.lines[1].is_suspect == (count >= 2 + 3)
    for _ in range(2):  # a crash is no kill
        weigh(strikes, death(taken=2, crash="Segmentation fault"))
    assert strikes.lines[2].verdict


def test_unexplained_deaths_with_results_between_are_not_in_a_row():
    history = History()
    for _ in range(2):
        weigh(history, death(in_flight=[1, 2]))
    for _ in range(10):
        weigh(history, death(in_flight=[1], lone_steps=3, has_results=True))
    assert not history.lines[1].verdict
    weigh(history, death(in_flight=[1], lone_steps=3))
    assert "2 times" not in history.lines[2].verdict and history.lines[1].verdict


def test_crashes_beside_others_condemn_no_line():
    history = History()
    for _ in range(5):
        weigh(history, death(in_flight=[1, 2], crash="Segmentation fault", has_results=True))
    assert not history.lines[1].verdict and not history.lines[2].verdict
    weigh(history, death(in_flight=[2], crash="Segmentation fault", lone_steps=1))
    assert not history.lines[1].verdict and "alone (Segmentation" in history.lines[2].verdict
