"""Entry point of `python -m nanovllm.batch`."""

import sys

from nanovllm.batch.run import main

if __name__ == "__main__":
    sys.exit(main())
