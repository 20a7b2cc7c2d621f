"""Triton's key, noted in its cache."""

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton import knobs
from triton.runtime import cache as triton_cache

from nanovllm.kernels.triton import compiler_key as module


@pytest.fixture
def new_key(tmp_path, monkeypatch):
    """Asks as a new process would; how often the key was made is in `made`."""
    (tmp_path / "compiler" / "_C").mkdir(parents=True)
    (tmp_path / "compiler" / "core.py").write_text("")
    (tmp_path / "compiler" / "_C" / "lib.so").write_text("")
    monkeypatch.setattr(module, "COMPILER", tmp_path / "compiler")
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "cache"))

    def ask() -> str:
        def make() -> str:
            ask.made += 1
            return f"{triton.__version__}-key-{ask.made}"

        monkeypatch.setattr(triton_cache, "triton_key", make)
        key = module.compiler_key.__wrapped__()
        assert triton_cache.triton_key() == key
        return key

    ask.made = 0
    return ask


def test_the_key_is_made_once(new_key):
    first = new_key()
    assert new_key() == first and new_key.made == 1


@pytest.mark.parametrize("file", ["core.py", "_C/lib.so"])
def test_a_changed_compiler_has_another_key(new_key, tmp_path, file):
    first = new_key()
    os.utime(tmp_path / "compiler" / file, (0, 0))
    assert new_key() != first


def test_a_broken_note_is_none(new_key, tmp_path):
    new_key()
    [note] = (tmp_path / "cache").iterdir()
    note.write_text("")
    assert new_key() == new_key() and new_key.made == 2


def test_where_nothing_can_be_written_the_key_is_made_each_time(new_key, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "file"))
    assert new_key() != new_key()


def test_it_is_that_of_triton(tmp_path, monkeypatch):
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    made = triton_cache.triton_key
    monkeypatch.setattr(triton_cache, "triton_key", made)
    expected = made()
    assert module.compiler_key.__wrapped__() == expected
    assert module.compiler_key.__wrapped__() == expected
