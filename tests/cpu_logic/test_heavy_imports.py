"""What an import of the engine does to Python's search for dead cycles, in fresh processes."""

import subprocess
import sys

import pytest

AFTER = """
import gc
print(gc.isenabled(), gc.get_freeze_count() > 100_000)
class Node: pass
import weakref
node = Node()
node.itself, is_there = node, weakref.ref(node)
del node
gc.collect()
print(is_there() is not None)
"""


@pytest.mark.parametrize(
    ("before", "found"),
    [
        ("", "True True"),
        ("import torch", "True False"),
        ("import gc; gc.disable()", "False False"),
        ("many = [[] for _ in range(200_000)]", "True False"),
    ],
)
def test_objects_of_imports_are_left_alone(before, found):
    script = f"{before}\nfrom nanovllm import LLM\n{AFTER}"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert run.stdout.splitlines() == [found, "False"], run.stderr
