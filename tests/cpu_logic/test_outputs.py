"""RequestOutput as nano-vLLM's dict of two keys and as vLLM's object."""

import copy
import json
import operator
import pickle

import pytest

from nanovllm import CompletionOutput, FlatLogprobs, Logprob, RequestMetrics, RequestOutput

TWO_KEYS = {"text": " b", "token_ids": [5, 6]}


@pytest.fixture
def output() -> RequestOutput:
    entry = {5: Logprob(-0.5, 1, " b"), 7: Logprob(-1.5, 2, "c")}
    completions = [
        CompletionOutput(0, " b", [5, 6], -0.75, [entry, {6: Logprob(-0.25)}], "stop", 6),
        CompletionOutput(1, " c", [7], finish_reason="length"),
    ]
    return RequestOutput(
        "3",
        "a",
        [1, 2],
        [None, {2: Logprob(-0.125, 4, "a")}],
        completions,
        True,
        RequestMetrics(10.0, 10.5, 12.0),
        num_cached_tokens=1,
    )


def test_it_is_a_dict_of_text_and_token_ids(output):
    assert isinstance(output, dict)
    assert output == TWO_KEYS and TWO_KEYS.__eq__(output)
    assert output != TWO_KEYS | {"text": "x"}
    assert set(output) == {"text", "token_ids"} and len(output) == 2
    assert {**output} == dict(output) == TWO_KEYS
    assert type({**output}) is dict
    assert json.loads(json.dumps(output)) == TWO_KEYS
    assert json.loads(json.dumps(output, indent=1)) == TWO_KEYS
    text, token_ids = output.values()
    assert (text, token_ids) == (" b", [5, 6])


def test_it_has_the_attributes_of_vllm(output):
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("3", "a", [1, 2])
    assert output.finished is True and output.num_cached_tokens == 1
    assert output.prompt_logprobs[1][2].logprob == -0.125
    assert output.metrics.time_to_first_token == 0.5 and output.metrics.latency == 2.0
    first, second = output.outputs
    assert (first.index, first.text, first.token_ids) == (0, " b", [5, 6])
    assert (first.finish_reason, first.stop_reason, first.cumulative_logprob) == ("stop", 6, -0.75)
    assert first.logprobs[0][7].rank == 2 and first.logprobs[0][7].decoded_token == "c"
    assert (second.logprobs, second.cumulative_logprob, second.stop_reason) == (None, None, None)
    assert second.finished()


def test_what_vllm_has_and_this_library_does_not_is_none(output):
    names = "lora_request encoder_prompt encoder_prompt_token_ids kv_transfer_params".split()
    assert {getattr(output, name) for name in names} == {None}
    assert output.outputs[0].lora_request is output.outputs[0].routed_experts is None
    metrics = RequestMetrics(1.0, 2.0, 4.0)
    assert (metrics.queued_ts, metrics.first_token_ts, metrics.last_token_ts) == (1.0, 2.0, 4.0)
    assert metrics.first_token_latency == 1.0 and metrics.scheduled_ts is None


def test_attributes_read_as_keys_but_are_no_items(output):
    assert output["finish_reason"] == "stop" and output["stop_reason"] == 6
    assert output["cumulative_logprob"] == -0.75
    assert output["logprobs"] is output.outputs[0].logprobs
    assert output["prompt_token_ids"] == [1, 2] and output["num_cached_tokens"] == 1
    assert output["outputs"] is output.outputs and output["finished"] is True
    assert output.get("finish_reason") == "stop" and output.get("text") == " b"
    assert output.get("nothing") is None and output.get("nothing", 5) == 5
    assert "finish_reason" not in output
    for unknown in ("nothing", "__class__", "to_dict", 0):
        with pytest.raises(KeyError, match=str(unknown)):
            output[unknown]


@pytest.mark.parametrize(
    "make_copy",
    [copy.copy, copy.deepcopy]
    + [lambda output, p=p: pickle.loads(pickle.dumps(output, p)) for p in range(2, 6)],
)
def test_copies_keep_items_and_attributes(output, make_copy):
    twin = make_copy(output)
    assert type(twin) is RequestOutput and twin is not output
    assert twin == TWO_KEYS
    assert vars(twin) == vars(output) and repr(twin) == repr(output)
    assert twin["finish_reason"] == "stop"


def test_a_deep_copy_is_independent(output):
    twin = copy.deepcopy(output)
    twin["token_ids"].append(9)
    twin.outputs[0].logprobs[0].clear()
    assert output == TWO_KEYS and len(output.outputs[0].logprobs[0]) == 2
    assert twin.outputs[0].token_ids == [5, 6, 9]  # one list, as in the original


