"""cpu_offload_gb on CUDA: the same tokens, the bytes that were asked for, whatever else is on."""

import gc
import random

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VOCAB_SIZE, reference_greedy, save_family, save_model

from nanovllm import LLM, SamplingParams
from nanovllm.engine import prefill_graphs

MAX_TOKENS = 24
GIB, MIB = 1 << 30, 1 << 20
TINY = 1e-9  # GiB: as few layers as save anything, three
ALL = 1000.0  # GiB: more than any model here has
CHUNKS = {"enable_chunked_prefill": True, "max_num_batched_tokens": 200}
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
needs_hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
    reason="products with fp8 weights are for compute capability 9.x",
)


def random_prompts(lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


PROMPTS = random_prompts((1, 2, 17, 64, 255, 256, 257, 300, 511, 513))


def engine(path, **kwargs):
    settings = {"max_model_len": 1024, "max_num_seqs": 16, "num_kvcache_blocks": 128}
    return LLM(str(path), **(settings | kwargs))


def generate(llm, prompts=PROMPTS, params=GREEDY):
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def check_host_copies(llm, num_layers=None) -> None:
    """The offloaded parameters are pinned; vectors and all others are on the GPU."""
    runner = llm.model_runner
    offloaded = {id(parameter) for parameter in runner.offload.parameters()}
    assert num_layers in (None, len(runner.offload.layers))
    for name, parameter in runner.model.named_parameters():
        assert parameter.is_cuda == (id(parameter) not in offloaded), name
        assert parameter.is_cuda or parameter.is_pinned(), name


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=7)


@pytest.fixture(scope="module")
def reference(model_dir):
    return reference_greedy(model_dir, PROMPTS, MAX_TOKENS)


