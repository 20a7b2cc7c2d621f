"""What starts with an underscore is used by its own module alone."""

import ast
from pathlib import Path

import pytest

import nanovllm

PACKAGE = Path(nanovllm.__file__).parent
TREES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if "assets" not in path.parts
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def private_names(tree: ast.Module) -> set[str]:
    """Of the functions, classes and attributes that a module defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if is_of_self(node) else set()
    return set(filter(is_private, names))


def uses_of_others(tree: ast.Module, names: set[str]) -> list[str]:
    """Where a module uses one of `names` that it does not define, but on `self`."""
    others = names - private_names(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            used = set() if is_of_self(node) else {node.attr}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nanovllm"):
            used = {alias.name for alias in node.names}
        else:
            continue
        found += [f"line {node.lineno}: {name}" for name in used & others]
    return found


NAMES = set().union(*map(private_names, TREES.values()))


@pytest.mark.parametrize("path", TREES)
def test_no_module_uses_private_names_of_another(path):
    assert uses_of_others(TREES[path], NAMES) == []


def test_the_check_finds_what_it_looks_for():
    engine = ast.parse("class Engine:\n    def __init__(self):\n        self._queue = []\n")
    assert private_names(engine) == {"_queue"}
    feature = """
from nanovllm.engine import _secret
class Own:
    def __init__(self, other, llm):
        self._mine = self._queue
        other._mine = llm._queue
"""
    uses = uses_of_others(ast.parse(feature), {"_queue", "_secret", "_mine"})
    assert sorted(uses) == ["line 2: _secret", "line 6: _queue"]
