"""Packages that must not be old: transformers loads some models otherwise then, silently."""

from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as read_version

MIN_TRANSFORMERS = "5.22"  # of pyproject.toml
MIN_LLGUIDANCE = "1.9"  # likewise

version = cache(read_version)  # a file of 35 KB to parse, for every engine of a process


def check_transformers() -> None:
    """ImportError if the installed transformers is older than MIN_TRANSFORMERS."""
    if installed := older_than(MIN_TRANSFORMERS, "transformers"):
        raise ImportError(
            f"transformers {installed} is installed, but nanovllm needs {MIN_TRANSFORMERS} or "
            "newer: older ones load byte-level tokenizers and some configurations otherwise; "
            f"pip install 'transformers>={MIN_TRANSFORMERS}'"
        )


def older_than(least: str, package: str) -> str | None:
    """The installed version of a package if it is older; None: it is not, or has no version."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        return None
    return installed if _numbers(installed) < _numbers(least) else None


def _numbers(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
