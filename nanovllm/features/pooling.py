"""Pooling: what a prompt's hidden states say, with nothing generated.

Without a head they are embeddings; a classification head makes labels or rewards of them. The tasks
have vLLM's names. `features.scoring` has scores of pairs.
"""

from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.request import Request
from nanovllm.engine.request_output import raise_failed
from nanovllm.errors import ArgumentError, shown
from nanovllm.guards.garbage import rare_collections
from nanovllm.inputs.prompts import (
    as_lora_list,
    as_priority_list,
    as_prompt_list,
    check_each,
    check_tokenization_kwargs,
    encode_prompts,
)
from nanovllm.lora_request import LoRARequests
from nanovllm.models.head_config import IDENTITY, SIGMOID, SOFTMAX
from nanovllm.models.pooling_config import PoolingFiles, read_pooling_files, token_type
from nanovllm.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
)
from nanovllm.pooling_params import TASKS, PoolingParams
from nanovllm.progress import check_use_tqdm
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import check_choice, check_integer

SMALLEST_NORM = 1e-12  # a vector of zeros stays one
EMBEDDING_TASKS = ("embed", "token_embed")
TOKEN_TASKS = ("token_embed", "token_classify")
Output = TypeVar("Output")
Prompts = str | list[str] | list[int] | list[list[int]] | list[Any]
Params = PoolingParams | list[PoolingParams] | None


class Pooling(NamedTuple):
    """How a prompt of a call is pooled."""

    pooling_type: str  # of `FeatureState`, or "STEP"
    pooler: Callable[[np.ndarray], Any]  # of `FeatureState`
    skip_reading_prefix_cache: bool | None = None
    step_tag_id: int | None = None


# ---- the calls --------------------------------------------------------------------------------


def embed(
    llm: LLMEngine,
    prompts: Prompts,
    *,
    use_tqdm: bool | Callable[..., Any] = True,
    pooling_params: Params = None,
    truncate_prompt_tokens: int | None = None,
    tokenization_kwargs: dict[str, Any] | None = None,
    priority: list[int] | None = None,
    lora_request: LoRARequests = None,
) -> list[EmbeddingRequestOutput]:
    """Embed prompts: a hidden state of the last layer for each, scaled to length 1.

    Which one is said by `pooler_config`, else by the model's files for sentence-transformers. The
    default is that of the last token, which is how Qwen3-Embedding works; the token that its
    prompts end with is added by the tokenizer that it comes with. Nothing is generated. Requests
    queued otherwise run along.

    Args:
        prompts, priority, use_tqdm, tokenization_kwargs: as for `generate`; a prompt may have
            `max_model_len` tokens, or the `max_seq_length` of sentence_bert_config.json.
        pooling_params: fewer dimensions, or embeddings as they come; one for all prompts or one
            for each.
        truncate_prompt_tokens: cut texts to so many tokens, as the tokenizer does it (the
            tokens that it adds stay); -1: to the longest prompt.
        lora_request: as for `generate`.

    Returns:
        For each prompt an output whose `outputs.embedding` is a list of floats.

    Raises:
        ArgumentError: a prompt or parameter is wrong, the model has a classification head, or its
            files for sentence-transformers ask for another pooling or a further module; nothing
            was queued then.
        EngineDeadError: a tensor-parallel worker died.
    """
    truncation = truncate_prompt_tokens, tokenization_kwargs
    requests = run_task(
        llm, "embed", prompts, pooling_params, truncation, use_tqdm, priority, lora_request
    )
    return [
        _output(EmbeddingRequestOutput, request, EmbeddingOutput(_pooled(request).tolist()))
        for request in requests
    ]


def classify(
    llm: LLMEngine,
    prompts: Prompts,
    *,
    use_tqdm: bool | Callable[..., Any] = True,
    pooling_params: Params = None,
    truncate_prompt_tokens: int | None = None,
    tokenization_kwargs: dict[str, Any] | None = None,
    priority: list[int] | None = None,
    lora_request: LoRARequests = None,
) -> list[ClassificationRequestOutput]:
    """Classify prompts with the head of a model for sequence classification.

    The head reads the last token's hidden state (`pooler_config`: another). Softmax makes
    probabilities of its logits, sigmoid where there is one label or each is a question of its own
    (`problem_type` of config.json). `use_activation=False` leaves logits: the reward of a reward
    model.

    Args:
        prompts, use_tqdm, pooling_params, truncate_prompt_tokens, tokenization_kwargs, priority,
            lora_request: as of `embed`.

    Returns:
        For each prompt an output whose `outputs.probs` is a list of floats, one for each label.

    Raises:
        ArgumentError: a prompt or parameter is wrong, or the model has no such head; nothing was
            queued then.
        EngineDeadError: a tensor-parallel worker died.
    """
    truncation = truncate_prompt_tokens, tokenization_kwargs
    requests = run_task(
        llm, "classify", prompts, pooling_params, truncation, use_tqdm, priority, lora_request
    )
    return [
        _output(
            ClassificationRequestOutput, request, ClassificationOutput(_pooled(request).tolist())
        )
        for request in requests
    ]


