"""Embeddings and scores: what the last token's final hidden state says, with nothing generated.

The question for rerankers is that of Qwen3-Reranker's model card (Zhang et al. 2025, arXiv
2506.05176).
"""

import os
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.request import Request
from nanovllm.engine.request_output import raise_failed
from nanovllm.errors import ArgumentError, shown
from nanovllm.features.rpc import call_ranks
from nanovllm.inputs.prompts import (
    as_prompt_list,
    check_each,
    check_tokenization_kwargs,
    check_unsupported,
    encode_prompts,
)
from nanovllm.model_files import is_file, read_json, read_json_object
from nanovllm.outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from nanovllm.pooling_params import PoolingParams
from nanovllm.progress import check_use_tqdm
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import check_choice, check_integer

# Of sentence-transformers: its modules of which the last token's embedding is made, and the modes.
MODULES = ("Transformer", "Pooling", "Normalize")
MODE, LAST_TOKEN = "pooling_mode_", "lasttoken"
SMALLEST_NORM = 1e-12  # a vector of zeros stays one
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


# ---- embeddings -------------------------------------------------------------------------------


def embed(
    llm: LLMEngine,
    prompts: str | list[str] | list[int] | list[list[int]] | list[Any],
    *,
    use_tqdm: bool | Callable[..., Any] = True,
    pooling_params: PoolingParams | None = None,
    truncate_prompt_tokens: int | None = None,
    tokenization_kwargs: dict[str, Any] | None = None,
    priority: list[int] | None = None,
    lora_request: None = None,
) -> list[EmbeddingRequestOutput]:
    """Embed prompts: the final hidden state of each one's last token, scaled to length 1.

    That is how Qwen3-Embedding works; the token that its prompts end with is added by the
    tokenizer that it comes with. Nothing is generated. Requests queued otherwise run along.

    Args:
        prompts, priority, use_tqdm, tokenization_kwargs: as for `generate`; a prompt may have
            `max_model_len` tokens.
        pooling_params: fewer dimensions, or embeddings as they come.
        truncate_prompt_tokens: cut texts to so many tokens, as the tokenizer does it (the
            tokens that it adds stay); -1: to `max_model_len`.
        lora_request: only None.

    Returns:
        For each prompt an output whose `outputs.embedding` is a list of floats.

    Raises:
        ArgumentError: a prompt or parameter is wrong, or the model's files for
            sentence-transformers ask for another pooling or a further module; nothing was
            queued then.
        EngineDeadError: a tensor-parallel worker died.
    """
    check_unsupported(lora_request=lora_request)
    _check_pooling_mode(os.path.join(_pooling_folder(llm.config.model), "config.json"))
    pooler = _embedding_pooler(pooling_params, llm.config.model_config.hidden_size)
    kwargs = _truncating(llm, truncate_prompt_tokens, tokenization_kwargs)
    requests = _pool(llm, as_prompt_list(prompts), pooler, use_tqdm, kwargs, priority)
    outputs = []
    for request in requests:
        [seq] = request.sequences
        outputs.append(
            EmbeddingRequestOutput(
                str(request.request_id),
                EmbeddingOutput(seq.features.pooled.tolist()),
                seq.prompt_token_ids,
                num_cached_tokens=seq.num_cached_tokens,
            )
        )
    return outputs


def _pool(
    llm: LLMEngine,
    prompts: list[Any],
    pooler: Callable[[np.ndarray], Any],
    use_tqdm: bool | Callable[..., Any],
    tokenization_kwargs: dict[str, Any] | None = None,
    priority: list[int] | None = None,
) -> list[Request]:
    """The finished requests; their sequences' `pooled` is what `pooler` made of [hidden_size]."""
    check_use_tqdm(use_tqdm)
    llm.check_awake()
    nothing = SamplingParams(temperature=0, max_tokens=1)  # is sampled
    requests = llm.input_processor.process(prompts, nothing, priority, tokenization_kwargs, pooler)
    llm.run(requests, use_tqdm)
    raise_failed(requests)
    return requests


