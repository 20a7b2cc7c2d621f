"""Who takes what a step gives beside its plain tokens, by what sequences want."""

from nanovllm.engine.consumers import LogitsProcessing, PromptLogprobs, StepConsumer
from nanovllm.engine.poolers import LastTokenPooling, TokenPooling
from nanovllm.engine.rank_state import RankState
from nanovllm.engine.sequence import Wants


def new_consumers(rank: RankState) -> dict[int, StepConsumer]:
    """One of `Wants` -> its consumer, on one rank."""
    config, tp, model = rank.config, rank.tp, rank.model
    return {
        Wants.LOGITS: LogitsProcessing(config, rank.device, tp, rank.ops, rank.row_table),
        Wants.PROMPT: PromptLogprobs(config, tp, model.lm_head, rank.adapters),
        Wants.POOLING: LastTokenPooling(model),
        Wants.STATES: TokenPooling(model),
    }
