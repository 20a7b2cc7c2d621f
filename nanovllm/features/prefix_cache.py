"""Forgetting what the KV cache holds, for instance because the weights have changed."""

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.validation import check_bool


def reset_prefix_cache(
    llm: LLMEngine, reset_running_requests: bool = False, reset_connector: bool = False
) -> bool:
    """Forget all cached K/V.

    Args:
        reset_running_requests: put running requests back in the queue first; they go on, and
            their K/V is computed anew.
        reset_connector: changes nothing, there is no outside cache.

    Returns:
        True; or False if a request still holds blocks, and nothing has changed.
    """
    check_bool("reset_running_requests", reset_running_requests)
    llm.check_ready()
    if reset_running_requests:
        llm.drain()
        running = llm.scheduler.running
        while running:  # the newest first: each goes to the front of the waiting queue
            llm.scheduler.preempt(running[-1])
    return llm.scheduler.block_manager.reset_prefix_cache()
