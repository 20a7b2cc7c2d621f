"""The parts into which nanovllm.batch.ray_data splits an input; no Ray here."""

import faulthandler
import json
import os
from pathlib import Path

import pytest
from batch_engine import StandInEngine

from nanovllm.batch import ray_data
from nanovllm.batch.ray_data import LLMActor, _gpus_of_an_actor
from nanovllm.batch.requests import seed_of_line
from nanovllm.batch.result_file import Part, read_lines
from nanovllm.errors import ArgumentError

AUSTEN = Path(__file__).resolve().parents[2] / "nanovllm/assets/austen-7m"
LINES = [
    b'{"custom_id": "a", "prompt": "one"}\n',
    b"\n",
    b'{"custom_id": "b", "prompt": "two"}\r\n',
    b'{"custom_id": "b", "prompt": "again"}\n',
    b"no JSON\n",
    '{"custom_id": "a", "prompt": "Straße"}\n'.encode(),
    b'{"custom_id": "c", "prompt": "last"}',
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(LINES))
    return path


@pytest.fixture
def engines(monkeypatch):
    """Actors work in this process, one after the other, with engines that are returned here."""
    made: list[StandInEngine] = []

    def completed(tasks, options, settings, num_actors):
        pool = [LLMActor(options, settings) for _ in range(num_actors)]
        for i, task in enumerate(tasks):
            columns = pool[i % num_actors]({"task": [ray_data.encode_task(task)]})
            yield {name: value for name, [value] in columns.items()}

    def make_engine(**keywords):
        made.append(StandInEngine())
        return made[-1](**keywords)

    monkeypatch.setattr(ray_data, "_completed", completed)
    monkeypatch.setattr(ray_data, "load_engine", make_engine)
    monkeypatch.setattr(ray_data, "check_engine", lambda **keywords: None)  # there is no model
    return made


def run(source, folder, *options):
    arguments = [str(source), str(folder), "--model", "models/tiny", "--no-progress", *options]
    return ray_data.main([*arguments, "--num-actors", "2"])


def records_of(folder):
    return {
        record["line"]: record
        for path in sorted(folder.glob("lines-*.jsonl"))
        for record in map(json.loads, path.read_text().splitlines())
    }


@pytest.mark.parametrize("part_lines", [1, 2, 3, 7, 100])
def test_parts_hold_every_line_once(source, part_lines):
    parts = list(ray_data._split(str(source), part_lines))
    read = [line for part, _, _ in parts for line in read_lines(str(source), part)]
    assert read == list(read_lines(str(source)))
    assert [number for number, _ in read] == [1, 3, 4, 5, 6, 7]
    assert sum(num_lines for _, num_lines, _ in parts) == 6
    assert parts[0][0] == Part(1, min(part_lines, 7), 0)


def test_custom_ids_of_earlier_parts(source):
    earlier = {part.first: ids for part, _, ids in ray_data._split(str(source), 3)}
    assert earlier == {1: [], 4: ["a", "b"], 7: []}
    assert [ids for _, _, ids in ray_data._split(str(source), 7)] == [[]]  # the part's own affair


@pytest.mark.parametrize("part_lines", [2, 3, 7])
def test_results_do_not_depend_on_the_parts(source, tmp_path, engines, part_lines):
    folder = tmp_path / "out"
    assert run(source, folder, "--part-lines", str(part_lines)) == 1
    records = records_of(folder)
    codes = {line: (record["error"] or {}).get("code") for line, record in records.items()}
    duplicate = "duplicate_custom_id"
    assert codes == {1: None, 3: None, 4: duplicate, 5: "invalid_json", 6: duplicate, 7: None}
    prompts = {1: "one", 3: "two", 7: "last"}
    alone = StandInEngine()
    for line, prompt in prompts.items():
        params = alone.get_default_sampling_params()
        params.seed = seed_of_line(0, line)
        number = alone.add_request(prompt, params)
        while number in alone.queue:
            alone.step()
        text = alone.get_output(number).outputs[0].text
        assert records[line]["response"]["body"]["choices"][0]["text"] == text


