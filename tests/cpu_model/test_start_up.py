"""Modules that the first token of a known family does not need, and so does not wait for."""

import subprocess
import sys

from engine_checks import script_environment

HEAVY = (
    "llguidance",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "transformers.generation.utils",
    "transformers.image_utils",
    "transformers.modeling_utils",
    "transformers.processing_utils",
)
SCRIPT = """
import sys
from nanovllm import LLM, SamplingParams

llm = LLM(sys.argv[1], device="cpu")
(output,) = llm.generate([[5, 6]], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
print(len(output.outputs[0].token_ids), *sorted(set(sys.argv[2:]) & set(sys.modules)))
"""


def test_heavy_modules_are_not_imported_for_the_first_token(tiny_dir):
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_dir), *HEAVY],
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["1"]