# Tokens


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("chunks", [{}, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize("gib", [TINY, ALL])
def test_float32_gives_the_tokens_of_transformers(model_dir, reference, graphs, chunks, gib):
    with engine(model_dir, cpu_offload_gb=gib, enforce_eager=not graphs, **chunks) as llm:
        check_host_copies(llm, 3 if gib == TINY else 7)
        assert (llm.model_runner.graphs is not None) == graphs
        for _ in range(2):  # the second time with a warm prefix cache
            assert generate(llm) == reference
        common = [[*PROMPTS[7], 1], [*PROMPTS[7], 2]] * 4  # graphs captured while the engine runs
        tokens = generate(llm, common)
        assert tokens[:2] * 4 == tokens


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("settings", [{}, CHUNKS], ids=["whole", "chunks"])
def test_copies_are_never_late_nor_early(large_dir, graphs, settings, monkeypatch):
    """Layers whose copies take longer than their kernels, and prefills that take longer than both.

    The kernels are the same with and without, so the numbers are, too. Weights on the host exclude
    graphs of padded prefill steps.
    """
    monkeypatch.setattr(prefill_graphs, "LARGEST", 0)
    prompts = random_prompts([5, 600, 17, 300, *range(30, 60, 4)], seed=3)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    runs = []
    for gib in (0, 0.25, 0.6, ALL):
        with engine(
            large_dir,
            cpu_offload_gb=gib,
            load_format="dummy",
            dtype="bfloat16",
            enforce_eager=not graphs,
            **settings,
        ) as llm:
            runs.append([generate(llm, prompts[:n], params) for n in (1, len(prompts))])
            if gib:
                check_host_copies(llm, 16 if gib == ALL else None)
    assert len({tuple(tokens) for tokens in runs[0][1]}) > 3
    for run in runs[1:]:
        assert run == runs[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss", "qwen3.5", "gemma3", "starcoder2"])
def test_families_give_the_same_tokens(family, dtype, tmp_path):
    path = save_family(tmp_path / "model", family)
    runs = []
    for gib in (0, ALL):
        with engine(path, cpu_offload_gb=gib, dtype=dtype) as llm:
            runs.append(generate(llm))
            if gib:
                check_host_copies(llm)
    assert runs[0] == runs[1]


@needs_hopper
@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
def test_fp8_weights_give_the_same_tokens(family, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    if family == "qwen3-moe":
        sizes |= {
            "architecture": "Qwen3MoeForCausalLM",
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        }
    path = save_model(tmp_path / "model", **sizes)
    runs = []
    for gib in (0, ALL):
        with engine(path, cpu_offload_gb=gib, dtype="bfloat16", quantization="fp8") as llm:
            runs.append(generate(llm))
            if gib:
                check_host_copies(llm)
                dtypes = {p.dtype for p in llm.model_runner.offload.parameters()}
                assert torch.float8_e4m3fn in dtypes
    assert runs[0] == runs[1]


# Memory


def test_as_many_bytes_as_were_asked_for_become_free(large_dir):
    allocated, peaks, num_blocks = [], [], []
    asked = int(0.5 * GIB)
    for gib in (0, 0.5):
        for settings in ({"num_kvcache_blocks": 8}, {"num_kvcache_blocks": None}):
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with engine(
                large_dir,
                cpu_offload_gb=gib,
                load_format="dummy",
                dtype="bfloat16",
                max_num_batched_tokens=1024,
                gpu_memory_utilization=0.3,
                **settings,
            ) as llm:
                if settings["num_kvcache_blocks"]:
                    allocated.append(torch.cuda.memory_allocated() - before)
                    peaks.append(torch.cuda.max_memory_allocated() - before)
                else:
                    num_blocks.append(llm.config.num_kvcache_blocks)
                    block = llm.model_runner.kv_cache.nbytes // num_blocks[-1]
                if gib:
                    layer = len(llm.model_runner.offload.layers[0].memory)
                    assert layer > 70 * MIB
    assert asked - MIB <= allocated[0] - allocated[1] <= asked + layer + MIB
    # Nor were they there at any time of the start.
    assert peaks[0] - peaks[1] >= asked - 64 * MIB
    more = (num_blocks[1] - num_blocks[0]) * block
    assert asked - 128 * MIB <= more <= asked + layer + 128 * MIB


@pytest.mark.parametrize("graphs", [True, False])
def test_sleep_gives_the_buffers_back_and_keeps_the_host_copies(model_dir, reference, graphs):
    with engine(model_dir, cpu_offload_gb=TINY, enforce_eager=not graphs) as llm:
        offload = llm.model_runner.offload
        for level in (1, 2, 1):
            llm.sleep(level)
            assert all(buffer.untyped_storage().nbytes() == 0 for buffer in offload.buffers)
            other = torch.full((64 * MIB,), 255, dtype=torch.uint8, device="cuda")
            llm.wake_up()
            if level == 2:
                assert not any(p.any() for p in llm.model_runner.model.parameters())
                llm.reload_weights()
            check_host_copies(llm)
            assert generate(llm) == reference
            del other


def test_new_weights_go_to_the_host_copies(model_dir, reference, tmp_path):
    other_dir = save_model(tmp_path / "other", seed=5, num_hidden_layers=7)
    state = load_file(other_dir / "model.safetensors")
    expected = reference_greedy(other_dir, PROMPTS, MAX_TOKENS)
    with engine(model_dir, cpu_offload_gb=TINY, **CHUNKS) as llm:
        assert generate(llm) == reference
        ids = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS]
        llm.step()  # a chunk of a prompt, whose copies nothing waits for
        llm.load_weights({name: tensor.cuda() for name, tensor in state.items()})
        llm.abort_request(ids)
        assert generate(llm) == expected
        llm.load_weights(load_file(model_dir / "model.safetensors"))
        assert generate(llm) == reference


def test_the_host_memory_is_free_again_after_exit(model_dir):
    """Pages that stay locked cannot be locked twice."""
    for _ in range(3):
        with engine(model_dir, cpu_offload_gb=ALL) as llm:
            memories = [layer.memory for layer in llm.model_runner.offload.layers]
            assert all(memory.is_pinned() for memory in memories)
        del llm
        gc.collect()
        assert not any(memory.is_pinned() for memory in memories)


@pytest.mark.two_gpus
@pytest.mark.parametrize("graphs", [True, False])
def test_two_ranks_offload_their_own_parts(model_dir, reference, graphs):
    with engine(
        model_dir, cpu_offload_gb=TINY, tensor_parallel_size=2, enforce_eager=not graphs
    ) as llm:
        check_host_copies(llm)
        assert generate(llm) == reference
        llm.sleep(1)
        llm.wake_up()
        assert generate(llm) == reference
