"""What of PEFT's folders is read, and what is refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from nanovllm import ArgumentError
from nanovllm.lora_request import LoRARequest
from nanovllm.models.lora_checkpoint import LoRACheckpoint

MODULE = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{MODULE}"
A, B = f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight"


def save(path, tensors=None, **config):
    path.mkdir()
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}
    (path / "adapter_config.json").write_text(json.dumps(fields | config))
    save_file(tensors or pair(), path / "adapter_model.safetensors")
    return str(path)


def pair(rank=4):
    return {A: torch.ones(rank, 8), B: torch.ones(16, rank)}


@pytest.mark.parametrize(
    ("config", "rank", "scale"),
    [
        ({}, 4, 6 / 4),
        ({"use_rslora": True}, 4, 6 / 2),
        ({"alpha_pattern": {"q_proj": 2}}, 4, 2 / 4),
        ({"alpha_pattern": {"proj": 2, "self_attn.q_proj": 3, "q_proj": 4}}, 4, 3 / 4),
        ({"rank_pattern": {r".*layers\.\d+\.self_attn.q_proj": 9}}, 9, 6 / 9),
        ({"r": 8, "rank_pattern": {"q_proj": 9}, "use_rslora": True}, 9, 6 / 3),
        ({"target_modules": "all-linear", "lora_dropout": 0.1, "layers_to_transform": [0]}, 4, 1.5),
        ({"init_lora_weights": "gaussian", "bias": "none", "use_dora": False}, 4, 1.5),
    ],
)
def test_rank_and_scale_of_a_module(tmp_path, config, rank, scale):
    checkpoint = LoRACheckpoint(save(tmp_path / "a", pair(rank), **config))
    [(name, module)] = checkpoint.modules.items()
    assert (name, module.rank, module.is_embedding) == (MODULE, rank, False)
    assert module.scale == pytest.approx(scale)
    tensors = checkpoint.read()
    assert tensors[module.a].shape == (rank, 8) and tensors[module.b].shape == (16, rank)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"bias": "lora_only"}, "bias 'lora_only' is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"of_the_future": 1}, "of_the_future 1 is not supported"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern has '\\('"),
        ({"r": 5}, r"has A \[4, 8\] and B \[16, 4\]; its rank is 5"),
        ({"r": "4"}, "r must be a number > 0, got '4'"),
        ({"lora_alpha": None}, "lora_alpha must be a number > 0, got None"),
    ],
)
def test_what_computes_something_else_is_refused(tmp_path, config, message):
    with pytest.raises(ArgumentError, match=message):
        LoRACheckpoint(save(tmp_path / "a", **config))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{KEY}.lora_magnitude_vector": torch.ones(16)}, "DoRA"),
        ({f"{KEY}.lora_B.bias": torch.ones(16)}, "biases"),
        ({"base_model.model.lm_head.weight": torch.ones(9, 8)}, "whole weights"),
        ({f"{KEY[:-6]}k_proj.lora_A.weight": torch.ones(4, 8)}, "no other half"),
        ({A: torch.ones(4, 8, dtype=torch.int8)}, "dtype I8"),
        ({A: torch.ones(4, 8, 1)}, "has A"),
    ],
)
def test_tensors_that_are_not_understood(tmp_path, tensors, message):
    with pytest.raises(ArgumentError, match=message):
        LoRACheckpoint(save(tmp_path / "a", pair() | tensors))


def test_damaged_folders(tmp_path):
    path = save(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("[")
    with pytest.raises(ArgumentError, match=r"adapter_config.json cannot be read"):
        LoRACheckpoint(path)
    path = save(tmp_path / "b")
    (tmp_path / "b" / "adapter_model.safetensors").write_bytes(b"1234")
    with pytest.raises(ArgumentError, match=r"adapter_model.safetensors cannot be read"):
        LoRACheckpoint(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("", 1, "path"), "lora_name must be a string"),
        (("a", 0, "path"), "lora_int_id must be >= 1, got 0"),
        (("a", True, "path"), "lora_int_id"),
        (("a", 1, ""), "lora_path must be the path"),
        (("a", 1, 5), "lora_path must be the path of an adapter's folder, got 5"),
    ],
)
def test_wrong_requests(values, message):
    with pytest.raises(ArgumentError, match=message):
        LoRARequest(*values)


def test_vllms_names_of_a_request(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = LoRARequest("a", 3, "folder")
    assert (request.name, request.adapter_id) == ("a", 3)
    assert request.path == request.lora_path == str(tmp_path / "folder")
