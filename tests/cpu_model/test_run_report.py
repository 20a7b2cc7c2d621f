"""The report of an engine's run: its numbers are those of the outputs and of `get_metrics`."""

import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from engine_checks import (
    OUTPUT,
    check_nothing_is_held,
    drain,
    generate,
    greedy,
    random_prompts,
    script_environment,
    tiny_engine,
)
from forked_python import ForkedPython

from nanovllm import ArgumentError, SamplingParams
from nanovllm.batch.run import main
from nanovllm.engine import llm_engine
from nanovllm.stats import FinishedRequestStats, StepStats

MAX_TOKENS = 40
SHARED = random_prompts([300], seed=80)[0]
# Equal beginnings of a block, and more blocks than there are at once.
PROMPTS = [SHARED[:256] + tail for tail in random_prompts([240] * 4 + [3] * 4, seed=81)]
SHORT_OF_BLOCKS = {"num_kvcache_blocks": 6, "max_num_seqs": 8, "watermark": 0}


def numbers_of(path: Path) -> dict[str, int]:
    tree = ElementTree.parse(path)
    return {data.get("id"): int(data.get("value")) for data in tree.iter("data")}


def reasons_of(llm) -> dict[str, int]:
    metrics = llm.get_metrics()
    return {m.labels["finished_reason"]: m.value for m in metrics if "finished_reason" in m.labels}


class Log:
    """A stat logger that keeps everything."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.finished: list[FinishedRequestStats] = []
        self.num_closings = 0

    def record(self, step, finished):
        self.steps.append(step)
        self.finished += finished

    def close(self):
        self.num_closings += 1


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_the_page_has_the_numbers_of_the_run(tiny_dir, tmp_path, async_scheduling):
    path = tmp_path / "run.html"
    with tiny_engine(
        tiny_dir, record=str(path), async_scheduling=async_scheduling, **SHORT_OF_BLOCKS
    ) as llm:
        outputs = llm.generate(PROMPTS, greedy(MAX_TOKENS), use_tqdm=False)
        several = SamplingParams(max_tokens=5, ignore_eos=True, n=3)
        outputs += llm.generate(PROMPTS[4:6], several, use_tqdm=False)
        left = llm.add_request(PROMPTS[0], greedy(None))
        llm.step()
        partial = llm.get_output(left)
        metrics = llm.get_metrics()
        assert not path.exists()  # a run of seconds
    completions = [completion for output in outputs for completion in output.outputs]
    numbers = numbers_of(path)
    assert numbers["preemptions"] == metrics.get("num_preemptions") > 0
    assert numbers["prefix_cache_hits"] == metrics.get("prefix_cache_hits") > 0
    assert numbers["prefix_cache_queries"] == metrics.get("prefix_cache_queries")
    assert numbers["prompt_tokens"] == metrics.get("prompt_tokens")
    assert numbers["generation_tokens"] == metrics.get("generation_tokens")
    assert numbers["generation_tokens"] == sum(
        len(completion.token_ids) for completion in (*completions, *partial.outputs)
    )
    assert numbers["requests"] == len(outputs)
    # What the engine's end aborted is counted too.
    reasons = {name: numbers[f"finished_{name}"] for name in reasons_of(llm)}
    assert reasons == reasons_of(llm)
    assert reasons == {"stop": 0, "length": len(completions), "abort": 1, "repetition": 0}
    text = path.read_text()
    assert f"A run of {tiny_dir.name}" in text
    assert "<th scope='row'>num_kvcache_blocks</th><td>6</td>" in text
    assert "watermark" in text  # it is not the default, and preemptions have a hint


def test_a_record_changes_no_token_and_without_one_nothing_is_counted(
    tiny_dir, tmp_path, monkeypatch
):
    path = tmp_path / "run.html"
    with tiny_engine(tiny_dir, record=path, **SHORT_OF_BLOCKS) as llm:
        assert llm.config.record == str(path)
        with_record = generate(llm, PROMPTS, greedy(MAX_TOKENS))
    monkeypatch.setattr(llm_engine, "log_step", None)
    with tiny_engine(tiny_dir, **SHORT_OF_BLOCKS) as llm:
        assert llm.stat_loggers == []
        assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == with_record


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_stat_loggers_see_every_step_and_request(tiny_dir, async_scheduling):
    log = Log()
    with tiny_engine(tiny_dir, async_scheduling=async_scheduling, **SHORT_OF_BLOCKS) as llm:
        llm.stat_loggers.append(log)
        ids = [llm.add_request(prompt, greedy(MAX_TOKENS)) for prompt in PROMPTS]
        completions, counts = drain(llm)
        check_nothing_is_held(llm)
        signed = [step.num_tokens * (1 if step.is_prefill else -1) for step in log.steps]
        assert signed == [count for count in counts if count]
        last = log.steps[-1]
        assert (last.num_running, last.num_waiting, last.num_used_blocks) == (0, 0, 0)
        assert last.num_blocks == max(step.num_used_blocks for step in log.steps) == 6
        assert max(step.num_seqs for step in log.steps) <= 8
        assert last.num_generation_tokens == sum(map(len, completions.values()))
        assert last.num_preemptions == llm.get_metrics().get("num_preemptions") > 0
        times = [step.time for step in log.steps]
        assert times == sorted(times)
        assert (
            sum(step.seconds for step in log.steps) <= times[-1] - times[0] + log.steps[0].seconds
        )
        assert sorted(request.request_id for request in log.finished) == ids
        for request in log.finished:
            assert request.num_prompt_tokens == len(PROMPTS[request.request_id - ids[0]])
            assert request.num_generation_tokens == len(completions[request.request_id])
            assert request.finish_reasons == ["length"]
            assert request.metrics.arrival_time < request.metrics.first_token_time
            assert request.metrics.first_token_time < request.metrics.finished_time
        cached = sum(request.num_cached_tokens for request in log.finished)
        assert cached == last.num_prefix_cache_hits > 0
        embedded = llm.embed(PROMPTS[:2], use_tqdm=False)
        assert len(log.finished) == len(ids) + len(embedded)
        assert log.finished[-1].metrics.first_token_time is None
        assert log.num_closings == 0
    assert log.num_closings == 1


@pytest.mark.parametrize("record", ["", "/nowhere/run.html", ".", 7, b"run.html"])
def test_a_path_that_cannot_be_written_is_refused_before_anything_is_loaded(record, monkeypatch):
    """There is no model either, and nobody looked."""
    with pytest.raises(ArgumentError, match="^record cannot be written, got "):
        tiny_engine(Path("no model"), record=record)


ENDS = {
    "the interpreter's end": "",
    "the last reference": "del llm; gc.collect(); assert os.path.exists(path); os._exit(0)",
    "kill": "os.kill(os.getpid(), 9)",
}
SCRIPT = """
import gc, os, sys
from engine_checks import generate, greedy, tiny_engine
from nanovllm.features import report