def encode(
    llm: LLMEngine,
    prompts: Prompts,
    pooling_params: Params = None,
    *,
    use_tqdm: bool | Callable[..., Any] = True,
    pooling_task: str | None = None,
    truncate_prompt_tokens: int | None = None,
    tokenization_kwargs: dict[str, Any] | None = None,
    priority: list[int] | None = None,
    lora_request: LoRARequests = None,
) -> list[PoolingRequestOutput]:
    """Pool prompts by any task, and get tensors.

    Args:
        prompts, use_tqdm, pooling_params, truncate_prompt_tokens, tokenization_kwargs, priority,
            lora_request: as of `embed`.
        pooling_task: "embed" and "classify" give one row for a prompt, as the methods of these
            names do. "token_embed" gives a row for each token, its hidden state scaled to length
            1; "token_classify" gives the head's results for each token. With pooling type "STEP"
            these are the rows of the tokens `step_tag_id` alone. None: the task of
            `pooling_params`, else of `pooler_config`.

    Returns:
        For each prompt an output whose `outputs.data` is a float32 tensor on the CPU, of [width] or
        [tokens, width].

    Raises:
        ArgumentError: a prompt or parameter is wrong, no task is named, or the model does not
            answer it; nothing was queued then.
        EngineDeadError: a tensor-parallel worker died.

    Tasks with a row for each token, and pooling types other than "LAST", need all hidden states of
    a prompt. So such a prompt is computed whole, without the prefix cache.
    """
    task = pooling_task
    if task is None:
        named = pooling_params if isinstance(pooling_params, list) else [pooling_params]
        tasks = {getattr(params, "task", None) or llm.config.pooling.task for params in named}
        if len(tasks) != 1 or None in tasks:
            raise ArgumentError(
                f"encode needs pooling_task: {llm.config.model!r} answers "
                f"{' and '.join(map(repr, tasks_of(llm)))}"
            )
        [task] = tasks
    assert task is not None
    truncation = truncate_prompt_tokens, tokenization_kwargs
    requests = run_task(
        llm, task, prompts, pooling_params, truncation, use_tqdm, priority, lora_request
    )
    return [
        _output(PoolingRequestOutput, request, PoolingOutput(torch.from_numpy(_pooled(request))))
        for request in requests
    ]


def reward(
    llm: LLMEngine,
    prompts: Prompts,
    *,
    use_tqdm: bool | Callable[..., Any] = True,
    pooling_params: Params = None,
    truncate_prompt_tokens: int | None = None,
    tokenization_kwargs: dict[str, Any] | None = None,
    priority: list[int] | None = None,
    lora_request: LoRARequests = None,
) -> list[PoolingRequestOutput]:
    """Rewards of each prompt's tokens, or steps: `encode` with `pooling_task="token_classify"`.

    A reward model for whole prompts (sequence classification) gives its reward with `classify`,
    which is this one's last row.
    """
    return encode(
        llm,
        prompts,
        pooling_params,
        use_tqdm=use_tqdm,
        pooling_task="token_classify",
        truncate_prompt_tokens=truncate_prompt_tokens,
        tokenization_kwargs=tokenization_kwargs,
        priority=priority,
        lora_request=lora_request,
    )


# ---- what they share --------------------------------------------------------------------------


def tasks_of(llm: LLMEngine) -> tuple[str, ...]:
    """What the engine answers, of TASKS: what the model can, or the one task it was made for."""
    if (task := llm.config.pooling.task) is not None:
        return (task,)
    head = llm.config.model_config.head
    return EMBEDDING_TASKS if head is None else head.tasks


def check_task(llm: LLMEngine, task: str) -> None:
    """ArgumentError if the engine does not answer a task."""
    check_choice("pooling_task", task, TASKS)
    only, tasks = llm.config.pooling.task, tasks_of(llm)
    if only is not None and task != only:
        raise ArgumentError(
            f"{task!r} is not answered with pooler_config=PoolerConfig(task={only!r}): try "
            f"PoolerConfig(task={task!r}), or None for all tasks of the model"
        )
    if task not in tasks:
        raise ArgumentError(
            f"{llm.config.model!r} does not answer {task!r}: a model of "
            f"{llm.config.model_config.architectures[0]} answers {' and '.join(map(repr, tasks))}"
        )


