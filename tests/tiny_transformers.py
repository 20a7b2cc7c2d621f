"""Every causal language model of the installed transformers, tiny and with random weights.

Configurations are made small by the names of their fields alone. Windows are shorter than the
prompts of the tests, each kind of layer that the default configuration names is there, soft caps
and multipliers have values that show.
"""

import tempfile
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import torch
import transformers
from tiny_models import greedy_tokens
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nanovllm import LLM, SamplingParams
from nanovllm.errors import ArgumentError

VOCAB_SIZE = 96
MIN_LAYERS = 4
MAX_WEIGHTS = 2**21
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size"), VOCAB_SIZE),
    **dict.fromkeys(
        """hidden_size d_model n_embd dim word_embed_proj_dim embedding_size model_dim
        decoder_hidden_size""".split(),
        32,
    ),
    **dict.fromkeys(
        """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff ffn_hidden_size
        moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        intermediate_size_mlp expert_ffn_hidden_size dense_intermediate_size
        prefix_dense_intermediate_size moe_shared_expert_intermediate_size""".split(),
        48,
    ),
    **dict.fromkeys(
        """num_attention_heads n_head n_heads num_heads decoder_attention_heads
        encoder_attention_heads""".split(),
        4,
    ),
    **dict.fromkeys(
        "num_key_value_heads num_kv_heads kv_n_heads num_global_key_value_heads".split(), 2
    ),
    **dict.fromkeys("head_dim attention_head_dim v_head_dim".split(), 8),
    **dict.fromkeys("global_head_dim kv_channels".split(), 16),
    **dict.fromkeys("qk_nope_head_dim qk_rope_head_dim".split(), 8),
    "qk_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    **dict.fromkeys(
        "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts".split(),
        4,
    ),
    **dict.fromkeys(
        "num_experts_per_tok moe_k moe_topk top_k_experts num_experts_per_token".split(), 2
    ),
    **dict.fromkeys("n_group num_expert_groups topk_group".split(), 1),
    **dict.fromkeys("n_shared_experts num_shared_experts moe_num_shared_experts".split(), 1),
    **dict.fromkeys("first_k_dense_replace num_dense_layers moe_layer_start_index".split(), 1),
    **dict.fromkeys("sliding_window window_size attention_chunk_size local_attention".split(), 8),
    **dict.fromkeys(
        "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions".split(), 512
    ),
    **dict.fromkeys("final_logit_softcapping logits_soft_cap attn_logit_softcapping".split(), 2.0),
    **dict.fromkeys("vocab_size_per_layer_input".split(), VOCAB_SIZE),
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 0.5,
    "logit_scale": 2.0,
    "use_sliding_window": True,
    "is_decoder": True,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "use_cache": True,
    "max_window_layers": 2,
    "attention_dropout": 0.0,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "conv_L_cache": 3,
}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
OPTIONAL = ("q_lora_rank", "attn_logit_softcapping")  # left out where they are by default
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": -1, "pad_token_id": 0}
REMOVED = object()
# What no general rule makes small, by model_type.
OTHERS: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {
        "intermediate_size": [48] * 4,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {"num_kv_shared_layers": 2},
    "longcat_flash": {"zero_expert_num": 2},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("sliding_attention", "full_attention")
        }
    },
}


