"""Runs the files of checks under Triton's interpreter, which needs no GPU.

Triton reads TRITON_INTERPRET when it is imported, hence a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "checks", ("triton_interpreter_checks.py", "triton_decode_checks.py", "triton_linear_checks.py")
)
def test_triton_kernels_in_the_interpreter(checks):
    pytest.importorskip("triton", reason="triton is not installed")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", str(Path(__file__).with_name(checks))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if "only 0-dimensional arrays can be converted" in result.stdout:
        pytest.skip("this triton's interpreter cannot run on this numpy (2.4 or later)")
    assert result.returncode == 0, f"the checks failed:\n{result.stdout}"
