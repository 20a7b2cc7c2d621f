"""Forgetting what the KV cache holds, for instance because the weights have changed."""

from typing import TYPE_CHECKING

from nanovllm.validation import check_bool

if TYPE_CHECKING:
    from nanovllm.llm import LLM


def reset_prefix_cache(llm: "LLM", reset_running_requests: bool = False) -> bool:
    """See `LLM.reset_prefix_cache`."""
    check_bool("reset_running_requests", reset_running_requests)
    llm._check_ready()
    if reset_running_requests:
        llm._settle()
        running = llm.scheduler.running
        while running:  # the newest first: each goes to the front of the waiting queue
            llm.scheduler.preempt(running[-1])
    return llm.scheduler.block_manager.reset_prefix_cache()
