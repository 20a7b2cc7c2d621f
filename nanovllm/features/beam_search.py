"""Beam search: the most probable completions, found a token at a time.

As in vLLM each live beam is a request for one token, whose prompt is the beam; what beams share is
in the prefix cache. The search is host code over their log probabilities.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ArgumentError, shown
from nanovllm.inputs.prompts import as_lora_list, as_prompt_list, encode_prompts
from nanovllm.lora_request import LoRARequest, LoRARequests
from nanovllm.outputs import Logprob
from nanovllm.progress import ProgressBar, check_use_tqdm
from nanovllm.sampling_params import BeamSearchParams, SamplingParams
from nanovllm.validation import check_at_least


@dataclass
class BeamSearchSequence:
    """A beam.

    Args:
        tokens: token ids of prompt and completion; an EOS token that ended it is the last.
        logprobs: for each completion token a dict of token ids: the candidates of its step.
        cum_logprob: sum of the natural logarithms of the completion tokens' probabilities.
        text: `tokens` decoded; None without a tokenizer.
        finish_reason: "stop" after an EOS token, else "length".
        stop_reason: the EOS token id that ended it; None otherwise.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None

    def score(self, eos_token_ids: frozenset[int], length_penalty: float) -> float:
        """`cum_logprob / length**length_penalty`, the length that of `tokens` without a last EOS.

        The formula of vLLM, whose length counts the prompt too.
        """
        length = len(self.tokens) - (self.tokens[-1] in eos_token_ids)
        return self.cum_logprob / max(length, 1) ** length_penalty


@dataclass
class BeamSearchOutput:
    """The result of a prompt: at most `beam_width` beams, the one of the highest score first."""

    sequences: list[BeamSearchSequence]


@dataclass
class _Search:
    """The search of one prompt."""

    beams: list[BeamSearchSequence]
    steps_left: int
    lora_request: LoRARequest | None
    completed: list[BeamSearchSequence] = field(default_factory=list)


def beam_search(
    llm: LLMEngine,
    prompts: str | list[str] | list[int] | list[list[int]] | list[Any],
    params: BeamSearchParams,
    lora_request: LoRARequests = None,
    use_tqdm: bool | Callable[..., Any] = False,
    concurrency_limit: int | None = None,
) -> list[BeamSearchOutput]:
    """Search for the most probable completions of each prompt.

    At each step a beam is continued by the `2 * beam_width` most probable tokens. Candidates that
    end in an EOS token are set aside; of the others the `beam_width` with the highest scores go on.
    The result is the best of all that ended and of those that are left.

    Args:
        prompts: as for `generate`.
        params: width, length, and how beams of different lengths compare.
        lora_request: as for `generate`.
        use_tqdm: show a progress bar of prompts on stderr; a callable is used in place of tqdm.
        concurrency_limit: prompts that are searched at a time; None: all.

    Returns:
        A `BeamSearchOutput` for each prompt, in their order.

    Raises:
        ArgumentError: a prompt or parameter is wrong, or `2 * beam_width` is more than
            `max_logprobs`; nothing was queued then.
        RequestError: a request for a token failed; `outputs` of this error are those of its step.
        EngineDeadError: a tensor-parallel worker died.
    """
    check_use_tqdm(use_tqdm)
    if not isinstance(params, BeamSearchParams):
        raise ArgumentError(f"params must be a BeamSearchParams, got {shown(params)}")
    if concurrency_limit is not None:
        check_at_least("concurrency_limit", concurrency_limit, 1)
    config = llm.config
    vocab_size = config.model_config.vocab_size
    num_candidates = min(2 * params.beam_width, vocab_size)
    if -1 < config.max_logprobs < num_candidates:
        raise ArgumentError(
            f"beam_width must be <= {config.max_logprobs // 2}, got {params.beam_width}: a step "
            f"needs {num_candidates} log probabilities, and max_logprobs is {config.max_logprobs}"
        )
    encoded = encode_prompts(as_prompt_list(prompts), llm.input_processor.tokenizer, vocab_size)
    searches = [
        _Search(
            [BeamSearchSequence(prompt.token_ids)],
            params.max_tokens,
            adapter and replace(adapter, load_inplace=False),  # not again for each token
        )
        for prompt, adapter in zip(encoded, as_lora_list(lora_request, len(encoded)), strict=True)
    ]
    one_token = SamplingParams(
        params.temperature, 1, ignore_eos=True, logprobs=num_candidates, detokenize=False
    )
    # All prompts are checked before the first step.
    first: list[object] = [_prompt(search.beams[0]) for search in searches]
    llm.input_processor.process(first, one_token, None, None, lora_request)
    at_once = concurrency_limit or max(len(searches), 1)
    with ProgressBar(use_tqdm, len(searches)) as bar:
        for start in range(0, len(searches), at_once):
            group = searches[start : start + at_once]
            while _step(llm, group, params, one_token):
                pass
            bar.update(len(group), 0, 0.0)
    return [_output(llm, search, params) for search in searches]


def _prompt(beam: BeamSearchSequence) -> dict[str, Any]:
    return {"prompt_token_ids": beam.tokens}


def _longest(llm: LLMEngine) -> int:
    """Tokens that a beam may have: those of a sequence that the KV cache holds."""
    config = llm.config
    assert config.num_kvcache_blocks is not None
    return min(config.max_model_len, config.num_kvcache_blocks * config.kvcache_block_size + 1)


def _step(
    llm: LLMEngine, searches: list[_Search], params: BeamSearchParams, one_token: SamplingParams
) -> bool:
    """Continue every beam by a token; whether there was any to continue."""
    longest = _longest(llm)
    live = [s for s in searches if s.beams and s.steps_left and len(s.beams[0].tokens) < longest]
    beams = [beam for search in live for beam in search.beams]
    if not beams:
        return False
    adapters = [search.lora_request for search in live for _ in search.beams]
    prompts = [_prompt(beam) for beam in beams]
    outputs = iter(llm.generate(prompts, one_token, False, lora_request=adapters))
    eos_token_ids = llm.config.eos_token_ids
    for search in live:
        search.steps_left -= 1
        going_on = []
        for beam in search.beams:
            [candidates] = next(outputs).outputs[0].logprobs or [{}]
            for token_id, logprob in candidates.items():
                longer = BeamSearchSequence(
                    [*beam.tokens, token_id],
                    [*beam.logprobs, candidates],
                    beam.cum_logprob + logprob.logprob,
                )
                if token_id in eos_token_ids and not params.ignore_eos:
                    longer.finish_reason, longer.stop_reason = "stop", token_id
                    search.completed.append(longer)
                else:
                    going_on.append(longer)
        search.beams = _best(going_on, llm, params)
        search.completed = _best(search.completed, llm, params)  # the others cannot come back
    return True


def _best(
    beams: list[BeamSearchSequence], llm: LLMEngine, params: BeamSearchParams
) -> list[BeamSearchSequence]:
    """The `beam_width` beams of the highest scores, the highest first."""

    def score(beam: BeamSearchSequence) -> float:
        return beam.score(llm.config.eos_token_ids, params.length_penalty)

    return sorted(beams, key=score, reverse=True)[: params.beam_width]


def _output(llm: LLMEngine, search: _Search, params: BeamSearchParams) -> BeamSearchOutput:
    tokenizer: Any = llm.input_processor.tokenizer
    sequences = _best(search.completed + search.beams, llm, params)
    for beam in sequences:
        beam.finish_reason = beam.finish_reason or "length"
        if tokenizer is not None:
            beam.text = tokenizer.decode(beam.tokens)
    return BeamSearchOutput(sequences)
