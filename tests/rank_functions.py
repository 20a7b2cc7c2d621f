"""What the tests call on every rank: pickled by name, so it lives in a module of its own."""

import gc
import os
import sys
import time

import torch

from nanovllm.kernels.types import Unreduced


def echo_rank(worker, *args, **kwargs):
    return worker.rank, os.getpid(), args, kwargs


def imported(worker, name):
    return name in sys.modules


def num_frozen_objects(worker):
    """Those that Python's garbage collector no longer looks at."""
    return gc.get_freeze_count()


def sum_of_ranks(worker):
    """A collective in a call: the ranks run it together."""
    total = torch.tensor([float(worker.rank + 1)])
    return worker.tp.all_reduce(Unreduced(total)).item()


def fail_on_rank(worker, rank):
    if worker.rank == rank:
        raise KeyError(f"injected on rank {rank}")


def sleep_on_rank(worker, rank, seconds):
    if worker.rank == rank:
        time.sleep(seconds)
    return worker.rank


def make_steps_slow(worker, seconds):
    def execute(plan, seqs=()):
        time.sleep(seconds)
        return type(worker).execute(worker, plan, seqs)

    worker.execute = execute


def on_announcement():
    """What `announce` calls; a test may put another function in its place."""


def announce(worker):
    on_announcement()


def call_engine(worker):
    """From inside a call the engine takes none; only rank 0 has it."""
    if worker.rank == 0:
        on_announcement()


def end_on_rank(worker, rank):
    if worker.rank == rank:
        os._exit(7)


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def memory_bytes(worker):
    """Of the KV cache and of the weights."""
    storages = [parameter.untyped_storage() for parameter in worker.model.parameters()]
    return worker.kv_cache.untyped_storage().nbytes(), sum(map(len, storages))


def print_to_descriptors(runner) -> None:
    """Write to stdout and stderr as code in C does it, whatever these are open for."""
    for descriptor in (1, 2):
        os.write(descriptor, b"x" * 4000)


class Extension:
    """What a trainer adds to the workers: its methods are called by their names."""

    def remember(self, value):
        self.remembered = value

    def recall(self):
        return self.local_rank, self.device.type, self.remembered

    def take_weights(self, weights):
        return sorted(self.model_runner.model.load_weights(weights=weights.items()))


class Conflicting:
    def reload_weights(self):
        """The worker has one of its own."""