def test_a_run_goes_on_where_it_was(source, tmp_path, engines, capsys):
    folder = tmp_path / "out"
    options = ["--part-lines", "3"]
    run(source, folder, *options)
    complete = records_of(folder)
    first, second = folder / "lines-000000000001.jsonl", folder / "lines-000000000004.jsonl"
    first.write_bytes(first.read_bytes()[:-5])  # torn
    kept = second.read_bytes()
    engines.clear()
    assert run(source, folder, *options) == 1
    assert second.read_bytes() == kept
    assert sum(len(engine.log) for engine in engines) == 1  # one line of one part
    without_time = [records_of(folder), complete]
    for records in without_time:
        for record in records.values():
            if record["response"]:
                del record["response"]["body"]["created"]
    assert without_time[0] == without_time[1]

    engines.clear()
    with source.open("ab") as file:
        file.write(b'\n{"custom_id": "d", "prompt": "appended"}\n')
    assert run(source, folder, *options) == 1
    assert [line for engine in engines for line in engine.log] == ["appended"]

    for changed in (["--part-lines", "2"], [*options, "--seed", "1"]):
        assert run(source, folder, *changed) == 2
        assert "choose another output" in capsys.readouterr().err
    source.write_bytes(b"".join(LINES[:3]))  # parts without input
    assert run(source, folder, *options) == 2
    assert "another input" in capsys.readouterr().err
    source.write_bytes(b"".join([b'{"custom_id": "z", "prompt": "else"}\n', *LINES[1:]]))
    assert run(source, folder, *options) == 2
    assert "has changed" in capsys.readouterr().err


def test_a_line_that_kills_an_actor_is_passed(source, tmp_path, engines):
    """The file of a part has a journal of its own."""
    with source.open("ab") as file:
        file.write(b'\n{"custom_id": "k", "prompt": "die in take: KILL"}\n')
        file.write(b'{"custom_id": "m", "prompt": "die in step 1: SEGV"}\n')
    folder, statuses = tmp_path / "out", []
    while not statuses or statuses[-1] < 0:
        assert len(statuses) < 8
        if not (process_id := os.fork()):
            status = 99
            try:
                faulthandler.disable()  # pytest's
                status = run(source, folder, "--part-lines", "3")
            finally:
                os._exit(status)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1]))
    assert statuses[-1] == 1 and len(statuses) == 5  # two deaths of each
    records = records_of(folder)
    assert sorted(records) == [1, 3, 4, 5, 6, 7, 8, 9]
    for line in (8, 9):
        assert records[line]["error"]["code"] == "killed_the_process"
    assert not list(folder.glob("*journal*"))


def test_actors_may_work_in_another_directory(source, tmp_path, engines, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tokenizer", "own", "auto"):
        (tmp_path / name).mkdir()
    for name in ("chat.jinja", "{{text}}"):
        (tmp_path / name).write_text("{{ messages }}")
    here = {"model": str(tmp_path / "models/tiny"), "seed": 0}
    for options, expected in (
        (
            {"tokenizer": "tokenizer/", "chat_template": "chat.jinja", "generation_config": "own"},
            {
                "tokenizer": str(tmp_path / "tokenizer"),
                "chat_template": str(tmp_path / "chat.jinja"),
                "generation_config": str(tmp_path / "own"),
            },
        ),
        # No paths: a word of its own, and a template.
        ({"generation_config": "auto", "chat_template": "{{text}}"}, None),
        ({"generation_config": "vllm", "chat_template": "missing.jinja"}, None),
    ):
        engines.clear()
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        assert run("in.jsonl", f"out-{options['generation_config']}", *words) == 1
        assert engines
        for engine in engines:
            assert engine.keywords == here | (expected or options)


def test_each_actor_has_a_record_of_its_own(source, tmp_path, engines, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("in.jsonl", "out", "--record", "run.html") == 1
    own = tmp_path / f"run-{os.uname().nodename}-{os.getpid()}.html"
    assert engines and {engine.keywords["record"] for engine in engines} == {str(own)}


@pytest.mark.parametrize("option", ["--num-actors", "--part-lines"])
def test_wrong_numbers(source, tmp_path, option, capsys):
    arguments = [str(source), str(tmp_path / "out"), "--model", "models/tiny", option, "0"]
    assert ray_data.main(arguments) == 2
    assert "must be >= 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gpus_of_an_actor():
    node = {"CPU": 8.0, "GPU": 4.0}
    assert _gpus_of_an_actor({}, 4, node) == 1
    assert _gpus_of_an_actor({"tensor_parallel_size": 2}, 2, node) == 2
    assert _gpus_of_an_actor({"device": "cpu"}, 8, node) == 0
    assert _gpus_of_an_actor({}, 8, {"CPU": 8.0}) == 0
    with pytest.raises(ArgumentError, match="num_actors must be <= 2: each takes 2 GPUs"):
        _gpus_of_an_actor({"tensor_parallel_size": 2}, 3, node)
    with pytest.raises(ArgumentError, match="num_actors must be <= 0: each takes 1 GPUs"):
        _gpus_of_an_actor({"device": "cuda"}, 1, {"CPU": 8.0})


@pytest.mark.parametrize("options", [["--model", "/nowhere"], ["--dtype", "float64"]])
def test_engines_that_cannot_be_are_refused_before_ray_starts(
    source, tmp_path, options, monkeypatch, capsys
):
    monkeypatch.setattr(ray_data, "_completed", None)
    assert run(source, tmp_path / "out", "--model", str(AUSTEN), *options) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("nanovllm.batch: error: ") and options[1] in line