def test_to_dict_is_everything_as_json(output):
    everything = output.to_dict()
    read = json.loads(json.dumps(everything))
    assert read == {
        "text": " b",
        "token_ids": [5, 6],
        "request_id": "3",
        "prompt": "a",
        "prompt_token_ids": [1, 2],
        "prompt_logprobs": [None, {"2": {"logprob": -0.125, "rank": 4, "decoded_token": "a"}}],
        "outputs": [
            {
                "index": 0,
                "text": " b",
                "token_ids": [5, 6],
                "cumulative_logprob": -0.75,
                "logprobs": [
                    {
                        "5": {"logprob": -0.5, "rank": 1, "decoded_token": " b"},
                        "7": {"logprob": -1.5, "rank": 2, "decoded_token": "c"},
                    },
                    {"6": {"logprob": -0.25, "rank": None, "decoded_token": None}},
                ],
                "finish_reason": "stop",
                "stop_reason": 6,
                "lora_request": None,
            },
            {
                "index": 1,
                "text": " c",
                "token_ids": [7],
                "cumulative_logprob": None,
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "lora_request": None,
            },
        ],
        "finished": True,
        "metrics": {"arrival_time": 10.0, "first_token_time": 10.5, "finished_time": 12.0},
        "num_cached_tokens": 1,
        "error": None,
        "lora_request": None,
    }
    assert type(everything) is dict
    for items in (everything["token_ids"], everything["prompt_token_ids"]):
        items.clear()
    assert output == TWO_KEYS and output.prompt_token_ids == [1, 2]


def test_an_unfinished_request_has_no_reason_and_no_times():
    output = RequestOutput("0", None, [1], None, [CompletionOutput(0, "", [])], False)
    assert output == {"text": "", "token_ids": []}
    assert output["finish_reason"] is None and not output.outputs[0].finished()
    assert output.metrics is None and output.num_cached_tokens is None
    assert output.to_dict()["metrics"] is None
    metrics = RequestMetrics(arrival_time=1.0)
    assert metrics.time_to_first_token is None and metrics.latency is None


def test_repr_shows_the_attributes(output):
    shown = repr(output)
    assert shown.startswith("RequestOutput(request_id='3', prompt='a', prompt_token_ids=[1, 2], ")
    assert "CompletionOutput(index=1, text=' c', token_ids=[7]" in shown
    assert "Logprob(logprob=-0.5, rank=1, decoded_token=' b')" in shown


def test_flat_logprobs_read_as_a_list_of_dicts():
    positions = [None, {5: Logprob(-0.5, 1, "a"), 6: Logprob(-1.5, 2)}, {7: Logprob(-0.25)}]
    flat = FlatLogprobs()
    flat.append(positions[0])
    flat.extend(positions[1:])
    dicts = [{}, *positions[1:]]
    assert (flat.start_indices, flat.end_indices) == ([0, 0, 2], [0, 2, 3])
    assert (flat.token_ids, flat.logprobs) == ([5, 6, 7], [-0.5, -1.5, -0.25])
    assert (flat.ranks, flat.decoded_tokens) == ([1, 2, None], ["a", None, None])
    assert list(flat) == dicts and list(reversed(flat)) == dicts[::-1]
    assert (len(flat), flat[-1], positions[1] in flat) == (3, dicts[-1], True)
    for part in (slice(1, 3), slice(None, None, -1), slice(0, None, 2), slice(3, None)):
        assert isinstance(flat[part], FlatLogprobs) and list(flat[part]) == dicts[part]
    assert flat[:2] == FlatLogprobs([0, 0], [0, 2], [5, 6], [-0.5, -1.5], [1, 2], ["a", None])
    twice = FlatLogprobs([0], [2], [5, 5], [-0.5, -0.5], [2, 1], [None, None])
    twice += twice
    assert (twice.end_indices, twice[1]) == ([2, 4], {5: Logprob(-0.5, 1)})
    with pytest.raises(IndexError):
        flat[3]


def test_positions_of_flat_logprobs_are_only_appended():
    flat = FlatLogprobs()
    flat += [{5: Logprob(-0.5)}]
    for change in (
        lambda: flat.insert(0, {}),
        lambda: flat.pop(),
        lambda: operator.setitem(flat, 0, {}),
        lambda: operator.delitem(flat, 0),
    ):
        with pytest.raises(TypeError, match="FlatLogprobs"):
            change()
    with pytest.raises(ValueError, match="shorter"):
        flat.append_fast([1, 2], [-0.5], [1, 2], [None, None])
    assert flat == FlatLogprobs([0], [1], [5], [-0.5], [None], [None])
