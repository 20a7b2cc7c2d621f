"""Scores of pairs of texts: by a classification head, by a reranker's question, by embeddings.

The question for rerankers is that of Qwen3-Reranker's model card (Zhang et al. 2025, arXiv
2506.05176). Late interaction is that of ColBERT (Khattab and Zaharia 2020, arXiv 2004.12832).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.request import Request
from nanovllm.errors import ArgumentError, is_fault, shown, shown_error
from nanovllm.features.pooling import (
    Pooling,
    check_each_params,
    classification,
    embed,
    encode,
    pool,
    truncating,
)
from nanovllm.features.rpc import call_ranks
from nanovllm.inputs.chat import render_prompts
from nanovllm.inputs.plain_tokenizer import in_full
from nanovllm.inputs.prompts import check_each, check_unsupported, encode_prompts
from nanovllm.models.head_config import IDENTITY, SEQUENCE, SIGMOID, HeadConfig
from nanovllm.models.pooling_config import lists_pooling
from nanovllm.outputs import (
    EmbeddingRequestOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from nanovllm.pooling_params import PoolingParams
from nanovllm.validation import check_choice

QUESTION_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
QUESTION = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
QUESTION_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
YES, NO = "yes", "no"
QUESTION_TOKENS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", YES, NO)
WEB_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
CROSS_ENCODER, RERANKER, EMBEDDING = "cross-encoder", "reranker", "embedding"
LATE_INTERACTION = "late-interaction"
METHODS = (CROSS_ENCODER, RERANKER, EMBEDDING, LATE_INTERACTION)
# Of sentence-transformers: the classes that a cross-encoder's config.json names for its scores.
SCORE_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": IDENTITY,
    "torch.nn.modules.activation.Sigmoid": SIGMOID,
    None: SIGMOID,
}
Embedded = TypeVar("Embedded", EmbeddingRequestOutput, PoolingRequestOutput)


def score(
    llm: LLMEngine,
    data_1: str | list[str],
    data_2: str | list[str],
    /,
    *,
    method: str | None = None,
    instruction: str | None = None,
    use_tqdm: bool | Callable[..., Any] = True,
    pooling_params: PoolingParams | None = None,
    truncate_prompt_tokens: int | None = None,
    lora_request: None = None,
    chat_template: str | None = None,
) -> list[ScoringRequestOutput]:
    """Score pairs of texts: one with one, one with each of several, or each with its own.

    Args:
        data_1: queries.
        data_2: documents, as many; any number for a single query.
        method: "cross-encoder": the classification head of the model reads both texts as the
            tokenizer makes a pair of them; the score is the sigmoid of its one logit (another
            function if config.json names one for a cross-encoder).
            "reranker" asks the model as Qwen3-Reranker was trained to be asked, whether the
            document meets the query; the score is the probability of "yes" against "no". A pair
            whose texts are the whole question, as vLLM's scripts write it, is asked as it is.
            "embedding": the cosine of the two texts' embeddings, as of Qwen3-Embedding.
            "late-interaction": for each token of the query the largest cosine with a token of the
            document, summed, as of ColBERT.
            None: chosen by the model's head, by `pooler_config` whose task is "token_embed"
            ("late-interaction"), or by modules.json that lists a pooling ("embedding"); a reranker
            otherwise.
        instruction: what the reranker looks for; None: passages that answer a web search.
        use_tqdm: as for `generate`.
        pooling_params: of a cross-encoder; `use_activation=False` leaves the logit.
        truncate_prompt_tokens: cut texts so that a prompt has so many tokens at most; of a pair
            the longer text is cut, and the reranker loses the end of the document. -1:
            `max_model_len`.
        lora_request: only None.
        chat_template: of a cross-encoder or reranker: a Jinja template, or the path of a file with
            one, that makes the prompt of a pair, two messages of the roles "query" and "document".

    Returns:
        For each pair an output whose `outputs.score` is a float.

    Raises:
        ArgumentError: an argument is wrong, the model does not answer so, or its tokenizer lacks
            one of the tokens that the reranker's question or answer is made of.
        EngineDeadError: a tensor-parallel worker died.
    """
    check_unsupported(lora_request=lora_request)
    if method is None:
        method = _method_of(llm)
    check_choice("method", method, METHODS)
    head = llm.config.model_config.head
    if (method == CROSS_ENCODER) != (head is not None):
        has = "a classification head" if head else "no classification head"
        raise ArgumentError(
            f"{llm.config.model!r} has {has}: method {method!r} does not go with it"
        )
    queries, documents = _as_texts("data_1", data_1), _as_texts("data_2", data_2)
    if len(queries) not in (1, len(documents)):
        raise ArgumentError(
            f"data_1 and data_2 must be one with one, one with several or as many with as many, "
            f"got {len(queries)} and {len(documents)}"
        )
    if method != CROSS_ENCODER:
        check_unsupported(pooling_params=pooling_params)
    if method != RERANKER and instruction is not None:
        raise ArgumentError(
            "instruction is for method='reranker'; write it into the queries of another model, "
            f"got {shown(instruction)}"
        )
    if method in (EMBEDDING, LATE_INTERACTION):
        check_unsupported(chat_template=chat_template)
        by = _cosines if method == EMBEDDING else _late_interaction
        return by(llm, queries, documents, use_tqdm, truncate_prompt_tokens)
    if not isinstance(instruction, (str, type(None))):
        raise ArgumentError(f"instruction must be a string, got {shown(instruction)}")
    pairs = list(zip(queries * (len(documents) // len(queries)), documents, strict=True))
    prompts = None
    if chat_template is not None:
        if instruction is not None or truncate_prompt_tokens is not None:
            raise ArgumentError(
                "chat_template makes the prompts of score: write the instruction into it, and cut "
                "the texts before; instruction and truncate_prompt_tokens must be None"
            )
        prompts = _rendered(llm, pairs, chat_template)
    if head is not None:
        return _cross_encode(
            llm, head, pairs, pooling_params, use_tqdm, truncate_prompt_tokens, prompts
        )
    return _rerank(llm, pairs, instruction or WEB_SEARCH, use_tqdm, truncate_prompt_tokens, prompts)


def _method_of(llm: LLMEngine) -> str:
    """What the model was made for, as far as its files say it."""
    if llm.config.model_config.head is not None:
        return CROSS_ENCODER
    if llm.config.pooling.task == "token_embed":
        return LATE_INTERACTION
    return EMBEDDING if lists_pooling(llm.config.model) else RERANKER


def _rendered(llm: LLMEngine, pairs: list[tuple[str, str]], chat_template: str) -> list[list[int]]:
    """The token ids of what a template makes of each pair."""
    conversations = [
        [{"role": "query", "content": query}, {"role": "document", "content": document}]
        for query, document in pairs
    ]
    rendered = render_prompts(llm, conversations, chat_template)
    return [prompt["prompt_token_ids"] for prompt in rendered]


# ---- by a classification head -----------------------------------------------------------------


def _cross_encode(
    llm: LLMEngine,
    head: HeadConfig,
    pairs: list[tuple[str, str]],
    params: PoolingParams | None,
    use_tqdm: bool | Callable[..., Any],
    limit: int | None,
    prompts: list[list[int]] | None,
) -> list[ScoringRequestOutput]:
    if head.kind != SEQUENCE or len(head.labels) != 1:
        unit = "prompt" if head.kind == SEQUENCE else "token"
        raise ArgumentError(
            f"score needs a head for sequence classification with one label: {llm.config.model!r} "
            f"has {len(head.labels)} of a {unit}"
        )
    [pooling] = check_each_params(params, 1, partial(_score_pooling, llm, head))
    kwargs = truncating(llm, limit, None)
    if prompts is None:
        prompts = _encode_pairs(in_full(llm.input_processor.tokenizer), pairs, kwargs)
    return _outputs(pool(llm, prompts, [pooling] * len(pairs), use_tqdm))


def _score_pooling(llm: LLMEngine, head: HeadConfig, params: PoolingParams) -> Pooling:
    for name in ("task", "dimensions", "step_tag_id", "returned_token_ids"):
        if getattr(params, name) is not None:
            raise ArgumentError(f"pooling_params: {name} is not for scores")
    config = llm.config.pooling
    activates = params.use_activation
    if activates is None:
        activates = config.is_activated
    if activates is not False and head.score_activation not in SCORE_ACTIVATIONS:
        raise ArgumentError(
            f"scores by {head.score_activation!r}, as config.json asks for, are not supported; "
            f"supported: {', '.join(filter(None, SCORE_ACTIVATIONS))}"
        )
    activation = IDENTITY if activates is False else SCORE_ACTIVATIONS[head.score_activation]
    logits_to_scores = partial(
        classification,
        mean=config.logit_mean or 0.0,
        sigma=1.0 if config.logit_sigma is None else config.logit_sigma,
        activation=activation,
    )
    return Pooling(
        config.sequence_type or "LAST",
        partial(_first_of, logits_to_scores),
        params.skip_reading_prefix_cache,
    )


def _first_of(pooler: Callable[[np.ndarray], np.ndarray], logits: np.ndarray) -> float:
    return float(pooler(logits)[0])


def _encode_pairs(
    tokenizer: Any, pairs: list[tuple[str, str]], kwargs: dict[str, Any]
) -> list[list[int]]:
    """The ids of each pair, as the tokenizer joins two texts."""
    if tokenizer is None:
        raise ArgumentError("score needs the tokenizer that skip_tokenizer_init=True left out")
    try:
        if getattr(tokenizer, "is_fast", False):
            first, second = zip(*pairs, strict=True)
            return tokenizer(list(first), list(second), **kwargs)["input_ids"]
        return [list(tokenizer.encode(*pair, **kwargs)) for pair in pairs]
    except BaseException as error:  # of many types
        if not is_fault(error):
            raise
        raise ArgumentError(f"the tokenizer refuses the pairs: {shown_error(error)}") from error


def _outputs(requests: list[Request]) -> list[ScoringRequestOutput]:
    """Those of requests that were pooled to a float each."""
    outputs = []
    for request in requests:
        [seq] = request.sequences
        outputs.append(
            ScoringRequestOutput(
                str(request.request_id),
                ScoringOutput(seq.features.pooled),
                seq.prompt_token_ids,
                num_cached_tokens=seq.num_cached_tokens,
            )
        )
    return outputs


# ---- by a question ----------------------------------------------------------------------------


def _rerank(
    llm: LLMEngine,
    pairs: list[tuple[str, str]],
    instruction: str,
    use_tqdm: bool | Callable[..., Any],
    limit: int | None,
    prompts: list[list[int]] | None,
) -> list[ScoringRequestOutput]:
    llm.check_awake()
    if not llm.model_runner.has_lm_head:
        raise ArgumentError(
            f"{llm.config.model!r} was saved without an LM head: only method='embedding' scores"
        )
    if llm.config.model_config.uses_transformers:  # its head may do more than multiply
        raise ArgumentError(
            "only method='embedding' scores with a model that runs on transformers' own module"
        )
    tokenizer, vocab_size = (
        in_full(llm.input_processor.tokenizer),
        llm.config.model_config.vocab_size,
    )
    yes_id, no_id = _check_question_tokens(tokenizer)
    if prompts is None:
        plain = {"add_special_tokens": False}
        (_, before), (_, after) = encode_prompts(
            [QUESTION_BEFORE, QUESTION_AFTER], tokenizer, vocab_size, plain
        )
        kwargs = truncating(llm, limit, plain, len(before) + len(after))
        questions = [_question(instruction, query, document) for query, document in pairs]
        encoded = encode_prompts(questions, tokenizer, vocab_size, kwargs)
        prompts = [[*before, *ids, *after] for _, ids in encoded]
    rows: dict[int, np.ndarray] = {}
    for held in call_ranks(llm, _lm_head_rows, args=([yes_id, no_id],)):
        rows |= held
    # softmax over two logits is the logistic function of their difference
    pooler = partial(_probability, weights=rows[yes_id] - rows[no_id])
    pooling = Pooling("LAST", pooler)
    return _outputs(pool(llm, prompts, [pooling] * len(prompts), use_tqdm))


def _question(instruction: str, query: str, document: str) -> str:
    """What is asked of a pair; one that is the whole question already keeps its own words."""
    if query.startswith(QUESTION_BEFORE) and document.endswith(QUESTION_AFTER):
        return query.removeprefix(QUESTION_BEFORE) + document.removesuffix(QUESTION_AFTER)
    return QUESTION.format(instruction=instruction, query=query, document=document)


def _probability(hidden_state: np.ndarray, weights: np.ndarray) -> float:
    """1 / (1 + exp(-x)) of the product x; both arguments are [hidden_size] float32."""
    return float(np.exp(-np.logaddexp(0.0, -float(hidden_state @ weights))))


def _lm_head_rows(runner: ModelRunner, token_ids: list[int]) -> dict[int, np.ndarray]:
    """[hidden_size] float32 of those of `token_ids` whose logits this rank computes."""
    lm_head = runner.model.lm_head
    local = {token_id: token_id - lm_head.first_token_id for token_id in token_ids}
    return {
        token_id: lm_head.weight[row].detach().float().cpu().numpy()
        for token_id, row in local.items()
        if 0 <= row < len(lm_head.weight)
    }


def _check_question_tokens(tokenizer: Any) -> tuple[int, int]:
    """The ids of "yes" and "no"; ArgumentError if a token of the question is none."""
    if tokenizer is None:
        raise ArgumentError("score needs the tokenizer that skip_tokenizer_init=True left out")
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    if missing := [token for token in QUESTION_TOKENS if token not in vocabulary]:
        raise ArgumentError(
            "method='reranker' needs a model like Qwen3-Reranker: the tokenizer has no token "
            f"{', '.join(map(repr, missing))}"
        )
    return vocabulary[YES], vocabulary[NO]


# ---- by embeddings ----------------------------------------------------------------------------


def _cosines(
    llm: LLMEngine,
    queries: list[str],
    documents: list[str],
    use_tqdm: bool | Callable[..., Any],
    limit: int | None,
) -> list[ScoringRequestOutput]:
    embedded = embed(llm, [*queries, *documents], use_tqdm=use_tqdm, truncate_prompt_tokens=limit)

    def cosine(one: EmbeddingRequestOutput, other: EmbeddingRequestOutput) -> float:
        return float(np.dot(one.outputs.embedding, other.outputs.embedding))

    return _of_pairs(embedded, len(queries), cosine)


def _late_interaction(
    llm: LLMEngine,
    queries: list[str],
    documents: list[str],
    use_tqdm: bool | Callable[..., Any],
    limit: int | None,
) -> list[ScoringRequestOutput]:
    embedded = encode(
        llm,
        [*queries, *documents],
        pooling_task="token_embed",
        use_tqdm=use_tqdm,
        truncate_prompt_tokens=limit,
    )

    def largest_cosines(one: PoolingRequestOutput, other: PoolingRequestOutput) -> float:
        cosines = one.outputs.data @ other.outputs.data.T  # [tokens of the query, of the document]
        return float(cosines.amax(1).sum())

    return _of_pairs(embedded, len(queries), largest_cosines)


def _of_pairs(
    embedded: list[Embedded], num_queries: int, score_of: Callable[[Embedded, Embedded], float]
) -> list[ScoringRequestOutput]:
    """The outputs of pairs of the first `num_queries` texts, or the one, with the others."""
    ours, theirs = embedded[:num_queries], embedded[num_queries:]
    return [
        ScoringRequestOutput(
            f"{one.request_id}_{other.request_id}",
            ScoringOutput(score_of(one, other)),
            one.prompt_token_ids + other.prompt_token_ids,
            num_cached_tokens=(one.num_cached_tokens or 0) + (other.num_cached_tokens or 0),
        )
        for one, other in zip(ours * (len(theirs) // len(ours)), theirs, strict=True)
    ]


def _as_texts(name: str, data: Any) -> list[str]:
    texts = [data] if isinstance(data, str) else data
    if not isinstance(texts, (list, tuple)) or not texts:
        raise ArgumentError(f"{name} must be a string or a list of strings, got {shown(data)}")

    def check(text: Any) -> str:
        if not isinstance(text, str):
            raise ArgumentError(f"a text must be a string, got {shown(text)}")
        return text

    return check_each(name, check, texts)
