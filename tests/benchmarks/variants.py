"""Techniques that a benchmark can switch off, or for another: alone or combined."""

import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Variant:
    """Parameters of `LLM`, and constants ("module.NAME") of modules of nanovllm."""

    settings: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)


NEVER = 2**62  # of anything that is counted

RING = {
    "kernels.triton.hopper_fused_decode.MIN_ROWS": 1,
    "kernels.triton.hopper_fused_decode.MAX_PARTS": 8,
    "kernels.triton.hopper_fused_decode.MERGE_ELEMENTS": 2048,
    "kernels.triton.hopper_fused_decode.IDLE_WAIT": False,
    "kernels.triton.hopper_fused_decode.SLOTS_FIRST": True,
}
VARIANTS = {
    "no-overlap": Variant({"async_scheduling": False}),
    "no-graphs": Variant({"enforce_eager": True}),
    "no-launch-overlap": Variant(constants={"kernels.triton.launch.OVERLAP_LAUNCHES": False}),
    "no-split-linears": Variant(constants={"kernels.triton.linear.SPLIT_LINEAR": False}),
    "no-fused-decode": Variant(
        constants={
            "kernels.triton.fused_decode.MAX_ROWS": 0,
            "kernels.triton.hopper_fused_decode.MIN_ROWS": 2**31,
        }
    ),
    # Attention of all decode steps by Hopper's kernel, with more of it, and its own plan.
    "ring-few-rows": Variant(constants=RING),
    "ring-few-rows-2": Variant(
        constants=RING | {"kernels.triton.decode_attention.PROGRAMS_PER_SM": {2**31: 2}}
    ),
    "ring-few-rows-64": Variant(
        constants=RING
        | {
            "kernels.triton.decode_attention.PROGRAMS_PER_SM": {2**31: 2},
            "kernels.triton.decode_attention.SMALL_BATCH_TILE": 64,
        }
    ),
    # Products of more than 8 tokens by `wide_linear`.
    "wide-few-rows": Variant(constants={"kernels.triton.linear.MIN_WIDE_TOKENS": 9}),
    "no-common-prefix": Variant(constants={"engine.common_prefix.MIN_SPARED_TOKENS": NEVER}),
    "no-joint-admission": Variant(constants={"engine.scheduling_policy.ADMISSION_INTERVAL": 0}),
    "no-prefix-caching": Variant({"enable_prefix_caching": False}),
    "flash-attn": Variant({"attention_backend": "flash-attn"}),
    "torch": Variant({"attention_backend": "torch"}),
    "fp8-kv-cache": Variant({"kv_cache_dtype": "fp8"}),
}


def settings_of(names: Iterable[str]) -> dict[str, Any]:
    """The parameters of `LLM` of all these variants together."""
    return {key: value for name in names for key, value in VARIANTS[name].settings.items()}


def constants_of(names: Iterable[str]) -> dict[str, Any]:
    """The constants of all these variants together."""
    return {key: value for name in names for key, value in VARIANTS[name].constants.items()}


@contextmanager
def constants_set(names: Iterable[str]) -> Iterator[None]:
    """The variants' constants hold inside; engines must be built and ended there.

    Raises:
        LookupError: this version of nanovllm has no such constant.
    """
    saved: list[tuple[ModuleType, str, Any]] = []
    try:
        for path, value in constants_of(names).items():
            module_name, _, constant = path.rpartition(".")
            module = importlib.import_module(f"nanovllm.{module_name}")
            if not hasattr(module, constant):
                raise LookupError(f"nanovllm.{module_name} has no {constant}")
            saved.append((module, constant, getattr(module, constant)))
            _set_constant(module, constant, value)
        yield
    finally:
        for module, constant, value in saved:
            _set_constant(module, constant, value)


def _set_constant(module: ModuleType, constant: str, value: Any) -> None:
    setattr(module, constant, value)
    # What any module has computed from the previous value and remembers.
    for name, loaded in list(sys.modules.items()):
        if name.startswith("nanovllm."):
            for member in list(vars(loaded).values()):
                if hasattr(member, "cache_clear"):
                    member.cache_clear()
