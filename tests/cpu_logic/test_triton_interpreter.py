"""Runs the files of checks under Triton's interpreter, which needs no GPU.

Triton reads TRITON_INTERPRET when it is imported, hence a process of its own.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FILES = (
    "triton_interpreter_checks.py",
    "triton_decode_checks.py",
    "triton_filter_checks.py",
    "triton_fp8_linear_checks.py",
    "triton_linear_checks.py",
    "triton_moe_checks.py",
)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple]]:
    """A process for each file of checks, side by side, and where its output goes."""
    pytest.importorskip("triton", reason="triton is not installed")
    started = {}
    for name in FILES:
        output = tmp_path_factory.mktemp("checks") / name
        with output.open("w") as file:
            started[name] = (
                output,
                subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "pytest",
                        "-q",
                        "--tb=short",
                        Path(__file__).parent / name,
                    ],
                    env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                ),
            )
    yield started
    for _, process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", FILES)
def test_triton_kernels_in_the_interpreter(processes, name):
    output, process = processes[name]
    code = process.wait()
    report = output.read_text()
    if "only 0-dimensional arrays can be converted" in report:
        pytest.skip("this triton's interpreter cannot run on this numpy (2.4 or later)")
    assert code == 0, f"the checks failed:\n{report}"
