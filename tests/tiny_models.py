"""Random tiny models, with a tokenizer, saved as Hugging Face model directories."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from vocabulary import VOCAB_SIZE

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog and then it sleeps in the warm afternoon sun",
    "a paged cache keeps the keys and values of every sequence in blocks of equal size",
]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 16.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 8.0],
}
DELTA_NET = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
# Arguments of `save_model`: all that a family's config can switch on.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"architecture": "Qwen2ForCausalLM", "head_dim": 8, "num_key_value_heads": 2},
    "qwen2-yarn": {
        "architecture": "Qwen2ForCausalLM",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_parameters": YARN | {"attention_factor": 1.3},
        "tie_word_embeddings": False,
    },
    "llama2": {
        "architecture": "LlamaForCausalLM",
        "num_key_value_heads": 8,
        "head_dim": 8,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama3": {"architecture": "LlamaForCausalLM", "rope_parameters": LLAMA3},
    "llama-linear": {
        "architecture": "LlamaForCausalLM",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
        "max_position_embeddings": 256,
    },
    "smollm2": {
        "architecture": "LlamaForCausalLM",
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
    },
    "mistral": {
        "architecture": "MistralForCausalLM",
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "mistral-window": {"architecture": "MistralForCausalLM", "sliding_window": 30},
    "ministral": {
        "architecture": "MinistralForCausalLM",
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen2-window": {
        "architecture": "Qwen2ForCausalLM",
        "use_sliding_window": True,
        "sliding_window": 40,
        "max_window_layers": 1,
    },
    "qwen3-window": {
        "use_sliding_window": True,
        "sliding_window": 50,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "attention_bias": True,
    },
    "gemma": {
        "architecture": "GemmaForCausalLM",
        "hidden_size": 72,  # whose root is rounded
        "attention_bias": True,
    },
    "gemma2": {
        "architecture": "Gemma2ForCausalLM",
        "sliding_window": 24,
        "query_pre_attn_scalar": 9,
        "attn_logit_softcapping": 5.0,
        "tie_word_embeddings": False,
        "final_logit_softcapping": 4.0,
        "attention_bias": True,
    },
    "gemma3": {
        "architecture": "Gemma3ForCausalLM",
        "num_hidden_layers": 4,
        "sliding_window_pattern": 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
        "tie_word_embeddings": False,
        "sliding_window": 24,
        "query_pre_attn_scalar": 9,
        "final_logit_softcapping": 4.0,
        "hidden_activation": "gelu",
    },
    "arcee": {"architecture": "ArceeForCausalLM", "attention_bias": True, "mlp_bias": True},
    "cohere": {
        "architecture": "CohereForCausalLM",
        "head_dim": 8,
        "attention_bias": True,
        "logit_scale": 0.3,
        "layer_norm_eps": 1e-3,
    },
    "cohere2": {
        "architecture": "Cohere2ForCausalLM",
        "head_dim": 8,
        "sliding_window": 30,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "tie_word_embeddings": False,
    },
    "exaone4": {
        "architecture": "Exaone4ForCausalLM",
        "sliding_window": 30,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": False,
    },
    "exaone4-full": {
        "architecture": "Exaone4ForCausalLM",
        "sliding_window": None,
        "layer_types": ["full_attention"] * 3,
        "tie_word_embeddings": False,
    },
    "helium": {
        "architecture": "HeliumForCausalLM",
        "head_dim": 8,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "nemotron": {
        "architecture": "NemotronForCausalLM",
        "attention_bias": True,
        "mlp_bias": True,
        "norm_eps": 1e-3,
    },
    "seed-oss": {
        "architecture": "SeedOssForCausalLM",
        "attention_out_bias": True,
        "mlp_bias": True,
    },
    "starcoder2": {
        "architecture": "Starcoder2ForCausalLM",
        "head_dim": 8,
        "sliding_window": 40,
        "norm_epsilon": 1e-3,
        "initializer_range": 0.4,
        "tie_word_embeddings": False,
    },
    "olmo2": {
        "architecture": "Olmo2ForCausalLM",
        "attention_bias": True,
        "rope_parameters": LLAMA3,
        "tie_word_embeddings": False,
        "initializer_range": 0.5,
    },
    "olmo3": {
        "architecture": "Olmo3ForCausalLM",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 30,
        "rope_parameters": {
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
        "tie_word_embeddings": False,
        "initializer_range": 0.5,
    },
    "granite": {
        "architecture": "GraniteForCausalLM",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.15,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.5,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen3-yarn": {"rope_parameters": YARN},
    "phi4-mini": {
        "architecture": "Phi3ForCausalLM",
        "hidden_size": 128,
        "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75},
        "original_max_position_embeddings": 1024,
        "sliding_window": 150,
    },
    "glm": {
        "architecture": "GlmForCausalLM",
        "attention_bias": True,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "glm4": {
        "architecture": "Glm4ForCausalLM",
        "attention_bias": True,
        "rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.25},
        "tie_word_embeddings": False,
    },
    "smollm3": {
        "architecture": "SmolLM3ForCausalLM",
        "no_rope_layers": [0, 1, 1],
        "use_sliding_window": True,
        "sliding_window": 100,
        "head_dim": 8,
        "rope_parameters": YARN,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen3-moe": {
        "architecture": "Qwen3MoeForCausalLM",
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "qwen3-moe-steps": {
        "architecture": "Qwen3MoeForCausalLM",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
        "norm_topk_prob": False,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "mixtral": {
        "architecture": "MixtralForCausalLM",
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 50,
        "tie_word_embeddings": False,
    },
    "qwen2-moe": {
        "architecture": "Qwen2MoeForCausalLM",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [1],
    },
    "qwen2-moe-windows": {
        "architecture": "Qwen2MoeForCausalLM",
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
        "norm_topk_prob": True,
        "qkv_bias": False,
        "use_sliding_window": True,
        "sliding_window": 40,
        "max_window_layers": 2,
    },
    "olmoe": {
        "architecture": "OlmoeForCausalLM",
        "head_dim": 8,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "tie_word_embeddings": False,
    },
    "granite-moe": {
        "architecture": "GraniteMoeForCausalLM",
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 1.5,
        "tie_word_embeddings": False,
    },
    "gpt-oss": {
        "architecture": "GptOssForCausalLM",
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "sliding_window": 50,
        "swiglu_limit": 1.5,  # few numbers here are beyond 7
        "swiglu_alpha": 1.3,
        "rope_parameters": YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
        "tie_word_embeddings": False,
    },
    "qwen3.5": {"architecture": "Qwen3_5ForCausalLM", **DELTA_NET},
    "qwen3.5-moe": {
        "architecture": "Qwen3_5MoeForCausalLM",
        **DELTA_NET,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 4,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "qwen3-next": {
        "architecture": "Qwen3NextForCausalLM",
        **DELTA_NET,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
        "norm_topk_prob": False,
        "tie_word_embeddings": False,
    },
}

# As old checkpoints write it: changes to config.json, None for a field that is derived.
OLD_CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe": {"head_dim": None},
    "qwen2": {"head_dim": None},
    "llama2": {"head_dim": None},
    "phi4-mini": {
        "rope_parameters": None,
        "rope_theta": LONGROPE["rope_theta"],
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": LONGROPE["short_factor"],
            "long_factor": LONGROPE["long_factor"],
        },
    },
    "glm": {"rope_parameters": None, "rope_theta": 500.0},  # half of a head is the default
    "smollm2": {"head_dim": None, "rope_parameters": None, "rope_theta": 10000.0},
    "qwen2-window": {"layer_types": None},
    "gemma": {"hidden_act": "gelu", "hidden_activation": None},
    "gemma2": {"layer_types": None, "hidden_act": "gelu_pytorch_tanh"},
    "gemma3": {
        "layer_types": None,
        "sliding_window_pattern": 2,
        "rope_parameters": None,
        "rope_theta": 5000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 100.0,
    },
}


def save_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer with the special tokens and the chat template of Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 64,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)


TINY_SETTINGS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "dtype": "float32",
}


def save_model(
    directory: Path,
    seed: int = 0,
    max_shard_size: str = "1GB",
    architecture: str = "Qwen3ForCausalLM",
    **overrides: Any,
) -> Path:
    """A random fp32 model whose greedy continuations vary; `overrides` go to its config."""
    # A family's id of padding may be beyond this vocabulary.
    settings: dict[str, Any] = TINY_SETTINGS | {"pad_token_id": None}
    family = getattr(transformers, architecture)
    config = family.config_class(**(settings | overrides))
    torch.manual_seed(seed)
    model = family(config).to(torch.float32).eval()
    has_recurrence = hasattr(config, "linear_num_key_heads")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0.0, 0.2)
        elif "norm" in name:  # ones would hide a norm weight that is not loaded
            # With larger ones rounding errors grow in a recurrence.
            is_zero = has_recurrence and not parameter.any()
            parameter.data.uniform_(0.5, 1.5).sub_(int(is_zero))
        elif name.endswith("sinks"):
            parameter.data.normal_(2.0, 1.0)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    save_tokenizer(directory)
    return directory


def save_family(directory: Path, name: str) -> Path:
    """The model FAMILIES[name], its config written as in OLD_CONFIGS if it is there."""
    save_model(directory, seed=len(name), **FAMILIES[name])
    edit_config(directory, **OLD_CONFIGS.get(name, {}))
    return directory


def edit_config(directory: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    removed = {name for name, value in changes.items() if value is None}
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in removed}))


@torch.inference_mode()
def reference_greedy(
    directory: Path,
    prompts: list[list[int]],
    max_tokens: int,
    guesses: list[list[int]] | None = None,
    **kwargs: Any,
) -> list[list[int]]:
    """Greedy completions of exactly `max_tokens` tokens by transformers in fp32, one by one.

    guesses: see `greedy_tokens`. kwargs: of `from_pretrained`.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **kwargs)
    return greedy_tokens(model, prompts, max_tokens, guesses)


