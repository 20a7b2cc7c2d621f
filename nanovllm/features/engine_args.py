"""vLLM's `EngineArgs`: the engine's parameters as an object and as options of a command line."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any

from nanovllm.command_line import add_options
from nanovllm.compat import (
    ALIASES,
    LLM_HINTS,
    LLM_NAMES,
    NONE_HAS_A_MEANING,
    VLLM_ABSENT,
    explain_fields,
)
from nanovllm.config import Config
from nanovllm.parameters import parameters

OUR_NAMES = {name: alias for alias, name in ALIASES.items()}
SHORT_OPTIONS = {"tensor_parallel_size": "-tp", "data_parallel_size": "-dp", "quantization": "-q"}


class FlexibleArgumentParser(argparse.ArgumentParser):
    """vLLM's: an option may be written with "_" in place of "-"."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_with_dashes(word) for word in given], namespace)


def _with_dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


class _Arguments:
    """The parameters of `LLM`, all of vLLM's names among them.

    `LLM.from_engine_args`, `LLMEngine.from_engine_args` and `LLM(**vars(engine_args))` take it.
    Defaults are those of `LLM`, but for two, which are vLLM's: `max_model_len` is the model's, and
    a `max_num_batched_tokens` below it splits prompts (`enable_chunked_prefill=None`).

    Raises:
        TypeError: an unknown keyword; the message says what it is called here.
    """

    def __repr__(self) -> str:
        """Those that are not the defaults."""
        others = [
            f"{f.name}={'...' if f.name == 'hf_token' else repr(value)}"
            for f in fields(EngineArgs)
            if (value := getattr(self, f.name)) != f.default
        ]
        return f"EngineArgs({', '.join(others)})"

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add an option for each parameter to `parser`, which is returned."""
        group = parser.add_argument_group("parameters of LLM")
        declared = parameters(Config)
        add_options(group, declared)
        for name, option in SHORT_OPTIONS.items():
            kind = int if name.endswith("_size") else str
            group.add_argument(option, dest=name, type=kind, default=argparse.SUPPRESS)
        for name, (values, _) in VLLM_ABSENT.items():
            group.add_argument(
                f"--{name.replace('_', '-')}",
                nargs="?",
                const=True,
                default=1 if values == (1,) else None,
                type=_value,
                help=argparse.SUPPRESS,
            )
        for p in declared:  # a script may set others by `parser.set_defaults`
            default = None if p.aliases else _default(p.name, p.default)
            parser.set_defaults(**{p.name: default})
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> "_Arguments":
        """Those of a parsed command line."""
        names = {f.name: ALIASES.get(f.name, f.name) for f in fields(EngineArgs)}
        given = {name: value for name, value in vars(args).items() if value is not None}
        found = {name: given.get(ours, given.get(name)) for name, ours in names.items()}
        return cls(**{name: value for name, value in found.items() if value is not None})


def _value(text: str) -> Any:
    """The text of an option as JSON says it, else as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _default(name: str, default: Any) -> Any:
    return None if default is MISSING or name in NONE_HAS_A_MEANING else default


if TYPE_CHECKING:

    @dataclass
    class EngineArgs(_Arguments):
        """As below, for type checkers, which do not know fields that are made."""

        def __init__(self, model: str | None = None, **values: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...

else:
    EngineArgs = make_dataclass(
        "EngineArgs",
        [
            (OUR_NAMES.get(p.name, p.name), Any, field(default=_default(p.name, p.default)))
            for p in parameters(Config)
        ]
        + [
            (name, Any, field(default=1 if values == (1,) else None))
            for name, (values, _) in VLLM_ABSENT.items()
        ],
        bases=(_Arguments,),
        repr=False,
        namespace={"__doc__": _Arguments.__doc__, "__module__": __name__},
    )
    explain_fields(EngineArgs, LLM_NAMES | OUR_NAMES, LLM_HINTS)
