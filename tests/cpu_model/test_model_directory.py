"""What the engine needs of a model directory beside weights, and memory it cannot have."""

import builtins
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import folder_mutations
import pytest
from engine_checks import greedy, tiny_engine
from tiny_models import VOCAB_SIZE, edit_config
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from nanovllm import LLM, ArgumentError, SamplingParams, StructuredOutputsParams
from nanovllm.config import Config
from nanovllm.inputs.tokenizer import load_tokenizer
from nanovllm.inputs.tokenizer_check import PROBE, check_agreement, read_fields


@pytest.fixture
def model_dir(tiny_dir, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


def test_eos_ids_that_the_model_does_not_have_are_left_out(model_dir):
    """They are never sampled, and min_tokens must not forbid them in the logits of others."""
    text = json.dumps({"eos_token_id": [2, VOCAB_SIZE, VOCAB_SIZE + 500, -1]})
    (model_dir / "generation_config.json").write_text(text)
    with tiny_engine(model_dir) as llm:
        assert llm.config.eos_token_ids == {2}
        params = SamplingParams(temperature=0, max_tokens=4, min_tokens=4)
        assert len(llm.generate([[5]], params, use_tqdm=False)[0]["token_ids"]) == 4


def test_structured_outputs_with_an_eos_id_that_the_tokenizer_does_not_have(model_dir):
    pytest.importorskip("llguidance")
    (model_dir / "generation_config.json").write_text(f'{{"eos_token_id": [{VOCAB_SIZE - 1}]}}')
    with tiny_engine(model_dir) as llm:
        assert len(llm.tokenizer) < VOCAB_SIZE
        params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["the dog"]))
        [output] = llm.generate([[5]], params, use_tqdm=False)
    assert output["text"].startswith("the dog")


def test_without_other_eos_ids_those_of_the_config_end_a_completion(model_dir):
    """As in transformers, whose generation config is then made of config.json."""
    (model_dir / "generation_config.json").unlink(missing_ok=True)
    edit_config(model_dir, eos_token_id=7)
    with tiny_engine(model_dir, skip_tokenizer_init=True) as llm:
        assert llm.config.eos_token_ids == {7}
        params = SamplingParams(temperature=0, max_tokens=5, logit_bias={7: 100.0})
        [output] = llm.generate([[5]], params, use_tqdm=False)
        assert output["token_ids"] == [7] and output.outputs[0].finish_reason == "stop"


def test_a_broken_tokenizer_is_refused_with_the_directory(model_dir):
    (model_dir / "tokenizer.json").write_text("{")
    with pytest.raises(ArgumentError, match=str(model_dir)):
        tiny_engine(model_dir)


def test_bytes_for_no_block_are_refused_before_any_rank_starts(tiny_dir, monkeypatch):
    monkeypatch.setattr("nanovllm.parallel.executor.MultiprocExecutor", None)
    with pytest.raises(ArgumentError, match="raise kv_cache_memory_bytes"):
        LLM(str(tiny_dir), device="cpu", kv_cache_memory_bytes=1, tensor_parallel_size=2)


def test_the_progress_bar_shows_rates_that_the_run_can_have(tiny_dir):
    lines = []

    class Bar:
        def __init__(self, **kwargs):
            pass

        def update(self, n):
            pass

        def set_postfix(self, rates):
            lines.append(rates)

        def close(self):
            pass

    with tiny_engine(tiny_dir) as llm:
        launch, slow = llm.executor.launch, 0.02

        def slow_launch(seqs, is_prefill):
            launched = launch(seqs, is_prefill)
            launched.seconds = slow
            return launched

        llm.executor.launch = slow_launch
        llm.generate([[1, 2, 3]] * 4, greedy(10), use_tqdm=Bar)
    decode = int(lines[-1]["Decode"].removesuffix("tok/s"))
    assert 0 < decode <= 4 / slow  # four sequences a step


def test_results_of_add_request_end_with_the_engine(tiny_dir):
    llm = tiny_engine(tiny_dir)
    llm.add_request([1, 2], greedy(2))
    llm.generate([[3, 4]], greedy(9), use_tqdm=False)
    assert not llm.is_finished()
    llm.exit()
    assert llm.is_finished()


# What a directory may not do


def test_files_are_read_once_and_by_nobody_else(model_dir, monkeypatch):
    """A file that changes after its check, or that another names, cannot be read behind it."""
    edit_config(model_dir, configuration_files=["config.4.0.0.json"])
    trap = {"model_type": "gpt2", "hidden_act": "gelu", "auto_map": {"AutoConfig": "code.Trap"}}
    (model_dir / "config.4.0.0.json").write_text(json.dumps(trap))
    opened = Counter()
    real_open, real_os_open = builtins.open, os.open

    def note(path):
        if isinstance(path, (str, os.PathLike)) and str(path).startswith(str(model_dir)):
            opened[str(path).removeprefix(f"{model_dir}/")] += 1

    def noted_open(path, *args, **kwargs):
        note(path)
        return real_open(path, *args, **kwargs)

    def noted_os_open(path, *args, **kwargs):
        note(path)
        return real_os_open(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", noted_open)
    monkeypatch.setattr(os, "open", noted_os_open)
    with tiny_engine(model_dir) as llm:
        assert type(llm.config.hf_config).__name__ == "Qwen3Config"
        assert llm.config.hf_config.hidden_act == "silu"
    assert opened["config.json"] == 1 and opened["tokenizer_config.json"] == 1
    assert "config.4.0.0.json" not in opened
    assert opened["tokenizer.json"] == 1


CODES = {
    "config.json": {"auto_map": {"AutoConfig": "code.Trap", "AutoTokenizer": "code.Trap"}},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["code.Trap", "code.Trap"]}},
}


