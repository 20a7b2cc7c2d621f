"""The order in which sequences that come in one call are queued."""

from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence


def queue_order(seqs: list[Sequence], scheduler: Scheduler) -> list[Sequence]:
    """`seqs` as they are to be queued. Equal ones keep their order.

    Where they outnumber the slots, those that may get the most tokens come first, so that the last
    steps run many sequences and not a few long ones (Graham 1969, SIAM J. Appl. Math. 17).

    The first ones may need more KV blocks at their ends than there are: some would be preempted,
    and computed again. Then only as many as there are slots, those that come last, are put in this
    order. So long and short ones share the cache, and the last steps still run many.
    """
    num_slots, block_size = scheduler.max_num_seqs, scheduler.config.kvcache_block_size
    if len(seqs) <= num_slots:
        return seqs
    longest_first = sorted(seqs, key=_most_new_tokens, reverse=True)
    num_needed = sum(-(-seq.max_length // block_size) for seq in longest_first[:num_slots])
    if num_needed <= len(scheduler.block_manager.blocks):
        return longest_first
    last = sorted(seqs[-num_slots:], key=_most_new_tokens, reverse=True)
    return seqs[:-num_slots] + last


def _most_new_tokens(seq: Sequence) -> int:
    return seq.max_length - seq.num_prompt_tokens
