"""The operations that a model needs from a backend; `kernels.select` chooses the backend."""

from typing import Protocol

from torch import Tensor

from nanovllm.kernels.types import (
    AttentionMetadata,
    ClampedSwiGLU,
    DecodeInputs,
    HeadInputs,
    KVCache,
    LinearOutput,
    LoRAWeights,
    PackedWeight,
    Product,
)


class Ops(Protocol):
    """One backend's operations. `torch_ops` runs on any device and is the oracle of kernel tests.

    T tokens, S sequences, B rows, D head_dim, Hq query and Hkv KV heads, V logits.

    Attributes:
        has_fp8_products: whether products with fp8 weights have kernels of their own, for K and N
            that are multiples of 16. Else weights are better kept in the model's dtype.
        supports_cuda_graphs: whether decode steps can be captured in a CUDA graph: no shape depends
            on device values.
        reads_common_blocks_once: whether `plan_decode` makes use of num_common_tokens.
        attention_extras: which of ATTENTION_EXTRAS `attend` takes. `Attention` refuses the others.
    """

    has_fp8_products: bool
    supports_cuda_graphs: bool
    reads_common_blocks_once: bool
    attention_extras: frozenset[str]

    def rms_norm(self, x: LinearOutput, weight: Tensor, eps: float) -> Tensor:
        """x [T, H], weight [H] -> x / sqrt(mean(x^2) + eps) * weight [T, H].

        Before the product with a weight of x's dtype the norm is rounded to it; with a float32
        weight it is not. The same holds for `add_rms_norm` and `qk_norm_rope_store`.
        """

    def add_rms_norm(
        self, x: LinearOutput, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual), both [T, H].

        The residual's memory may be reused for the second result.
        """

    def silu_and_mul(self, gate_up: LinearOutput) -> Tensor:
        """gate_up [T, 2I], gate first -> silu(gate) * up [T, I]."""

    def gelu_and_mul(self, gate_up: LinearOutput, is_tanh: bool) -> Tensor:
        """gate_up [T, 2I], gate first -> gelu(gate) * up [T, I] (Hendrycks and Gimpel 2016, arXiv
        1606.08415): x times the normal distribution's share below x, or its tanh approximation.
        """

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> LinearOutput:
        """x [T, K], weight [N, K], bias [N] -> x weight^T + bias [T, N]."""

    def gated_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """`silu_and_mul` of x weight^T: x [T, K], weight [2I, K], gate's rows first -> [T, I]."""

    def vocab_linear(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """x [B, H], weight [V, H] -> x weight^T [B, V], in `out` if it is given."""

    def fp8_linear(
        self, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None
    ) -> LinearOutput:
        """x [T, K], weight [N, K] FP8_DTYPE, scales float32, bias [N] -> [T, N].

        A weight is its number times its scale: that of its row, scales [N], or that of its
        FP8_BLOCK x FP8_BLOCK block, scales [ceil(N / FP8_BLOCK), ceil(K / FP8_BLOCK)]. x may be
        quantised: each row with scales for rows, each FP8_BLOCK elements of a row with blocks.
        """

    def packed_linear(
        self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None
    ) -> LinearOutput:
        """x [T, K], weight [N, K] in 4 or 8 bits, bias [N] -> [T, N].

        x is not quantised. A weight's value is rounded to x's dtype before the product.
        """

    def plan_adapters(self, slots: Tensor, num_slots: int) -> object:
        """How `add_adapters` divides its work over T tokens, made once for all layers.

        Args:
            slots: [T] int32, 1 + the slot of each token's adapter; 0: it has none.
            num_slots: of adapters.
        """

    def add_adapters(
        self, out: LinearOutput, x: Tensor, weights: LoRAWeights, plan: object
    ) -> None:
        """Add each token's adapter's terms to a product, in place.

        Args:
            out: [T, N]; of a product in parts, one part gets the terms.
            x: [T, K], or [T, P * R] where `weights.a` is None.
            weights: of all adapters.
            plan: of `plan_adapters`, for these tokens.
        """

    def experts(
        self,
        x: Tensor,
        router_logits: LinearOutput,
        gate_up_weight: Tensor | PackedWeight,
        down_weight: Tensor | PackedWeight,
        num_experts_per_tok: int,
        norm_topk_prob: bool,
        gate_up_scales: Tensor | None = None,
        down_scales: Tensor | None = None,
        *,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        swiglu: ClampedSwiGLU | None = None,
    ) -> LinearOutput:
        """Each token's most probable experts, down(silu(gate(x)) * up(x)) each, summed.

        Each expert's output, bias included, is multiplied by its probability first. With
        norm_topk_prob these probabilities add up to 1: they are then also the softmax of the chosen
        experts' logits alone.

        Args:
            x: [T, H].
            router_logits: [T, E].
            gate_up_weight: [E * 2I, H], gate's rows first in each expert.
            down_weight: [E * H, I]. Both weights are in the model's dtype, both in FP8_DTYPE, or
                both packed, without `order`.
            num_experts_per_tok: how many experts a token has.
            norm_topk_prob: see above.
            gate_up_scales: of an fp8 weight, as in `fp8_linear`; a block is an expert's, or its
                gate's or up's, alone. x, and what goes into down, may then be quantised as well.
            down_scales: the same.
            gate_up_bias: [E * 2I], or None.
            down_bias: [E * H], or None.
            swiglu: takes the place of silu(gate) * up.

        Returns:
            [T, H].
        """

    def qk_norm_rope_store(
        self,
        qkv: LinearOutput,
        q_norm_weight: Tensor | None,
        k_norm_weight: Tensor | None,
        eps: float,
        cos_sin: Tensor,
        positions: Tensor,
        cache: KVCache,
        slot_mapping: Tensor,
    ) -> Tensor:
        """RMS norm of each head and rotation of q and k, and K/V into their slots.

        Args:
            qkv: [T, (Hq + 2 Hkv) * D].
            q_norm_weight: [D], or None: q is not normalised.
            k_norm_weight: the same for k.
            eps: of the norms.
            cos_sin: [max_position, D] float32, the cosines' half first.
            positions: [T] int32.
            cache: written to.
            slot_mapping: [T] int64; slot -1 is not written. A value that is not finite may be
                stored as 0.

        Returns:
            query [T, Hq, D].
        """

    def heads_linear(
        self,
        qkv: Product,
        q_norm_weight: Tensor | None,
        k_norm_weight: Tensor | None,
        eps: float,
        cos_sin: Tensor,
        positions: Tensor,
        cache: KVCache,
        slot_mapping: Tensor,
    ) -> Tensor:
        """`qk_norm_rope_store` of a product -> query [T, Hq, D]."""

    def copy_units(self, cache: KVCache, copies: Tensor) -> None:
        """K/V of whole units of COPY_UNIT slots, with their scales, into other units of the cache.

        Args:
            cache: of the layer; its block size is a multiple of COPY_UNIT.
            copies: [C, 2] int32, (target, source); unit u has the slots from u * COPY_UNIT on. No
                target is a source or another target. A pair of one and the same unit does nothing.
        """

    def attend(
        self,
        query: Tensor,
        cache: KVCache,
        metadata: AttentionMetadata,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Causal attention over the paged cache, the new tokens' K/V included.

        A row of length 0 gives finite values that nobody reads. A block all of whose tokens lie
        before the windows of all the sequence's queries may hold anything: no result depends on it.

        Args:
            query: [T, Hq, D]; with `DecodeMetadata` T is B.
            cache: of the layer.
            metadata: which tokens each query sees, and where they are.
            scale: multiplies the products of q and k, which gives the scores.
            window: a query at position p sees the keys k with p - window < k <= p. At least 1;
                None: k <= p.
            softcap: a score becomes softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118).
                Above 0; None: it stays.
            sinks: [Hq], of any floating dtype, read as float32: a score for each head that takes
                part in the softmax, is not capped and has no value (gpt-oss, arXiv 2508.10925).

        Returns:
            [T, Hq, D].
        """

    def attention(
        self,
        heads: HeadInputs,
        cache: KVCache,
        metadata: AttentionMetadata,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """`qk_norm_rope_store`, `copy_units` and `attend`, for the queries at `logits_indices`.

        Of a `Product` `heads_linear`.

        Args:
            heads: of the T new tokens.
            cache: of the layer; gets their K/V.
            metadata: of the layer's cache group.
            scale: as in `attend`, and so are the others.

        Returns:
            [T, Hq, D], or as many rows as there are `logits_indices`.
        """

    def sigmoid_gate(self, x: Tensor, gate: LinearOutput) -> Tensor:
        """x [T, N], gate [T, N] -> x * sigmoid(gate) [T, N]."""

    def causal_conv1d(
        self, x: LinearOutput, weight: Tensor, state: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """silu of a convolution over each sequence's tokens, with a kernel for each channel.

        Token t gives silu(sum over j < K of weight[:, j] * x[t - K + 1 + j]). What comes before the
        step's first token is in `state`; before a sequence's first token it is 0.

        Args:
            x: [T, C].
            weight: [C, K].
            state: [rows, C, K - 1], the last K - 1 inputs of each sequence; those of this step
                replace them. The padding row's, and that of a row of length 0, may be anything.
            metadata: with `rows`.

        Returns:
            [T, C]; a row of length 0 gives finite values.
        """

    def gated_delta_rule(
        self,
        qkv: Tensor,
        beta: LinearOutput,
        decay: LinearOutput,
        decay_rate: Tensor,
        decay_bias: Tensor,
        state: Tensor,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """The gated delta rule (Yang et al. 2024, arXiv 2412.06464), for each value head.

        q and k are divided by their lengths, q by sqrt(Dk) as well. The head's state S [Dk, Dv], 0
        before the sequence, changes with each token:

            S = exp(-exp(decay_rate) * softplus(decay + decay_bias)) * S
            S = S + k (sigmoid(beta) * (v - S^T k))^T
            output = S^T q

        Args:
            qkv: [T, 2 Hk Dk + Hv Dv], q first. Each key head serves Hv / Hk value heads in a row.
            beta: [T, Hv].
            decay: [T, Hv].
            decay_rate: [Hv] float32.
            decay_bias: [Hv] float32.
            state: [rows, Hv, Dk, Dv] float32, as the last step left it; changed in place.
            metadata: with `rows`.

        Returns:
            [T, Hv, Dv]; a row of length 0 gives finite values.
        """

    def gated_rms_norm(self, x: Tensor, gate: LinearOutput, weight: Tensor, eps: float) -> Tensor:
        """norm(x) * silu(gate): x [T, Hv, Dv], gate [T, Hv * Dv], weight [Dv] -> [T, Hv * Dv]."""

    def plan_decode(
        self,
        cache: KVCache,
        block_tables: Tensor,
        context_lens: Tensor,
        num_common_tokens: Tensor | None = None,
        window: int | None = None,
    ) -> object:
        """How the work of a decode step is divided, made once for all layers of one shape.

        `DecodeMetadata` carries it. Without one `attend` makes its own, and so it does with a plan
        of another window or number of KV heads, once for all layers that need the same.

        Args:
            cache: of any layer.
            block_tables: [B, W] int32.
            context_lens: [B] int32.
            num_common_tokens: [1] int32 or None. All rows that are not empty begin with so many
                tokens of equal K/V, fewer than any of these rows has. They are read once for the
                batch, from the first row's blocks. Prefixes that only some rows share are not.
                Layers with a window read no token once.
            window: of the layers, as in `attend`.
        """

    def sample(
        self,
        logits: Tensor,
        temperatures: Tensor,
        seeds: Tensor,
        positions: Tensor,
        first_token_id: int,
        vocab_size: int,
        thresholds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A token for each row by Gumbel-max sampling; the plain argmax at temperature 0.

        The noise is a function of (seed, position, token id) and (seed, position, token id //
        DRAW_GROUP) alone, so a draw is the same in any batch, on any ranks and in any step.

        Args:
            logits: [B, V], of token ids [first_token_id, first_token_id + V).
            temperatures: [B] float32. A row below 0 is skipped: its logits are not read, it scores
                -inf and its token is any valid one.
            seeds: [B, 2] int32.
            positions: [B] int32.
            first_token_id: see logits; a multiple of DRAW_GROUP.
            vocab_size: ids from here on never win.
            thresholds: [B] float32; a token whose logit is less never wins.

        Returns:
            The winners' scores [B] float32 and token ids [B] int32; the lowest id wins a tie.
        """

    def filter_thresholds(
        self,
        logits: Tensor,
        temperatures: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        vocab_size: int,
    ) -> Tensor:
        """The tokens that survive min_p, top_k and then top_p have a logit >= their row's result.

        Of p = softmax(logits / temperature), min_p keeps p >= min_p * max(p). top_k keeps the k
        largest, and whatever equals the last of them. top_p keeps the largest p whose sum reaches
        top_p of what min_p and top_k left, and whatever equals the last of them.

        Args:
            logits: [B, V]; -inf has probability 0, a NaN never counts.
            temperatures: [B] float32; at 0 or less all three are off.
            top_k: [B] int32; off are 0, what is less, and V and more.
            top_p: [B] float32; 1 is off.
            min_p: [B] float32; 0 is off.
            vocab_size: columns from here on are padding.

        Returns:
            [B] float32; -inf where all three are off.
        """

    def gather_decode_inputs(
        self, row_table: Tensor, rows: Tensor, block_size: int
    ) -> DecodeInputs:
        """row_table [R, BLOCK_TABLE + W] int32, rows [B] int32 -> the rows' next inputs."""

    def write_back(
        self,
        row_table: Tensor,
        rows: Tensor,
        token_ids: Tensor,
        positions: Tensor,
        temperatures: Tensor | None = None,
    ) -> None:
        """Enter the sampled tokens: LAST_TOKEN = token, LENGTH = position + 2.

        rows, token_ids and positions are [B] int32. The last row, which is padding, is left as it
        is, and so are rows whose temperature, [B] float32, is below 0.
        """
