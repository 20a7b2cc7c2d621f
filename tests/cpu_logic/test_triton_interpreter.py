"""Runs the files of checks under Triton's interpreter, which needs no GPU.

Triton reads TRITON_INTERPRET when it is imported, hence processes of their own. They are few, as
each imports torch and Triton. A test waits for its process, so that no more of them run than pytest
has workers.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GROUPS = {
    "attention": ("interpreter", "decode", "attention_extras"),
    "others": ("delta_net", "filter", "fp8_linear", "linear", "lora", "moe", "packed"),
}


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_triton_kernels_in_the_interpreter(group):
    pytest.importorskip("triton", reason="triton is not installed")
    files = [Path(__file__).parent / f"triton_{name}_checks.py" for name in GROUPS[group]]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "fast_interpreter", *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if "only 0-dimensional arrays can be converted" in finished.stdout:
        pytest.skip("this triton's interpreter cannot run on this numpy (2.4 or later)")
    assert finished.returncode == 0, f"the checks failed:\n{finished.stdout}"