@pytest.mark.parametrize("names", [["config.json"], ["tokenizer_config.json"], [*CODES]])
@pytest.mark.parametrize("tokenizer_class", ["TokenizersBackend", "Trap", "AutoModelForCausalLM"])
def test_no_code_of_a_directory_runs_and_nobody_is_asked(
    names, tokenizer_class, model_dir, tmp_path, monkeypatch
):
    ran = tmp_path / "ran"
    (model_dir / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Trap: pass\n")
    for name in names:
        path = model_dir / name
        path.write_text(json.dumps(json.loads(path.read_text()) | CODES[name]))
    path = model_dir / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | {"tokenizer_class": tokenizer_class}
    path.write_text(json.dumps(fields))

    def ask(*args):
        raise AssertionError("somebody asks on stdin")

    monkeypatch.setattr(builtins, "input", ask)
    names_code = path.name in names and tokenizer_class == "Trap"
    other = model_dir.with_name("other")
    for given, kwargs in ((model_dir, {}), (other, {"tokenizer": model_dir})):
        if given == other:
            shutil.copytree(model_dir, other)
        if names_code or tokenizer_class == "AutoModelForCausalLM":
            message = "trust_remote_code=True" if names_code else "is no tokenizer"
            with pytest.raises(ArgumentError, match=message):
                tiny_engine(given, **kwargs)
        else:
            tiny_engine(given, **kwargs).exit()
    assert not ran.exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("value", ["AutoTokenizer", "AutoModel", "pipeline", "utils", "Trainer"])
def test_a_tokenizer_class_is_one(name, value, model_dir):
    path = model_dir / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": value}))
    with pytest.raises(ArgumentError, match=f"{name}: tokenizer_class '{value}' is no tokenizer"):
        tiny_engine(model_dir)


def test_trusted_code_of_a_directory_makes_the_tokenizer(model_dir):
    (model_dir / "code.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class Mine(PreTrainedTokenizerFast):\n    is_mine = True\n"
    )
    path = model_dir / "tokenizer_config.json"
    fields = {"auto_map": {"AutoTokenizer": [None, "code.Mine"]}, "tokenizer_class": "Mine"}
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with tiny_engine(model_dir, trust_remote_code=True) as llm:
        assert llm.tokenizer.is_mine


@pytest.mark.parametrize("name", ["tokenizer_file", "vocab_file", "name_or_path", "init_inputs"])
def test_settings_of_a_tokenizer_name_no_other_file(name, model_dir, tmp_path):
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text("{")
    path = model_dir / "tokenizer_config.json"
    value = [str(elsewhere)] if name == "init_inputs" else str(elsewhere)
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with tiny_engine(model_dir) as llm:
        assert llm.tokenizer.name_or_path == str(model_dir)
        assert "elsewhere" not in repr(llm.tokenizer.init_kwargs)


def words_tokenizer() -> Tokenizer:
    """Like SentencePiece's: spaces are "▁", and one comes first."""
    alphabet = sorted({*PROBE, *"▁ the quick brown fox"})
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True))
    prepend, replace = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([prepend, replace])
    return tokenizer


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_a_class_that_belongs_to_its_tokenizer_json_is_taken(tokenizer_class, model_dir):
    edit_config(model_dir, model_type="llama", architectures=["LlamaForCausalLM"])
    words_tokenizer().save(str(model_dir / "tokenizer.json"))
    settings = {"tokenizer_class": tokenizer_class, "eos_token": "</s>", "unk_token": "<unk>"}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(settings))
    config = Config(str(model_dir))
    text = "the quick brown fox"
    ids = words_tokenizer().encode(text).ids
    assert load_tokenizer(config).encode(text, add_special_tokens=False) == ids


