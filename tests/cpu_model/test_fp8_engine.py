"""kv_cache_dtype="fp8": the tokens of transformers over quantised K/V, whatever the switches."""

import itertools

import pytest
import torch
from engine_checks import check_nothing_is_held, check_varied, generate, greedy, tiny_engine
from transformers import AttentionInterface, Qwen3ForCausalLM

from nanovllm import ArgumentError, SamplingParams

MAX_TOKENS = 16
# Any two switches in all their combinations, and all at once with a pool that preempts.
SWITCHES = [s for s in itertools.product([True, False], repeat=4) if sum(s) in (0, 3)]


def fp8_engine(model_dir, **kwargs):
    return tiny_engine(model_dir, kv_cache_dtype="fp8", **kwargs)


@pytest.fixture(scope="module")
def completions(shallow_dir, workload):
    """Of each prompt alone, from an engine that shares, splits and preempts nothing."""
    with fp8_engine(
        shallow_dir, enable_prefix_caching=False, async_scheduling=False, max_num_seqs=1
    ) as llm:
        completions = generate(llm, workload.prompts, greedy(MAX_TOKENS))
    check_varied(completions)
    return completions


def through_fp8(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] as it comes back from the cache."""
    scale = (x.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-30)  # a row may be zero
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def attention_over_fp8(
    module,
    query,
    key,
    value,
    mask,
    scaling,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    **kwargs,
):
    """Causal attention [B, H, T, D] -> [B, T, H, D] for transformers; K and V go through fp8."""
    group = query.shape[1] // key.shape[1]
    key, value = (through_fp8(x).repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    everything = torch.ones(scores.shape[-2:], dtype=torch.bool)
    hidden = everything.triu(1)
    window = sliding_window
    if type(module).__name__ == "Qwen2MoeAttention":  # it passes none
        window = getattr(module, "sliding_window", None)
    if window is not None:
        hidden |= everything.tril(-window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2), None


@torch.inference_mode()
def greedy_gaps(model_dir, prompts, completions, attention: str) -> torch.Tensor:
    """How far the logit of each completion token lies below the largest, by transformers."""
    AttentionInterface.register("over_fp8", attention_over_fp8)
    model = Qwen3ForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation=attention
    )
    gaps = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0]
        logits = logits[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
        gaps.append(logits.amax(1) - chosen)
    return torch.cat(gaps)


def test_greedy_tokens_are_those_of_transformers_over_quantised_keys_and_values(
    shallow_dir, workload, completions
):
    """Rounding may tip an element to the next fp8 number, hence a small tolerance."""
    few = workload.prompts[:9], completions[:9]  # up to 300 tokens
    quantised = greedy_gaps(shallow_dir, *few, "over_fp8")
    plain = greedy_gaps(shallow_dir, *few, "sdpa")
    assert quantised.max() < 0.02
    assert (plain > 0.02).sum() > 5  # or the check would not notice the quantisation


@pytest.mark.parametrize(("caching", "chunked", "overlap", "ample"), SWITCHES)
def test_no_switch_changes_a_token(
    shallow_dir, workload, completions, caching, chunked, overlap, ample
):
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 90} if chunked else {}
    pool = {} if ample else {"num_kvcache_blocks": 7, "watermark": 0}
    with fp8_engine(
        shallow_dir,
        enable_prefix_caching=caching,
        async_scheduling=overlap,
        **chunks,
        **pool,
    ) as llm:
        for _ in range(1 + caching):  # the second time with a warm prefix cache
            assert generate(llm, workload.prompts, greedy(MAX_TOKENS)) == completions
            check_nothing_is_held(llm)
        assert (llm.scheduler.num_preemptions > 0) == (not ample)


@pytest.mark.usefixtures("ranks_are_threads")
def test_two_ranks_change_no_token(shallow_dir, workload, completions):
    with fp8_engine(shallow_dir, tensor_parallel_size=2) as llm:
        for _ in range(2):
            assert generate(llm, workload.prompts, greedy(MAX_TOKENS)) == completions
            check_nothing_is_held(llm)


def test_sampled_tokens_do_not_depend_on_the_pool(shallow_dir, workload):
    params = SamplingParams(temperature=0.8, max_tokens=MAX_TOKENS, ignore_eos=True)
    outputs = []
    for kwargs in ({}, {"num_kvcache_blocks": 7, "watermark": 0}):
        with fp8_engine(shallow_dir, **kwargs) as llm:
            outputs.append(generate(llm, workload.prompts, params))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_half_precision(shallow_dir, workload, dtype):
    with fp8_engine(shallow_dir, dtype=dtype, enable_prefix_caching=False) as llm:
        first = generate(llm, workload.prompts, greedy(MAX_TOKENS))
        assert generate(llm, workload.prompts, greedy(MAX_TOKENS)) == first
        check_nothing_is_held(llm)
    check_varied(first)


def test_the_same_memory_holds_more_blocks(shallow_dir):
    num_blocks = {}
    for kv_cache_dtype in ("auto", "fp8", "fp8_e4m3"):
        with tiny_engine(
            shallow_dir,
            dtype="bfloat16",
            kv_cache_dtype=kv_cache_dtype,
            num_kvcache_blocks=None,
            kv_cache_memory_bytes=64 << 20,
        ) as llm:
            num_blocks[kv_cache_dtype] = llm.config.num_kvcache_blocks
            runner = llm.model_runner
            scales = 0 if runner.kv_scales is None else runner.kv_scales.nbytes
            assert 0.95 * (64 << 20) < runner.kv_cache.nbytes + scales <= 64 << 20
    # 16 numbers of one byte and a scale of four, where there were 16 of two.
    heads = 2 * 2 * 256 * 4  # K and V, layers, tokens, KV heads
    assert num_blocks["auto"] == (64 << 20) // (heads * 32)
    assert num_blocks["fp8"] == num_blocks["fp8_e4m3"] == (64 << 20) // (heads * 20)


def test_flash_attn_is_refused_by_name(shallow_dir):
    with pytest.raises(ArgumentError, match="'fp8', which attention_backend 'flash-attn'"):
        fp8_engine(shallow_dir, attention_backend="flash-attn")
