"""The plan of the package: its size, which module may import which, and what its types say."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter

import core_size
import pytest

REPO = core_size.REPO
PACKAGE = "nanovllm"
# A module imports from its own line and from lines below it. A name stands for a module or for the
# rest of a package; "" is the package's `__init__`.
ORDER = [
    "batch estimate warmup",
    "",
    "vllm_async",
    "vllm_engine",
    "llm",
    "features",
    "engine.llm_engine",
    "parallel.executor parallel.workers parallel.calls parallel.process parallel.packed_plans"
    " parallel.replica_executor parallel.replicas parallel.replica_messages parallel.router",
    "engine",
    "config sampling inputs models",
    "layers",
    "parallel.weight_group",
    "parallel.tensor_parallel parallel.ipc_memory",
    "kernels",
    "kernels.types kernels.row_state",
    "sampling_params pooling_params lora_request outputs progress stats model_files guards",
    "command_line",
    "compat parameters validation",
    "vllm_names",
    "errors guards.garbage",
]
RANKS = {name: rank for rank, line in enumerate(ORDER) for name in line.split(" ")}
# Names of other packages that have no public one: where they are accessed, and why.
FOREIGN_PRIVATE = {
    "kernels.cpu_ops: torch.ops.mkldnn._linear_pointwise": "oneDNN's float32 product has no other",
    "kernels.cpu_packed: torch.ops.aten._convert_weight_to_int4pack_for_cpu": "the order of the"
    " product below",
    "kernels.cpu_packed: torch.ops.aten._weight_int4pack_mm_for_cpu": "the product has no other",
    "kernels.cpu_packed: torch.ops.aten._weight_int8pack_mm": "the same",
    "kernels.cpu_packed: weight.numbers._version": "whether weights were loaded again",
    "kernels.triton.compiler_processes: os._exit": "a copy ends nothing of what it was copied with",
    "kernels.triton.fp8_linear: torch._scaled_mm": "no other product of fp8 takes a scale per row",
    "parallel.process: multiprocessing.current_process()._inheriting": "the mark of a process that"
    " imports the user's script",
    "parallel.process: process._inheriting": "the same",
    "parallel.process: os._exit": "an end without waiting for the device and for peers",
    "parallel.process: subprocess._args_from_interpreter_flags": "flags for a worker's Python",
    "parallel.tensor_parallel: gloo._Options": "the group takes its device by no other way",
    "parallel.tensor_parallel: options._devices": "the same",
    "parallel.tensor_parallel: options._timeout": "the group takes its time limit by no other way",
    "parallel.tensor_parallel: group._set_default_timeout": "the limit after the start differs",
    "sampling.finite_patterns: re._parser": "Python's parser of patterns has no public name",
}
# Whose signatures say `Any` nowhere: what a request passes through, and what runs it.
WITHOUT_ANY = ("engine.", "layers.", "kernels.types", "kernels.ops", "kernels.select")
WITHOUT_ANY += ("kernels.torch_ops", "kernels.cpu_")
TUPLE_NAMES = ("_asdict", "_fields", "_make", "_replace")  # public ones, of a NamedTuple
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def modules() -> dict[str, ast.Module]:
    """Each module's tree, by its name without the package's: "" is the package itself."""
    trees = {}
    for path in sorted((REPO / PACKAGE).rglob("*.py")):
        parts = path.relative_to(REPO / PACKAGE).with_suffix("").parts
        if parts[0] != "assets":  # scripts that made the model of the tests
            name = ".".join(parts).removesuffix("__init__").removesuffix(".")
            trees[name] = ast.parse(path.read_text("utf-8"), str(path))
    return trees


@cache
def nodes(tree: ast.AST) -> tuple[ast.AST, ...]:
    """All nodes of a tree, which many checks look at."""
    return tuple(ast.walk(tree))


def is_module(name: str) -> bool:
    """Whether it is the dotted name of a module in the package."""
    package, _, own = name.partition(".")
    return package == PACKAGE and own != "" and own in modules()


def imported(node: ast.AST) -> Iterator[str]:
    """Dotted names that a node imports: of `from a import b` a.b, if it is a module.

    A string that names a module counts: it is for importlib.
    """
    match node:
        case ast.Import(names=aliases):
            yield from (alias.name for alias in aliases)
        case ast.ImportFrom(module=module, names=aliases, level=level):
            assert not level, f"a relative import in line {node.lineno}"
            for alias in aliases:
                name = f"{module}.{alias.name}"
                yield name if is_module(name) else str(module)
        case ast.Constant(value=str(name)) if is_module(name):
            yield name


@cache
def imports_of(tree: ast.Module) -> set[str]:
    """The package's modules that a module imports: at its top, in functions, for type checks."""
    names = {name for node in nodes(tree) for name in imported(node)}
    names = {f"{name}." for name in names if name.split(".")[0] == PACKAGE}
    return {name.removeprefix(f"{PACKAGE}.").removesuffix(".") for name in names}


def rank(name: str) -> int:
    """The line of ORDER that a module belongs to: the longest name there that fits."""
    while name not in RANKS:
        name, dot, _ = name.rpartition(".")
        assert dot, "ORDER lacks a module"
    return RANKS[name]


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in nodes(tree) if isinstance(node, Function))


def annotations(function: Function) -> Iterator[tuple[str, ast.expr | None]]:
    """Each parameter's name and annotation, and those of the result, named "return"."""
    args = function.args
    for arg in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg):
        if arg is not None and arg.arg not in ("self", "cls"):
            yield arg.arg, arg.annotation
    yield "return", function.returns


