"""A LoRA adapter's folder, as PEFT saves it: what it changes, and what of PEFT is refused."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from nanovllm.errors import ArgumentError, cut, shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
DTYPES = ("F32", "F16", "BF16")
# The ends of the two tensors of a module: of a linear layer and of an embedding.
A, B = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
BASE = ".base_layer.weight"  # what it was trained on: PEFT saves it of embedding and LM head
# Fields of adapter_config.json that change nothing here: the tensors say what is adapted.
READ = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "peft_type")
HARMLESS = frozenset(
    """auto_mapping base_model_name_or_path revision inference_mode task_type peft_version
    lora_dropout target_modules exclude_modules layers_to_transform layers_pattern megatron_config
    megatron_core eva_config loftq_config corda_config lora_ga_config runtime_config
    qalora_group_size""".split()
)
# With other values the adapter belongs to changed base weights.
INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")


class LoRAModule(NamedTuple):
    """One module that an adapter changes."""

    is_embedding: bool
    rank: int
    scale: float  # of B A
    a: str  # the names of its tensors
    b: str


class LoRACheckpoint:
    """The modules of an adapter, by the names that the model's checkpoint has for them.

    Args:
        path: of the folder.

    Attributes:
        modules: what is changed.
        base_weights: tensors with the whole weights that some of these modules had before.

    Raises:
        ArgumentError: the folder is none of an adapter, is damaged, or asks for what is not there.
    """

    def __init__(self, path: str) -> None:
        self.where = f"adapter {path!r}"
        self._file = Path(path, WEIGHTS)
        if not Path(path).is_dir():
            raise ArgumentError(f"{self.where}: there is no such folder")
        for name in (CONFIG, WEIGHTS):
            if not Path(path, name).is_file():
                raise ArgumentError(f"{self.where} has no {name}, which PEFT saves")
        self._config = self._read_config(Path(path, CONFIG))
        self._shapes = self._read_shapes()
        self.modules = self._find_modules()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._shapes[name]

    def read(self) -> dict[str, torch.Tensor]:
        """The tensors of all modules, on the CPU."""
        return self._read(
            [name for module in self.modules.values() for name in (module.a, module.b)]
        )

    def read_base(self, module: str) -> torch.Tensor:
        """The whole weight that one of `base_weights` had before."""
        name = self.base_weights[module]
        return self._read([name])[name]

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        try:
            with safe_open(self._file, framework="pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise ArgumentError(f"{self.where}: {WEIGHTS} cannot be read: {error}") from error

    def _read_config(self, path: Path) -> dict[str, Any]:
        try:
            config = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ArgumentError(f"{self.where}: {CONFIG} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise ArgumentError(f"{self.where}: {CONFIG} must hold an object")
        if config.get("peft_type") != "LORA":
            self._refuse("peft_type", config.get("peft_type"))
        if config.get("bias", "none") != "none":
            self._refuse("bias", config["bias"])
        initialisation = config.get("init_lora_weights", True)
        if initialisation not in INITIALISATIONS:
            self._refuse("init_lora_weights", initialisation)
        for name, value in config.items():
            if name not in HARMLESS and name not in (*READ, "bias", "init_lora_weights") and value:
                self._refuse(name, value)
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(config.get(name) or {}, Mapping):
                self._refuse(name, config[name])
        return config

    def _refuse(self, name: str, value: Any) -> None:
        raise ArgumentError(f"{self.where}: {name} {shown(value)} is not supported")

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        try:
            with safe_open(self._file, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, it is no dict
                    part = file.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise ArgumentError(
                            f"{self.where}: tensor {cut(name)} is of dtype {part.get_dtype()}; "
                            f"it must be one of {', '.join(DTYPES)}"
                        )
                    shapes[name] = tuple(part.get_shape())
        except (SafetensorError, OSError) as error:
            raise ArgumentError(f"{self.where}: {WEIGHTS} cannot be read: {error}") from error
        return shapes

    def _find_modules(self) -> dict[str, LoRAModule]:
        modules = {}
        rest = set(self._shapes)
        for name in self._shapes:
            for end, other in ((A, B), (EMBEDDING_A, EMBEDDING_B)):
                pair = name, name.removesuffix(end) + other
                if name.endswith(end) and pair[1] in rest:
                    module = name.removesuffix(end).removeprefix(PREFIX)
                    modules[module] = self._module(module, end == EMBEDDING_A, *pair)
                    rest.difference_update(pair)
        self.base_weights = {
            name.removesuffix(BASE).removeprefix(PREFIX): name
            for name in rest
            if name.endswith(BASE)
        }
        if others := rest.difference(self.base_weights.values()):
            name = min(others)
            raise ArgumentError(f"{self.where}: tensor {cut(name)}: {_why_not(name)}")
        if not modules:
            raise ArgumentError(f"{self.where}: {WEIGHTS} holds no tensors")
        return modules

    def _module(self, module: str, is_embedding: bool, a: str, b: str) -> LoRAModule:
        shapes = self._shapes[a], self._shapes[b]
        rank = self._number("r", "rank_pattern", module)
        if any(len(shape) != 2 for shape in shapes) or (shapes[0][0], shapes[1][1]) != (rank,) * 2:
            raise ArgumentError(
                f"{self.where}: module {cut(module)} has A {shown(list(shapes[0]))} and B "
                f"{shown(list(shapes[1]))}; its rank is {rank} by {CONFIG}"
            )
        alpha = self._number("lora_alpha", "alpha_pattern", module)
        scale = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        return LoRAModule(is_embedding, int(rank), scale, a, b)

    def _number(self, name: str, pattern_name: str, module: str) -> float:
        """A module's rank or alpha: that of the first pattern that fits its name, else of all."""
        value: Any = self._config.get(name)
        for pattern, of_pattern in (self._config.get(pattern_name) or {}).items():
            try:
                fits = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error as error:
                raise ArgumentError(
                    f"{self.where}: {pattern_name} has {shown(pattern)}: {error}"
                ) from error
            if fits:
                name, value = pattern_name, of_pattern
                break
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or (name != "lora_alpha" and value <= 0):
            raise ArgumentError(f"{self.where}: {name} must be a number > 0, got {shown(value)}")
        return value


def _why_not(tensor: str) -> str:
    """Why a tensor that is no half of a pair is refused."""
    if "lora_magnitude_vector" in tensor:
        return "DoRA is not supported"
    if tensor.endswith(".bias"):
        return "biases are not supported"
    if ".lora_" in tensor:
        return f"it has no other half ({A}, {B}), or is unknown"
    return "whole weights (modules_to_save) are not supported"
