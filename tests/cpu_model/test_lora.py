"""Requests with LoRA adapters get the tokens of transformers with the adapter in its weights."""

import pytest
import torch
from engine_checks import (
    check_nothing_is_held,
    check_varied,
    drain,
    generate,
    greedy,
    random_prompts,
    tiny_engine,
    token_ids,
)
from lora_adapters import FUSED, LINEAR, VOCABULARY, Adapter, merged, reference, save_adapter
from nanovllm.lora.request import LoRARequest
from tiny_models import greedy_tokens, save_family, save_model

from nanovllm import ArgumentError, BeamSearchParams, LLMEngine, SamplingParams
from nanovllm.kernels.torch_ops import dequantize_packed

MAX_TOKENS = 12
LENGTHS = (1, 17, 300, 5, 256, 40, 257, 90)


@pytest.fixture(scope="module")
def adapters(tiny_dir, tmp_path_factory) -> list[Adapter]:
    """Of different ranks, scales and modules."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        save_adapter(folder / "all", tiny_dir, seed=1),
        save_adapter(folder / "rs", tiny_dir, seed=2, rank=3, use_rslora=True),
        save_adapter(
            folder / "patterns",
            tiny_dir,
            seed=3,
            rank=4,
            targets=("q_proj", "v_proj", "down_proj"),
            ranks={"v_proj": 16},
            alphas={"down_proj": 3},
        ),
        save_adapter(folder / "words", tiny_dir, seed=4, targets=(*LINEAR, *VOCABULARY)),
    ]


def requests(adapters: list[Adapter | None]) -> list[LoRARequest | None]:
    """Adapters as requests name them; equal ones have one number."""
    numbers: dict[str, int] = {}
    return [
        adapter
        and LoRARequest(
            adapter.path.name,
            numbers.setdefault(str(adapter.path), len(numbers) + 1),
            str(adapter.path),
        )
        for adapter in adapters
    ]


def mixed(adapters: list[Adapter]) -> list[Adapter | None]:
    """The adapters of LENGTHS' prompts."""
    return [None, *adapters, None, adapters[0], adapters[2]]


@pytest.fixture(scope="module")
def expected(tiny_dir, adapters) -> list[list[int]]:
    chosen, prompts = mixed(adapters), random_prompts(LENGTHS)
    with tiny_engine(tiny_dir, enable_lora=True, max_loras=4) as llm:
        guesses = run(llm, chosen, prompts)
    completions = reference(tiny_dir, chosen, prompts, MAX_TOKENS, guesses)
    check_varied(completions)
    return completions


@pytest.fixture(scope="module")
def llm(tiny_dir):
    """Two adapters at a time, three in host memory."""
    with tiny_engine(tiny_dir, enable_lora=True, max_loras=2, max_cpu_loras=3) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _nothing_is_left(request):
    yield
    if "llm" in request.fixturenames:
        llm = request.getfixturevalue("llm")
        check_nothing_is_held(llm)
        for adapter_id in llm.list_loras():
            assert llm.remove_lora(adapter_id)


def run(llm, adapters, prompts, params=None) -> list[list[int]]:
    params = params or greedy(MAX_TOKENS)
    return token_ids(llm.generate(prompts, params, False, lora_request=requests(adapters)))


def test_mixed_adapters_equal_merged_weights(llm, adapters, expected):
    """Four adapters and none, two of them at a time, in one call."""
    assert run(llm, mixed(adapters), random_prompts(LENGTHS)) == expected
    assert len(llm.list_loras()) == 3
    without = generate(llm, random_prompts(LENGTHS), greedy(MAX_TOKENS))
    assert [a == b for a, b in zip(without, expected, strict=True)] == [
        adapter is None for adapter in mixed(adapters)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_kvcache_blocks": 5, "watermark": 0},
        {"max_num_batched_tokens": 64, "enable_chunked_prefill": True, "max_num_seqs": 3},
    ],
)
def test_preempted_and_chunked_prompts(tiny_dir, adapters, expected, settings):
    settings = {"enable_lora": True, "max_loras": 4} | settings
    with tiny_engine(tiny_dir, **settings) as llm:
        assert run(llm, mixed(adapters), random_prompts(LENGTHS)) == expected
        check_nothing_is_held(llm)
        assert llm.scheduler.num_preemptions > 0 or "num_kvcache_blocks" not in settings


