"""OLMo 2 (OLMo team 2024, arXiv 2501.00656): norms after the blocks, and of all of q and of k."""

import torch
from torch import Tensor, nn

from nanovllm.kernels.types import AttentionMetadata, Unreduced, summed
from nanovllm.layers.context import ModelContext
from nanovllm.layers.weights import new_parameter_of_heads
from nanovllm.models.base import CausalLM
from nanovllm.models.decoder import GatedMLP, SelfAttention
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.post_norm import PostNormLayer

POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")


class HeadsNorm(nn.Module):
    """The weight of a norm over all heads of q or of k: this rank's heads' part.

    It is float32 if the model's other norm weights are.
    """

    def __init__(self, num_heads: int, config: ModelConfig, context: ModelContext) -> None:
        super().__init__()
        dtype = context.dtype if config.norm_weight_offset is None else torch.float32
        self.weight = new_parameter_of_heads(num_heads, config.head_dim, context, dtype)

    def scaled(self, normed: Tensor, dtype: torch.dtype) -> Tensor:
        """normed [T, size] float32 times the weight, rounded as `Ops.rms_norm` rounds."""
        if self.weight.dtype == dtype:
            normed = normed.to(dtype)
        return (normed * self.weight).to(dtype)


class Olmo2Attention(SelfAttention):
    """Self-attention whose q and k are RMS-normalised over the heads of all ranks together."""

    def __init__(
        self, config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> None:
        bias = config.attention_bias
        super().__init__(config, cos_sin, context, index, qkv_bias=bias, output_bias=bias)
        self.q_norm = HeadsNorm(config.num_attention_heads, config, context)
        self.k_norm = HeadsNorm(config.num_key_value_heads, config, context)
        self.tp, self.ops, self.eps = context.tp, context.ops, config.rms_norm_eps

    def forward(self, x: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Unreduced:
        """x [T, hidden_size] -> [T, hidden_size], at `logits_indices`."""
        qkv = summed(self.qkv_proj(x))
        weights = self.q_norm.weight, self.k_norm.weight
        sizes = [len(weight) for weight in weights]
        q, k, v = qkv.split([*sizes, sizes[1]], dim=-1)
        if self.tp.size == 1:
            q, k = (self.ops.rms_norm(y, w, self.eps) for y, w in zip((q, k), weights, strict=True))
        else:
            q, k = self._normed_over_ranks(q, k)
        return self.o_proj(self.attn(torch.cat((q, k, v), dim=-1), positions, metadata))

    def _normed_over_ranks(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k, this rank's heads, divided by the root mean square of all ranks' heads.

        Each rank has equally many heads, and each key head is on equally many ranks.
        """
        q32, k32 = q.float(), k.float()
        mean_squares = torch.stack([y.square().mean(-1) for y in (q32, k32)])
        inverse_rms = torch.rsqrt(self.tp.mean_over_ranks(mean_squares) + self.eps).unsqueeze(-1)
        return (
            self.q_norm.scaled(q32 * inverse_rms[0], q.dtype),
            self.k_norm.scaled(k32 * inverse_rms[1], k.dtype),
        )


class Olmo2ForCausalLM(CausalLM):
    """OLMo 2 with its LM head."""

    @staticmethod
    def new_layer(
        config: ModelConfig, cos_sin: Tensor, context: ModelContext, index: int
    ) -> PostNormLayer:
        """See `CausalLM.new_layer`."""
        attention = Olmo2Attention(config, cos_sin, context, index)
        return PostNormLayer(config, context, attention, GatedMLP(config, context), POST_NORMS)
