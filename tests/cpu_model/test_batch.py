"""Batch files with a real engine: the completions are those of transformers and of `generate`."""

import json
import os
import signal

import pytest
from engine_checks import random_prompts
from tiny_models import reference_greedy

from nanovllm import LLM, SamplingParams
from nanovllm.batch.requests import seed_of_line
from nanovllm.batch.run import main

PROMPTS = random_prompts((5, 30, 12, 260, 7, 3, 18, 40), seed=70)
MAX_TOKENS = 12
ENGINE = ["--device", "cpu", "--num-kvcache-blocks", "32", "--max-num-seqs", "2"]
HELLO = [{"role": "user", "content": "the quick brown fox"}]


def run(source, target, tiny_dir, *options, make_engine=None):
    arguments = [str(source), str(target), "--model", str(tiny_dir), *ENGINE, "--no-progress"]
    return main([*arguments, *options], make_engine)


def write(path, lines):
    path.write_text("".join(json.dumps({"custom_id": str(i)} | x) + "\n" for i, x in lines.items()))
    return path


def bodies_of(path):
    """The bodies by custom_id, without what the clock says; errors by their messages."""
    bodies = {}
    for record in map(json.loads, path.read_text().splitlines()):
        assert record["custom_id"] not in bodies
        if record["error"] is None:
            del record["response"]["body"]["created"]
            bodies[record["custom_id"]] = record["response"]["body"]
        else:
            bodies[record["custom_id"]] = record["error"]["message"]
    return bodies


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    lines = {i: {"prompt": prompt, "max_tokens": 4 + i} for i, prompt in enumerate(PROMPTS)}
    return write(tmp_path_factory.mktemp("batch") / "in.jsonl", lines)


def test_an_interrupted_run_gives_what_an_uninterrupted_one_gives(tiny_dir, tmp_path, source):
    """At temperature 1, with other requests side by side after each restart."""
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    options = ["--temperature", "1", "--ignore-eos", "--return-token-ids", "--seed", "3"]
    assert run(source, whole, tiny_dir, *options, "--max-num-seqs", "8") == 0
    engine = LLM(str(tiny_dir), device="cpu", num_kvcache_blocks=32, max_num_seqs=2)

    class Interrupted:
        """The engine, loaded once; SIGTERM arrives in step 15 of every run."""

        config, num_steps = engine.config, 0

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            engine.abort_request(list(engine.requests.unfinished))

        def __getattr__(self, name):
            return getattr(engine, name)

        def step(self):
            self.num_steps += 1
            if self.num_steps == 15:
                os.kill(os.getpid(), signal.SIGTERM)
            return engine.step()

    statuses = []
    while not statuses or statuses[-1] == 143:
        content = parts.read_text() if parts.exists() else ""
        statuses.append(
            run(source, parts, tiny_dir, *options, make_engine=lambda **keywords: Interrupted())
        )
        assert parts.read_text().startswith(content)
        assert len(parts.read_text()) > len(content)
    assert statuses[-1] == 0 and len(statuses) > 2
    assert bodies_of(parts) == bodies_of(whole)

    params = [
        SamplingParams(
            temperature=1, max_tokens=4 + i, ignore_eos=True, seed=seed_of_line(3, i + 1)
        )
        for i in range(len(PROMPTS))
    ]
    with engine:
        outputs = engine.generate(PROMPTS, params, use_tqdm=False)
    token_ids = {key: body["choices"][0]["token_ids"] for key, body in bodies_of(whole).items()}
    assert token_ids == {str(i): output["token_ids"] for i, output in enumerate(outputs)}
    assert len({tuple(ids[:4]) for ids in token_ids.values()}) == len(PROMPTS)


def test_results_of_every_kind(tiny_dir, tmp_path):
    lines = {
        **{
            i: {"prompt": PROMPTS[i], "max_tokens": MAX_TOKENS, "ignore_eos": True}
            for i in range(4)
        },
        "chat": {
            "url": "/v1/chat/completions",
            "body": {"messages": HELLO, "max_tokens": 5, "logprobs": True, "top_logprobs": 2},
        },
        "text": {"prompt": "the quick brown fox", "max_tokens": 6, "logprobs": 1},
        "several": {"prompt": [5, 6, 7], "n": 2, "temperature": 1.0, "max_tokens": 3},
        "long": {"prompt": [5] * 3000},
        "id": {"prompt": [5, 9999]},
        "two chats": {"messages": [HELLO, HELLO]},
        "no chat": {"messages": []},
        "bad role": {"messages": [{"content": "a"}]},
    }
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert run(source, target, tiny_dir, "--temperature", "0", "--return-token-ids") == 1
    bodies = bodies_of(target)
    reference = reference_greedy(tiny_dir, PROMPTS[:4], MAX_TOKENS)
    assert [bodies[str(i)]["choices"][0]["token_ids"] for i in range(4)] == reference
    assert [bodies[str(i)]["prompt_token_ids"] for i in range(4)] == PROMPTS[:4]
    assert bodies["0"]["choices"][0]["finish_reason"] == "length"
    assert bodies["0"]["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": MAX_TOKENS,
        "total_tokens": 5 + MAX_TOKENS,
    }

    [choice] = bodies["chat"]["choices"]
    assert choice["message"]["role"] == "assistant"
    entries = choice["logprobs"]["content"]
    assert len(entries) == len(choice["token_ids"]) <= 5
    for entry in entries:  # greedy: the first of the most probable
        assert len(entry["top_logprobs"]) == 2
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]
    [choice] = bodies["text"]["choices"]
    assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"])
    assert [choice["index"] for choice in bodies["several"]["choices"]] == [0, 1]
    assert bodies["several"]["usage"]["completion_tokens"] <= 6

    assert "prompt length 3000" in bodies["long"]
    assert "9999" in bodies["id"]
    assert "one conversation, got 2" in bodies["two chats"]
    assert "one conversation, got 0" in bodies["no chat"]
    assert "role" in bodies["bad role"]


def test_the_model_is_checked_before_it_is_loaded(source, tmp_path, capsys):
    assert run(source, tmp_path / "out.jsonl", tmp_path / "missing") == 2
    assert "model must be an existing local directory" in capsys.readouterr().err
