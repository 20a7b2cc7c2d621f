"""`python -m nanovllm.batch --help` and what is said of options that do not exist."""

import re
import subprocess
import sys

import pytest

from nanovllm.batch import ray_data
from nanovllm.batch.options import parse_options
from nanovllm.config import Config
from nanovllm.parameters import parameters
from nanovllm.sampling_params import SamplingParams

# The library keeps special tokens; a batch leaves them out, as OpenAI's does.
DEFAULTS = {p.name: p.default for p in (*parameters(Config), *parameters(SamplingParams))}
DEFAULTS |= {"skip_special_tokens": True, "return_token_ids": False, "no_progress": False}
del DEFAULTS["model"], DEFAULTS["output_kind"], DEFAULTS["flat_logprobs"]
DEFAULTS["seed"] = 0


def help_of(call, monkeypatch, capsys):
    """The help by option, its lines joined."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="^0$"):
        call(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    entries = re.split(r"\n  (?=--)", text.partition("exit status")[0])[1:]
    found = {}
    for entry in entries:
        flag, _, rest = entry.partition(" ")
        paragraph = re.split(r"\n\n|\n\S", rest)[0]
        found[flag[2:].rstrip(",").replace("-", "_")] = " ".join(paragraph.split())
    return found


def test_every_option_has_words_and_its_default(monkeypatch, capsys):
    found = help_of(parse_options, monkeypatch, capsys)
    assert found.keys() == DEFAULTS.keys() | {"model"}
    for name, default in DEFAULTS.items():
        assert found[name].endswith(f" (default: {default})"), name
        words = found[name].removesuffix(f" (default: {default})")
        words = re.sub(r"^(--[\w-]+,? )?(--[\w-]+ )?([A-Z]+ )?", "", words)
        assert len(words.split()) >= 2, name
    assert found["model"] == "DIR model directory, or with --download a name on the hub"
    assert "sequences in flight at most; integer >= 1 (default: 1024)" in found["max_num_seqs"]
    assert "divides the logits" in found["temperature"]
    assert "may be given several times" in found["stop"]
    assert all("`" not in text for text in found.values())


def test_the_help_of_many_engines(monkeypatch, capsys):
    found = help_of(ray_data.main, monkeypatch, capsys)
    assert found.keys() == DEFAULTS.keys() | {"model", "num_actors", "part_lines"}
    assert found["part_lines"] == "N lines of a part (default: 4096)"
    assert found["num_actors"] == "N engines (default: 1)"


def test_the_help_does_not_load_torch():
    script = (
        "import sys; from nanovllm.batch.run import main\n"
        "try: main(['--help'])\n"
        "finally: sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--max-num-seq", "--max-num-seqs"),
        ("--max_num_seqs", "--max-num-seqs"),
        ("--topk", "--top-k"),
        ("--temprature=0", "--temperature"),
        ("--no-enforce-eagre", "--no-enforce-eager"),
        ("--block_sise", "--block-size"),
        ("--something-else", None),
        ("--max-new-tokens", "--max-tokens"),
    ],
)
def test_an_unknown_option_names_the_nearest(given, meant, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        parse_options(["in.jsonl", "out.jsonl", "--model", "m", given, "5"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"unrecognized arguments: {given}" in message
    if meant:
        assert message.endswith(f"; instead of {given.partition('=')[0]} try {meant}")
    else:
        assert "try" not in message


def test_a_misspelt_option_that_must_be_given(capsys):
    with pytest.raises(SystemExit, match="^2$"):
        parse_options(["in.jsonl", "out.jsonl", "--modle", "m"])
    message = capsys.readouterr().err
    assert "the following arguments are required: --model" in message
    assert "instead of --modle try --model" in message
