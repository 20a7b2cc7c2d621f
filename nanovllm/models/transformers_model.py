"""Transformers' own module of a family that has no file here, on packed tokens and a paged cache.

The module calls an attention function from outside, which stores and reads K/V in our blocks. The
masks that transformers makes come to it as functions of positions, so sliding windows and chunks
hold at any length. When a model is built, what it gives is compared with transformers' own
attention: a module that mixes tokens by other means (convolutions, recurrent states, encoders) is
refused.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    PretrainedConfig,
)

from nanovllm.errors import ArgumentError, shown_error
from nanovllm.kernels.types import (
    AttentionMetadata,
    DecodeMetadata,
    KVCache,
    KVCacheSpec,
    PrefillMetadata,
)
from nanovllm.layers.attention import Attention, at_logits_indices
from nanovllm.layers.context import ModelContext
from nanovllm.layers.embedding import ParallelLMHead
from nanovllm.layers.weights import Parameter, Shard
from nanovllm.models.loader import load_model, shortened

ATTENTION, PROBE = "nanovllm", "nanovllm_probe"  # by transformers' names of implementations
MAX_SCORE_ELEMENTS = 2**24  # attention scores alive at a time
# How far apart results of equal meaning may be, by their Euclidean norms.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class Mask:
    """Which keys a query sees, by their positions in the sequence: transformers' mask function."""

    def __init__(self, function: Callable[[int, int, Tensor, Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """[..., Lq] and [..., Lk] -> bool [..., Lq, Lk]."""
        q, k = query_positions.unsqueeze(-1), key_positions.unsqueeze(-2)
        return self.function(0, 0, q, k) & (k <= q)

    def __getattr__(self, name: str) -> object:
        raise AttributeError("it makes a mask of its own out of transformers' one")

    def __getitem__(self, index: object) -> "Mask":
        parts = index if isinstance(index, tuple) else (index,)
        if all(part in (slice(None), slice(0, None)) for part in parts):
            return self
        raise TypeError("it makes a mask of its own out of transformers' one")


class Scoring(NamedTuple):
    """How an attention function makes scores of products, and weights of scores."""

    mask: Mask
    scale: float  # multiplies the products
    softcap: float | None  # scores become softcap * tanh(score / softcap)
    sinks: Tensor | None  # [Hq], a score for each head that takes its part and has no value


class PagedAttention(Attention):
    """One call of the attention function: K/V into the cache, and attention over it.

    Keys and values of different sizes are stored in the larger one's.
    """

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """query [T, Hq, Dk], key [T, Hkv, Dk], value [T, Hkv, Dv] -> [T, Hq, Dv]."""
        dim, value_dim = self.cache_spec.head_dim, value.shape[-1]
        stored = metadata.slot_mapping >= 0
        slots = metadata.slot_mapping[stored]
        for new, memory in ((key, self.cache.key), (value, self.cache.value)):
            heads = F.pad(new, (0, dim - new.shape[-1]))[stored]
            memory.view(-1, *memory.shape[2:])[slots] = heads.to(memory.dtype)
        out = query.new_empty(*query.shape[:2], value_dim)
        if isinstance(metadata, DecodeMetadata):
            self._decode(query, scoring, metadata, out)
        else:
            self._prefill(query, scoring, metadata, out)
        return out

    def _prefill(
        self,
        query: Tensor,
        scoring: Scoring,
        metadata: PrefillMetadata,
        out: Tensor,
    ) -> None:
        """A sequence at a time, and of its queries as many as the scores' memory allows."""
        block_size = self.cache.key.shape[1]
        q_ends, k_ends = metadata.cu_seqlens_q.tolist(), metadata.cu_seqlens_k.tolist()
        for seq, table in enumerate(metadata.block_tables):
            q_begin, q_end = q_ends[seq : seq + 2]
            len_k = k_ends[seq + 1] - k_ends[seq]
            pages = table[: -(-len_k // block_size)].long()
            key, value = (m[pages].flatten(0, 1)[:len_k].transpose(0, 1) for m in self.cache[:2])
            positions = torch.arange(len_k, device=query.device)
            rows = max(1, MAX_SCORE_ELEMENTS // (query.shape[1] * len_k))
            for begin in range(q_begin, q_end, rows):
                end = min(begin + rows, q_end)
                first, last = begin - q_end + len_k, end - q_end + len_k
                out[begin:end] = attention(
                    query[begin:end].transpose(0, 1),
                    key[:, :last, : query.shape[-1]],
                    value[:, :last, : out.shape[-1]],
                    scoring.mask(positions[first:last], positions[:last]),
                    scoring,
                ).transpose(0, 1)

    def _decode(
        self,
        query: Tensor,
        scoring: Scoring,
        metadata: DecodeMetadata,
        out: Tensor,
    ) -> None:
        """Slices of rows, each padded to the slice's longest context."""
        num_heads, block_size = query.shape[1], self.cache.key.shape[1]
        lens = metadata.context_lens.tolist()
        rows = max(1, MAX_SCORE_ELEMENTS // max(1, max(lens) * num_heads * query.shape[-1]))
        for begin in range(0, len(lens), rows):
            part = slice(begin, begin + rows)
            length = metadata.context_lens[part].long().unsqueeze(1)  # [b, 1]
            positions = torch.arange(max(1, max(lens[part])), device=query.device)
            # Past its end a row reads its own first slot: a masked NaN would spoil the product.
            places = torch.where(positions < length, positions, 0)
            pages = metadata.block_tables[part].long().gather(1, places // block_size)
            slots = pages * block_size + places % block_size
            key, value = (m.flatten(0, 1)[slots].transpose(1, 2) for m in self.cache[:2])
            out[part] = attention(
                query[part].unsqueeze(2),
                key[..., : query.shape[-1]],
                value[..., : out.shape[-1]],
                scoring.mask(length - 1, positions.expand_as(places)).unsqueeze(1),
                scoring,
            ).squeeze(2)


class AttentionCalls:
    """The calls of the attention function in one pass through the module, in their order."""

    def __init__(self) -> None:
        self.paged: list[PagedAttention] = []
        self.metadata: AttentionMetadata
        self._index = 0

    def begin(self, metadata: AttentionMetadata) -> None:
        """A pass begins."""
        self.metadata, self._index = metadata, 0

    def next(self) -> PagedAttention:
        """The next call's attention."""
        self._index += 1
        return self.paged[self._index - 1]

    @property
    def is_complete(self) -> bool:
        """Whether the pass has made all of its calls."""
        return self._index == len(self.paged)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scoring: Scoring,
) -> Tensor:
    """query [..., Hq, Lq, Dk], key [..., Hkv, Lk, Dk], value [..., Hkv, Lk, Dv] -> [..., Lq, Dv].

    Args:
        query: as above.
        key: as above.
        value: as above.
        visible: bool, which key each query sees; of a shape that broadcasts to [..., Hq, Lq, Lk].
        scoring: how the products become weights; its mask is not read.
    """
    group = query.shape[-3] // key.shape[-3]
    key, value = (x.to(query.dtype).repeat_interleave(group, -3) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.float().masked_fill(~visible, torch.finfo(torch.float32).min)
    if scoring.sinks is not None:
        sink = scoring.sinks.float().view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1).to(query.dtype)
    return weights[..., : key.shape[-2]] @ value


def _mask(*args: object, mask_function: Callable[..., Tensor], **kwargs: object) -> Mask:
    """For transformers' mask interface."""
    return Mask(mask_function)


def _run(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """For transformers' attention interface: query [1, Hq, T, Dk] -> [1, T, Hq, Dv]."""
    assert isinstance(attention_mask, Mask)
    calls = module.attention_calls
    assert isinstance(calls, AttentionCalls)
    paged = calls.next()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    scoring = Scoring(attention_mask, scale, softcap, s_aux)
    out = paged.attend(query, key, value, scoring, calls.metadata)
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION, _run)
AttentionMaskInterface.register(ATTENTION, _mask)
AttentionMaskInterface.register(PROBE, _mask)


class TransformersBody(nn.Module):
    """Token ids to hidden states, as `CausalLM.model`."""

    def __init__(self, model: "TransformersForCausalLM") -> None:
        super().__init__()
        self.run = model.run_body  # no submodule: its parameters would come twice

    def forward(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
        """input_ids and positions [T] int32 -> [T, hidden_size], the last tokens' of a prefill."""
        hidden_states = self.run(input_ids, positions, metadata)
        return at_logits_indices(hidden_states, metadata.last_tokens or metadata)


class TransformersLMHead(ParallelLMHead):
    """Hidden states to logits, with all that transformers does between them."""

    def __init__(self, model: "TransformersForCausalLM", vocab_size: int) -> None:
        super().__init__(vocab_size, model.module.get_output_embeddings().weight, model.context)
        self.run = model.run_head

    def forward(self, hidden_states: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden_states [B, hidden_size] -> logits [B, vocab_size], in `out` if it is given."""
        logits = self.run(hidden_states)
        return logits if out is None else out.copy_(logits)


class _Given(nn.Module):
    """Stands in for the body while the head runs: returns what it is given."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output
        self.decoder = self.forward  # of a body that is no more than a decoder in a wrapper

    def forward(self, *args: object, **kwargs: object) -> object:
        """The output, whatever the arguments."""
        return self.output


class TransformersForCausalLM(nn.Module):
    """A module of transformers with the interface of `CausalLM`.

    Args:
        hf_config: the model's configuration.
        vocab_size: token ids that may be sampled.
        context: of one rank.

    Raises:
        ArgumentError: transformers cannot build it, or `load` finds that it mixes tokens otherwise
            than by attention.
    """

    def __init__(self, hf_config: PretrainedConfig, vocab_size: int, context: ModelContext) -> None:
        super().__init__()
        self.name = (hf_config.architectures or [type(hf_config).__name__])[0]
        self.context = context
        try:
            with context.device:
                self.module = AutoModelForCausalLM.from_config(
                    hf_config, dtype=context.dtype, attn_implementation="eager"
                )
        except Exception as error:
            raise self._refusal(f"transformers does not build it: {shown_error(error)}") from error
        self.module.eval().requires_grad_(False)
        for parameter in self.module.parameters():
            everything = tuple(slice(0, n) for n in parameter.shape)
            parameter.__class__ = Parameter
            parameter.shards = {"": Shard(tuple(parameter.shape), everything, everything)}
        name = self.module.base_model_prefix
        self.body_name = name if hasattr(self.module, name) else "model"
        self.calls = AttentionCalls()
        if self.module.get_output_embeddings() is None:
            raise self._refusal("it has no LM head")
        self.model = TransformersBody(self)
        self.lm_head = TransformersLMHead(self, vocab_size)

    def _refusal(self, reason: str) -> ArgumentError:
        return ArgumentError(f"{self.name} does not run on transformers' module here: {reason}")

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """By transformers' own names."""
        return self.module.named_parameters(*args, **kwargs)

    def load(self, directory: str, load_format: str, std: float) -> bool:
        """As `loader.load_model`; the first time the model is checked then."""
        if load_format == "dummy":
            load_model(self, directory, load_format, std)
        else:
            self._load_files(directory)
        if not self.calls.paged:
            try:
                self._check()
            except ArgumentError:
                raise
            except Exception as error:
                raise self._refusal(shown_error(error)) from error
            self.attentions = nn.ModuleList(self.calls.paged)
        return True

    def _load_files(self, directory: str) -> None:
        config = self.module.config
        try:
            loaded, info = type(self.module).from_pretrained(
                directory,
                config=config,
                dtype=self.context.dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:
            raise ArgumentError(
                f"cannot load model directory {directory!r}: {shown_error(error)}"
            ) from error
        problems = [
            f"{kind} tensors: {shortened(sorted(map(str, info[key])))}"
            for kind, key in (
                ("missing", "missing_keys"),
                ("unexpected", "unexpected_keys"),
                ("misshapen", "mismatched_keys"),
            )
            if info[key]
        ]
        if problems:
            raise ArgumentError(
                f"model directory {directory!r} does not fit its config; {'; '.join(problems)}"
            )
        self.module.load_state_dict(loaded.state_dict())

    def run_body(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
        """[T] -> hidden states [T, hidden_size]."""
        self.calls.begin(metadata)
        hidden_states = self._call_body(input_ids, positions)
        assert self.calls.is_complete
        return hidden_states

    def _call_body(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        ids = input_ids.long().unsqueeze(0)
        output = getattr(self.module, self.body_name)(
            input_ids=ids,
            position_ids=positions.long().unsqueeze(0),
            attention_mask=torch.ones_like(ids),
            use_cache=False,
        )
        self.output_class = type(output)
        return output.last_hidden_state[0]

    def run_head(self, hidden_states: Tensor) -> Tensor:
        """[B, hidden_size] -> logits [B, vocab_size]."""
        body = getattr(self.module, self.body_name)
        given = _Given(self.output_class(last_hidden_state=hidden_states[None]))
        setattr(self.module, self.body_name, given)
        try:
            ids = torch.zeros(1, len(hidden_states), dtype=torch.long, device=self.context.device)
            return self.module(input_ids=ids, use_cache=False).logits[0]
        finally:
            setattr(self.module, self.body_name, body)

    # ---- what is checked once -------------------------------------------------------------------

    @torch.inference_mode()
    def _check(self) -> None:
        """ArgumentError unless packed tokens give what separate rows give in transformers.

        Two sequences, prefilled in one row and in parts, then decoded in one batch.
        """
        device, lengths = self.context.device, (7, 4)
        generator = torch.Generator().manual_seed(0)
        ids = [
            torch.randint(0, self.lm_head.vocab_size, (n + 1,), generator=generator).to(device)
            for n in lengths
        ]
        positions = [torch.arange(n + 1, device=device) for n in lengths]
        whole = [self._call_body(i, p) for i, p in zip(ids, positions, strict=True)]
        expected = [self.module(input_ids=i[None], use_cache=False).logits[0] for i in ids]
        if expected[0].shape[-1] != len(self.lm_head.weight):
            raise ValueError("it has not one logit for each row of its LM head")
        self._probe(ids[0], positions[0])
        self.module.set_attn_implementation(ATTENTION)
        block_size = max(lengths) + 1
        for paged in self.calls.paged:
            heads, dim, dtype, _ = paged.cache_spec
            memory = torch.zeros(2, 2, block_size, heads, dim, dtype=dtype, device=device)
            paged.cache = KVCache(memory[0], memory[1])
        tables = torch.tensor([[0], [1]], dtype=torch.int32, device=device)
        found: list[list[Tensor]] = [[], []]
        for starts, ends in (((0, 0), (3, 2)), ((3, 2), lengths), (lengths, (8, 5))):
            parts = [slice(a, b) for a, b in zip(starts, ends, strict=True)]
            new_ids = torch.cat([i[part] for i, part in zip(ids, parts, strict=True)])
            new_positions = torch.cat([p[part] for p, part in zip(positions, parts, strict=True)])
            slots = torch.cat([p[parts[s]] + s * block_size for s, p in enumerate(positions)])
            sizes = [b - a for a, b in zip(starts, ends, strict=True)]
            metadata: AttentionMetadata
            if starts == lengths:
                context_lens = torch.tensor(ends, dtype=torch.int32, device=device)
                metadata = DecodeMetadata(slots, tables, context_lens)
            else:
                q_ends, k_ends = [0, sizes[0], sum(sizes)], [0, ends[0], sum(ends)]
                cu_q, cu_k = (
                    torch.tensor(e, dtype=torch.int32, device=device) for e in (q_ends, k_ends)
                )
                metadata = PrefillMetadata(slots, tables, cu_q, cu_k, max(sizes), max(ends))
            hidden = self.model(new_ids, new_positions, metadata)
            for seq, part in enumerate(hidden.split(sizes)):
                found[seq].append(part)
        for seq, parts_of_seq in enumerate(found):
            hidden = torch.cat(parts_of_seq)
            self._compare(hidden, whole[seq], "hidden states")
            self._compare(self.lm_head(hidden), expected[seq], "logits")
        for paged in self.calls.paged:
            del paged.cache

    def _probe(self, input_ids: Tensor, positions: Tensor) -> None:
        """Give each module that calls the attention function a `PagedAttention`."""
        dtype = self.context.dtype
        layers = DynamicCache(config=self.module.config).layers  # of transformers' `generate`
        windows: dict[int | None, int | None] = {
            i: getattr(layer, "sliding_window", None) for i, layer in enumerate(layers)
        }

        def record(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: object,
            **kwargs: object,
        ) -> tuple[Tensor, None]:
            if not isinstance(attention_mask, Mask):
                raise TypeError(f"{type(module).__name__} has a mask of its own")
            window = windows.get(getattr(module, "layer_idx", None))
            if window is not None:
                seen = torch.arange(2 * window, device=query.device)
                if int(attention_mask(seen[-1:], seen).sum()) > window:
                    raise ValueError(
                        f"the cache of {type(module).__name__} forgets tokens that its mask shows"
                    )
            spec = KVCacheSpec(key.shape[1], max(key.shape[-1], value.shape[-1]), dtype)
            self.calls.paged.append(PagedAttention(spec, input_ids, self.context))
            vars(module)["attention_calls"] = self.calls
            return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None

        AttentionInterface.register(PROBE, record)
        self.module.set_attn_implementation(PROBE)
        self._call_body(input_ids, positions)
        if not self.calls.paged:
            raise ValueError("its layers do not call an attention function from outside")

    def _compare(self, found: Tensor, expected: Tensor, what: str) -> None:
        difference = (found.float() - expected.float()).norm() / expected.float().norm()
        if not difference <= TOLERANCES[self.context.dtype]:
            raise self._refusal(
                "it mixes tokens by other means than attention over a KV cache (its packed "
                f"{what} differ by {difference:.1e} from those of separate rows)"
            )