@pytest.mark.usefixtures("ranks_are_threads")
def test_ranks_share_adapters(tiny_dir, adapters, expected):
    with tiny_engine(tiny_dir, enable_lora=True, max_loras=2, tensor_parallel_size=2) as llm:
        assert run(llm, mixed(adapters), random_prompts(LENGTHS)) == expected
        assert llm.pin_lora(1) and 1 in llm.list_loras()


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama2", (*LINEAR, *VOCABULARY)),
        ("gemma", (*LINEAR, *VOCABULARY)),  # tied, with a multiplier of embeddings
        ("phi4-mini", (*FUSED, "o_proj", "down_proj")),  # fused, with features in another order
        ("gemma2", (*LINEAR, "lm_head")),  # with norms after the blocks, and a soft cap
    ],
)
def test_families(tmp_path, name, targets):
    model_dir = save_family(tmp_path / "model", name)
    adapter = save_adapter(tmp_path / "adapter", model_dir, targets=targets)
    chosen: list[Adapter | None] = [adapter, None]
    prompts = random_prompts((20, 30))
    completions = reference(model_dir, chosen, prompts, 5)
    with tiny_engine(model_dir, enable_lora=True, max_lora_rank=8) as llm:
        assert run(llm, chosen, prompts, greedy(5)) == completions
        assert run(llm, [None], prompts[:1], greedy(5)) != completions[:1]


def test_a_quantised_base_stays_quantised(tmp_path):
    """The adapter is added to what the rounded weights give."""
    model_dir = save_model(tmp_path / "model", hidden_size=128, intermediate_size=128)
    adapter = save_adapter(tmp_path / "adapter", model_dir)
    prompts = random_prompts((20, 5))
    with tiny_engine(model_dir, enable_lora=True, quantization="int8") as llm:
        found = run(llm, [adapter, None], prompts)
        layers = llm.model_runner.model.model.layers
        rounded = {}
        for index, layer in enumerate(layers):
            for module, names in (
                (
                    layer.self_attn.qkv_proj,
                    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ),
                (layer.self_attn.o_proj, ("self_attn.o_proj",)),
                (layer.mlp.gate_up_proj, ("mlp.gate_proj", "mlp.up_proj")),
                (layer.mlp.down_proj, ("mlp.down_proj",)),
            ):
                whole = dequantize_packed(module.weight, torch.float32)
                sizes = [
                    shard.target[0].stop - shard.target[0].start for shard in module.shards.values()
                ]
                for name, part in zip(names, whole.split(sizes), strict=True):
                    rounded[f"model.layers.{index}.{name}"] = part
    for chosen, prompt, completion in zip((adapter, None), prompts, found, strict=True):
        model = merged(model_dir, None)
        for name, weight in rounded.items():
            change = chosen.changes[name] if chosen else 0
            model.get_submodule(name).weight.data = weight + change
        assert greedy_tokens(model, [prompt], MAX_TOKENS) == [completion]


def test_prefixes_are_shared_within_an_adapter(llm, tiny_dir, adapters):
    [prompt] = random_prompts([300], seed=7)
    chosen = [adapters[0], adapters[1], None, adapters[0], adapters[1], None]
    completions = reference(tiny_dir, chosen[:3], [prompt] * 3, 4)
    cached = []
    for lora_request, completion in zip(requests(chosen), completions * 2, strict=True):
        [output] = llm.generate(prompt, greedy(4), False, lora_request=lora_request)
        assert output["token_ids"] == completion
        assert output.lora_request is output.outputs[0].lora_request is lora_request
        cached.append(output.num_cached_tokens)
    assert cached == [0, 0, 0, 256, 256, 256]


def test_log_probabilities_are_those_of_the_adapter(llm, tiny_dir, adapters):
    """Of prompts too, whose tokens the LM head reads in pieces."""
    chosen = [adapters[3], None, adapters[0]]
    prompts = random_prompts((30, 20, 300), seed=8)
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0, logprobs=0)
    outputs = llm.generate(prompts, params, False, lora_request=requests(chosen))
    for adapter, prompt, output in zip(chosen, prompts, outputs, strict=True):
        ids = torch.tensor([prompt + output["token_ids"]])
        with torch.inference_mode():
            exact = merged(tiny_dir, adapter)(ids).logits[0].log_softmax(-1)
        rows = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        found = [row[token].logprob for row, token in zip(rows, ids[0, 1:].tolist(), strict=True)]
        wanted = exact[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-3, atol=1e-3)


