"""bench.py, example.py and the usage that nano-vLLM documents, as a user runs them."""

import ast
import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
from engine_checks import REPO, SHARED, script_environment
from forked_python import ForkedPython
from tiny_models import save_model
from vocabulary import VOCAB_SIZE

import nanovllm
from nanovllm import SamplingParams

RESULT = r"Total: (\d+)tok, Time: \d+\.\d\ds, Throughput: \d+\.\d\dtok/s\n"
SHIPPED = Path(nanovllm.__file__).parent / "assets" / "austen-7m"


def run_script(*command, popen=subprocess.Popen, **environment):
    """What a script prints, on stdout and on stderr; it must end well."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    settings = {"env": script_environment(**environment)}
    with popen([sys.executable, *map(str, command)], **pipes, **settings) as process:
        try:
            printed = process.communicate(timeout=1000)
        finally:
            process.kill()
    assert process.returncode == 0, printed[1]
    return printed


fork_script = partial(run_script, popen=ForkedPython)


# ---- bench.py -------------------------------------------------------------------------------


@pytest.fixture
def bench():
    spec = importlib.util.spec_from_file_location("bench_script", REPO / "bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeLLM:
    """Remembers how it was used."""

    def __init__(self, model, **kwargs):
        self.model, self.kwargs, self.calls = model, kwargs, []
        self.config = types.SimpleNamespace(get_vocab_size=lambda: 151936)
        FakeLLM.last = self

    def generate(self, prompts, sampling_params, use_tqdm=True):
        self.calls.append((prompts, sampling_params, use_tqdm))


def test_the_default_workload_of_bench(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "LLM", FakeLLM)
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    bench.main()
    llm = FakeLLM.last
    assert llm.model == os.path.expanduser("~/huggingface/Qwen3-0.6B/")
    assert llm.kwargs["enforce_eager"] is False
    assert llm.kwargs["max_model_len"] == 4096

    (warm_up, warm_up_params, has_bar), (prompts, params, has_second_bar) = llm.calls
    assert (warm_up, warm_up_params, has_bar) == (["Benchmark: "], SamplingParams(), True)
    assert has_second_bar is False

    random.seed(0)
    assert prompts == [
        [random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)
    ]
    assert params == [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=random.randint(100, 1024))
        for _ in range(256)
    ]
    lengths = [len(prompt) for prompt in prompts]
    assert sum(lengths) == 142827
    assert min(lengths) == 107
    assert max(n + p.max_tokens for n, p in zip(lengths, params, strict=True)) == 2011
    match = re.fullmatch(RESULT, capsys.readouterr().out)
    assert match
    assert match[1] == "133966"


def test_bench_with_dummy_weights(tiny_dir, tmp_path):
    """The directory holds a config and a tokenizer, nothing else."""
    shutil.copytree(tiny_dir, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    output, errors = fork_script(
        REPO / "bench.py",
        *("--model", tmp_path / "m", "--load-format", "dummy", "--num-seqs", 5, "--repeat", 2),
        *("--min-input-len", 5, "--max-input-len", 30),
        *("--min-output-len", 4, "--max-output-len", 20),
    )
    match = re.fullmatch(RESULT * 2, output)
    assert match, output
    assert match[1] == match[2]
    assert 5 * 4 <= int(match[1]) <= 5 * 20
    assert re.search(r"Generating: 100%\|.*\| 1/1 ", errors)
    assert "5/5" not in errors


# ---- example.py -----------------------------------------------------------------------------


def check_example(output, errors, model, template):
    """Its stdout holds the documented lines only."""
    pattern = r"\n\nPrompt: (.*)\nCompletion: (.*)\n" * 2
    match = re.fullmatch(pattern, output)
    assert match, output
    prompts = [ast.literal_eval(match[i]) for i in (1, 3)]
    requests = ["introduce yourself", "list all prime numbers within 100"]
    assert prompts == [template.format(request) for request in requests]
    assert all(isinstance(ast.literal_eval(match[i]), str) for i in (2, 4))
    assert any(str(model) in line for line in errors.splitlines())
    assert re.search(r"Generating: 100%\|.*\| 2/2 .*Prefill=\d+tok/s, Decode=", errors)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A home folder with the model that nano-vLLM asks for; completions end after a few dozen."""
    home = tmp_path_factory.mktemp("home")
    model = home / "huggingface" / "Qwen3-0.6B"
    save_model(model, num_hidden_layers=1, eos_token_id=[2, *range(10, VOCAB_SIZE, 40)])
    return home


QWEN_TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def test_example_on_the_model_in_the_home_folder(home):
    output, errors = fork_script(REPO / "example.py", HOME=str(home))
    check_example(output, errors, home / "huggingface" / "Qwen3-0.6B", QWEN_TEMPLATE)


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="the shipped model is not in this checkout")
def test_example_on_the_shipped_model(tmp_path):
    output, errors = run_script(REPO / "example.py", HOME=str(tmp_path))
    match = re.fullmatch(r"\n\nPrompt: (.*)\nCompletion: (.*)\n" * 2, output)
    assert match, output
    prompts = [ast.literal_eval(match[i]) for i in (1, 3)]
    assert prompts == ["It was a cold morning, and", "Elizabeth was sitting by the window when"]
    assert all(ast.literal_eval(match[i]) for i in (2, 4))
    assert str(SHIPPED) in errors


# ---- the usage that nano-vLLM documents -------------------------------------------------------


