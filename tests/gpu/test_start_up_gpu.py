"""What a start on the GPU imports, and the host memory it takes; each of its parts is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from starts import time_parts

import nanovllm

GIB = 1 << 30
AUSTEN = Path(nanovllm.__file__).parent / "assets" / "austen-7m"


def test_a_start_imports_no_transformers(tmp_path):
    seconds, heavy = time_parts(str(AUSTEN), {}, tmp_path)
    assert "transformers" not in heavy
    assert {"torch", "weights", "warm-up", "graphs", "first token"} <= seconds.keys()


START = """
import re, sys, threading
from pathlib import Path

import torch

from nanovllm import LLM, SamplingParams

# Pages of anonymous memory and of shared memory. Pages of files are dropped where memory is short.
def host_bytes():
    status = Path("/proc/self/status").read_text()
    return sum(1024 * int(re.search(rf"{name}:\\s+(\\d+)", status)[1])
               for name in ("RssAnon", "RssShmem"))

torch.zeros(1, device="cuda")
before, peak, ended = host_bytes(), [0], threading.Event()

def watch():
    while not ended.wait(0.002):
        peak[0] = max(peak[0], host_bytes())

threading.Thread(target=watch, daemon=True).start()
options = {"quantization": sys.argv[2]} if len(sys.argv) > 2 else {}
llm = LLM(sys.argv[1], skip_tokenizer_init=True, max_model_len=256, max_num_seqs=4, **options)
(output,) = llm.generate([[1, 2]], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
ended.set()
print(peak[0] - before)
"""


@pytest.fixture(scope="module")
def two_gib_dir(tmp_path_factory) -> Path:
    """A checkpoint of 2 GiB in bfloat16, in one file."""
    directory = tmp_path_factory.mktemp("models")
    hidden, inner, layers, vocab = 4096, 16384, 4, 4096
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "self_attn.q_proj.weight": (4096, hidden),
                "self_attn.k_proj.weight": (1024, hidden),
                "self_attn.v_proj.weight": (1024, hidden),
                "self_attn.o_proj.weight": (hidden, 4096),
                "self_attn.q_norm.weight": (128,),
                "self_attn.k_norm.weight": (128,),
                "mlp.gate_proj.weight": (inner, hidden),
                "mlp.up_proj.weight": (inner, hidden),
                "mlp.down_proj.weight": (hidden, inner),
                "input_layernorm.weight": (hidden,),
                "post_attention_layernorm.weight": (hidden,),
            }.items()
        }
    save_file(
        {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()},
        directory / "model.safetensors",
    )
    return directory


@pytest.mark.parametrize("quantization", [None, "fp8", "int4"])
def test_a_start_takes_no_more_host_memory_than_the_model_and_a_gib(two_gib_dir, quantization):
    """Of a process that has a CUDA context, whatever the weights become on the GPU."""
    size = (two_gib_dir / "model.safetensors").stat().st_size
    assert size > 1.8 * GIB
    process = subprocess.run(
        [sys.executable, "-c", START, str(two_gib_dir), *filter(None, [quantization])],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    peak = int(process.stdout.split()[-1])
    print(f"\n{quantization}: {peak / GIB:.2f} GiB for a file of {size / GIB:.2f}")
    assert peak <= size + GIB