def _pooling_folder(model_dir: str) -> str:
    """Where sentence-transformers keeps how to pool; ArgumentError for modules that we lack."""
    path = os.path.join(model_dir, "modules.json")
    folder = "1_Pooling"
    if is_file(path):
        modules = read_json(path)
        if modules == {}:
            modules = []  # it names none
        if not isinstance(modules, list):
            raise ArgumentError(f"cannot read {path}: it must hold a list, got {shown(modules)}")
        for module in modules:
            kind, module_path = _module(module, path)
            if kind not in MODULES:
                raise ArgumentError(
                    f"{path}: module {shown(kind)} is not supported; supported: "
                    f"{', '.join(MODULES)}"
                )
            if kind == "Pooling":
                folder = module_path
    return os.path.join(model_dir, folder)


def _module(module: Any, path: str) -> tuple[str, str]:
    """The class and the folder of an entry of modules.json."""
    fields = module if isinstance(module, dict) else {}
    kind, folder = fields.get("type"), fields.get("path")
    if not isinstance(kind, str) or not isinstance(folder, str):
        raise ArgumentError(
            f"cannot read {path}: a module needs a type and a path, got {shown(module)}"
        )
    if os.path.isabs(folder) or ".." in folder.split("/") or "\0" in folder:
        raise ArgumentError(
            f"{path}: a module's path must be in the model's directory: {shown(folder)}"
        )
    return kind.rpartition(".")[2], folder


def _check_pooling_mode(path: str) -> None:
    """ArgumentError if the file, that of sentence-transformers, does not ask for the last token.

    Older versions have a field for each mode; newer ones `pooling_mode`, whose default is "mean".
    """
    if not is_file(path):
        return
    fields = read_json_object(path)
    mode = fields.get("pooling_mode", [])
    modes = list(mode) if isinstance(mode, list) else [mode]
    modes += [n.removeprefix(MODE) for n, v in fields.items() if n.startswith(MODE) and v is True]
    if {str(mode) for mode in modes} != {LAST_TOKEN}:
        raise ArgumentError(
            f"{path}: pooling {shown(modes) if modes else 'mean'} is not supported; supported: "
            "last token"
        )


def _embedding_pooler(params: Any, hidden_size: int) -> Callable[[np.ndarray], np.ndarray]:
    if params is None:
        params = PoolingParams()
    if not isinstance(params, PoolingParams):
        raise ArgumentError(f"pooling_params must be a PoolingParams, got {shown(params)}")
    if params.dimensions is not None:
        check_integer("dimensions", params.dimensions, 1, hidden_size)
    normalize = params.use_activation is not False
    return partial(_embedding, dimensions=params.dimensions, normalize=normalize)


def _embedding(hidden_state: np.ndarray, dimensions: int | None, normalize: bool) -> np.ndarray:
    """A new array of the first `dimensions` numbers."""
    kept = hidden_state[:dimensions]
    return kept / max(np.linalg.norm(kept), SMALLEST_NORM) if normalize else kept.copy()


def _truncating(
    llm: LLMEngine, limit: int | None, kwargs: Any, num_others: int = 0
) -> dict[str, Any]:
    """Checked keywords for the tokenizer, which with `num_others` more tokens gives `limit`."""
    kwargs = check_tokenization_kwargs(kwargs)
    if limit is None:
        return kwargs
    longest = llm.config.max_model_len
    if longest <= num_others:
        raise ArgumentError(
            f"max_model_len ({longest}) leaves no room for a text beside the {num_others} tokens "
            "of the question"
        )
    if isinstance(limit, Integral) and limit == -1:
        limit = longest
    limit = check_integer("truncate_prompt_tokens", limit, 1 + num_others, longest)
    return kwargs | {"truncation": True, "max_length": limit - num_others}


# ---- scores -----------------------------------------------------------------------------------


