"""One rank's memory while the engine sleeps: weights to the host or dropped, the KV cache dropped.

Modules keep their parameters and views of the cache; only the memory behind them goes and comes.
It comes back at other addresses, so CUDA graphs do not survive. What `cpu_offload_gb` keeps in host
memory stays there.
"""

import gc

import torch

from nanovllm.engine.model_runner import ModelRunner


def release_memory(runner: ModelRunner, keep_weights: bool) -> None:
    """Free the KV cache, the CUDA graphs and the weights' device memory. May be called again.

    Args:
        runner: this rank's; nothing of it may run.
        keep_weights: keep a copy in host memory, pinned if possible; else their content is lost.
    """
    if runner.is_cuda:
        torch.cuda.synchronize(runner.device)
    runner.drop_graphs()
    for consumer in runner.consumers.values():
        consumer.release()
    for buffer in _buffers(runner):
        buffer.untyped_storage().resize_(0)
    if runner.offload is not None and not keep_weights:
        runner.offload.finish_copies()
        for layer in runner.offload.layers:
            layer.memory.zero_()
    for parameter in _on_device(runner):
        if keep_weights:
            parameter.data = _on_host(parameter.data)
        else:
            # One element stands in for all, with the shape of the whole.
            parameter.data = parameter.data.new_zeros((), device=runner.device).expand(
                parameter.shape
            )
    if runner.is_cuda:
        gc.collect()
        torch.cuda.empty_cache()


def restore_weights(runner: ModelRunner) -> None:
    """Weights back on the device; zeros, if their content was dropped. May be called again."""
    for parameter in _on_device(runner):
        parameter.data = parameter.data.to(runner.device, non_blocking=True).contiguous()


def restore_kv_cache(runner: ModelRunner) -> None:
    """The KV cache's memory again, its content undefined. May be called again."""
    for buffer in _buffers(runner):
        if buffer.untyped_storage().nbytes() == 0:
            buffer.untyped_storage().resize_(buffer.nbytes)
            if runner.is_cuda:
                buffer.zero_()  # a kernel may multiply what it masks


def _on_device(runner: ModelRunner) -> list[torch.nn.Parameter]:
    """The parameters that are on the device while the engine is awake; a tied one comes once."""
    offloaded = {id(p) for p in runner.offload.parameters()} if runner.offload else set()
    return [p for p in runner.model.parameters() if id(p) not in offloaded]


def _buffers(runner: ModelRunner) -> list[torch.Tensor]:
    """What only steps fill and read: KV cache, its scales, recurrent states, decode logits, and
    the buffers for offloaded weights."""
    buffers = [runner.kv_cache, runner.kv_scales, runner.decode_logits, *runner.states]
    if runner.offload is not None:
        buffers += runner.offload.buffers
    return [buffer for buffer in buffers if buffer is not None]


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu" or tensor.untyped_storage().nbytes() < tensor.nbytes:
        return tensor  # there already, or dropped
    try:
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    except RuntimeError:  # no more memory can be pinned
        host = torch.empty_like(tensor, device="cpu")
    return host.copy_(tensor)
