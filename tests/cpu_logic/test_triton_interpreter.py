"""Runs the files of checks under Triton's interpreter, which needs no GPU.

Triton reads TRITON_INTERPRET when it is imported, hence a process of its own for each file. A test
waits for its process, so that no more of them run than pytest has workers.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = (
    "triton_interpreter_checks.py",
    "triton_decode_checks.py",
    "triton_attention_extras_checks.py",
    "triton_delta_net_checks.py",
    "triton_filter_checks.py",
    "triton_fp8_linear_checks.py",
    "triton_linear_checks.py",
    "triton_moe_checks.py",
    "triton_packed_checks.py",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_triton_kernels_in_the_interpreter(name):
    pytest.importorskip("triton", reason="triton is not installed")
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", Path(__file__).parent / name],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if "only 0-dimensional arrays can be converted" in finished.stdout:
        pytest.skip("this triton's interpreter cannot run on this numpy (2.4 or later)")
    assert finished.returncode == 0, f"the checks failed:\n{finished.stdout}"