def score(
    llm: LLMEngine,
    data_1: str | list[str],
    data_2: str | list[str],
    /,
    *,
    method: str = "reranker",
    instruction: str | None = None,
    use_tqdm: bool | Callable[..., Any] = True,
    truncate_prompt_tokens: int | None = None,
    lora_request: None = None,
) -> list[ScoringRequestOutput]:
    """Score pairs of texts: one with one, one with each of several, or each with its own.

    Args:
        data_1: queries.
        data_2: documents, as many; any number for a single query.
        method: "reranker" asks the model as Qwen3-Reranker was trained to be asked, whether the
            document meets the query; the score is the probability of "yes" against "no".
            "embedding": the cosine of the two texts' embeddings, as of Qwen3-Embedding.
        instruction: what the reranker looks for; None: passages that answer a web search.
        use_tqdm: as for `generate`.
        truncate_prompt_tokens: cut texts so that a prompt has so many tokens at most; the
            reranker loses the end of the document. -1: `max_model_len`.
        lora_request: only None.

    Returns:
        For each pair an output whose `outputs.score` is a float.

    Raises:
        ArgumentError: an argument is wrong, the model has no LM head, or its tokenizer lacks
            one of the tokens that the reranker's question or answer is made of.
        EngineDeadError: a tensor-parallel worker died.
    """
    check_unsupported(lora_request=lora_request)
    check_choice("method", method, ("reranker", "embedding"))
    queries, documents = _as_texts("data_1", data_1), _as_texts("data_2", data_2)
    if len(queries) not in (1, len(documents)):
        raise ArgumentError(
            f"data_1 and data_2 must be one with one, one with several or as many with as many, "
            f"got {len(queries)} and {len(documents)}"
        )
    if method == "embedding":
        if instruction is not None:
            raise ArgumentError(
                "instruction is for method='reranker'; write it into the queries of an embedding "
                f"model, got {shown(instruction)}"
            )
        return _cosines(llm, queries, documents, use_tqdm, truncate_prompt_tokens)
    if not isinstance(instruction, (str, type(None))):
        raise ArgumentError(f"instruction must be a string, got {shown(instruction)}")
    pairs = list(zip(queries * (len(documents) // len(queries)), documents, strict=True))
    return _rerank(llm, pairs, instruction or WEB_SEARCH, use_tqdm, truncate_prompt_tokens)


def _rerank(
    llm: LLMEngine,
    pairs: list[tuple[str, str]],
    instruction: str,
    use_tqdm: bool | Callable[..., Any],
    limit: int | None,
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
    tokenizer, vocab_size = llm.tokenizer, llm.config.model_config.vocab_size
    yes_id, no_id = _check_question_tokens(tokenizer)
    plain = {"add_special_tokens": False}
    (_, before), (_, after) = encode_prompts(
        [QUESTION_BEFORE, QUESTION_AFTER], tokenizer, vocab_size, plain
    )
    kwargs = _truncating(llm, limit, plain, len(before) + len(after))
    questions = [
        QUESTION.format(instruction=instruction, query=query, document=document)
        for query, document in pairs
    ]
    encoded = encode_prompts(questions, tokenizer, vocab_size, kwargs)
    rows: dict[int, np.ndarray] = {}
    for held in call_ranks(llm, _lm_head_rows, args=([yes_id, no_id],)):
        rows |= held
    # softmax over two logits is the logistic function of their difference
    pooler = partial(_probability, weights=rows[yes_id] - rows[no_id])
    requests = _pool(llm, [[*before, *ids, *after] for _, ids in encoded], pooler, use_tqdm)
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


def _cosines(
    llm: LLMEngine,
    queries: list[str],
    documents: list[str],
    use_tqdm: bool | Callable[..., Any],
    limit: int | None,
) -> list[ScoringRequestOutput]:
    embedded = embed(llm, [*queries, *documents], use_tqdm=use_tqdm, truncate_prompt_tokens=limit)
    ours, theirs = embedded[: len(queries)], embedded[len(queries) :]
    return [
        ScoringRequestOutput(
            f"{one.request_id}_{other.request_id}",
            ScoringOutput(float(np.dot(one.outputs.embedding, other.outputs.embedding))),
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
