"""`python -m nanovllm.estimate MODEL --gpu-memory 8GiB`: whether a model fits a GPU, without it."""

import sys
from collections.abc import Sequence

from nanovllm.command_line import Parser, add_options, given_values
from nanovllm.config import Config
from nanovllm.errors import ArgumentError
from nanovllm.parameters import parameters

DESCRIPTION = """\
Says what an engine would take of a GPU's memory: weights, activations, CUDA graphs and KV cache;
the longest sequence and the largest batch that fit; and which parameters would make more room. No
GPU is needed, and of MODEL only its config.json."""
EPILOG = "exit status: 0 it fits; 1 it does not; 2 a wrong argument"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the estimate of a command line, `sys.argv[1:]` if there is none; the exit status."""
    parser = Parser(
        prog="python -m nanovllm.estimate",
        usage="%(prog)s MODEL [--gpu-memory 8GiB] [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="model directory, or with --download a name on the hub"
    )
    parser.add_argument("--gpu-memory", metavar="SIZE", help='such as "8GiB"; None: the GPU here')
    parser.add_argument(
        "--compute-capability", metavar="X.Y", help="of the GPU; None: of the GPU here, else 8.9"
    )
    declared = [p for p in parameters(Config) if p.name != "model"]
    add_options(parser.add_argument_group("parameters of LLM"), declared)
    given = parser.values_of(sys.argv[1:] if arguments is None else arguments)
    from nanovllm.features.estimate import estimate  # torch takes a while

    try:
        result = estimate(
            given["model"],
            given["gpu_memory"],
            compute_capability=given["compute_capability"],
            **given_values(given, declared),
        )
    except ArgumentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(result)
    return 0 if result.fits else 1


if __name__ == "__main__":
    sys.exit(main())
