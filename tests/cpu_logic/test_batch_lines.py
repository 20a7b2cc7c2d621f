"""Batch files: the forms of a line, what is wrong with one, the records, the command line."""

import json

import pytest
from batch_engine import StandInEngine
from test_batch_resume import records_of, run

from nanovllm import ArgumentError, SamplingParams
from nanovllm.batch.options import parse_options
from nanovllm.batch.records import LineInfo, encode, result_record
from nanovllm.batch.requests import as_request, parse_line, seed_of_line
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.sampling_params import StructuredOutputsParams

DEFAULTS = {"temperature": 0.6, "max_tokens": 7}
HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def request_of(line, defaults=DEFAULTS):
    return as_request(parse_line(json.dumps(line).encode()), defaults, False, 5)


# ---- lines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "Hi", "temperature": 0.5, "top_k": 3},
        {"prompt": "Hi", "sampling_params": {"temperature": 0.5, "top_k": 3}},
        {"prompt": "Hi", "top_k": 3, "sampling_params": {"temperature": 0.5}},
        {"body": {"model": "gpt", "prompt": "Hi", "temperature": 0.5, "top_k": 3, "stop": None}},
        {
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": "Hi", "temperature": 0.5, "top_k": 3, "stream": False, "user": "a"},
        },
        {"method": None, "url": None, "body": {"prompt": "Hi", "temperature": 0.5, "top_k": 3}},
        {"method": None, "url": None, "body": None, "prompt": "Hi", "temperature": 0.5, "top_k": 3},
        {
            "prompt": "Hi",
            "top_k": 3,
            "temperature": None,
            "sampling_params": {"temperature": 0.5, "top_k": None},
        },
    ],
)
def test_the_forms_of_a_completion(line):
    request = request_of(line | {"custom_id": "a"})
    assert (request.prompt, request.messages, request.chat_options) == ("Hi", None, {})
    assert request.params == SamplingParams(temperature=0.5, max_tokens=7, top_k=3, seed=5)
    assert request.return_token_ids is False


def test_the_forms_of_a_chat():
    url = "/v1/chat/completions"
    for line in (
        {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}},
        {
            "url": url,
            "body": {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}},
        },
    ):
        request = request_of(line | {"custom_id": "a"})
        assert (request.prompt, request.messages) == (None, HELLO)
        assert request.chat_options == {"chat_template_kwargs": {"enable_thinking": False}}
        assert request.params == SamplingParams(**DEFAULTS, seed=5)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {}),
        ({"max_tokens": None}, {"max_tokens": None}),
        ({"temperature": None}, {}),
        ({"max_completion_tokens": 3}, {"max_tokens": 3}),
        ({"max_completion_tokens": 3, "max_tokens": 3}, {"max_tokens": 3}),
        ({"max_completion_tokens": 3, "max_tokens": None}, {"max_tokens": 3}),
        ({"seed": 11}, {"seed": 11}),
        ({"seed": 0}, {"seed": 0}),
        ({"seed": -1}, {}),
        ({"seed": None}, {}),
        ({"logprobs": 2}, {"logprobs": 2}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 4}, {"logprobs": 4}),
        ({"logprobs": False}, {}),
        ({"stop": "a", "n": 2}, {"stop": ["a"], "n": 2}),
        ({"logit_bias": {"5": -100}}, {"logit_bias": {5: -100.0}}),
        ({"response_format": {"type": "text"}}, {}),
        (
            {"response_format": {"type": "json_object"}},
            {"structured_outputs": StructuredOutputsParams(json_object=True)},
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            {"structured_outputs": StructuredOutputsParams(json=SCHEMA)},
        ),
        (
            {"structured_outputs": {"choice": ["yes", "no"]}},
            {"structured_outputs": StructuredOutputsParams(choice=["yes", "no"])},
        ),
    ],
)
def test_parameters(values, expected):
    params = request_of({"prompt": "Hi", **values}).params
    assert params == SamplingParams(**({"seed": 5} | DEFAULTS | expected))