def run_task(
    llm: LLMEngine,
    task: str,
    prompts: Prompts,
    pooling_params: Params,
    truncation: tuple[int | None, dict[str, Any] | None],
    use_tqdm: bool | Callable[..., Any],
    priority: list[int] | None,
    lora_request: LoRARequests,
) -> list[Request]:
    """The finished requests of a call; arguments and errors are those of `encode`.

    truncation: `truncate_prompt_tokens` and `tokenization_kwargs`.
    """
    check_task(llm, task)
    makes_embeddings = task in EMBEDDING_TASKS
    files = read_pooling_files(llm.config.model) if makes_embeddings else PoolingFiles()
    prompt_list = as_prompt_list(prompts)
    poolings = check_each_params(
        pooling_params, len(prompt_list), lambda params: new_pooling(llm, task, params, files)
    )
    kwargs = truncating(llm, *truncation, longest=files.max_seq_length)
    longest = files.max_seq_length
    return pool(llm, prompt_list, poolings, use_tqdm, kwargs, priority, longest, lora_request)


def check_each_params(
    params: Any, num_prompts: int, check: Callable[[PoolingParams], Output]
) -> list[Output]:
    """`check` of the parameters of each prompt; one, or None for the defaults, serves all."""
    if params is None:
        params = PoolingParams()
    if isinstance(params, PoolingParams):
        return [check(params)] * num_prompts
    if not isinstance(params, (list, tuple)):
        raise ArgumentError(
            f"pooling_params must be a PoolingParams or a list of them, got {shown(params)}"
        )
    if len(params) != num_prompts:
        raise ArgumentError(
            f"The lengths of prompts ({num_prompts}) and pooling_params ({len(params)}) must be "
            "the same."
        )
    checked: dict[int, Output] = {}  # usually one object serves many prompts

    def check_once(item: Any) -> Output:
        if not isinstance(item, PoolingParams):
            raise ArgumentError(f"pooling_params must be a PoolingParams, got {shown(item)}")
        if id(item) not in checked:
            checked[id(item)] = check(item)
        return checked[id(item)]

    return check_each("pooling_params", check_once, params)


def new_pooling(llm: LLMEngine, task: str, params: PoolingParams, files: PoolingFiles) -> Pooling:
    """How a task pools a prompt with these parameters; ArgumentError if they do not go with it."""
    config, model_config = llm.config.pooling, llm.config.model_config
    is_embedding = task in EMBEDDING_TASKS
    if params.task not in (None, task):
        raise ArgumentError(f"pooling_params: task is {params.task!r}, but {task!r} is asked for")
    if params.dimensions is not None and not is_embedding:
        raise ArgumentError(f"dimensions are of embeddings, got {params.dimensions} for {task!r}")
    if task in TOKEN_TASKS:
        pooling_type = token_type(config, model_config)
    else:
        pooling_type = config.sequence_type or files.pooling_type or "LAST"
    is_step = pooling_type == "STEP"
    for name in ("step_tag_id", "returned_token_ids"):
        if (value := getattr(params, name)) is not None and not is_step:
            raise ArgumentError(
                f"{name} is for pooling type 'STEP' of a task for tokens, got {shown(value)} for "
                f"{task!r} with {pooling_type!r}"
            )
    step_tag_id = config.step_tag_id if params.step_tag_id is None else params.step_tag_id
    columns = params.returned_token_ids or config.returned_token_ids
    activates = params.use_activation
    if activates is None:
        activates = config.is_activated
    pooler: Callable[[np.ndarray], Any]
    if is_embedding:
        dimensions = config.dimensions if params.dimensions is None else params.dimensions
        size = model_config.hidden_size
        if dimensions is not None:
            check_integer("dimensions", dimensions, 1, size)
        if activates is None:
            activates = files.normalize
        pooler = partial(embedding, dimensions=dimensions, normalize=activates is not False)
    else:
        assert model_config.head is not None
        size = len(model_config.head.labels)
        pooler = partial(
            classification,
            mean=config.logit_mean or 0.0,
            sigma=1.0 if config.logit_sigma is None else config.logit_sigma,
            activation=IDENTITY if activates is False else model_config.head.activation,
        )
    if not is_step:
        return Pooling(pooling_type, pooler, params.skip_reading_prefix_cache)
    if columns is not None:
        check_integer("returned_token_ids", max(columns), 0, size - 1)
        pooler = partial(_of_columns, columns=columns, pooler=pooler)
    if step_tag_id is not None:
        check_integer("step_tag_id", step_tag_id, 0, model_config.vocab_size - 1)
    return Pooling(pooling_type, pooler, params.skip_reading_prefix_cache, step_tag_id)


