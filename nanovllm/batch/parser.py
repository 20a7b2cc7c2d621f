"""The parser of the command line, which says what a misspelt option was meant to be."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from nanovllm.compat import SAMPLING_NAMES
from nanovllm.errors import nearest


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
