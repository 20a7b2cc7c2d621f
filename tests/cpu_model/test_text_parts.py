"""The text part of a multimodal checkpoint, against transformers' whole model given text alone."""

import pytest
import torch
from engine_checks import generate, greedy, random_prompts, tiny_engine
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, edit_config, greedy_tokens, save_tokenizer
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from nanovllm import ArgumentError

MAX_TOKENS = 6
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 16,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """The directory of a model whose embeddings are tied, prompts and greedy completions."""
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=TEXT,
        vision_config={"model_type": "siglip_vision_model"} | VISION,
        image_token_index=VOCAB_SIZE - 1,
        mm_tokens_per_image=4,
        dtype="float32",
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "post_" in name and "layernorm" in name:  # else the embeddings outweigh the layers
            parameter.data.fill_(3.0)
    directory = tmp_path_factory.mktemp("gemma3")
    model.save_pretrained(directory)
    save_tokenizer(directory)
    prompts = random_prompts((3, 5, 20, 33, 40, 50, 64, 70), seed=4)
    prompts = [[min(token, VOCAB_SIZE - 2) for token in prompt] for prompt in prompts]  # no image
    reference = greedy_tokens(model, prompts, MAX_TOKENS)
    assert len({token for tokens in reference for token in tokens}) >= 6
    return directory, prompts, reference


def test_text_alone_gives_the_tokens_of_the_whole_model(gemma3):
    directory, prompts, reference = gemma3
    with tiny_engine(directory) as llm:
        assert not llm.config.model_config.uses_transformers
        assert generate(llm, prompts, greedy(MAX_TOKENS)) == reference


def test_published_files_are_read(gemma3):
    """Their config.json leaves defaults out, and there are two spellings of the tensors' names."""
    directory, prompts, reference = gemma3
    edit_config(directory, text_config=TEXT | {"model_type": "gemma3_text"})
    path = directory / "model.safetensors"
    tensors = load_file(path)
    assert any("vision_tower" in name for name in tensors)
    inner = "language_model.model."
    old, new = (inner, "model.language_model.")
    if not any(name.startswith(inner) for name in tensors):
        old, new = new, old
    renamed = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path)
    with tiny_engine(directory) as llm:
        assert generate(llm, prompts, greedy(MAX_TOKENS)) == reference
    save_file(renamed | {name: tensor.clone() for name, tensor in tensors.items()}, path)
    with pytest.raises(ArgumentError, match="is in .* twice, as"):
        tiny_engine(directory)
    save_file(tensors, path)


def test_what_the_text_part_asks_for_is_checked(gemma3):
    directory, _, _ = gemma3
    edit_config(directory, text_config=TEXT | {"model_type": "gemma2"})
    with pytest.raises(ArgumentError, match="model_type of Gemma3ForCausalLM is 'gemma3_text'"):
        tiny_engine(directory)
