"""What a start costs: modules that the first token does not need, and memory beside the weights."""

import ctypes
import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_checks import script_environment
from safetensors.torch import save_file

from nanovllm import LLM
from nanovllm.engine import startup
from nanovllm.layers import weights
from nanovllm.models import checkpoint

HEAVY = (
    "jinja2",
    "llguidance",
    "pandas",
    "scipy",
    "sklearn",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "transformers",
)
SCRIPT = """
import sys
from nanovllm import LLM, SamplingParams

llm = LLM(sys.argv[1], device="cpu")
params = SamplingParams(max_tokens=1, ignore_eos=True, logprobs=1, stop=["never"])
(output,) = llm.generate("the fox", params, use_tqdm=False)
print(len(output.outputs[0].token_ids), *sorted(set(sys.argv[2:]) & set(sys.modules)))
assert llm.get_tokenizer().encode("the fox") == output.prompt_token_ids
print(type(llm.config.hf_config).__name__, "transformers" in sys.modules)
"""


def test_heavy_modules_are_not_imported_for_the_first_token(tiny_dir):
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_dir), *HEAVY],
        env=script_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == ["1", "Qwen3Config True"]


def resident_bytes(name: str) -> int:
    """A size of this process: "VmRSS" now, "VmHWM" the most since it was reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1])


@pytest.fixture(scope="module")
def large_dir(tmp_path_factory) -> Path:
    """Two files with an embedding and an LM head of 24 MiB each, and little else."""
    directory = tmp_path_factory.mktemp("models") / "large"
    directory.mkdir()
    hidden, inner, vocab = 256, 16, 48 * 1024
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        **{f"{layer}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"},
        **{f"{layer}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")},
        f"{layer}mlp.down_proj.weight": (hidden, inner),
        f"{layer}input_layernorm.weight": (hidden,),
        f"{layer}post_attention_layernorm.weight": (hidden,),
        "model.norm.weight": (hidden,),
    }
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, directory / "model-1.safetensors")
    head = tensors["model.embed_tokens.weight"]
    save_file({"lm_head.weight": head}, directory / "model-2.safetensors")
    return directory


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_loading_takes_little_more_host_memory_than_the_weights(
    large_dir, load_format, monkeypatch
):
    """Neither the files' pages nor a copy of a tensor stay in memory beside the parameters."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("the peak of a process's memory is Linux's")
    monkeypatch.setattr(weights, "MAX_PIECE", 1 << 18)
    monkeypatch.setattr(checkpoint, "MAX_MAPPED_BYTES", 1 << 20)
    gc.collect()
    try:
        reset.write_text("5")
    except OSError:
        pytest.skip("the peak of a process's memory cannot be reset here")
    before = resident_bytes("VmRSS")
    with LLM(
        str(large_dir),
        device="cpu",
        skip_tokenizer_init=True,
        load_format=load_format,
        num_kvcache_blocks=1,
        max_num_seqs=1,
    ) as llm:
        size = sum(parameter.nbytes for parameter in llm.model_runner.model.parameters())
        peak = resident_bytes("VmHWM") - before
    assert size > 48 << 20
    assert peak < 1.3 * size


def test_nothing_of_cuda_is_imported_without_its_driver(tiny_dir, monkeypatch):
    def missing(name: str) -> None:
        raise OSError(name)

    imported: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(startup, "importlib", SimpleNamespace(import_module=imported.append))
    _, device, _, _ = startup.prepare(str(tiny_dir), {"device": "auto"})
    assert imported == []
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
