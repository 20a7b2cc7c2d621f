"""Transformers' own module of a family that has no file here, on packed tokens and a paged cache.

The module calls an attention function from outside: see `transformers_attention`. When a model is
built, what it gives is compared with transformers' own attention: a module that mixes tokens by
other means (convolutions, recurrent states, encoders) is refused.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from nanovllm.errors import ArgumentError, shown_error
from nanovllm.kernels.types import (
    FP8_DTYPE,
    AttentionMetadata,
    DecodeMetadata,
    KVCache,
    PrefillMetadata,
)
from nanovllm.layers.attention import at_logits_indices
from nanovllm.layers.context import ModelContext
from nanovllm.layers.embedding import ParallelLMHead
from nanovllm.models.host_reads import HostReads
from nanovllm.models.loader import expected_tensors, load_model, load_tensor, shortened
from nanovllm.models.transformers_attention import (
    ATTENTION,
    PROBE,
    AttentionCalls,
    Mask,
    PagedAttention,
    window_of,
)
from nanovllm.models.transformers_parallel import as_whole, split

# How far apart results of equal meaning may be, by their Euclidean norms.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
CHECK_BLOCK_SIZE = 256  # any that the kernels take


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
    """Hidden states to all logits on every rank, with what transformers does between them."""

    def __init__(self, model: "TransformersForCausalLM", vocab_size: int) -> None:
        super().__init__(vocab_size, model.module.get_output_embeddings().weight, model.context)
        self.first_token_id = 0
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

    Attributes:
        eager_reason: why decode steps cannot be captured in CUDA graphs, known once it is loaded;
            None: nothing speaks against it.
        was_captured: whether they have been.

    Raises:
        ArgumentError: transformers cannot build it, or its ranks cannot share it; or `load` finds
            that it mixes tokens otherwise than by attention.
    """

    def __init__(self, hf_config: PretrainedConfig, vocab_size: int, context: ModelContext) -> None:
        super().__init__()
        self.name = (hf_config.architectures or [type(hf_config).__name__])[0]
        self.context = context
        self.eager_reason: str | None = None
        self.was_captured = False
        is_split = context.tp.size > 1
        try:
            with torch.device("cpu") if is_split else context.device, no_init_weights():
                self.module = AutoModelForCausalLM.from_config(
                    hf_config, dtype=context.dtype, attn_implementation="eager"
                )
            self.module.eval().requires_grad_(False)
            self.module.tie_weights()  # what comes after initialising
            if is_split:
                split(self.module, self.module.tp_plan, context)
        except Exception as error:
            raise self._refusal(f"transformers does not build it: {shown_error(error)}") from error
        if not is_split:
            for parameter in self.module.parameters():
                as_whole(parameter)
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
        whole: PreTrainedModel | None = None
        if load_format == "dummy":
            load_model(self, directory, load_format, std)
        else:
            whole = self._load_files(directory)
        if not self.calls.paged:
            try:
                self._check(whole if self.context.tp.size > 1 else None)
            except ArgumentError:
                raise
            except Exception as error:
                raise self._refusal(shown_error(error)) from error
            self.attentions = nn.ModuleList(self.calls.paged)
        return True

    def _load_files(self, directory: str) -> PreTrainedModel:
        """Fill the parameters from files; returns transformers' own model of them, on the CPU."""
        config = self.module.config
        try:
            loaded, info = type(self.module).from_pretrained(
                directory,
                config=config,
                dtype=self.context.dtype,
                attn_implementation="eager",
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
        state = loaded.state_dict()
        for name in expected_tensors(self):
            load_tensor(self, name, state[name])
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                if name in state:
                    buffer.copy_(state[name])
        return loaded.eval()

    def run_body(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
        """[T] -> hidden states [T, hidden_size]."""
        self.calls.begin(metadata)
        hidden_states = self._call_body(input_ids, positions)
        assert self.calls.is_complete
        return hidden_states

    def _call_body(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        ids = input_ids.long().unsqueeze(0)
        output = self._output_of(self.module, ids, positions.long().unsqueeze(0))
        self.output_class = type(output)
        return output.last_hidden_state[0]

    def _output_of(self, module: PreTrainedModel, ids: Tensor, positions: Tensor) -> Any:
        """What a module's body gives for ids and positions [1, T]."""
        return getattr(module, self.body_name)(
            input_ids=ids,
            position_ids=positions,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
        )

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
    def _check(self, whole: PreTrainedModel | None) -> None:
        """ArgumentError unless packed tokens give what separate rows give in transformers.

        Two sequences, prefilled in one row and in parts, then decoded in one batch.

        whole: what they are compared with, on the CPU and on rank 0 alone; None: this module.
        """
        device, lengths = self.context.device, (7, 4)
        generator = torch.Generator().manual_seed(0)
        ids = [
            torch.randint(0, self.lm_head.vocab_size, (n + 1,), generator=generator)[None]
            for n in lengths
        ]
        positions = [torch.arange(n + 1)[None] for n in lengths]
        expected: list[tuple[Tensor, Tensor]] = []
        if whole is None or self.context.tp.rank == 0:
            reference = self.module if whole is None else whole
            for tensors in zip(ids, positions, strict=True):
                i, p = (t.to(reference.device) for t in tensors)
                hidden = self._output_of(reference, i, p).last_hidden_state[0]
                logits = reference(input_ids=i, use_cache=False).logits[0]
                expected.append((hidden.to(device), logits.to(device)))
        ids, positions = ([t[0].to(device) for t in tensors] for tensors in (ids, positions))
        self._probe(ids[0], positions[0])
        self.module.set_attn_implementation(ATTENTION)
        found = self._run_packed(ids, positions, lengths)
        for hidden, (whole_hidden, whole_logits) in zip(found, expected, strict=False):
            self._compare(hidden, whole_hidden, "hidden states")
            logits = self.lm_head(hidden)
            if logits.shape[-1] != len(self.lm_head.weight):
                raise ValueError("it has not one logit for each row of its LM head")
            self._compare(logits, whole_logits, "logits")

    def _run_packed(
        self, ids: list[Tensor], positions: list[Tensor], lengths: tuple[int, int]
    ) -> list[Tensor]:
        """The hidden states of two sequences; notes what a CUDA graph cannot capture.

        All but each one's last token are prefilled, in two steps.
        """
        device, block_size = self.context.device, CHECK_BLOCK_SIZE
        for paged in self.calls.paged:
            spec = paged.cache_spec
            shape = 2, 2, block_size, spec.num_kv_heads, spec.head_dim
            paged.cache = KVCache(*torch.zeros(shape, dtype=self.context.dtype, device=device))
        tables = torch.tensor([[0], [1]], dtype=torch.int32, device=device)
        found: list[list[Tensor]] = [[], []]
        reads = HostReads()  # of the decode step
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
            with reads if starts == lengths else nullcontext():
                hidden = self.model(new_ids, new_positions, metadata)
                self.lm_head(hidden)
            for seq, part in enumerate(hidden.split(sizes)):
                found[seq].append(part)
        if reads.found is not None:
            self.eager_reason = self.eager_reason or f"the host waits for {reads.found}"
        for paged in self.calls.paged:
            del paged.cache
        return [torch.cat(parts_of_seq) for parts_of_seq in found]

    def _probe(self, input_ids: Tensor, positions: Tensor) -> None:
        """Give each module that calls the attention function a `PagedAttention`."""
        context = self.context
        layers = DynamicCache(config=self.module.config).layers  # of transformers' `generate`
        forgotten: dict[int | None, int | None] = {
            i: getattr(layer, "sliding_window", None) for i, layer in enumerate(layers)
        }
        windows: dict[Mask, int | None] = {}  # layers share masks

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
            kept = forgotten.get(getattr(module, "layer_idx", None))
            if kept is not None:
                seen = torch.arange(2 * kept, device=query.device)
                if int(attention_mask(seen[-1:], seen).sum()) > kept:
                    raise ValueError(
                        f"the cache of {type(module).__name__} forgets tokens that its mask shows"
                    )
            if attention_mask not in windows:
                length = context.max_model_len or len(positions)
                windows[attention_mask] = window_of(attention_mask, length, query.device)
            names = {"softcap": "softcap", "s_aux": "sinks"}
            extras = {names[name] for name in names if kwargs.get(name) is not None}
            if any(isinstance(kwargs.get(name), Tensor) for name in ("scaling", "softcap")):
                extras.add("a scale or soft cap that is a tensor")
            head_dims, window = (key.shape[-1], value.shape[-1]), windows[attention_mask]
            paged = PagedAttention(key.shape[1], head_dims, context, window, extras)
            if paged.obstacle is not None:
                self._note_obstacle(f"{type(module).__name__}: {paged.obstacle}")
            self.calls.paged.append(paged)
            vars(module)["attention_calls"] = self.calls
            return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None

        AttentionInterface.register(PROBE, record)
        self.module.set_attn_implementation(PROBE)
        self._call_body(input_ids, positions)
        if not self.calls.paged:
            raise ValueError("its layers do not call an attention function from outside")

    def _note_obstacle(self, obstacle: str) -> None:
        """Attention without a kernel: no CUDA graphs, and ArgumentError for an fp8 cache."""
        if self.context.kv_cache_dtype == FP8_DTYPE:
            raise ArgumentError(
                f"kv_cache_dtype 'fp8' is not supported for {self.name}, as no attention kernel "
                f"computes {obstacle}"
            )
        self.eager_reason = f"no attention kernel computes {obstacle}"

    def _compare(self, found: Tensor, expected: Tensor, what: str) -> None:
        difference = (found.float() - expected.float()).norm() / expected.float().norm()
        if not difference <= TOLERANCES[self.context.dtype]:
            shared = "its tp_plan changes results, or " if self.context.tp.size > 1 else ""
            raise self._refusal(
                f"{shared}it mixes tokens by other means than attention over a KV cache (its "
                f"packed {what} differ by {difference:.1e} from those of separate rows)"
            )
