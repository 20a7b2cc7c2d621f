"""Forgetting what the KV cache holds, for instance because the weights have changed."""

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.validation import check_bool


def reset_prefix_cache(llm: LLMEngine, reset_running_requests: bool = False) -> bool:
    """See `LLM.reset_prefix_cache`."""
    check_bool("reset_running_requests", reset_running_requests)
    llm.check_ready()
    if reset_running_requests:
        llm.drain()
        running = llm.scheduler.running
        while running:  # the newest first: each goes to the front of the waiting queue
            llm.scheduler.preempt(running[-1])
    return llm.scheduler.block_manager.reset_prefix_cache()
