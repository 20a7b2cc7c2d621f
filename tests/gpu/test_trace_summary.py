"""tests/trace_summary.py sees what really runs on the device."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny_models import save_model
from trace_summary import LINEARS, LM_HEAD, SAMPLER

NUM_LAYERS = 3


def test_windows_of_a_tiny_model(tmp_path):
    model_dir = save_model(tmp_path / "tiny", num_hidden_layers=NUM_LAYERS)
    options = "--max-num-seqs 16 --num-kvcache-blocks 64 --max-model-len 1024 --steps 10"
    options += " --dtype bfloat16 --rows"
    shapes = "--decode 1x60 8x60 --prefill 4x200"
    # A process of its own: the profiler may see nothing in one that has profiled before.
    script = Path(__file__).parents[1] / "trace_summary.py"
    command = [sys.executable, str(script), "--model", str(model_dir)]
    path = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    output = subprocess.run(
        [*command, *options.split(), *shapes.split()],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    windows = json.loads(output.splitlines()[-1])["windows"]
    assert [window["name"] for window in windows] == ["1x60", "8x60", "prefill 4x200"]
    for window in windows:
        assert 0 < window["busy_share"] <= 1
        assert window["profiled_step_us"] > 0
        busy_us = window["busy_share"] * window["profiled_step_us"]
        assert abs(sum(window["group_us"].values()) - busy_us) < 1e-3 * busy_us
        for group in ("attention", LINEARS, LM_HEAD, SAMPLER):
            assert window["group_us"][group] > 0, (window["name"], group)
        calls = {}
        for kernel in window["kernels"]:
            calls[kernel["group"]] = calls.get(kernel["group"], 0) + kernel["calls_per_step"]
        assert calls["attention"] >= NUM_LAYERS
        assert calls["RoPE, KV write"] == NUM_LAYERS  # so no step is missed or counted twice
        assert calls[LM_HEAD] in (1, 2)  # 2: split, with a reduction
