"""What transformers' configuration classes say where a config.json leaves a field out.

Only of fields that are read here. A test compares all of it with the classes of transformers.
"""

import json
from typing import Any

# Each row is a model_type and, beside those of all families in the first row, its fields.
_TABLE = """
* vocab_size=32000 hidden_size=4096 num_hidden_layers=32 num_attention_heads=32 eos_token_id=null
  num_key_value_heads=null max_position_embeddings=32768 initializer_range=0.02
  tie_word_embeddings=false architectures=null dtype=null id2label=null problem_type=null
  rope_parameters=null
arcee hidden_size=2560 intermediate_size=18432 hidden_act="relu2" max_position_embeddings=4096
  rms_norm_eps=1e-05 eos_token_id=128001 attention_bias=false mlp_bias=false head_dim=null
cohere2 vocab_size=256000 hidden_size=8192 intermediate_size=22528 logit_scale=0.0625
  num_hidden_layers=40 num_attention_heads=64 hidden_act="silu" max_position_embeddings=8192
  layer_norm_eps=1e-05 eos_token_id=255001 tie_word_embeddings=true attention_bias=false
  sliding_window=4096 layer_types=null
cohere vocab_size=256000 hidden_size=8192 intermediate_size=22528 logit_scale=0.0625
  num_hidden_layers=40 num_attention_heads=64 hidden_act="silu" max_position_embeddings=8192
  layer_norm_eps=1e-05 eos_token_id=255001 tie_word_embeddings=true attention_bias=false
  use_qk_norm=false
exaone4 vocab_size=102400 intermediate_size=16384 num_key_value_heads=32 hidden_act="silu"
  max_position_embeddings=2048 rms_norm_eps=1e-05 eos_token_id=2 sliding_window=4096
  sliding_window_pattern=4 layer_types=null
gemma2 vocab_size=256000 hidden_size=2304 intermediate_size=9216 num_hidden_layers=26
  num_attention_heads=8 num_key_value_heads=4 head_dim=256 hidden_activation="gelu_pytorch_tanh"
  max_position_embeddings=8192 rms_norm_eps=1e-06 eos_token_id=1 tie_word_embeddings=true
  attention_bias=false query_pre_attn_scalar=256 sliding_window=4096 layer_types=null
  final_logit_softcapping=30.0 attn_logit_softcapping=50.0
gemma3_text vocab_size=262208 hidden_size=2304 intermediate_size=9216 num_hidden_layers=26
  num_attention_heads=8 num_key_value_heads=4 head_dim=256 hidden_activation="gelu_pytorch_tanh"
  max_position_embeddings=131072 rms_norm_eps=1e-06 eos_token_id=1 tie_word_embeddings=true
  attention_bias=false query_pre_attn_scalar=256 sliding_window=4096 layer_types=null
  final_logit_softcapping=null attn_logit_softcapping=null
gemma vocab_size=256000 hidden_size=3072 intermediate_size=24576 num_hidden_layers=28
  num_attention_heads=16 num_key_value_heads=16 head_dim=256 hidden_act="gelu_pytorch_tanh"
  max_position_embeddings=8192 rms_norm_eps=1e-06 eos_token_id=1 tie_word_embeddings=true
  attention_bias=false
glm4 vocab_size=151552 intermediate_size=13696 num_hidden_layers=40 num_key_value_heads=2
  head_dim=128 hidden_act="silu" max_position_embeddings=131072 rms_norm_eps=1.5625e-07
  attention_bias=true
glm vocab_size=151552 intermediate_size=13696 num_hidden_layers=40 num_key_value_heads=2
  head_dim=128 hidden_act="silu" max_position_embeddings=131072 rms_norm_eps=1.5625e-07
  attention_bias=true
gpt_oss num_hidden_layers=36 vocab_size=201088 hidden_size=2880 intermediate_size=2880 head_dim=64
  num_attention_heads=64 num_key_value_heads=8 sliding_window=128 hidden_act="silu"
  max_position_embeddings=131072 rms_norm_eps=1e-05 num_experts_per_tok=4 swiglu_alpha=1.702
  swiglu_limit=7.0 layer_types=null attention_bias=true num_experts=128
granite intermediate_size=11008 hidden_act="silu" max_position_embeddings=2048 rms_norm_eps=1e-06
  eos_token_id=2 attention_bias=false mlp_bias=false embedding_multiplier=1.0 logits_scaling=1.0
  residual_multiplier=1.0 attention_multiplier=1.0
granitemoe intermediate_size=11008 hidden_act="silu" max_position_embeddings=2048
  rms_norm_eps=1e-06 eos_token_id=2 attention_bias=false embedding_multiplier=1.0
  logits_scaling=1.0 residual_multiplier=1.0 attention_multiplier=1.0 num_local_experts=8
  num_experts_per_tok=2
helium vocab_size=48000 hidden_size=2560 intermediate_size=7040 num_hidden_layers=24
  num_attention_heads=20 num_key_value_heads=20 head_dim=128 hidden_act="silu"
  max_position_embeddings=4096 rms_norm_eps=1e-08 eos_token_id=2 attention_bias=false
  mlp_bias=false
llama intermediate_size=11008 hidden_act="silu" max_position_embeddings=2048 rms_norm_eps=1e-06
  eos_token_id=2 attention_bias=false mlp_bias=false head_dim=null
ministral intermediate_size=14336 num_key_value_heads=8 head_dim=null hidden_act="silu"
  max_position_embeddings=131072 rms_norm_eps=1e-06 eos_token_id=2 sliding_window=4096
  layer_types=null
mistral intermediate_size=14336 num_key_value_heads=8 head_dim=null hidden_act="silu"
  max_position_embeddings=131072 rms_norm_eps=1e-06 eos_token_id=2 sliding_window=4096
mixtral intermediate_size=14336 num_key_value_heads=8 head_dim=null hidden_act="silu"
  max_position_embeddings=131072 rms_norm_eps=1e-05 eos_token_id=2 sliding_window=null
  num_experts_per_tok=2 num_experts=8
nemotron vocab_size=256000 hidden_size=6144 intermediate_size=24576 num_attention_heads=48
  head_dim=null hidden_act="relu2" max_position_embeddings=4096 initializer_range=0.0134
  norm_eps=1e-05 eos_token_id=3 attention_bias=false mlp_bias=false
olmo2 vocab_size=50304 intermediate_size=11008 hidden_act="silu" max_position_embeddings=2048
  eos_token_id=50279 attention_bias=false rms_norm_eps=1e-05
olmo3 vocab_size=50304 intermediate_size=11008 hidden_act="silu" max_position_embeddings=2048
  eos_token_id=50279 attention_bias=false rms_norm_eps=1e-05 sliding_window=4096 layer_types=null
olmoe vocab_size=50304 hidden_size=2048 intermediate_size=2048 num_hidden_layers=16
  num_attention_heads=16 hidden_act="silu" max_position_embeddings=4096 rms_norm_eps=1e-05
  eos_token_id=50279 attention_bias=false num_experts_per_tok=8 num_experts=64
  norm_topk_prob=false
phi3 vocab_size=32064 hidden_size=3072 intermediate_size=8192 hidden_act="silu"
  max_position_embeddings=4096 original_max_position_embeddings=4096 rms_norm_eps=1e-05
  eos_token_id=32000 sliding_window=null
qwen2 vocab_size=151936 intermediate_size=22016 num_key_value_heads=32 hidden_act="silu"
  rms_norm_eps=1e-06 use_sliding_window=false sliding_window=4096 max_window_layers=28
  layer_types=null
qwen2_moe vocab_size=151936 hidden_size=2048 intermediate_size=5632 num_hidden_layers=24
  num_attention_heads=16 num_key_value_heads=16 hidden_act="silu" rms_norm_eps=1e-06
  use_sliding_window=false sliding_window=4096 max_window_layers=28 decoder_sparse_step=1
  moe_intermediate_size=1408 shared_expert_intermediate_size=5632 num_experts_per_tok=4
  num_experts=60 norm_topk_prob=false mlp_only_layers=null qkv_bias=true layer_types=null
qwen3 vocab_size=151936 intermediate_size=22016 num_key_value_heads=32 head_dim=128
  hidden_act="silu" rms_norm_eps=1e-06 attention_bias=false use_sliding_window=false
  sliding_window=4096 max_window_layers=28 layer_types=null
qwen3_moe vocab_size=151936 hidden_size=2048 intermediate_size=6144 num_hidden_layers=24
  num_key_value_heads=4 hidden_act="silu" rms_norm_eps=1e-06 attention_bias=false
  use_sliding_window=false sliding_window=4096 decoder_sparse_step=1 moe_intermediate_size=768
  num_experts_per_tok=8 num_experts=128 norm_topk_prob=false mlp_only_layers=null
qwen3_next vocab_size=151936 hidden_size=2048 intermediate_size=5632 num_hidden_layers=48
  num_attention_heads=16 num_key_value_heads=2 hidden_act="silu" rms_norm_eps=1e-06
  attention_bias=false head_dim=256 linear_conv_kernel_dim=4 linear_key_head_dim=128
  linear_value_head_dim=128 linear_num_key_heads=16 linear_num_value_heads=32
  decoder_sparse_step=1 moe_intermediate_size=512 shared_expert_intermediate_size=512
  num_experts_per_tok=10 num_experts=512 norm_topk_prob=true mlp_only_layers=null layer_types=null
qwen3_5_text vocab_size=248320 intermediate_size=12288 num_attention_heads=16
  num_key_value_heads=4 hidden_act="silu" rms_norm_eps=1e-06 attention_bias=false head_dim=256
  linear_conv_kernel_dim=4 linear_key_head_dim=128 linear_value_head_dim=128
  linear_num_key_heads=16 linear_num_value_heads=32 layer_types=null
qwen3_5_moe_text vocab_size=248320 hidden_size=2048 num_hidden_layers=40 num_attention_heads=16
  num_key_value_heads=2 hidden_act="silu" rms_norm_eps=1e-06 attention_bias=false head_dim=256
  linear_conv_kernel_dim=4 linear_key_head_dim=128 linear_value_head_dim=128
  linear_num_key_heads=16 linear_num_value_heads=32 moe_intermediate_size=512
  shared_expert_intermediate_size=512 num_experts_per_tok=8 num_experts=256 layer_types=null
seed_oss vocab_size=155136 intermediate_size=27648 num_hidden_layers=64 num_attention_heads=80
  num_key_value_heads=8 hidden_act="silu" max_position_embeddings=524288 rms_norm_eps=1e-06
  eos_token_id=2 attention_bias=true attention_out_bias=false mlp_bias=false head_dim=128
starcoder2 vocab_size=49152 hidden_size=3072 intermediate_size=12288 num_hidden_layers=30
  num_attention_heads=24 num_key_value_heads=2 hidden_act="gelu_pytorch_tanh"
  max_position_embeddings=4096 initializer_range=0.018042 norm_epsilon=1e-05 eos_token_id=50256
  sliding_window=null use_bias=true tie_word_embeddings=true
smollm3 vocab_size=128256 hidden_size=2048 intermediate_size=11008 num_hidden_layers=36
  num_attention_heads=16 num_key_value_heads=4 hidden_act="silu" rms_norm_eps=1e-06
  eos_token_id=128001 use_sliding_window=false sliding_window=null no_rope_layers=null
  no_rope_layer_interval=4 layer_types=null attention_bias=false mlp_bias=false
  tie_word_embeddings=true
"""
_STORED = {"num_experts": "num_local_experts"}
# Other names of fields: the name -> under which the class stores it. Here it is "num_experts".
ATTRIBUTE_MAPS = {
    "gpt_oss": _STORED,
    "mixtral": _STORED,
    "olmoe": {"num_local_experts": "num_experts"},
    "qwen3_moe": _STORED,
}
# The base of the rotary embeddings where it is not 10,000; gemma3_text's is of full attention.
ROPE_THETAS = {
    "cohere": 500000.0,
    "gemma3_text": 1000000.0,
    "gpt_oss": 150000.0,
    "helium": 100000.0,
    "mixtral": 1000000.0,
    "olmo3": 500000.0,
    "smollm3": 2000000.0,
}
# The share of a head that is rotated, where the class names one.
PARTIAL_ROTARY_FACTORS = {
    "glm": 0.5,
    "glm4": 0.5,
    "nemotron": 0.5,
    "qwen3_5_moe_text": 0.25,
    "qwen3_5_text": 0.25,
    "qwen3_next": 0.25,
}
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
GLM_EOS_TOKEN_IDS = [151329, 151336, 151338]
# Every so many layers one has full attention; of gemma3_text and cohere2 a field may say so.
FULL_ATTENTION_INTERVALS = {
    "cohere2": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3_text": 6,
    "gpt_oss": 2,
    "olmo3": 4,
    "qwen3_5_moe_text": 4,
    "qwen3_5_text": 4,
    "qwen3_next": 4,
}


def _rows() -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    row: dict[str, Any] = {}
    for word in _TABLE.split():
        name, is_field, value = word.partition("=")
        if is_field:
            row[name] = json.loads(value)
        else:
            rows[name] = row = dict(rows.get("*", {}))
    del rows["*"]
    return rows


DEFAULTS = _rows()
