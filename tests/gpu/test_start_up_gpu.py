"""What a start on the GPU imports, and that each of its parts is timed."""

from pathlib import Path

from starts import time_parts

import nanovllm

AUSTEN = Path(nanovllm.__file__).parent / "assets" / "austen-7m"


def test_a_start_imports_no_transformers(tmp_path):
    seconds, heavy = time_parts(str(AUSTEN), {}, tmp_path)
    assert "transformers" not in heavy
    assert {"torch", "weights", "warm-up", "graphs", "first token"} <= seconds.keys()
