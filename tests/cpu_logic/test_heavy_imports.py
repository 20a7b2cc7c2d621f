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
# What decides, without torch's two seconds.
MANY_OBJECTS = """
from nanovllm.guards.garbage import heavy_imports
with heavy_imports():
    imported = [[] for _ in range(200_000)]
"""


def check(program, found):
    run = subprocess.run(
        [sys.executable, "-c", program + AFTER], capture_output=True, text=True, timeout=300
    )
    assert run.stdout.splitlines() == [found, "False"], run.stderr


def test_objects_of_the_engines_imports_are_left_alone():
    check("from nanovllm import LLM", "True True")


@pytest.mark.parametrize(
    ("before", "found"),
    [
        ("", "True True"),
        ("import sys; sys.modules['torch'] = sys", "True False"),
        ("import gc; gc.disable()", "False False"),
        ("many = [[] for _ in range(200_000)]", "True False"),
    ],
)
def test_who_may_have_cycles_to_lose_keeps_the_search(before, found):
    check(before + MANY_OBJECTS, found)
