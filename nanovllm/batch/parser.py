"""The parser of the command line: help that comes from the documentation, and typing errors.

A parameter is documented where it is declared, in the "Args:" of `LLMEngine` and `SamplingParams`.
`--help` shows the first sentence and the default. The engine's file is read, not imported: it loads
torch.
"""

import argparse
import ast
import inspect
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from nanovllm.compat import SAMPLING_NAMES
from nanovllm.config import DEFAULT_MAX_NUM_BATCHED_TOKENS, Config
from nanovllm.errors import nearest
from nanovllm.sampling_params import SamplingParams

NEXT_ENTRY = re.compile(r"\n {4}(?=\S)")  # of "Args:"
HEADING = re.compile(r"(\w[\w, ]*?(?: \([^()]*\)[\w, ]*?)*): (.*)", re.DOTALL)
FIRST_SENTENCE = re.compile(r".*?(?=\.(?:\s|$)|$)", re.DOTALL)
# What the dataclasses do not show, and what a batch does otherwise than the library.
OWN_DEFAULTS = {
    "max_num_batched_tokens": DEFAULT_MAX_NUM_BATCHED_TOKENS,
    "skip_special_tokens": True,
}


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose help is complete, and whose errors name what was meant."""

    def __init__(self, prog: str, usage: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog, usage=usage, description=description, epilog=epilog, allow_abbrev=False
        )
        self._arguments: Sequence[str] = ()

    def values_of(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The values of a command line."""
        self._arguments = arguments
        return vars(self.parse_args(arguments))

    def format_help(self) -> str:
        """The help, with the words and the default of each option."""
        words, defaults = parameter_words(), parameter_defaults()
        for action in self._actions:
            text, default = action.help or "", action.default
            if default is argparse.SUPPRESS and action.dest in defaults:  # a parameter
                default = defaults[action.dest]
                text = "; ".join(filter(None, [words.get(action.dest), text]))
            is_optional = bool(action.option_strings) and not action.required
            if is_optional and default is not argparse.SUPPRESS:
                text += f" (default: {default})"
            action.help = text.replace("%", "%%")
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """End with a message, which names the option that an unknown one was meant to be."""
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for argument in self._arguments:
            flag = argument.partition("=")[0][:100]
            if flag.startswith("--") and flag not in (*known, "--"):
                plain = flag[2:].replace("_", "-")
                name = SAMPLING_NAMES.get(plain.replace("-", "_"), "").replace("_", "-")
                meant = f"--{name}" if name else nearest(f"--{plain}", known)
                if meant in known:
                    message += f"; instead of {flag} try {meant}"
        super().error(message)


def parameter_words() -> dict[str, str]:
    """The first sentence of what is said of each parameter of `LLM` and `SamplingParams`."""
    source = pkgutil.get_data("nanovllm.engine", "llm_engine.py") or b""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    engine = [ast.get_docstring(node) for node in classes if node.name == "LLMEngine"]
    sentences: dict[str, str] = {}
    for documentation in (*engine, inspect.getdoc(SamplingParams)):
        sentences |= _first_sentences(documentation or "")
    return sentences


def parameter_defaults() -> dict[str, Any]:
    """The default of each."""
    declared = {f.name: f.default for f in (*fields(Config), *fields(SamplingParams)) if f.init}
    return declared | OWN_DEFAULTS


def _first_sentences(documentation: str) -> dict[str, str]:
    section = documentation.partition("\nArgs:\n    ")[2].partition("\n\n")[0]
    words = {}
    for entry in NEXT_ENTRY.split(section):
        match = HEADING.fullmatch(entry)
        if match:
            sentence = FIRST_SENTENCE.match(" ".join(match[2].replace("`", "").split()))
            for name in re.sub(r" \([^()]*\)", "", match[1]).split(", "):
                words[name] = sentence[0] if sentence else ""
    return words
