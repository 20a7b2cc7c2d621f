"""What holds for every Triton kernel of the library."""

import importlib
import pkgutil
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

import nanovllm.kernels.triton  # noqa: E402
from nanovllm.kernels.triton import compilation, launcher  # noqa: E402
from nanovllm.kernels.triton import launch as triton_launch  # noqa: E402
from nanovllm.kernels.triton.compilation import (  # noqa: E402
    Compilation,
    Variant,
    compiling_for,
)


def kernels() -> dict[str, object]:
    """Every kernel, and every function that kernels call, by module and name."""
    found = {}
    for module_info in pkgutil.iter_modules(nanovllm.kernels.triton.__path__):
        module = importlib.import_module(f"nanovllm.kernels.triton.{module_info.name}")
        for name, value in vars(module).items():
            if isinstance(value, triton.runtime.JITFunction):
                found[f"{module_info.name}.{name}"] = value
    return found


def test_kernels_fuse_multiply_adds_whatever_the_version_does_by_default():
    found = kernels()
    assert len(found) > 40
    for name, kernel in found.items():
        if kernel.is_gluon() and not name.endswith("_kernel"):
            continue  # what Gluon's kernels call
        assert isinstance(kernel.run, launcher.Launcher), name


def test_a_launch_hands_the_option_on(monkeypatch):
    calls = []

    class Kernel:
        def run(self, *args, **kwargs):
            calls.append((args, kwargs))

        def __getitem__(self, grid):
            return lambda *args, **kwargs: self.run(*args, grid=grid, warmup=False, **kwargs)

    monkeypatch.setattr(triton, "jit", lambda function, **options: Kernel())
    triton_launch.jit(print)[(2,)](1, num_warps=4)
    triton_launch.jit(do_not_specialize=["x"])(print)[(3,)](2)
    always = {"warmup": False, "enable_fp_fusion": True}
    assert calls == [
        ((1,), {"grid": (2,), "num_warps": 4, **always}),
        ((2,), {"grid": (3,), **always}),
    ]


def kernel_of_all_kinds(out, x, tiles, count, scale, WIDTH, OVERLAP):
    pass


def launches() -> list[tuple[tuple[object, ...], dict[str, object]]]:
    """They differ in all that Triton compiles for, and in what it does not."""
    memory = torch.zeros(512, dtype=torch.bfloat16)
    tensors = [memory, memory[8:], memory[4:], memory.float(), memory[:0], None]
    descriptors = [
        TensorDescriptor(memory.view(rows, -1), [rows, 512 // rows], [512 // rows, 1], shape)
        for rows, shape in ((8, [8, 16]), (8, [4, 16]), (16, [8, 16]))
    ]
    counts = [1, 2, 15, 16, 32, 0, -16, 2**31 - 1, 2**31, 2**31 + 16, 2**40, True, None]
    options = [
        {"WIDTH": width, "OVERLAP": overlap, "num_warps": num_warps}
        for width, overlap, num_warps in (
            (64, True, 4),
            (64, False, 4),
            (32, True, 4),
            (64, True, 8),
        )
    ]
    first = (memory, memory, descriptors[0], 16, 0.5)
    varied = [
        *((memory, x, *first[2:]) for x in tensors),
        *((*first[:2], tiles, *first[3:]) for tiles in descriptors),
        *((*first[:3], count, 0.5) for count in counts),
        *((*first[:4], scale) for scale in (1.0, 0.25, 0.0)),
    ]
    return [(args, options[0]) for args in varied] + [(first, other) for other in options]


@pytest.mark.parametrize("unspecialized", [[], ["x", "count"]])
def test_a_repeated_launch_calls_what_triton_would(unspecialized):
    """Triton's own binder says which launches share a compiled kernel."""
    kernel = triton.JITFunction(
        kernel_of_all_kinds,
        do_not_specialize=unspecialized,
        do_not_specialize_on_alignment=unspecialized,
    )
    kernel.params[5].is_constexpr = kernel.params[6].is_constexpr = True
    launched = []

    def compiled_for(args, options):
        kind = repr(binder(*args, **options)[1:])

        def launch(x, y, z, stream, function, metadata, enter, own, leave, *values):
            assert (function, metadata, enter, own, leave) == (kind, "packed", None, None, None)
            launched.append((kind, (x, y, z), values))

        return SimpleNamespace(run=launch, function=kind, packed_metadata="packed")

    def run(*args, grid, warmup, **options):
        assert options.pop("enable_fp_fusion") is True and not warmup
        compiled = compiled_for(args, options)
        values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]
        constants = options["WIDTH"], options["OVERLAP"]
        compiled.run(
            *grid, 1, 0, compiled.function, "packed", None, None, None, *values, *constants
        )
        num_own.append(1)
        return compiled

    kernel.run, num_own = run, []
    triton_launch.with_dry_runs(kernel)
    with compiling_for((9, 0)):
        binder = kernel.create_binder()[-1]
        for round_number in range(2):
            for args, options in launches():
                kernel[(3, 2)](*args, **options)
                kind, grid, values = launched.pop()
                assert kind == repr(binder(*args, **options)[1:]), (args, options)
                assert grid == (3, 2, 1)
                pointers = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]
                assert list(values) == [*pointers, options["WIDTH"], options["OVERLAP"]]
            if round_number == 0:
                num_first = len(num_own)
    assert num_first < len(launches())
    assert len(num_own) == num_first  # in the second round Triton is never asked


def test_kernels_are_loaded_one_after_the_other(monkeypatch):
    """By threads that compile ahead, and by first launches: see `launcher.LOADING`."""
    loading = threading.Lock()

    def load():
        assert loading.acquire(blocking=False), "two threads load at once"
        time.sleep(0.02)
        loading.release()

    class Compiled:
        metadata_group: ClassVar[dict[str, str]] = {}
        function, packed_metadata = 0, ()
        run = property(lambda self: load() or (lambda *args: None))

    def run(*args, warmup, **options):
        compiled = Compiled()
        if not warmup:
            compiled.run()
        return compiled

    kernel = triton.JITFunction(kernel_of_all_kinds)
    kernel.params[5].is_constexpr = kernel.params[6].is_constexpr = True
    kernel.run = run
    triton_launch.with_dry_runs(kernel)
    constants = {"WIDTH": 1, "OVERLAP": False}
    variants = [Variant(kernel, (number, None, None, None, None), constants) for number in range(4)]
    monkeypatch.setattr(compilation, "may_fork", lambda: False)
    monkeypatch.setattr(compilation, "num_cores", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with compiling_for((9, 0)):
        ahead = Compilation(variants, (9, 0), torch.device("cuda", 0))
        for number in range(4):
            kernel[(1,)](number, None, None, None, None, **constants)
        assert ahead.wait() == []


def test_who_listens_to_launches_hears_all(monkeypatch):
    kernel = triton.JITFunction(kernel_of_all_kinds)
    calls = []
    compiled = SimpleNamespace(run=None, function=0, packed_metadata=())
    kernel.run = lambda *args, **options: calls.append(args) or compiled
    triton_launch.with_dry_runs(kernel)
    monkeypatch.setattr(launcher, "_has_hooks", lambda: True)
    with compiling_for((9, 0)):
        for number in range(2):
            kernel[(1,)](number, None, None, None, None, WIDTH=1, OVERLAP=False)
            kernel[(1,)](number, None, None, None, None, WIDTH=1, OVERLAP=False)
    assert len(calls) == 4


def test_this_versions_compiler_knows_the_option():
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    for value in (True, False):
        assert backend.parse_options({"enable_fp_fusion": value}).enable_fp_fusion is value
