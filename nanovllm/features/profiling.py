"""Traces of torch's profiler, one file for each rank."""

import os

import torch
from torch.profiler import ProfilerActivity, profile

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.errors import ArgumentError, shown
from nanovllm.features.rpc import call_ranks

DEFAULT_PREFIX = "nanovllm-trace"


def start_profile(llm: LLMEngine, profile_prefix: str | None = None) -> None:
    """Start torch's profiler on every rank.

    Args:
        profile_prefix: the beginning of the traces' paths; None: "nanovllm-trace". A relative
            one starts at the folder of `profiler_config`, else VLLM_TORCH_PROFILER_DIR, if that is
            set.

    Raises:
        ArgumentError: it runs already.
    """
    if not isinstance(profile_prefix, (str, os.PathLike, type(None))):
        raise ArgumentError(f"profile_prefix must be a path, got {shown(profile_prefix)}")
    prefix = os.fspath(profile_prefix or DEFAULT_PREFIX)
    # A relative prefix starts at vLLM's folder for traces, if that is set; made absolute here, so
    # that it does not matter where the process has moved to when the trace is written.
    folder = llm.config.profiler_config or os.environ.get("VLLM_TORCH_PROFILER_DIR", "")
    path = os.path.abspath(os.path.join(str(folder), prefix))
    call_ranks(llm, _start, args=(path,))


def stop_profile(llm: LLMEngine) -> list[str]:
    """Write the traces, for chrome://tracing or Perfetto, and stop.

    Returns:
        The paths, `<prefix>-rank<r>.json` for each rank r, with several replicas
        `<prefix>-replica<i>-rank<r>.json`. Older files there are replaced.

    Raises:
        ArgumentError: the profiler does not run.
    """
    return call_ranks(llm, _stop)


def _start(runner: ModelRunner, prefix: str) -> None:
    if runner.profiler is not None:
        raise ArgumentError("start_profile: the profiler runs already; call stop_profile() first")
    os.makedirs(os.path.dirname(prefix), exist_ok=True)
    activities = [ProfilerActivity.CPU]
    if runner.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities)
    profiler.start()
    index = runner.config.replica
    replica = "" if index is None else f"-replica{index}"
    runner.profiler = profiler, f"{prefix}{replica}-rank{runner.rank}.json"


def _stop(runner: ModelRunner) -> str:
    if runner.profiler is None:
        raise ArgumentError("stop_profile: the profiler does not run; call start_profile() first")
    (profiler, path), runner.profiler = runner.profiler, None
    if runner.is_cuda:
        torch.cuda.synchronize(runner.device)
    profiler.stop()
    profiler.export_chrome_trace(path)
    return path
