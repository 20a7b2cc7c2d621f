"""Which LoRA adapter a request uses (Hu et al. 2021, arXiv 2106.09685), by vLLM's names."""

import os
from dataclasses import dataclass

from nanovllm.errors import ArgumentError, shown
from nanovllm.validation import check_at_least, check_bool


@dataclass(frozen=True)
class LoRARequest:
    """An adapter: a folder as PEFT saves it.

    Args:
        lora_name: a name for the reader.
        lora_int_id: its number in the engine, at least 1. Requests with the same number share the
            adapter, its place on the device and its prefix cache.
        lora_path: the folder, with adapter_config.json and adapter_model.safetensors.
        base_model_name: vLLM's, which changes nothing.
        load_inplace: whether the folder is read again where the number is known already.

    Raises:
        ArgumentError: a value is of the wrong type or out of range.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise ArgumentError(f"lora_name must be a string, got {shown(self.lora_name)}")
        check_at_least("lora_int_id", self.lora_int_id, 1)
        if not isinstance(self.lora_path, (str, os.PathLike)) or not os.fspath(self.lora_path):
            raise ArgumentError(
                f"lora_path must be the path of an adapter's folder, got {shown(self.lora_path)}"
            )
        check_bool("load_inplace", self.load_inplace)
        # `os.chdir` does not move it.
        object.__setattr__(self, "lora_path", os.path.abspath(os.fsdecode(self.lora_path)))

    @property
    def name(self) -> str:
        """`lora_name`."""
        return self.lora_name

    @property
    def path(self) -> str:
        """`lora_path`."""
        return self.lora_path

    @property
    def adapter_id(self) -> int:
        """`lora_int_id`."""
        return self.lora_int_id


# One for all prompts, or one or none for each.
LoRARequests = LoRARequest | list[LoRARequest | None] | list[LoRARequest] | None
