"""`python -m nanovllm.warmup MODEL`: compiles an engine's kernels ahead of its first start."""

import sys
from collections.abc import Sequence

from nanovllm.command_line import Parser, add_options, given_values
from nanovllm.config import Config
from nanovllm.errors import ArgumentError
from nanovllm.parameters import parameters

DESCRIPTION = """\
Compiles the kernels that an engine with these parameters can launch into Triton's cache on disk
(TRITON_CACHE_DIR, else ~/.triton/cache), in parallel. Its starts find them there. Of MODEL only
config.json is read, and no GPU is needed if its compute capability is given."""
EPILOG = "exit status: 0 all are compiled; 1 some could not be; 2 a wrong argument"


def main(arguments: Sequence[str] | None = None) -> int:
    """Warm up for a command line, `sys.argv[1:]` if there is none; the exit status."""
    parser = Parser(
        prog="python -m nanovllm.warmup",
        usage="%(prog)s MODEL [--capability 8.9] [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="model directory")
    parser.add_argument(
        "--capability",
        "--compute-capability",
        metavar="X.Y",
        help="compute capability of the GPU; None: of the GPU here",
    )
    declared = [p for p in parameters(Config) if p.name != "model"]
    add_options(parser.add_argument_group("parameters of LLM"), declared)
    given = parser.values_of(sys.argv[1:] if arguments is None else arguments)
    from nanovllm.features.warmup import warm_up  # torch takes a while

    try:
        result = warm_up(
            given["model"],
            compute_capability=given["capability"],
            **given_values(given, declared),
        )
    except ArgumentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(result)
    return 1 if result.errors else 0


if __name__ == "__main__":
    sys.exit(main())