def test_a_line_overrides_a_default():
    request = request_of({"prompt": "Hi", "logprobs": False}, {"logprobs": 3, "min_p": 0.1})
    assert request.params == SamplingParams(min_p=0.1, seed=5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({}, "one of 'prompt' and 'messages', got neither"),
        ({"prompt": "a", "messages": HELLO}, "got prompt and messages"),
        ({"prompt": "a", "temprature": 1}, "unknown parameter 'temprature'; .*: temperature"),
        ({"prompt": "a", "sampling_params": {"topk": 1}}, "unknown parameter 'topk'; .*: top_k"),
        ({"prompt": "a", "sampling_params": []}, "sampling_params must be an object"),
        ({"prompt": "a", "sampling_params": [1]}, "sampling_params must be an object"),
        ({"prompt": "a", "n": 1, "sampling_params": {"n": 1}}, "n is given twice"),
        ({"prompt": "a", "chat_template_kwargs": {}}, "unknown parameter 'chat_template_kwargs'"),
        ({"prompt": "a", "guided_regex": "a"}, r'write structured_outputs=\{"regex": \.\.\.\}$'),
        ({"prompt": "a", "num_beams": 4}, "'num_beams': beam search is a call of its own"),
        ({"prompt": "a", "priority": 1}, "unknown parameter 'priority'$"),
        ({"prompt": "a", "temperature": -1}, "temperature must be finite and >= 0, got -1"),
        ({"prompt": "a", "temperature": "1"}, "temperature must be .* got '1'"),
        ({"prompt": "a", "stream": True}, "stream is not available"),
        ({"prompt": "a", "echo": True}, "echo is not available"),
        ({"prompt": "a", "top_logprobs": 3}, "top_logprobs needs logprobs=true"),
        ({"prompt": "a", "logprobs": True, "top_logprobs": "x"}, "top_logprobs must be"),
        ({"prompt": "a", "return_token_ids": 1}, "return_token_ids must be True or False"),
        ({"prompt": "a", "max_tokens": 4, "max_completion_tokens": 5}, "both given and differ"),
        ({"prompt": "a", "response_format": "json"}, "response_format must be"),
        ({"prompt": "a", "response_format": {"type": "json_schema"}}, "response_format must be"),
        ({"prompt": "a", "structured_outputs": {"jsn": 1}}, "structured_outputs has no 'jsn'"),
        ({"url": "/v1/completions", "prompt": "a"}, "unknown parameter 'url'"),
        ({"url": "/v1/embeddings", "prompt": "a"}, "unknown parameter 'url'"),
        ({"body": None}, "one of 'prompt' and 'messages', got neither"),
        ({"body": []}, "body must be an object"),
        ({"body": {"prompt": "a"}, "temperature": 1}, "unknown parameter 'temperature'"),
        ({"body": {"prompt": "a"}, "method": "GET"}, "method must be 'POST'"),
        ({"body": {"prompt": "a"}, "url": "/v1/embeddings"}, "url must be one of"),
        ({"body": {"prompt": "a"}, "url": ["/v1/completions"]}, "url must be one of"),
        (
            {"body": {"prompt": "a"}, "url": "/v1/chat/completions"},
            "needs 'messages', got 'prompt'",
        ),
        ({"body": {"sampling_params": {}, "prompt": "a"}}, "unknown parameter 'sampling_params'"),
    ],
)
def test_wrong_requests(line, message):
    with pytest.raises(ArgumentError, match=message):
        request_of(line)


def test_seeds_of_lines():
    seeds = {seed_of_line(seed, number) for seed in range(20) for number in range(1, 51)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert seed_of_line(3, 4) == seed_of_line(3, 4)


def test_bad_lines_become_error_records(tmp_path, capsys):
    lines = {
        b'{"custom_id": "a", "prompt": "one"}': None,
        b"": None,
        b"{": ("invalid_json", "not valid JSON"),
        b"[1]": ("invalid_json", "must be a JSON object, got [1]"),
        b"[" * 100_000: ("invalid_json", "not valid JSON"),
        b"\xff\xfe": ("invalid_json", "not valid JSON"),
        b'{"prompt": "two"}': ("invalid_request", "custom_id must be a string"),
        b'{"custom_id": 5, "prompt": "two"}': ("invalid_request", "custom_id must be a string"),
        b'{"custom_id": "a", "prompt": "two"}': ("duplicate_custom_id", "'a'"),
        b'{"custom_id": "b", "prompt": "two", "topp": 1}': ("invalid_request", "top_p"),
        b'{"custom_id": "c", "prompt": "too long"}': ("invalid_request", "prompt length 9"),
        b'{"custom_id": "d", "prompt": "odd"}': ("internal_error", "KeyError('odd')"),
        '{"custom_id": "é\\ud800", "prompt": "three"}\r'.encode(): None,
    }
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(lines))
    engine = StandInEngine()
    assert run(source, target, engine) == 1
    assert "12 lines: 2 completed, 10 with an error record" in capsys.readouterr().err
    assert sorted(engine.log) == ["one", "three"]
    records = {record["line"]: record for record in records_of(target)}
    assert sorted(records) == [1, *range(3, 14)]  # the second is blank
    for number, expected in enumerate(lines.values(), 1):
        if expected is not None:
            code, message = expected
            assert records[number]["response"] is None
            assert records[number]["error"]["code"] == code
            assert message in records[number]["error"]["message"]
    assert [records[number]["custom_id"] for number in (1, 3, 8, 9)] == ["a", None, None, "a"]
    assert records[13]["custom_id"] == "é\ud800"
    assert run(source, target, engine) == 1
    assert len(records_of(target)) == 12


