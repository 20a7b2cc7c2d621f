"""The installed transformers: an old one loads some models and tokenizers otherwise, silently."""

from functools import cache
from importlib.metadata import version as read_version

MIN_TRANSFORMERS = "5.22"  # of pyproject.toml

version = cache(read_version)  # a file of 35 KB to parse, for every engine of a process


def check_transformers() -> None:
    """ImportError if the installed transformers is older than MIN_TRANSFORMERS."""
    installed = version("transformers")
    if _numbers(installed) < _numbers(MIN_TRANSFORMERS):
        raise ImportError(
            f"transformers {installed} is installed, but nanovllm needs {MIN_TRANSFORMERS} or "
            "newer: older ones load byte-level tokenizers and some configurations otherwise; "
            f"pip install 'transformers>={MIN_TRANSFORMERS}'"
        )


def _numbers(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
