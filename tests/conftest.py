"""Under pytest-xdist the cores are shared: each worker, and what it starts, uses one thread."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, so not yet