def test_every_call_takes_adapters(llm, tiny_dir, adapters):
    [lora_request] = requests(adapters[:1])
    [prompt] = random_prompts([20], seed=9)
    [completion] = reference(tiny_dir, adapters[:1], [prompt], 4)
    llm.add_request(prompt, greedy(4), lora_request=lora_request)
    assert [*drain(llm)[0].values()] == [completion]
    llm.enqueue(prompt, greedy(4), lora_request)
    assert token_ids(llm.wait_for_completion(use_tqdm=False)) == [completion]
    pieces = llm.generate_stream(prompt, greedy(4), lora_request=lora_request)
    assert [token for piece in pieces for token in piece.token_ids] == completion
    [found] = llm.beam_search(prompt, BeamSearchParams(1, 4, ignore_eos=True), lora_request)
    assert found.sequences[0].tokens == prompt + completion
    conversation = [{"role": "user", "content": "hello"}]
    [output] = llm.chat(conversation, greedy(4), False, lora_request)
    [expected] = reference(tiny_dir, adapters[:1], [output.prompt_token_ids], 4)
    assert output["token_ids"] == expected
    embeddings = [
        llm.embed(prompt, use_tqdm=False, lora_request=adapter)[0].outputs.embedding
        for adapter in (lora_request, None)
    ]
    with torch.inference_mode():
        for adapter, embedding in zip((adapters[0], None), embeddings, strict=True):
            states = (
                merged(tiny_dir, adapter).model(torch.tensor([prompt])).last_hidden_state[0, -1]
            )
            exact = torch.nn.functional.normalize(states, dim=0)
            torch.testing.assert_close(torch.tensor(embedding), exact, rtol=1e-3, atol=1e-4)


def test_vllm_engine(tiny_dir, adapters):
    [lora_request] = requests(adapters[:1])
    [prompt] = random_prompts([20], seed=9)
    engine = LLMEngine(str(tiny_dir), enable_lora=True, max_model_len=64, device="cpu")
    engine.add_request("a", prompt, greedy(4), lora_request=lora_request)
    while engine.has_unfinished_requests():
        outputs = engine.step()
    assert token_ids(outputs) == reference(tiny_dir, adapters[:1], [prompt], 4)
    assert outputs[0].lora_request == lora_request and engine.list_loras() == {1}
    engine.shutdown()


def test_adapters_are_loaded_and_dropped(llm, adapters):
    first, second, third, fourth = requests(adapters)
    assert llm.add_lora(first) and not llm.add_lora(first)
    assert llm.add_lora(second) and llm.add_lora(third) and llm.list_loras() == {1, 2, 3}
    assert llm.pin_lora(1) and llm.add_lora(fourth)
    assert llm.list_loras() == {1, 3, 4}, "what was used longest ago makes room, if not pinned"
    assert llm.remove_lora(3) and not llm.remove_lora(3) and llm.list_loras() == {1, 4}
    with pytest.raises(ArgumentError, match="there is no adapter 3"):
        llm.pin_lora(3)


def test_a_folder_is_read_again_on_request(llm, tmp_path, tiny_dir, adapters):
    other = save_adapter(tmp_path / "other", tiny_dir, seed=99)
    [prompt] = random_prompts([300], seed=10)
    [first] = requests(adapters[:1])
    assert run(llm, adapters[:1], [prompt], greedy(4)) == reference(
        tiny_dir, adapters[:1], [prompt], 4
    )
    moved = LoRARequest("other", 1, str(other.path))
    with pytest.raises(ArgumentError, match="lora_int_id 1 is that of .*all.*load_inplace=True"):
        llm.generate(prompt, greedy(1), False, lora_request=moved)
    again = LoRARequest("other", 1, str(other.path), load_inplace=True)
    llm.add_request(prompt, greedy(1), lora_request=first)
    with pytest.raises(ArgumentError, match="adapter 1 cannot go: unfinished requests use it"):
        llm.add_lora(again)
    with pytest.raises(ArgumentError, match="adapter 1 cannot go: unfinished requests use it"):
        llm.remove_lora(1)
    drain(llm)
    [output] = llm.generate(prompt, greedy(4), False, lora_request=again)
    assert [output["token_ids"]] == reference(tiny_dir, [other], [prompt], 4)
    assert output.num_cached_tokens == 0