@torch.inference_mode()
def greedy_tokens(
    model: transformers.PreTrainedModel,
    prompts: list[list[int]],
    max_tokens: int,
    guesses: list[list[int]] | None = None,
) -> list[list[int]]:
    """What `reference_greedy` gives, of a model that is loaded.

    guesses: completions that may be right, as those of the engine. One call of the model shows
    whether one is, instead of a call for each token; what is returned does not depend on them.
    """
    found: dict[tuple[int, ...], list[int]] = {}  # equal prompts have equal completions
    for i, prompt in enumerate(prompts):
        if tuple(prompt) in found:
            continue
        guess = guesses[i] if guesses else []
        if len(guess) != max_tokens or best_tokens(model, prompt, guess) != guess:
            guess = _generated(model, prompt, max_tokens)
        found[tuple(prompt)] = guess
    return [found[tuple(prompt)] for prompt in prompts]


def best_tokens(
    model: transformers.PreTrainedModel, prompt: list[int], completion: list[int]
) -> list[int]:
    """The model's best token in each place of a completion, given the tokens before it."""
    return completion_logits(model, prompt, completion).argmax(-1).tolist()


@torch.inference_mode()
def completion_logits(
    model: transformers.PreTrainedModel, prompt: list[int], completion: list[int]
) -> torch.Tensor:
    """Of which each token of a completion is drawn: [len(completion), vocab_size]."""
    ids = torch.tensor([[*prompt, *completion]])
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]


def _generated(
    model: transformers.PreTrainedModel, prompt: list[int], max_tokens: int
) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),  # else a prompt's pad tokens are masked
        max_new_tokens=max_tokens,
        min_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return out[0, len(prompt) :].tolist()
