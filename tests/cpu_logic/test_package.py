"""What the package says of itself."""

import re
from pathlib import Path

import pytest

import nanovllm
from nanovllm.guards.versions import MIN_LLGUIDANCE, MIN_TRANSFORMERS, check_transformers

tomllib = pytest.importorskip("tomllib", reason="of Python 3.11 and later")

REPO = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
LINK = re.compile(r"\]\(([^)]+)\)|<(?:a|img)[^>]+(?:href|src)=\"([^\"]+)\"")


def test_links_of_the_long_description_work_off_the_repository():
    text = (REPO / PROJECT["project"]["readme"]).read_text(encoding="utf-8")
    links = [first or second for first, second in LINK.findall(text)]
    assert links
    assert all(link.startswith("https://") for link in links), links


def test_type_checkers_find_the_types():
    assert (Path(nanovllm.__file__).parent / "py.typed").read_text() == ""
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["nanovllm"]


def test_classifiers_readme_and_the_declared_range_name_the_same_pythons():
    lowest, end = map(int, re.findall(r"3\.(\d+)", PROJECT["project"]["requires-python"]))
    prefix = "Programming Language :: Python :: 3."
    named = [c[len(prefix) :] for c in PROJECT["project"]["classifiers"] if c.startswith(prefix)]
    assert named == [str(minor) for minor in range(lowest, end)]
    for name in ("README.md", "docs/package.md"):
        assert f"Python 3.{lowest} to 3.{end - 1}" in (REPO / name).read_text(encoding="utf-8")


def test_the_changelog_knows_this_version():
    text = (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert headings[0] == "Unreleased" and nanovllm.__version__ in headings


@pytest.mark.parametrize("installed", ["5.21.3", "4.57.1"])
def test_an_older_transformers_is_refused_by_name(monkeypatch, installed):
    assert f"transformers>={MIN_TRANSFORMERS}," in ",".join(PROJECT["project"]["dependencies"])
    monkeypatch.setattr("nanovllm.guards.versions.version", lambda name: installed)
    with pytest.raises(ImportError, match=f"{installed} is installed.*needs {MIN_TRANSFORMERS}"):
        check_transformers()


def test_the_extras_ask_for_the_same_version():
    extras = PROJECT["project"]["optional-dependencies"]
    assert f"llguidance>={MIN_LLGUIDANCE},<2" in extras["structured-outputs"]


@pytest.mark.parametrize("installed", [MIN_TRANSFORMERS, "5.100.0", "6.0"])
def test_newer_ones_are_not(monkeypatch, installed):
    monkeypatch.setattr("nanovllm.guards.versions.version", lambda name: installed)
    check_transformers()