def test_wrong_adapters_are_refused_before_anything_is_queued(llm, tmp_path, tiny_dir, adapters):
    prompts = random_prompts((3, 4))
    large = save_adapter(tmp_path / "large", tiny_dir, rank=17)
    other_model = save_model(tmp_path / "model", hidden_size=72, head_dim=8, num_hidden_layers=5)
    wider = save_adapter(tmp_path / "wider", other_model, targets=("q_proj",))
    deeper = save_adapter(tmp_path / "deeper", other_model, targets=("norm", "o_proj"))
    known = requests(adapters)[0]
    for lora_request, message in (
        (LoRARequest("a", 9, str(tmp_path / "none")), "there is no such folder"),
        (LoRARequest("a", 9, str(tiny_dir)), "has no adapter_config.json"),
        (LoRARequest("a", 9, str(large.path)), "rank of .* is 17, and max_lora_rank is 16"),
        (LoRARequest("a", 9, str(wider.path)), r"model.layers.3.self_attn.q_proj"),
        (LoRARequest("a", 9, str(deeper.path)), "take no adapter in this model: .*layers.3"),
        ([known], r"lengths of prompts \(2\) and lora_request \(1\)"),
        ([known, "adapter"], "must be a LoRARequest or a list of them"),
    ):
        with pytest.raises(ArgumentError, match=message):
            llm.generate(prompts, greedy(1), False, lora_request=lora_request)
        check_nothing_is_held(llm)
    assert llm.generate(prompts, greedy(2), False, lora_request=known)


def test_an_adapter_that_vanishes_ends_its_request_alone(llm, tmp_path, tiny_dir):
    adapter = save_adapter(tmp_path / "gone", tiny_dir)
    prompts = random_prompts((5, 6))
    expected = generate(llm, prompts[1:], greedy(MAX_TOKENS))
    gone = LoRARequest("gone", 8, str(adapter.path))
    llm.enqueue(prompts, greedy(MAX_TOKENS), [gone, None])
    (adapter.path / "adapter_model.safetensors").unlink()
    failed, other = llm.wait_for_completion(use_tqdm=False)
    assert failed["token_ids"] == [] and "has no adapter_model.safetensors" in failed.error
    assert other["token_ids"] == expected[0] and other.error is None
    assert llm.remove_lora(8)


def test_an_engine_without_adapters_says_what_it_needs(tiny_dir, adapters):
    [lora_request] = requests(adapters[:1])
    with tiny_engine(tiny_dir, max_loras=4) as llm:
        assert not llm.model_runner.model.model._forward_pre_hooks
        with pytest.raises(ArgumentError, match=r"lora_request needs LLM\(..., enable_lora=True\)"):
            llm.generate([1, 2], greedy(1), False, lora_request=lora_request)
        with pytest.raises(ArgumentError, match=r"it needs LLM\(..., enable_lora=True\)"):
            llm.add_lora(lora_request)
        assert generate(llm, [[1, 2]], greedy(1))


def test_peft_agrees(llm, tiny_dir, adapters, tmp_path):
    """With adapters of this file's making, and with one of PEFT's."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    prompts = random_prompts((20, 9), seed=11)
    base = merged(tiny_dir, None)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=[*LINEAR, "embed_tokens", "lm_head"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, r".*up_proj": 5},
        alpha_pattern={"mlp.*": 3},
    )
    made = peft.get_peft_model(base, config)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.1)
    made.save_pretrained(tmp_path / "peft")
    for path in (tmp_path / "peft", *(adapter.path for adapter in adapters)):
        model = peft.PeftModel.from_pretrained(merged(tiny_dir, None), path)
        lora_request = LoRARequest("peft", 1, str(path), load_inplace=True)
        outputs = llm.generate(prompts, greedy(MAX_TOKENS), False, lora_request=lora_request)
        found = token_ids(outputs)
        assert found == greedy_tokens(model, prompts, MAX_TOKENS, found)
