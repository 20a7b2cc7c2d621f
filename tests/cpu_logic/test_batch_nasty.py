"""Batch files of nasty lines: each has exactly one record, and the run goes on."""

import json
import random

import pytest
from batch_engine import StandInEngine
from test_batch_resume import PanicError, records_of, results_of, run, write_lines

from nanovllm.batch.requests import LineError, parse_line
from nanovllm.batch.result_file import ResultFile


class Untold(Exception):
    def __repr__(self):
        raise ValueError("no words for it")

    __str__ = __repr__


ERRORS = [PanicError("index out of bounds"), MemoryError(), RecursionError(), OSError("odd")]
ERRORS += [Untold(), KeyError("x" * 10**6), StopIteration(), UnicodeError("\ud800")]


@pytest.fixture
def source(tmp_path):
    return write_lines(tmp_path / "in.jsonl", 20)


@pytest.fixture
def expected(source, tmp_path):
    assert run(source, tmp_path / "expected.jsonl") == 1
    return results_of(tmp_path / "expected.jsonl")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("stage", ["take", "output"])
def test_whatever_a_line_raises_is_its_error_record(source, tmp_path, expected, error, stage):
    class Engine(StandInEngine):
        def add_request(self, prompt, sampling_params):
            if prompt == "prompt 7" and stage == "take":
                raise error
            return super().add_request(prompt, sampling_params)

        def get_output(self, number):
            if self.returned[number][0] == "prompt 7":
                raise error
            return super().get_output(number)

    target = tmp_path / "out.jsonl"
    assert run(source, target, Engine()) == 1
    results = results_of(target)
    record = results.pop("id-7")
    assert record["error"]["code"] == "internal_error"
    assert type(error).__name__ in record["error"]["message"]
    assert len(record["error"]["message"]) < 1100
    del expected["id-7"]
    assert results == expected


def test_an_error_record_that_finds_no_memory(source, tmp_path, monkeypatch):
    """Without the id it is written."""
    append = ResultFile.append

    def scarce(self, record):
        if record["error"] and record["custom_id"]:
            raise MemoryError
        append(self, record)

    monkeypatch.setattr(ResultFile, "append", scarce)
    assert run(source, tmp_path / "out.jsonl") == 1
    [record] = [record for record in records_of(tmp_path / "out.jsonl") if record["error"]]
    assert (record["line"], record["custom_id"]) == (4, None)
    assert "temperature" in record["error"]["message"]


def test_a_request_that_failed_in_a_step(source, tmp_path, expected):
    """The engine ended it alone, and says why."""

    class Engine(StandInEngine):
        def get_output(self, number):
            output = super().get_output(number)
            output.error = None
            if output.prompt == "prompt 7":
                output.error = "OverflowError: int too large to convert"
                output.outputs[0].finish_reason = "abort"
            if output.prompt == "prompt 8":  # a grammar's dead end: a result
                output.outputs[0].finish_reason = "abort"
            return output

    target = tmp_path / "out.jsonl"
    assert run(source, target, Engine()) == 1
    results = results_of(target)
    message = "OverflowError: int too large to convert"
    assert results.pop("id-7")["error"] == {"code": "request_failed", "message": message}
    [choice] = results["id-8"]["response"]["body"]["choices"]
    assert choice.pop("finish_reason") == "abort"
    [choice] = expected["id-8"]["response"]["body"]["choices"]
    del expected["id-7"], choice["finish_reason"]
    assert results == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' twice in one object"),
        (b'{"b": {"c": [{"a": 1, "a": 2}]}}', "the key 'a' twice in one object"),
        (b'{"a": 1, "\\u0061": 2}', "the key 'a' twice in one object"),
        (b'{"a": NaN}', "has NaN, which is not JSON"),
        (b'{"a": [Infinity]}', "has Infinity, which is not JSON"),
        (b'{"a": -Infinity}', "has -Infinity, which is not JSON"),
        (b'{"a": 1e400}', "a number beyond a float: 1e400"),
        (b'{"a": -' + b"9" * 400 + b".0}", "a number beyond a float: -999"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b'{"a": "\xff"}', "not valid JSON: 'utf-8' codec can't decode"),
        (b'{"a": "\xed\xa0\x80"}', "not valid JSON: 'utf-8' codec can't decode"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON: 'utf-8' codec can't decode"),
        ('{"a": 1}'.encode("utf-32-le"), "not valid JSON"),
        (b'{"a": "\x00"}', "not valid JSON: Invalid control character"),
        (b'{"a": 01}', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 1} {"a": 1}', "not valid JSON: Extra data"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON: RecursionError"),
        (b"[" * 900 + b"]" * 900, "must be a JSON object"),
        (b'"a"', "must be a JSON object, got 'a'"),
        (b"7" * 4300, "must be a JSON object, got 777"),
    ],
)
def test_lines_that_are_no_json(line, message):
    with pytest.raises(LineError) as caught:
        parse_line(line)
    assert caught.value.code == "invalid_json"
    assert message in str(caught.value) and len(str(caught.value)) < 400


