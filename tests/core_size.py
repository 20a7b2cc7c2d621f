"""Counts the code of the files that one reads to follow a request on one GPU.

    python tests/core_size.py

A line counts if it holds code: no blank lines, comments and docstrings. Exits 1 above LIMIT.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
LIMIT = 1500
# Loading weights (layers/weights.py, models/loader.py) is left out: no request passes through it.
CORE = [
    "engine/llm_engine.py",
    "engine/request.py",
    "engine/sequence.py",
    "engine/scheduler.py",
    "engine/block_manager.py",
    "engine/step_plan.py",
    "engine/executor.py",
    "engine/model_runner.py",
    "engine/sampler.py",
    "engine/cuda_graphs.py",
    "engine/launched_step.py",
    "engine/scheduling_policy.py",
    "kernels/copies.py",
    "engine/prefill_inputs.py",
    "layers/linear.py",
    "layers/norm.py",
    "layers/attention.py",
    "layers/embedding.py",
    "layers/rotary.py",
    "layers/context.py",
    "models/base.py",
    "models/decoder.py",
    "models/qwen3.py",
]
# What the core asks of the kernels: read when one goes below it.
CONTRACT = ["kernels/types.py", "kernels/ops.py", "kernels/row_state.py"]
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def num_code_lines(source: str) -> int:
    """The lines of a module that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):  # a docstring
                lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(lines)


def core_sizes(names: list[str] = CORE) -> dict[str, int]:
    """The lines of code of each of these files that there is."""
    paths = {name: REPO / "nanovllm" / name for name in names}
    return {
        name: num_code_lines(path.read_text("utf-8"))
        for name, path in paths.items()
        if path.exists()
    }


def main() -> int:
    sizes = core_sizes()
    for name, size in sizes.items():
        print(f"{size:5}  {name}")
    total = sum(sizes.values())
    contract = sum(core_sizes(CONTRACT).values())
    print(f"{total:5}  in {len(sizes)} files; the limit is {LIMIT:,}")
    print(f"{total + contract:5}  with what the core asks of the kernels")
    return int(total > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