def test_a_class_that_encodes_otherwise_than_its_tokenizer_json_is_refused(model_dir):
    words_tokenizer().save(str(model_dir / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>", "unk_token": "<unk>"}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(settings))
    message = r"tokenizer\.json and the class Qwen2Tokenizer .* differently.*update transformers"
    with pytest.raises(ArgumentError, match=f"(?s){message}"):
        load_tokenizer(Config(str(model_dir)))


def test_spaces_that_a_class_loses_are_noticed(model_dir):
    """As transformers 5.3 to 5.21 did with a byte-level tokenizer.json and LlamaTokenizerFast."""
    path = str(model_dir / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=path)
    fields = read_fields(Path(path).read_text(), path)
    check_agreement(tokenizer, fields, path)
    pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    with pytest.raises(ArgumentError, match="encode .* differently"):
        check_agreement(tokenizer, fields, path)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"],
)
@pytest.mark.parametrize("kind", ["fifo", "directory", "loop"])
def test_what_is_no_file_is_refused_under_every_name(name, kind, model_dir):
    path = model_dir / name
    path.unlink()
    make = {"fifo": os.mkfifo, "directory": os.mkdir, "loop": lambda p: os.symlink(p, p)}
    make[kind](path)
    with pytest.raises(ArgumentError, match=f"cannot read .*{name}"):
        tiny_engine(model_dir)


@pytest.mark.parametrize("name", ["/dev/zero", "../other", "a/b", "", ".", "..", 5, None, ["x"]])
def test_an_index_names_files_of_its_directory_alone(name, model_dir):
    (model_dir / "model.safetensors").rename(model_dir / "weights.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ArgumentError, match=r"index\.json: weight_map must|cannot read .*it is a dir"
    ):
        tiny_engine(model_dir)
    index["weight_map"]["model.norm.weight"] = "pipe"
    os.mkfifo(model_dir / "pipe")
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArgumentError, match="cannot read .*pipe: it is a FIFO"):
        tiny_engine(model_dir)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 10**6},
        {"vocab_size": 2**31 - 1},
        {"intermediate_size": 2**31 - 1},
        {"head_dim": 2**30},
        {"num_attention_heads": 2**30, "num_key_value_heads": 1},
        {"hidden_size": 10**6, "vocab_size": 10**6, "num_hidden_layers": 1000, "layer_types": None},
    ],
)
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_config_that_asks_for_too_much_is_refused_before_it_is_allocated(
    changes, load_format, model_dir, monkeypatch
):
    monkeypatch.setattr("nanovllm.engine.llm_engine.ModelRunner", None)
    monkeypatch.setattr("nanovllm.models.size.device_memory", lambda device: 2**32)
    edit_config(model_dir, **changes)
    message = "does not fit its config" if load_format == "auto" else "no memory for the model"
    with pytest.raises(ArgumentError, match=message):
        tiny_engine(model_dir, load_format=load_format)


def test_weights_of_another_kind_and_pointers_to_weights_are_named(model_dir):
    (model_dir / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ArgumentError, match=r"model\.safetensors is a git-lfs pointer.* lfs pull"):
        tiny_engine(model_dir)
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    with pytest.raises(ArgumentError, match=r"'pytorch_model\.bin' is of a kind that is not read"):
        tiny_engine(model_dir)


def test_weights_are_read_again_from_where_they_were_after_chdir(model_dir, monkeypatch):
    monkeypatch.chdir(model_dir.parent)
    with tiny_engine(Path(model_dir.name)) as llm:
        before = llm.generate([[5]], greedy(4), use_tqdm=False)[0]["token_ids"]
        monkeypatch.chdir("/")
        llm.reload_weights()
        assert llm.generate([[5]], greedy(4), use_tqdm=False)[0]["token_ids"] == before


@pytest.mark.parametrize("listed", [[0, 2], 0, [2, 7]])
@pytest.mark.parametrize("generation_config", [None, {"temperature": 0.5}, {"eos_token_id": [5]}])
def test_ids_that_end_are_those_of_transformers_and_the_tokenizers(
    listed, generation_config, model_dir
):
    path = model_dir / "generation_config.json"
    path.unlink()
    if generation_config is not None:
        path.write_text(json.dumps(generation_config))
    edit_config(model_dir, eos_token_id=listed)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = model.generation_config.eos_token_id
    expected = {*(ids if isinstance(ids, list) else [] if ids is None else [ids]), 2}
    with tiny_engine(model_dir) as llm:
        assert llm.config.eos_token_ids == expected
        for token_id in expected:
            params = SamplingParams(temperature=0, max_tokens=5, logit_bias={token_id: 100.0})
            [output] = llm.generate([[5]], params, use_tqdm=False)
            assert output["token_ids"] == [token_id]


def test_mutated_directories_give_right_answers_or_are_refused(model_dir, capsys):
    """NANOVLLM_FOLDER_MUTATIONS=5000 tries that many; a line for each that went wrong is shown."""
    modules = [{"path": "", "type": "Transformer"}, {"path": "1_Pooling", "type": "m.Pooling"}]
    (model_dir / "modules.json").write_text(json.dumps(modules))
    (model_dir / "1_Pooling").mkdir()
    pooling = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
    (model_dir / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    count = os.environ.get("NANOVLLM_FOLDER_MUTATIONS", "24")
    status = folder_mutations.main([str(model_dir), "--count", count, "--seed", "20000"])
    out = capsys.readouterr().out
    assert status == 0, out[-4000:]
    ends = json.loads(out.splitlines()[-1])
    assert ends["refused"] > 0 and ends["same"] > 0