def own_private_names(tree: ast.Module) -> set[str]:
    """Names with an underscore that a module's classes define, or set on themselves."""
    names = set()
    for node in nodes(tree):
        match node:
            case ast.ClassDef(body=body):
                names |= {item.name for item in body if isinstance(item, Function)}
                names |= {
                    ast.unparse(item.target) for item in body if isinstance(item, ast.AnnAssign)
                }
            case ast.Attribute(value=ast.Name(id="self"), attr=attr, ctx=ast.Store()):
                names.add(attr)
    return names


def foreign_parameters(tree: ast.Module) -> set[str]:
    """Parameters that are never of a class of the module itself."""
    classes = {node.name for node in nodes(tree) if isinstance(node, ast.ClassDef)}
    own, foreign = {"self", "cls"}, set()
    for function in functions(tree):
        for name, annotation in annotations(function):
            words = set(re.findall(r"\w+", ast.unparse(annotation))) if annotation else set()
            (own if words & classes else foreign).add(name)
    return foreign - own


def private_accesses(tree: ast.Module) -> Iterator[str]:
    """Names with one underscore that belong to another module, as they are written."""
    own, foreign = own_private_names(tree), foreign_parameters(tree)
    for node in nodes(tree):
        match node:
            case ast.ImportFrom(module=str(owner), names=aliases):
                names = [alias.name for alias in aliases]
            case ast.Attribute(value=owner, attr=name):
                names = [name]
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr"),
                args=[owner, ast.Constant(value=str(name)), *_],
            ):
                names = [name]
            case _:
                continue
        for name in names:
            if not re.match("_[^_]", name) or name in TUPLE_NAMES:
                continue
            written = owner if isinstance(owner, str) else ast.unparse(owner)
            is_own = written in ("self", "cls", "super()")
            if not is_own and (name not in own or written in foreign):
                yield f"{written}.{name}"


def test_the_core_is_small_and_the_readme_tells_its_size():
    run = subprocess.run(
        [sys.executable, REPO / "tests" / "core_size.py"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    sizes = core_size.core_sizes()
    assert list(sizes) == core_size.CORE
    total = sum(sizes.values())
    assert f"{total}  in {len(core_size.CORE)} files" in run.stdout
    assert f"{total:,} lines" in (REPO / "README.md").read_text("utf-8")


def test_lines_of_code_are_counted_without_blanks_comments_and_docstrings():
    source = '''"""A module.

    Of three lines.
    """

# A comment.
def function(
    a,  # counts
):
    """Does nothing."""

    return """counts
    twice"""
'''
    assert core_size.num_code_lines(source) == 5


def test_no_modules_import_each_other_around_a_circle():
    graph = {name: imports_of(tree) - {name} for name, tree in modules().items()}
    assert {"engine.executor", "config"} <= graph["engine.llm_engine"]
    assert {"models.base", "models.registry"} <= graph["models.families"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_the_order_names_what_there_is():
    for name in RANKS:
        assert any(f"{module}.".startswith(f"{name}.") for module in modules()), name


def test_imports_lead_down_the_order():
    up = [
        f"{name} -> {other}"
        for name, tree in modules().items()
        for other in sorted(imports_of(tree))
        if rank(other) < rank(name)
    ]
    assert not up, "\n".join(up)


def test_no_module_touches_what_is_private_to_another():
    found = {
        f"{name}: {access}" for name, tree in modules().items() for access in private_accesses(tree)
    }
    assert not found - FOREIGN_PRIVATE.keys(), "\n".join(sorted(found - FOREIGN_PRIVATE.keys()))
    assert not FOREIGN_PRIVATE.keys() - found, "the list names what nobody uses"


def test_private_names_are_told_from_a_modules_own():
    source = """
import other
from other import _hidden, shown

class Own:
    _count: int

    def __init__(self, other: Other):
        self._x = other._x

    def same(self, value: "Own | None"):
        return value._x + value._count + self._of_a_base_class + super()._y

copy = Own()._x + other._z
getattr(copy, "_w")
copy._asdict().__class__
"""
    assert set(private_accesses(ast.parse(source))) == {
        "other._hidden",
        "other._x",
        "other._z",
        "copy._w",
    }


def test_mypy_asks_for_types_everywhere_but_in_kernels():
    tomllib = pytest.importorskip("tomllib", reason="of Python 3.11 and later")
    mypy = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["tool"]["mypy"]
    assert mypy["files"] == [PACKAGE] and mypy["exclude"] == [f"{PACKAGE}/assets"]
    assert mypy["disallow_untyped_defs"] and mypy["disallow_any_generics"]
    assert [override["module"] for override in mypy["overrides"]] == [f"{PACKAGE}.kernels.triton.*"]


def test_only_kernels_lack_types():
    untyped = [
        f"{name}:{function.lineno}: {function.name}"
        for name, tree in modules().items()
        if name.startswith("kernels.triton")
        for function in functions(tree)
        if not any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)
        and None in dict(annotations(function)).values()
    ]
    assert not untyped, "\n".join(untyped)


def test_the_core_passes_no_any():
    found = [
        f"{name}:{function.lineno}: {function.name}({parameter})"
        for name, tree in modules().items()
        if name.startswith(WITHOUT_ANY)
        for function in functions(tree)
        for parameter, annotation in annotations(function)
        if annotation is not None and re.search(r"\bAny\b", ast.unparse(annotation))
    ]
    assert not found, "\n".join(found)
