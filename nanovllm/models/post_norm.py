"""Decoder layers that normalise what a block gives, before it is added to the residual."""

from torch import Tensor, nn

from nanovllm.kernels.types import AttentionMetadata
from nanovllm.layers.attention import at_logits_indices
from nanovllm.layers.context import ModelContext
from nanovllm.layers.norm import RMSNorm
from nanovllm.models.model_config import ModelConfig


class PostNormLayer(nn.Module):
    """Attention and MLP, each with a norm after it, and mostly one before it as well.

    Args:
        config: the model's configuration.
        context: what the rank's layers are built with.
        self_attn: as of `DecoderLayer`.
        mlp: as of `DecoderLayer`.
        post_norms: the names, in checkpoints, of the norms after attention and after the MLP.
        pre_norms: of those before them; None: the blocks read the residual itself.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: ModelContext,
        self_attn: nn.Module,
        mlp: nn.Module,
        post_norms: tuple[str, str],
        pre_norms: tuple[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.self_attn, self.mlp = self_attn, mlp
        size, eps, offset = config.hidden_size, config.rms_norm_eps, config.norm_weight_offset
        for name in (*post_norms, *(pre_norms or ())):
            setattr(self, name, RMSNorm(size, eps, context, offset))
        self.post_norms, self.pre_norms = post_norms, pre_norms

    def forward(
        self, x: Tensor | None, residual: Tensor, positions: Tensor, metadata: AttentionMetadata
    ) -> tuple[Tensor, Tensor]:
        """(x, residual) [T, hidden_size] each -> the same for the next layer, at `logits_indices`.

        x is what is to be added to the residual; the first layer has none.
        """
        block_input, residual = self._add(0, x, residual)
        x = self._normed(0, self.self_attn(block_input, positions, metadata))
        residual = at_logits_indices(residual, metadata)
        block_input, residual = self._add(1, x, residual)
        return self._normed(1, self.mlp(block_input)), residual

    def _add(self, index: int, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What block `index` reads, and the residual with x in it."""
        if self.pre_norms is None:
            total = residual if x is None else x + residual
            return total, total
        norm = getattr(self, self.pre_norms[index])
        return (norm(residual), residual) if x is None else norm.add(x, residual)

    def _normed(self, index: int, output: object) -> Tensor:
        """A block's output, summed over the ranks and normalised."""
        return getattr(self, self.post_norms[index])(output)
