"""The note that all kernels of an engine are in Triton's cache."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs

from nanovllm.config import Config
from nanovllm.engine import compile_ahead, kernel_variants
from nanovllm.engine.compile_ahead import traits_of
from nanovllm.kernels.device import KNOWN_GPUS
from nanovllm.kernels.triton import compilation, kernel_index
from nanovllm.kernels.triton.kernel_index import KernelIndex
from nanovllm.parallel.tensor_parallel import TensorParallel

REPO = Path(__file__).resolve().parents[2]
HOPPER = (9, 0)


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """A package of one module, and an empty cache."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "module.py").write_text("x = 1")
    monkeypatch.setattr(kernel_index, "PACKAGE", folder)
    monkeypatch.setattr(kernel_index, "compiler_key", lambda: "the compiler")
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def files(tmp_path):
    found = [tmp_path / name for name in ("a.cubin", "a.json")]
    for path in found:
        path.write_text("")
    return found


def is_complete(traits: str = "traits", capability: tuple[int, int] = HOPPER) -> bool:
    return KernelIndex(traits, capability).is_complete()


def write(files) -> None:
    KernelIndex("traits", HOPPER).write(map(str, files))


def test_a_note_holds_while_its_files_are_there(files):
    assert not is_complete()
    write(files)
    assert is_complete()
    files[0].unlink()
    assert not is_complete()


def test_a_note_of_nothing_is_none():
    write([])
    assert not is_complete()


def test_a_note_holds_for_the_same_alone(files, package, monkeypatch):
    write(files)
    assert not is_complete("other traits")
    assert not is_complete(capability=(8, 9))
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_DISABLE_LINE_INFO", "1")
        assert not is_complete()
    with monkeypatch.context() as patch:
        patch.setattr(kernel_index, "compiler_key", lambda: "another compiler")
        assert not is_complete()
    assert is_complete()
    os.utime(package / "module.py", (0, 0))
    assert not is_complete()


def test_a_broken_note_is_none(files, tmp_path):
    write(files)
    [note] = (tmp_path / "cache").iterdir()
    note.write_text("[")
    assert not is_complete()
    write(files)
    assert is_complete()


def test_where_nothing_can_be_written_there_is_no_note(files, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "file"))
    write(files)
    assert not is_complete()


def test_traits_are_what_kernels_follow_from():
    model = str(REPO / "nanovllm" / "assets" / "austen-7m")
    limits = KNOWN_GPUS[HOPPER]

    def traits(rank: int = 0, **options: object) -> str:
        return traits_of(Config.from_kwargs(model, options), limits, rank, True)

    assert traits() == traits(seed=3, num_kvcache_blocks=9)
    assert len({traits(), traits(1), traits(max_num_seqs=7), traits(dtype="float16")}) == 4


class FakeCompilation:
    """Of kernels that are in the cache when the weights are loaded."""

    problems: tuple[Exception, ...] = ()
    files: frozenset[str] = frozenset()

    def __init__(self, variants, capability, device) -> None:
        self.is_open = True

    def wait(self) -> tuple[Exception, ...]:
        assert self.is_open
        return self.problems

    def close(self) -> None:
        self.is_open = False


@pytest.fixture
def start(files, monkeypatch):
    """Compiles ahead for a GPU that is not there; how often kernels were listed is in `listed`."""
    limits = KNOWN_GPUS[HOPPER]
    monkeypatch.setattr(compile_ahead, "device_limits", lambda device: limits)
    monkeypatch.setattr(compilation, "preparing", lambda: SimpleNamespace(join=lambda: None))
    monkeypatch.setattr(compilation, "Compilation", FakeCompilation)
    monkeypatch.setattr(FakeCompilation, "files", frozenset(map(str, files)))

    def record_variants(*args: object) -> list[object]:
        start.listed += 1
        if start.fails:
            raise RuntimeError("it cannot be run dry")
        return []

    monkeypatch.setattr(kernel_variants, "record_variants", record_variants)

    def start(**options: object) -> None:
        config = Config.from_kwargs(str(REPO / "nanovllm" / "assets" / "austen-7m"), options)
        ops = SimpleNamespace(supports_cuda_graphs=True)
        device = torch.device("cuda", 0)
        with compile_ahead.compiling_ahead(config, device, TensorParallel(), ops):
            start.loaded += 1

    start.listed = start.loaded = 0
    start.fails = False
    return start


def test_kernels_are_listed_once(start, files):
    start()
    start(seed=3)
    assert (start.listed, start.loaded) == (1, 2)
    start(max_num_seqs=7)
    files[0].unlink()
    start()
    assert (start.listed, start.loaded) == (3, 4)


def test_kernels_that_were_not_compiled_are_listed_again(start, monkeypatch, caplog):
    monkeypatch.setattr(FakeCompilation, "problems", (RuntimeError("too large"),))
    start()
    start()
    assert (start.listed, start.loaded) == (2, 2)
    assert [r.getMessage() for r in caplog.records] == 2 * [
        "a kernel was not compiled ahead: too large"
    ]


def test_an_engine_starts_without_a_list(start, caplog):
    start.fails = True
    start()
    start()
    assert (start.listed, start.loaded) == (2, 2)
    assert caplog.records[0].getMessage().endswith("as they are launched: it cannot be run dry")
