"""Entry point of `python -m nanovllm.batch`."""

import faulthandler
import sys

from nanovllm.batch.run import main

if __name__ == "__main__":
    faulthandler.disable()  # Python's own switch: the journal's notes of crashes need it
    sys.exit(main())
