"""The command line: the two files, and every parameter of `LLM` and of `SamplingParams` by name."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.batch.requests import structured_outputs
from nanovllm.command_line import Parser, add_options, given_values
from nanovllm.config import Config
from nanovllm.errors import ArgumentError
from nanovllm.parameters import Parameter, parameters
from nanovllm.sampling_params import SamplingParams

DESCRIPTION = """\
Completes every line of INPUT, a JSON Lines file of requests, and appends a line of results to
OUTPUT as each finishes. Run the same command again to resume."""
EPILOG = """\
exit status: 0 every line has a result; 1 some lines have an error record; 2 a wrong argument, and
nothing was run; 3 the engine or a write failed; 130, 143 ended by SIGINT, SIGTERM. After 3, 130 and
143 the results so far are kept, and the same command goes on; so it does when the process was
killed. A line that kills the process twice gets an error record in the third run: OUTPUT.journal,
which is gone at the end, says which lines were at work."""

BATCH_DEFAULTS = {"skip_special_tokens": True}  # as in OpenAI's batches


@dataclass(frozen=True)
class Options:
    """The values of a command line.

    Attributes:
        input_path, output_path: checked; the output need not exist.
        engine: keywords of `LLM`, "model" among them.
        defaults: sampling parameters of lines that do not set them.
        return_token_ids: default of a line's "return_token_ids".
        seed: with the line's number it keys the draws of a line without a seed.
        shows_progress: draw a bar on stderr.
    """

    input_path: str
    output_path: str
    engine: dict[str, Any]
    defaults: dict[str, Any]
    return_token_ids: bool
    seed: int
    shows_progress: bool

    @property
    def model_name(self) -> str:
        """The name of the model's directory."""
        return os.path.basename(os.path.realpath(self.engine["model"]))

    @property
    def digest(self) -> str:
        """8 hex digits that differ when the model's name, a default parameter or the seed does.

        So do they for another `generation_config` or `override_generation_config`; outputs begun
        without these keep their digits.
        """
        values = [self.model_name, self.defaults, self.return_token_ids, self.seed]
        source = self.engine.get("generation_config", "auto")
        if source not in ("auto", "vllm"):
            source = os.path.realpath(source)
        override = self.engine.get("override_generation_config") or {}
        if source != "auto" or override:
            values.append([source, override])
        text = json.dumps(values, sort_keys=True, default=repr)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """The checked command line; `arguments` default to `sys.argv[1:]`.

    Raises:
        ArgumentError: a file or a default sampling parameter is wrong.
        SystemExit: 2 for anything else, after a message on stderr.
    """
    parser = Parser(
        prog="python -m nanovllm.batch",
        usage="%(prog)s INPUT OUTPUT --model DIR [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add_parameters(parser)
    parser.add_argument("output", metavar="OUTPUT", help="JSON Lines file to append results to")
    options = options_of(parser.values_of(sys.argv[1:] if arguments is None else arguments))
    _check_output(options.input_path, options.output_path)
    for path in (options.input_path, options.output_path):
        if os.path.realpath(options.engine.get("record", "")) == os.path.realpath(path):
            raise ArgumentError(f"the record would replace {path!r}; choose another path for it")
    return options


def add_parameters(parser: argparse.ArgumentParser) -> None:
    """Add what `options_of` reads, but for "output"."""
    parser.add_argument("input", metavar="INPUT", help="JSON Lines file of requests")
    parser.add_argument(
        "--model",
        required=True,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="model directory, or with --download a name on the hub",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="a line without a seed gets one from this and its number",
    )
    parser.add_argument("--no-progress", action="store_true", help="draw no bar on stderr")
    engine = parser.add_argument_group("parameters of LLM")
    add_options(engine, _engine_parameters())
    sampling = parser.add_argument_group(
        "sampling parameters of lines that do not set them",
        "What is not given here is taken from the model's generation_config.json, if it is there.",
    )
    sampling.add_argument("--return-token-ids", action="store_true", help="add them to the choices")
    add_options(sampling, _sampling_parameters(), BATCH_DEFAULTS)


def options_of(given: dict[str, Any]) -> Options:
    """The options of a parsed command line.

    Raises:
        ArgumentError: the input or a default sampling parameter is wrong.
    """
    defaults = given_values(given, _sampling_parameters())
    if isinstance(defaults.get("structured_outputs"), dict):
        defaults["structured_outputs"] = structured_outputs(defaults["structured_outputs"])
    SamplingParams(**defaults)
    _check_input(given["input"])
    engine_given = given_values(given, _engine_parameters())
    return Options(
        input_path=given["input"],
        output_path=given["output"],
        engine={"model": given["model"], "seed": given["seed"]} | engine_given,
        defaults=defaults,
        return_token_ids=given["return_token_ids"],
        seed=given["seed"],
        shows_progress=not given["no_progress"],
    )


def _engine_parameters() -> list[Parameter]:
    own = ("model", "seed")  # options of their own
    return [p for p in parameters(Config) if p.name not in own]


def _sampling_parameters() -> list[Parameter]:
    # Has an option of its own; are no text; a batch has whole outputs, and writes JSON.
    others = ("seed", "logits_processors", "output_kind", "flat_logprobs")
    return [p for p in parameters(SamplingParams) if p.name not in others]


def _check_input(source: str) -> None:
    if source == "-":
        raise ArgumentError("the input must be a file, not '-': a pipe cannot be resumed")
    if not os.path.isfile(source):
        raise ArgumentError(f"input {source!r} is not an existing file")
    if not os.access(source, os.R_OK):
        raise ArgumentError(f"input {source!r} cannot be read")


def _check_output(source: str, target: str) -> None:
    if target == "-":
        raise ArgumentError("the output must be a file, not '-': a pipe cannot be resumed")
    folder = os.path.dirname(os.path.abspath(target))
    if not os.path.isdir(folder):
        raise ArgumentError(f"the folder of the output does not exist: {folder!r}")
    if os.path.exists(target):
        if os.path.samefile(source, target):
            raise ArgumentError(f"input and output are the same file: {source!r}")
        if not os.path.isfile(target):
            raise ArgumentError(f"output {target!r} is not a regular file")