def test_what_the_engine_is_given(tmp_path):
    """The model's defaults, then the command line's, then the line's."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"custom_id": "a", "prompt": [1, 2], "max_tokens": 3}\n')
    given = []
    engine = StandInEngine(lambda step: given.extend(engine.queue.values()))
    options = ["--seed", "9", "--temperature", "0.2", "--max-model-len", "none", "--enforce-eager"]
    assert run(source, target, engine, *options) == 0
    settings = {"model": "models/tiny", "seed": 9, "max_model_len": None, "enforce_eager": True}
    assert engine.keywords == settings
    params = SamplingParams(
        temperature=0.2, top_p=0.95, max_tokens=3, skip_special_tokens=True, seed=seed_of_line(9, 1)
    )
    assert given[0] == ([1, 2], params)


# ---- records ----------------------------------------------------------------------------------


def output_with(prompt_logprobs=None, **completion):
    values = {"index": 0, "text": "Hi", "token_ids": [7, 8], "finish_reason": "stop"} | completion
    return RequestOutput("0", "P", [1, 2, 3], prompt_logprobs, [CompletionOutput(**values)], True)


def test_a_completion_record():
    record = result_record(LineInfo("batch_req_0_1", 4, "a"), output_with(stop_reason=8), "tiny")
    created = record["response"]["body"].pop("created")
    assert isinstance(created, int)
    choice = {"index": 0, "text": "Hi", "logprobs": None, "finish_reason": "stop", "stop_reason": 8}
    body = {
        "id": "cmpl-1",
        "object": "text_completion",
        "model": "tiny",
        "choices": [choice],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }
    assert record == {
        "id": "batch_req_0_1",
        "line": 4,
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "1", "body": body},
        "error": None,
    }


def test_a_chat_record_with_everything():
    logprobs = [
        {7: Logprob(-2.0, 3, "H"), 5: Logprob(-0.5, 1, "A"), 6: Logprob(-1.5, 2, "\ufffd")},
        {8: Logprob(float("-inf"), 1, None), 5: Logprob(float("-inf"), 2, "A")},
    ]
    output = output_with([None, *logprobs], logprobs=logprobs)
    info = LineInfo("batch_req_0_1", 4, "a", SamplingParams(logprobs=2), True, True)
    body = json.loads(encode(result_record(info, output, "tiny")))["response"]["body"]
    assert (body["id"], body["object"]) == ("chatcmpl-1", "chat.completion")
    assert body["prompt_token_ids"] == [1, 2, 3]
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hi"}
    assert choice["token_ids"] == [7, 8]
    first, second = choice["logprobs"]["content"]
    half = {"token": "\ufffd", "logprob": -1.5, "bytes": None}
    top = [{"token": "A", "logprob": -0.5, "bytes": [65]}, half]
    assert first == {"token": "H", "logprob": -2.0, "bytes": [72], "top_logprobs": top}
    assert (second["token"], second["logprob"]) == ("token_id:8", -9999.0)
    assert body["prompt_logprobs"][0] is None
    assert body["prompt_logprobs"][1]["5"] == {"logprob": -0.5, "rank": 1, "decoded_token": "A"}

    info = LineInfo("batch_req_0_1", 4, "a", SamplingParams(logprobs=2))
    body = json.loads(encode(result_record(info, output, "tiny")))["response"]["body"]
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["H", "token_id:8"],
        "token_logprobs": [-2.0, -9999.0],
        "top_logprobs": [
            {"H": -2.0, "A": -0.5, "\ufffd": -1.5},
            {"token_id:8": -9999.0, "A": -9999.0},
        ],
        "text_offset": [0, 1],
    }


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_logprob_that_is_no_number_is_null(is_chat):
    """As an overflow in float16 makes them; JSON has no NaN."""
    rows = [{7: Logprob(float("nan"), 1, "H"), 8: Logprob(-1.0, 2, "i")}, {8: Logprob(-2.0, 1)}]
    info = LineInfo("batch_req_0_1", 4, "a", SamplingParams(logprobs=2), is_chat)
    record = result_record(info, output_with([None, *rows], logprobs=rows), "tiny")
    body = json.loads(encode(record))["response"]["body"]
    logprobs = body["choices"][0]["logprobs"]
    if is_chat:
        assert [entry["logprob"] for entry in logprobs["content"]] == [None, -2.0]
        assert {token["logprob"] for token in logprobs["content"][0]["top_logprobs"]} == {None, -1}
    else:
        assert logprobs["token_logprobs"] == [None, -2.0]
        assert logprobs["top_logprobs"][0] == {"H": None, "i": -1.0}
    assert body["prompt_logprobs"][1]["7"]["logprob"] is None


def test_a_record_is_one_line_of_utf8():
    for text in ("a\nb\u2028\r\x00", "为什么🌶️", "\ud800", '"\\'):
        line = encode({"text": text})
        assert line.index(b"\n") == len(line) - 1
        assert json.loads(line) == {"text": text}
    assert "为什么".encode() in encode({"text": "为什么"})


# ---- the command line -------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"custom_id": "a", "prompt": "one"}\n')
    return [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]


def test_options(files):
    arguments = [
        *files,
        "--model",
        "models/Tiny/",
        "--tensor-parallel-size",
        "2",
        "--dtype=float16",
    ]
    arguments += ["--no-enable-prefix-caching", "--gpu-memory-utilization", "0.5"]
    arguments += ["--block-size", "512", "--hf-overrides", '{"num_hidden_layers": 2}']
    arguments += ["--max-tokens", "none", "--stop", "a", "--stop", "b", "--stop-token-ids", "5"]
    arguments += ["--top-p", "0.5", "--logit-bias", '{"5": 1}', "--no-detokenize"]
    arguments += ["--structured-outputs", '{"regex": "a+"}', "--return-token-ids"]
    with pytest.raises(ArgumentError, match="stop needs detokenize=True"):
        parse_options(arguments)
    arguments.remove("--no-detokenize")
    options = parse_options(arguments)
    assert (options.input_path, options.output_path) == tuple(files)
    assert options.model_name == "Tiny"
    assert options.engine == {
        "model": "models/Tiny/",
        "seed": 0,
        "tensor_parallel_size": 2,
        "dtype": "float16",
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.5,
        "kvcache_block_size": 512,
        "hf_overrides": {"num_hidden_layers": 2},
    }
    assert options.defaults == {
        "max_tokens": None,
        "stop": ["a", "b"],
        "stop_token_ids": [5],
        "top_p": 0.5,
        "logit_bias": {"5": 1},
        "structured_outputs": StructuredOutputsParams(regex="a+"),
    }
    assert options.return_token_ids and options.shows_progress


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature must be finite and >= 0"),
        (["--structured-outputs", "{}"], "exactly one of"),
        (["--temperature", "warm"], "argument --temperature: invalid number value: 'warm'"),
        (["--max-num-seqs", "many"], "argument --max-num-seqs: invalid number value: 'many'"),
        (["--hf-overrides", "[]"], "is not a JSON object"),
        (["--hf-overrides", "{"], "is not valid JSON"),
        (["--max-num", "5"], "unrecognized arguments"),
    ],
)
def test_wrong_options(files, options, message, capsys):
    def refuse(**keywords):
        raise AssertionError("the model is loaded before the arguments are checked")

    arguments = [*files, "--model", "models/tiny", *options]
    if "argument" in message or "JSON" in message:
        with pytest.raises(SystemExit, match="2"):
            parse_options(arguments)
    else:
        assert run(*files, refuse, *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("-", "out.jsonl", "not '-'"),
        ("in.jsonl", "-", "not '-'"),
        ("missing.jsonl", "out.jsonl", "input 'missing.jsonl' is not an existing file"),
        (".", "out.jsonl", "input '.' is not an existing file"),
        ("in.jsonl", "missing/out.jsonl", "the folder of the output does not exist"),
        ("in.jsonl", ".", "is not a regular file"),
        ("in.jsonl", "/dev/null", "is not a regular file"),
        ("in.jsonl", "in.jsonl", "the same file"),
        ("in.jsonl", "./in.jsonl", "the same file"),
        ("in.jsonl", "link.jsonl", "the same file"),
    ],
)
def test_wrong_files(files, tmp_path, monkeypatch, source, target, message, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    assert run(source, target) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_the_engine_refuses_an_option(files, capsys):
    def refuse(**keywords):
        raise ArgumentError("max_num_seqs must be >= 1, got 0")

    assert run(*files, refuse, "--max-num-seqs", "0") == 2
    assert "max_num_seqs must be >= 1, got 0" in capsys.readouterr().err


def test_an_empty_input(tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n \n")
    assert run(source, target, None) == 0
    assert "0 lines" in capsys.readouterr().err
