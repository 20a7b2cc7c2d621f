"""Sleep and wake_up: which parts of the engine are off, and what happens to its requests.

While anything is off, requests can be queued, but nothing is computed.
"""

from collections.abc import Iterable

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ArgumentError, shown
from nanovllm.features.offload import release_memory, restore_kv_cache, restore_weights
from nanovllm.features.prefix_cache import reset_prefix_cache
from nanovllm.features.rpc import call_ranks
from nanovllm.validation import check_choice, check_integer

MEMORY_TAGS = frozenset({"weights", "kv_cache"})
TAGS = ("weights", "kv_cache", "scheduling")


def sleep(llm: LLMEngine, level: int = 1, mode: str = "abort") -> None:
    """Give memory back until `wake_up`. Requests can be queued meanwhile, but nothing runs.

    Args:
        level: 0 only stops the scheduling, all memory stays. 1 moves the weights to host
            memory and drops the KV cache and the CUDA graphs. 2 drops the weights too.
        mode: what becomes of unfinished requests: "abort" ends them, "wait" finishes them
            first (`step` returns them), "keep" lets them go on after `wake_up`; from level 1
            on their K/V is computed anew then.

    Whatever runs a step, such as `generate`, raises a RuntimeError until `wake_up`.
    """
    level = check_integer("level", level, minimum=0, maximum=2)
    check_choice("mode", mode, ("abort", "wait", "keep"))
    llm.check_ready()
    llm.drain()
    if mode == "abort":
        llm.abort(list(llm.requests.unfinished.values()))
    while mode == "wait" and not llm.scheduler.is_finished():
        llm.advance()
    if level == 0:
        llm.asleep |= {"scheduling"}
        return
    reset_prefix_cache(llm, reset_running_requests=True)
    llm.asleep |= MEMORY_TAGS  # before: half asleep is no state to compute in
    call_ranks(llm, release_memory, args=(level == 1,))


def wake_up(llm: LLMEngine, tags: Iterable[str] | None = None) -> bool:
    """Undo `sleep`.

    Args:
        tags: what to wake: "weights" and "kv_cache" (levels 1 and 2), "scheduling" (level 0);
            None: everything. CUDA graphs are captured with the last of weights and cache.

    Returns:
        Whether everything is awake.

    After level 2 all weights are zero: follow with `load_weights` or `reload_weights`, before
    or after waking the cache.

    Raises:
        ArgumentError: there is no such tag.
        RuntimeError: the memory is taken by now. The engine sleeps on; try again later.
    """
    wanted = frozenset(TAGS) if tags is None else _check_tags(tags)
    llm.check_ready()
    due = wanted & llm.asleep
    # Memory first, on all ranks: a rank that has too little must not leave the others waiting in
    # the collectives that a capture runs.
    if "weights" in due:
        call_ranks(llm, restore_weights)
    if "kv_cache" in due:
        call_ranks(llm, restore_kv_cache)
    if due & MEMORY_TAGS and not (llm.asleep - due) & MEMORY_TAGS:
        call_ranks(llm, "capture_graphs")
    llm.asleep -= due
    return not llm.asleep


def _check_tags(tags: Iterable[str]) -> frozenset[str]:
    try:
        given = list(tags) if not isinstance(tags, str) else [tags]
    except TypeError:
        raise ArgumentError(f"tags must be of {', '.join(TAGS)}, got {shown(tags)}") from None
    for tag in given:
        if not isinstance(tag, str) or tag not in TAGS:
            raise ArgumentError(f"tags must be of {', '.join(TAGS)}, got {shown(tag)}")
    return frozenset(given)