def test_lines_that_are_json():
    assert parse_line(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}  # a file's byte order mark
    assert parse_line(b'\t{"a": "\\ud800", "b": [1e-400, -0.0, 1E5]}\r') == {
        "a": "\ud800",
        "b": [0.0, -0.0, 1e5],
    }
    large = 10**4299
    assert parse_line(b'{"a": %d}' % large) == {"a": large}


def test_nasty_lines_have_one_record_each(tmp_path):
    """Values of all sorts in all places, lines torn and garbled, several MB; two runs."""
    rng = random.Random(3)
    values = [None, True, 0, -1, 2**31, -(2**31), 2**53, 2**63, -(2**63), 2**64, 10**4299, 1e308]
    values += [5e-324, -0.0, 0.5, "", "a", "\0", "\ud800", "é", "😀", "a" * 500_000, [], [[]], {}]
    values += [[1, 2], ["a"], {"a": 1}, [None], [10**30], {"": ""}, {"\ud800": 1}, [{}] * 3]
    deep: list = []
    for _ in range(300):
        deep = [deep]
    values.append(deep)
    names = ["custom_id", "prompt", "model", "temperature", "top_k", "seed", "stop", "n", "odd"]
    names += ["max_tokens", "logprobs", "top_logprobs", "logit_bias", "sampling_params", "body"]
    names += ["response_format", "structured_outputs", "return_token_ids", "method", "url", "tools"]
    names += ["max_completion_tokens", "stream", "min_p", "bad_words", "allowed_token_ids", "user"]
    plain = {"custom_id": "x", "prompt": "one", "max_tokens": 3}
    lines = []
    for i in range(1500):
        record = plain | {"custom_id": f"id-{i}"}
        for _ in range(rng.randrange(3)):
            record[rng.choice(names)] = rng.choice(values)
        if rng.random() < 0.2:
            record = {"custom_id": f"id-{i}", "body": record}
        line = json.dumps(record, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        if rng.random() < 0.2:
            garbled = bytearray(line[: rng.randrange(1, 1 + len(line))])
            for _ in range(rng.randrange(4)):
                garbled[rng.randrange(len(garbled))] = rng.randrange(256)
            line = bytes(garbled)
        lines.append(line.replace(b"\n", b" ").replace(b"\r", b" ") or b"{")
    lines.append(json.dumps(plain | {"custom_id": "large", "user": "a" * 20_000_000}).encode())
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n")
    numbers = [number for number, line in enumerate(lines, 1) if line.strip()]
    assert run(source, target) == 1
    records = records_of(target)
    assert sorted(record["line"] for record in records) == numbers
    codes = ("invalid_json", "invalid_request", "duplicate_custom_id")
    num_results = sum(record["error"] is None for record in records)
    assert 300 < num_results < 1200
    assert {record["line"]: record for record in records}[len(lines)]["custom_id"] == "large"
    for record in records:
        if record["error"]:
            assert record["error"]["code"] in codes, record["error"]
            assert len(record["error"]["message"]) <= 1003
    content = target.read_bytes()
    assert run(source, target) == 1
    assert target.read_bytes() == content
