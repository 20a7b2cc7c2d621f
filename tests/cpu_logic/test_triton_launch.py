"""What holds for every Triton kernel of the library."""

import importlib
import pkgutil

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

import nanovllm.kernels.triton  # noqa: E402


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
        assert kernel.run.keywords == {"enable_fp_fusion": True}, name


def test_a_launch_hands_the_option_on(monkeypatch):
    from nanovllm.kernels.triton import launch as triton_launch

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


def test_this_versions_compiler_knows_the_option():
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    for value in (True, False):
        assert backend.parse_options({"enable_fp_fusion": value}).enable_fp_fusion is value
