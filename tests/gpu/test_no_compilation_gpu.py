"""No kernel is compiled after the constructor: engines with an empty cache, each in a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lora_adapters import LINEAR, VOCABULARY, save_adapter
from tiny_models import edit_config, save_family, save_model

SCRIPT = """
import json, os, sys
from pathlib import Path
from triton import knobs
from nanovllm import LLM, SamplingParams
from nanovllm.lora_request import LoRARequest
from nanovllm.sampling_params import StructuredOutputsParams

model, options, kind = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
compiled, feature = [], None

def note(*, src, cache_hit, **other):
    if not cache_hit:
        compiled.append((feature, src.name))

def num_cached():  # whoever compiles, in whichever process, puts it there
    return len(list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))

before = num_cached()
llm = LLM(model, **options)
at_start = num_cached() - before
knobs.compilation.listener = note
print(f"{at_start} kernels compiled by the constructor", file=sys.stderr)
window = options.get("max_model_len", 1024) - 40
size = llm.config.model_config.vocab_size
prompt = lambda length, first=3: [(first + 7 * i) % (size - 3) + 3 for i in range(length)]
adapters = [LoRARequest(path, number, path) for number, path in enumerate(sys.argv[4:], 1)]
def taking_turns(call, prompts, *args, **options):
    turns = [None, *adapters]
    requests = [turns[(i + 1) % len(turns)] for i in range(len(prompts))]
    call(prompts, *args, use_tqdm=False, lora_request=requests, **options)
GENERATION = {
    "plain": {"temperature": 0.0},
    "temperature": {"temperature": 0.8, "seed": 3},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "top_k": {"temperature": 0.8, "top_k": 20},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "all filters": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.2, "presence_penalty": 0.3,
                  "frequency_penalty": 0.1, "top_p": 0.9},
    "logit_bias": {"temperature": 0.8, "logit_bias": {5: 2.0}},
    "allowed": {"temperature": 0.8, "allowed_token_ids": list(range(3, 90))},
    "logprobs": {"temperature": 0.8, "logprobs": 3},
    "prompt_logprobs": {"temperature": 0.8, "prompt_logprobs": 2},
    "n": {"temperature": 0.8, "n": 3},
}
if kind == "tokenizer":
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    GENERATION["json"] = {"structured_outputs": StructuredOutputsParams(json=schema)}
for name, values in GENERATION.items():
    for batch in (1, 3, 4, 7, 13, 37):
        feature = f"{name}, {batch} requests"
        params = SamplingParams(max_tokens=6, ignore_eos=name != "json", **values)
        lengths = [(11 + 29 * i) % 300 + 1 for i in range(batch)]
        taking_turns(llm.generate, [prompt(n, i) for i, n in enumerate(lengths)], params)
params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
for length in (1, 2, 5, 17, 33, 63, 65, 129, 255, 257, 513, window):
    feature = f"a prompt of {length}"
    taking_turns(llm.generate, [prompt(length, length)], params)
shared = prompt(600 if window > 700 else 300)
for batch in (2, 9, 33, 40):
    feature = f"a shared prefix, {batch} requests"
    taking_turns(llm.generate, [shared + prompt(5, i) for i in range(batch)], params)
    feature = f"a mixed batch of {batch}"
    mixed = [SamplingParams(max_tokens=6, ignore_eos=True, **v)
             for v in list(GENERATION.values())[:12]] * 4
    taking_turns(llm.generate, [prompt(9 + i, i) for i in range(batch)], mixed[:batch])
if kind != "hybrid":
    for batch in (1, 3, 40):
        prompts = [prompt(9 + 5 * i, i) for i in range(batch)]
        feature = f"embed, {batch} prompts"
        taking_turns(llm.embed, prompts)
        feature = f"states of all tokens, {batch} prompts"
        taking_turns(llm.encode, prompts, pooling_task="token_embed")
print(json.dumps({"at_start": at_start, "later": compiled}))
"""


def compiled_by(
    model: Path, cache: Path, kind: str, adapters: tuple[Path, ...] = (), **options
) -> dict:
    """How many kernels the constructor compiled, and which came later.

    adapters: requests take turns among them and none.
    """
    settings = {"max_model_len": 1024, "max_num_seqs": 40, "num_kvcache_blocks": 200} | options
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model), json.dumps(settings), kind, *map(str, adapters)],
        env=os.environ | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32}
    path = save_model(tmp_path_factory.mktemp("models") / "dense", **sizes)
    edit_config(path, dtype="bfloat16")
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True, "dtype": "float16"},
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 128, "kv_cache_dtype": "fp8"},
        {"quantization": "int4"},
        {"quantization": "fp8"},
    ],
    ids=lambda options: ",".join(options) or "default",
)
def test_nothing_is_compiled_after_the_constructor(dense, tmp_path, options):
    found = compiled_by(dense, tmp_path, "tokenizer", **options)
    assert found["at_start"] > 20
    assert found["later"] == []


@pytest.mark.parametrize("max_lora_rank", [16, 256])
def test_nothing_is_compiled_later_with_adapters(dense, tmp_path, max_lora_rank):
    adapters = (
        save_adapter(tmp_path / "linear", dense, seed=1).path,
        save_adapter(tmp_path / "words", dense, seed=2, targets=(*LINEAR, *VOCABULARY)).path,
    )
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": max_lora_rank}
    found = compiled_by(dense, tmp_path / "cache", "tokenizer", adapters, **options)
    assert found["at_start"] > 20
    assert found["later"] == []


@pytest.mark.parametrize("family", ["qwen3-moe", "gemma3", "gpt-oss", "qwen3.5"])
def test_nothing_is_compiled_later_in_other_families(family, tmp_path):
    path = save_family(tmp_path / family, family)
    kind = "hybrid" if family == "qwen3.5" else "ids"
    found = compiled_by(path, tmp_path / "cache", kind, dtype="bfloat16")
    assert found["at_start"] > 20
    assert found["later"] == []


@pytest.mark.two_gpus
def test_nothing_is_compiled_later_with_two_ranks(dense, tmp_path):
    found = compiled_by(dense, tmp_path, "tokenizer", tensor_parallel_size=2)
    assert found["later"] == []


def test_a_cache_that_is_built_ahead_leaves_nothing_to_the_constructor(dense, tmp_path):
    # Parameters that decide on kernels, and the GPU's own limits, are those of `compiled_by`.
    options = ["--max-model-len", "1024", "--max-num-seqs", "40"]
    command = [sys.executable, "-m", "nanovllm.warmup", str(dense), *options]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr
    found = compiled_by(dense, tmp_path, "tokenizer")
    assert found == {"at_start": 0, "later": []}


def test_the_shapes_of_qwen3_0_6b(dense, tmp_path):
    path = save_model(tmp_path / "model")
    edit_config(
        path,
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        dtype="bfloat16",
    )
    found = compiled_by(path, tmp_path / "cache", "ids", load_format="dummy", max_num_seqs=512)
    assert found["at_start"] > 20
    assert found["later"] == []
