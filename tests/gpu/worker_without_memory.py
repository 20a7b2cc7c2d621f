"""A worker that cannot share GPU memory, for a test to put in place of the real one.

It is looked up by name in the spawned process, so it lives in a module of its own.
"""

from nanovllm.parallel import tensor_parallel, workers


def main(rank: int, *args) -> None:
    def cannot_allocate(*arguments):
        raise RuntimeError("injected: this rank cannot share its memory")

    tensor_parallel.IpcMemory = cannot_allocate
    real_main(rank, *args)


real_main = workers._worker_main
