"""LoRA adapters as PEFT saves them, made without PEFT, and models that they are merged into."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import greedy_tokens
from transformers import AutoModelForCausalLM

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "gate_up_proj")
VOCABULARY = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Adapter:
    """A folder, and what it adds to the weights of the model's modules."""

    path: Path
    changes: dict[str, torch.Tensor]


def weight_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's matrices, by the names of their modules."""
    shapes = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                shapes[name.removesuffix(".weight")] = tuple(file.get_slice(name).get_shape())
    return {name: shape for name, shape in shapes.items() if len(shape) == 2}


def save_adapter(
    path: Path,
    model_dir: Path,
    seed: int = 0,
    rank: int = 8,
    alpha: float = 12,
    targets: tuple[str, ...] = LINEAR,
    ranks: dict[str, int] | None = None,
    alphas: dict[str, float] | None = None,
    size: float = 0.5,
    **config: Any,
) -> Adapter:
    """A random adapter of a model.

    Args:
        path: of its folder.
        model_dir: of the model.
        targets: last parts of the modules' names.
        ranks: PEFT's `rank_pattern`, whose keys are last parts of names here.
        alphas: `alpha_pattern`, likewise.
        size: about what is added to a weight, as a share of the weight's deviation of 0.2.
        config: further fields of adapter_config.json.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = weight_shapes(model_dir)
    if "lm_head" in targets:
        shapes.setdefault("lm_head", shapes["model.embed_tokens"])
    tensors, changes = {}, {}
    for name, (num_rows, num_columns) in shapes.items():
        last = name.rpartition(".")[2]
        if last not in targets:
            continue
        r, own_alpha = (ranks or {}).get(last, rank), (alphas or {}).get(last, alpha)
        scale = own_alpha / (r**0.5 if config.get("use_rslora") else r)
        a = torch.randn(r, num_columns, generator=generator)
        b = torch.randn(num_rows, r, generator=generator) * (0.2 * size / scale / r**0.5)
        key = f"base_model.model.{name}"
        if last == "embed_tokens":  # the table is transposed
            tensors[f"{key}.lora_embedding_A"] = b.T.contiguous()
            tensors[f"{key}.lora_embedding_B"] = a.T.contiguous()
        else:
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
        changes[name] = scale * (b @ a)
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "bias": "none",
        "rank_pattern": ranks or {},
        "alpha_pattern": alphas or {},
    }
    (path / "adapter_config.json").write_text(json.dumps(fields | config))
    return Adapter(path, changes)


def merged(model_dir: Path, adapter: Adapter | None) -> transformers.PreTrainedModel:
    """transformers' model in float32 with an adapter's changes added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter is not None:
        if any(name in adapter.changes for name in ("lm_head", "model.embed_tokens")):
            # PEFT changes one of two tied weights alone.
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        for name, change in adapter.changes.items():
            model.get_submodule(name).weight.data += change
    return model


def reference(
    model_dir: Path,
    adapters: list[Adapter | None],
    prompts: list[list[int]],
    max_tokens: int,
    guesses: list[list[int]] | None = None,
) -> list[list[int]]:
    """Greedy completions by transformers, each of the model with its prompt's adapter.

    guesses: of each prompt's completion, see `greedy_tokens`.
    """
    models: dict[int, transformers.PreTrainedModel] = {}
    completions = []
    for i, (adapter, prompt) in enumerate(zip(adapters, prompts, strict=True)):
        if id(adapter) not in models:
            models[id(adapter)] = merged(model_dir, adapter)
        guess = guesses and [guesses[i]]
        completions += greedy_tokens(models[id(adapter)], [prompt], max_tokens, guess)
    return completions