SNIPPETS = {
    "single prompt": """\
from nanovllm import LLM, SamplingParams

llm = LLM("/path/to/model", enforce_eager=True)
sampling_params = SamplingParams(temperature=0.6, max_tokens=256)

outputs = llm.generate(["Hello, Nano-vLLM."], sampling_params)
print(outputs[0]["text"])
""",
    "quick start": """\
from nanovllm import LLM, SamplingParams
llm = LLM("/YOUR/MODEL/PATH", enforce_eager=True, tensor_parallel_size=1)
sampling_params = SamplingParams(temperature=0.6, max_tokens=256)
prompts = ["Hello, Nano-vLLM."]
outputs = llm.generate(prompts, sampling_params)
outputs[0]["text"]
""",
    "batch": """\
import os
from nanovllm import LLM, SamplingParams
from transformers import AutoTokenizer

path = os.path.expanduser("~/huggingface/Qwen3-0.6B/")
tokenizer = AutoTokenizer.from_pretrained(path)
llm = LLM(path, enforce_eager=True, tensor_parallel_size=1)

sampling_params = SamplingParams(temperature=0.6, max_tokens=256)
prompts = [
    "introduce yourself",
    "list all prime numbers within 100",
]
prompts = [
    tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
    )
    for prompt in prompts
]
outputs = llm.generate(prompts, sampling_params)

for prompt, output in zip(prompts, outputs):
    print(f"Prompt: {prompt!r}")
    print(f"Completion: {output['text']!r}")
""",
    "params per request": """\
from nanovllm import LLM, SamplingParams

llm = LLM("/path/to/model")

prompts = [
    "Write a haiku about the ocean.",
    "Explain quantum entanglement in one sentence.",
    "List the capitals of all G7 countries.",
]

sampling_params = [
    SamplingParams(temperature=0.9, max_tokens=64),   # creative
    SamplingParams(temperature=0.3, max_tokens=128),  # factual
    SamplingParams(temperature=0.6, max_tokens=256),  # balanced
]

outputs = llm.generate(prompts, sampling_params)
""",
    "token ids": """\
from nanovllm import LLM, SamplingParams
from transformers import AutoTokenizer
from random import randint, seed

path = "/path/to/model"
tokenizer = AutoTokenizer.from_pretrained(path)
llm = LLM(path)

# pass raw token IDs directly
seed(0)
prompt_token_ids = [
    [randint(0, 10000) for _ in range(randint(100, 1024))]
    for _ in range(8)
]
sampling_params = SamplingParams(temperature=0.6, max_tokens=128)

outputs = llm.generate(prompt_token_ids, sampling_params)
for output in outputs:
    print(output["token_ids"])  # list[int]
""",
    "manual loop": """\
from nanovllm import LLM, SamplingParams

llm = LLM("/path/to/model")
sp = SamplingParams(temperature=0.6, max_tokens=128)

prompts = ["Tell me a joke.", "What is 2 + 2?"]
for prompt in prompts:
    llm.add_request(prompt, sp)

results = {}
while not llm.is_finished():
    outputs, num_tokens = llm.step()
    for seq_id, token_ids in outputs:
        # decode as each sequence finishes
        text = llm.tokenizer.decode(token_ids)
        results[seq_id] = text
        print(f"[seq {seq_id}] {text}")
""",
}

RUN_SNIPPETS = """
import pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.txt")):
    print(f"== {path.stem}")
    exec(compile(path.read_text(), path, "exec"), {"__name__": "__main__"})
"""


def test_documented_usage_runs_unchanged_with_a_path(home, tmp_path):
    """One process, so the engines follow one another without being ended."""
    models = dict.fromkeys(SNIPPETS, home / "huggingface" / "Qwen3-0.6B")
    models["token ids"] = save_model(tmp_path / "m", vocab_size=10048, num_hidden_layers=1)
    snippets = tmp_path / "snippets"
    snippets.mkdir()
    for name, code in SNIPPETS.items():
        for placeholder in ("/path/to/model", "/YOUR/MODEL/PATH"):
            code = code.replace(placeholder, str(models[name]))
        (snippets / f"{name}.txt").write_text(code)
    runner = tmp_path / "run_snippets.py"
    runner.write_text(RUN_SNIPPETS)
    output, _ = fork_script(runner, snippets, HOME=str(home))
    printed = dict(re.findall(r"== (.*)\n((?:(?!== ).*\n)*)", output))
    assert sorted(printed) == sorted(SNIPPETS)
    assert len(re.findall(r"^Prompt: ", printed["batch"], re.MULTILINE)) == 2
    assert len(re.findall(r"^\[[\d, ]+\]$", printed["token ids"], re.MULTILINE)) == 8
    assert set(re.findall(r"^\[seq (\d)\]", printed["manual loop"], re.MULTILINE)) == {"0", "1"}
    assert printed["single prompt"].strip()


def test_the_snippets_are_those_of_the_documents():
    documents = sorted((SHARED / "reference").glob("*.txt"))
    if not documents:
        pytest.skip("the reference documents are not beside this checkout")
    text = "\n".join(path.read_text(encoding="utf-8") for path in documents)
    for name, code in SNIPPETS.items():
        assert code in text, name


def test_sampling_params_are_imported_without_torch():
    code = "import sys; from nanovllm import SamplingParams; print('torch' in sys.modules)"
    assert run_script("-c", code)[0] == "False\n"