@rare_collections()
def pool(
    llm: LLMEngine,
    prompts: list[Any],
    poolings: list[Pooling],
    use_tqdm: bool | Callable[..., Any],
    tokenization_kwargs: dict[str, Any] | None = None,
    priority: list[int] | None = None,
    longest: int | None = None,
    lora_request: LoRARequests = None,
) -> list[Request]:
    """The finished requests, one for each prompt; their sequences' `pooled` is the result.

    longest: tokens that a prompt may have, if fewer than `max_model_len`.
    """
    check_use_tqdm(use_tqdm)
    llm.check_awake()
    vocab_size = llm.config.model_config.vocab_size
    encoded = encode_prompts(
        prompts, llm.input_processor.tokenizer, vocab_size, tokenization_kwargs
    )
    priorities = as_priority_list(priority, len(prompts))
    adapters = as_lora_list(lora_request, len(prompts))
    for index, (_, token_ids) in enumerate(encoded):
        if longest is not None and len(token_ids) > longest:
            raise ArgumentError(
                f"prompts[{index}] has {len(token_ids)} tokens, the max_seq_length of "
                f"sentence_bert_config.json is {longest}; truncate_prompt_tokens=-1 cuts texts"
            )
    numbers: dict[int, list[int]] = {}  # the prompts of each pooling
    for index, pooling in enumerate(poolings):
        numbers.setdefault(id(pooling), []).append(index)
    found: dict[int, Request] = {}
    for own in numbers.values():
        pooling = poolings[own[0]]
        params = SamplingParams(  # nothing is sampled
            temperature=0,
            max_tokens=1,
            skip_reading_prefix_cache=pooling.skip_reading_prefix_cache,
        )
        requests = llm.input_processor.process(
            [{"prompt": encoded[i].text, "prompt_token_ids": encoded[i].token_ids} for i in own],
            params,
            [priorities[i] for i in own],
            None,
            [adapters[i] for i in own],
            pooler=pooling.pooler,
            pooling_type="ALL" if pooling.pooling_type == "STEP" else pooling.pooling_type,
        )
        found.update(zip(own, requests, strict=True))
    result = [found[index] for index in range(len(prompts))]
    llm.run(result, use_tqdm)
    raise_failed(result)
    for request, pooling in zip(result, poolings, strict=True):
        if pooling.step_tag_id is not None:
            [seq] = request.sequences
            is_step = np.array(seq.prompt_token_ids) == pooling.step_tag_id
            seq.features.pooled = seq.features.pooled[is_step]
    return result


def _pooled(request: Request) -> np.ndarray:
    [seq] = request.sequences
    return seq.features.pooled


def _output(cls: Callable[..., Output], request: Request, outputs: object) -> Output:
    """A request's output of one of the classes in `nanovllm.outputs`."""
    [seq] = request.sequences
    return cls(
        str(request.request_id),
        outputs,
        seq.prompt_token_ids,
        num_cached_tokens=seq.num_cached_tokens,
    )


def truncating(
    llm: LLMEngine,
    limit: int | None,
    kwargs: Any,
    num_others: int = 0,
    longest: int | None = None,
) -> dict[str, Any]:
    """Checked keywords for the tokenizer, which with `num_others` more tokens gives `limit`.

    longest: tokens that a prompt may have, if fewer than `max_model_len`.
    """
    kwargs = check_tokenization_kwargs(kwargs)
    if limit is None:
        return kwargs
    longest = min(longest or llm.config.max_model_len, llm.config.max_model_len)
    if longest <= num_others:
        raise ArgumentError(
            f"max_model_len ({longest}) leaves no room for a text beside the {num_others} tokens "
            "of the question"
        )
    if isinstance(limit, Integral) and limit == -1:
        limit = longest
    limit = check_integer("truncate_prompt_tokens", limit, 1 + num_others, longest)
    return kwargs | {"truncation": True, "max_length": limit - num_others}


# ---- poolers ----------------------------------------------------------------------------------


def embedding(states: np.ndarray, dimensions: int | None, normalize: bool) -> np.ndarray:
    """[..., hidden_size] float32 -> a new array of the first `dimensions` numbers of each row."""
    kept = states[..., :dimensions]
    if not normalize:
        return kept.copy()
    return kept / np.maximum(np.linalg.norm(kept, axis=-1, keepdims=True), SMALLEST_NORM)


def classification(
    logits: np.ndarray, mean: float, sigma: float, activation: str | None
) -> np.ndarray:
    """[..., labels] float32 -> what the activation makes of (logits - mean) / sigma.

    activation: one of `models.head_config`; None: softmax of several labels, sigmoid of one.
    """
    logits = ((logits - mean) / sigma).astype(np.float32)
    if activation is None:
        activation = SOFTMAX if logits.shape[-1] > 1 else SIGMOID
    if activation == IDENTITY:
        return logits
    if activation == SIGMOID:
        return np.exp(-np.logaddexp(np.float32(0), -logits))
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _of_columns(values: np.ndarray, columns: list[int], pooler: Callable[[np.ndarray], Any]) -> Any:
    return pooler(values[..., columns])