model, path = sys.argv[1:]
report.REFRESH_SECONDS = 0.0 if {is_killed} else 1e9
report.MAX_WRITING_SHARE = float("inf")
llm = tiny_engine(model, record=path)
generate(llm, [[5, 6, 7]], greedy(9))
assert os.path.exists(path) == {is_killed}
if not os.fork():
    sys.exit(0)  # a child that writes nothing
os.wait()
assert os.path.exists(path) == {is_killed}
{end}
"""


@pytest.mark.parametrize("end", ENDS)
def test_the_page_is_there_however_the_process_ends(tiny_dir, tmp_path, end):
    path = tmp_path / "run.html"
    script = SCRIPT.format(is_killed=end == "kill", end=ENDS[end])
    command = [sys.executable, "-c", script, str(tiny_dir), str(path)]
    with ForkedPython(command, env=script_environment(), **OUTPUT) as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == (-9 if end == "kill" else 0), output
    assert os.listdir(tmp_path) == ["run.html"]
    assert ("The run goes on" if end == "kill" else "The run ended") in path.read_text()
    assert numbers_of(path)["generation_tokens"] == 9


def test_the_batch_command_has_the_option(tiny_dir, tmp_path):
    source, target, page = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "run.html"))
    lines = [
        f'{{"custom_id": "{word}", "prompt": "a {word}", "max_tokens": 6}}\n'
        for word in ("fox", "dog")
    ]
    source.write_text("".join(lines))
    arguments = [str(source), str(target), "--model", str(tiny_dir), "--no-progress"]
    arguments += ["--device", "cpu", "--num-kvcache-blocks", "8", "--ignore-eos"]
    assert main([*arguments, "--record", str(tmp_path)]) == 2  # a folder
    assert main([*arguments, "--record", str(page)]) == 0
    assert numbers_of(page)["generation_tokens"] == 12
    assert numbers_of(page)["finished_length"] == numbers_of(page)["requests"] == 2
    page.write_text("unchanged")
    assert main([*arguments, "--record", str(page)]) == 0  # nothing is left to do
    assert page.read_text() == "unchanged"