@cache
def architectures() -> dict[str, str]:
    """Each class's name -> its model_type, that of the text alone where there are two.

    A class of one model_type is not imported: all of them take seconds.
    """
    found: dict[str, str] = {}
    counts = Counter(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if counts[name] == 1 or model_type == model_class(name).config_class.model_type:
            found[name] = model_type
        else:
            found.setdefault(name, model_type)
    return found


def model_class(name: str) -> type[PreTrainedModel]:
    """The class of an architecture."""
    return getattr(transformers, name)


def tiny_config(model_type: str, name: str) -> PretrainedConfig:
    """A configuration of a few thousand weights; raises what transformers raises if it cannot."""
    config_class = model_class(name).config_class
    if config_class.model_type != model_type and model_type in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[model_type]
    return _shrunk(config_class, {"architectures": [name]})


def _shrunk(config_class: type[PretrainedConfig], given: dict[str, Any]) -> PretrainedConfig:
    """A small configuration of a class; `given` are fields that it must have."""
    default = config_class()
    known = {**TOKEN_IDS, **default.to_dict()}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    num_layers = max(MIN_LAYERS, len(kinds))
    fields: dict[str, Any] = {}
    for name in (*known, *config_class.attribute_map):
        value = SIZES.get(name, TOKEN_IDS.get(name))
        stored = config_class.attribute_map.get(name, name)
        old = known.get(stored)
        if name in LAYERS:
            value = num_layers
        elif isinstance(old, list) and len(old) == getattr(default, "num_hidden_layers", -1):
            value = old[-num_layers:]
        if value is not None and not (old is None and name in OPTIONAL):
            fields[stored] = value
    for name, sub_class in (config_class.sub_configs or {}).items():
        if name in ("text_config", "decoder", "attn_config") and hasattr(sub_class, "model_type"):
            fields[name] = _shrunk(sub_class, {}).to_dict()
    if "kv_lora_rank" in fields:  # every head has keys of its own
        fields["num_key_value_heads"] = 4
    if kinds and not isinstance(getattr(config_class, "layer_types", None), property):
        fields["layer_types"] = [kinds[i % len(kinds)] for i in range(num_layers)]
    fields = {**fields, **OTHERS.get(config_class.model_type, {}), **given}
    return config_class(**{n: v for n, v in fields.items() if v is not REMOVED})


def tiny_model(config: PretrainedConfig, name: str, seed: int = 0) -> PreTrainedModel:
    """The model, in float32, with weights that make attention and experts matter."""
    with torch.device("meta"), no_init_weights():
        size = sum(p.numel() for p in model_class(name)(config).parameters())
    if size > MAX_WEIGHTS:
        raise ValueError(f"no tiny configuration: {size} weights")
    torch.manual_seed(seed)
    model = model_class(name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


# ---- what the engine makes of each -------------------------------------------------------------

MAX_TOKENS = 5  # with which even the shortest of the first three prompts outgrows a block
# Of blocks of 256 tokens: two prompts share one, and the first three want two each while they
# decode.
ENGINE: dict[str, Any] = {
    "model_impl": "transformers",
    "dtype": "float32",
    "device": "cpu",
    "skip_tokenizer_init": True,
    "max_model_len": 320,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 100,
    "enable_chunked_prefill": True,
    "num_kvcache_blocks": 4,
    "watermark": 0,
}


class Outcome(NamedTuple):
    """What became of an architecture: "equal", "different", "refused" or "not tried", and why.

    Of those that run also what speaks against CUDA graphs, and against tensor parallelism.
    """

    kind: str
    reason: str = ""
    num_preemptions: int = 0
    eager_reason: str | None = None
    has_plan: bool = False


def prompts() -> list[list[int]]:
    """Ragged prompts, which reach past every window."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB_SIZE, (262,), generator=generator).tolist()
    return [ids[:253], ids[3:255], ids[:254], ids[:5], ids[:259], ids[3:40], ids[:257]]


def expected_tokens(model: PreTrainedModel) -> list[list[int]]:
    """Transformers' own greedy tokens after each of `prompts`."""
    return greedy_tokens(model, prompts(), MAX_TOKENS)


@torch.inference_mode()
def best_tokens(model: PreTrainedModel, completions: list[list[int]]) -> list[list[int]]:
    """What transformers has for each token of completions of `prompts`, given those before it.

    That is all of them, and only if they are transformers' greedy tokens. It is one call for
    all: a row is filled up on its right, which no token before sees.
    """
    rows = [[*p, *c] for p, c in zip(prompts(), completions, strict=True)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for padded, row in zip(ids, rows, strict=True):
        padded[: len(row)] = torch.tensor(row)
    best = model(input_ids=ids, use_cache=False).logits.argmax(-1)
    starts = [len(prompt) - 1 for prompt in prompts()]
    parts = zip(best, starts, completions, strict=True)
    return [row[start : start + len(c)].tolist() for row, start, c in parts]


@cache
def outcome(name: str) -> Outcome:
    """Greedy tokens of transformers and of the engine, for a tiny model of an architecture."""
    longest = max(range(len(prompts())), key=lambda i: len(prompts()[i]))
    try:
        model = tiny_model(tiny_config(architectures()[name], name), name)
        [expected] = greedy_tokens(model, [prompts()[longest]], MAX_TOKENS)
    except Exception as error:
        return Outcome("not tried", f"no tiny model: {type(error).__name__}")
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        try:
            llm = LLM(directory, **ENGINE)
        except ArgumentError as error:
            return Outcome("refused", str(error).replace(directory, "model"))
    try:
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
        outputs = llm.generate(prompts(), params, use_tqdm=False)
        found = [output["token_ids"] for output in outputs]
        num_preemptions = llm.get_metrics().get("num_preemptions")
        eager_reason = llm.model_runner.model.eager_reason
        try:
            llm.config.model_config.check_ranks(2)
            has_plan = True
        except ArgumentError:
            has_plan = False
    finally:
        llm.exit()
    is_equal = found[longest] == expected and found == best_tokens(model, found)
    kind = "equal" if is_equal else "different"
    return Outcome(kind, "", num_preemptions, eager_reason, has_plan)
