"""How a model is to be pooled: by `pooler_config`, and by its files for sentence-transformers."""

import os
from typing import Any, NamedTuple

from nanovllm.errors import ArgumentError, shown
from nanovllm.model_files import is_file, read_json, read_json_object
from nanovllm.models.head_config import PROCESS_REWARD, SEQUENCE
from nanovllm.models.model_config import ModelConfig
from nanovllm.pooling_params import PoolerConfig
from nanovllm.validation import check_integer

# The modules that are computed here; any other would change an embedding.
MODULES = ("Transformer", "Pooling", "Normalize")
MODE = "pooling_mode_"  # an older file has a field for each mode, a newer one all in one
MODES = {"lasttoken": "LAST", "cls": "CLS", "mean": "MEAN"}
OLDER_MODES = {"lasttoken": "LAST", "cls_token": "CLS", "mean_tokens": "MEAN"}


class PoolingFiles(NamedTuple):
    """What a model's files for sentence-transformers say; None where they say nothing."""

    pooling_type: str | None = None
    normalize: bool | None = None
    max_seq_length: int | None = None  # tokens of a text that the model was trained with


def check_pooler_config(config: PoolerConfig, model_config: ModelConfig) -> None:
    """ArgumentError for an entry that a model does not have anything for."""
    name, head = model_config.architectures[0], model_config.head
    given = vars(config) | {"seq_pooling_type": config.sequence_type}
    tasks = ("embed", "token_embed") if head is None else head.tasks
    if config.task is not None and config.task not in tasks:
        raise ArgumentError(
            f"pooler_config: task={config.task!r}, but {name} answers "
            f"{' and '.join(map(repr, tasks))}"
        )
    if head is None:
        useless = ["activation", "softmax", "logit_mean", "logit_sigma"]
        why = f"{name} has no classification head"
    else:
        useless = ["normalize", "dimensions"]
        why = f"{name} has a classification head, and makes no embeddings"
    for entry in useless:
        if given[entry] is not None:
            raise ArgumentError(f"pooler_config: {entry}={given[entry]!r}, but {why}")
    if head is not None and head.kind != SEQUENCE and config.sequence_type is not None:
        raise ArgumentError(
            f"pooler_config: {config.sequence_type} makes one result of a prompt, but {name} has "
            "one for each token"
        )
    if token_type(config, model_config) != "STEP":
        for entry in ("step_tag_id", "returned_token_ids"):
            if given[entry] is not None:
                raise ArgumentError(f"pooler_config: {entry} is for tok_pooling_type='STEP'")
    if config.dimensions is not None:
        check_integer("pooler_config: dimensions", config.dimensions, 1, model_config.hidden_size)


def token_type(config: PoolerConfig, model_config: ModelConfig) -> str:
    """Which tokens have results of their own: "ALL" or "STEP"."""
    head = model_config.head
    is_process = head is not None and head.kind == PROCESS_REWARD
    return config.token_type or ("STEP" if is_process else "ALL")


def read_pooling_files(model_dir: str) -> PoolingFiles:
    """What the files of a model directory say about its embeddings.

    Raises:
        ArgumentError: they ask for a module or a pooling that is not computed here, for texts in
            small letters, or are damaged.
    """
    folder, normalize, is_listed = _read_modules(os.path.join(model_dir, "modules.json"))
    pooling_type = _read_pooling(os.path.join(model_dir, folder, "config.json"))
    max_seq_length = None
    path = os.path.join(model_dir, "sentence_bert_config.json")
    if is_listed and is_file(path):
        fields = read_json_object(path)
        if fields.get("do_lower_case"):
            raise ArgumentError(f"{path}: do_lower_case is not supported")
        if fields.get("max_seq_length") is not None:
            max_seq_length = fields["max_seq_length"]
            check_integer(f"{path}: max_seq_length", max_seq_length, 1)
    return PoolingFiles(pooling_type, normalize if is_listed else None, max_seq_length)


def _read_modules(path: str) -> tuple[str, bool, bool]:
    """The folder of the pooling, whether embeddings are normalised, whether the file says so."""
    folder, normalize = "1_Pooling", False
    modules = read_json(path) if is_file(path) else []
    if modules == {}:
        modules = []  # it names none
    if not isinstance(modules, list):
        raise ArgumentError(f"cannot read {path}: it must hold a list, got {shown(modules)}")
    for module in modules:
        kind, module_path = _module(module, path)
        if kind not in MODULES:
            raise ArgumentError(
                f"{path}: module {shown(kind)} is not supported; supported: {', '.join(MODULES)}"
            )
        if kind == "Pooling":
            folder = module_path
        normalize = normalize or kind == "Normalize"
    return folder, normalize, bool(modules)


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


def _read_pooling(path: str) -> str | None:
    """The pooling type of a folder's config.json; "mean" is what one that says nothing means."""
    if not is_file(path):
        return None
    fields = read_json_object(path)
    mode = fields.get("pooling_mode", [])
    modes = [MODES.get(str(m), str(m)) for m in (mode if isinstance(mode, list) else [mode])]
    for name, value in fields.items():
        if name.startswith(MODE) and value is True:
            older = name.removeprefix(MODE)
            modes.append(OLDER_MODES.get(older, older))
    found = set(modes) or {"MEAN"}
    if len(found) > 1 or not found <= set(MODES.values()):
        raise ArgumentError(
            f"{path}: pooling {shown(sorted(found))} is not supported; supported: one of "
            f"{', '.join(MODES)}"
        )
    return found.pop()


def lists_pooling(model_dir: str) -> bool:
    """Whether a model directory says that it is one of sentence-transformers for embeddings."""
    path = os.path.join(model_dir, "modules.json")
    modules = read_json(path) if is_file(path) else []
    kinds = [m.get("type") for m in modules if isinstance(m, dict)] if modules else []
    return any(isinstance(kind, str) and kind.endswith(".Pooling") for kind in kinds)
