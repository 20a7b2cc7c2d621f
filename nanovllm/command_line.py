"""What command lines are made of: options of declared parameters, and a parser.

The parser says what a misspelt option was meant to be.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from nanovllm.compat import SAMPLING_NAMES
from nanovllm.errors import nearest
from nanovllm.parameters import Parameter


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose help shows defaults, and whose errors name what was meant."""

    def __init__(self, prog: str, usage: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self._arguments: Sequence[str] = ()

    def values_of(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The values of a command line."""
        self._arguments = arguments
        return vars(self.parse_args(arguments))

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


def add_options(
    group: Any, declared: Iterable[Parameter], defaults: Mapping[str, Any] | None = None
) -> None:
    """An option for each parameter, of its type; only what is given is in the result.

    Args:
        group: of an `argparse.ArgumentParser`, or the parser itself.
        declared: the parameters.
        defaults: that are shown in place of the parameters' own.
    """
    for p in declared:
        text = p.type.__name__ if isinstance(p.type, type) else str(p.type)
        default = (defaults or {}).get(p.name, p.default)
        sentence = p.help.partition(". ")[0].removesuffix(".").replace("`", "")
        settings: dict[str, Any] = {"default": argparse.SUPPRESS}
        words = re.findall(r"\w+", text)
        if text.startswith("bool"):
            settings["action"] = argparse.BooleanOptionalAction
        elif "dict" in words or "StructuredOutputsParams" in words:
            settings |= {"type": _json_object, "metavar": "JSON"}
        else:
            kind = next((kind for kind in (float, int) if kind.__name__ in words), str)
            settings |= {
                "type": _or_none(kind),
                "metavar": {float: "X", int: "N", str: "TEXT"}[kind],
            }
            if "list" in words:
                settings |= {"type": kind, "action": "append"}
                sentence += "; may be given several times"
            elif p.limits:
                sentence += f"; {p.limits}"
        flags = [f"--{name.replace('_', '-')}" for name in (p.name, *p.aliases)]
        option = group.add_argument(*flags, dest=p.name, **settings)
        option.help = f"{sentence} (default: {default})".replace("%", "%%")


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of an option.

    A number may be "none", which a parameter takes if it can, and an integer may be "32k".
    """
    if kind is str:
        return str

    def number(text: str) -> Any:  # argparse names the function in its message
        if kind is int and re.fullmatch(r"[0-9.]+[kKmMgGtT]", text):
            return text
        return None if text.lower() == "none" else kind(text)

    return number


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text[:200]!r} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text[:200]!r} is not a JSON object")
    return value


def given_values(values: Mapping[str, Any], declared: Iterable[Parameter]) -> dict[str, Any]:
    """The values of a command line that are these parameters'."""
    return {p.name: values[p.name] for p in declared if p.name in values}
