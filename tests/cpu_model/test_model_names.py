"""Models by name, from a hub on 127.0.0.1 and from caches that huggingface_hub laid out."""

import json
import os
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
from engine_checks import generate, greedy, tiny_engine
from hub_server import Hub, commit_of, running_hub
from safetensors.torch import load_file, save_file

from nanovllm import ArgumentError, EngineArgs
from nanovllm.config import Config
from nanovllm.estimate import main as estimate_main

NAME = "somebody/tiny"
NEEDED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
          "chat_template.jinja", "model.safetensors", "modules.json",
          "1_Pooling/config.json"}  # fmt: skip
# What a repository may hold beside it, and no engine reads.
OTHERS = {
    "README.md": b"x",
    ".gitattributes": b"x",
    "pytorch_model.bin": b"x",
    "model.gguf": b"x",
    "original/model.safetensors": b"x",
    "onnx/model.onnx": b"x",
    "code.py": b"raise SystemExit",
    "2_Dense/model.safetensors": b"x",
}
PROMPTS = [[1, 2, 3]]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def hub(cache):
    with running_hub(cache) as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tiny_dir, tmp_path_factory) -> Path:
    """The tiny model, with files of sentence-transformers."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny_dir, folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": p} for kind, p in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


@pytest.fixture
def model(hub, folder) -> Hub:
    hub.add(NAME, folder, **OTHERS)
    return hub


def files_of(folder: str) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()}


def test_a_name_runs_like_the_directory_and_only_what_is_needed_is_fetched(model, folder):
    expected = generate(tiny_engine(folder), PROMPTS, greedy(4))
    llm = tiny_engine(NAME, download=True)
    assert generate(llm, PROMPTS, greedy(4)) == expected
    assert files_of(llm.config.model) == model.downloaded() == NEEDED
    assert llm.get_default_sampling_params().temperature == 0.5
    num_requests = len(model.requests)
    assert Config(NAME, download=True).model == llm.config.model
    assert len(model.requests) == num_requests  # all is in the cache


def test_without_download_a_name_is_refused_with_the_command(model, monkeypatch):
    for given in ({}, {"download": False}):
        with pytest.raises(AssertionError) as raised:
            Config(NAME, **given)
        for part in (f"got {NAME!r}", f"hf download {NAME} --local-dir tiny", "NANOVLLM_DOWNLOAD"):
            assert part in str(raised.value)
    monkeypatch.setenv("NANOVLLM_DOWNLOAD", "0")
    with pytest.raises(ArgumentError, match="existing local directory"):
        Config(NAME)
    monkeypatch.setenv("NANOVLLM_DOWNLOAD", "perhaps")
    with pytest.raises(ArgumentError, match="NANOVLLM_DOWNLOAD in the environment must be 1 or 0"):
        Config(NAME)
    assert not model.requests
    monkeypatch.setenv("NANOVLLM_DOWNLOAD", "1")
    assert os.path.isdir(Config(NAME).model)
    with pytest.raises(ArgumentError, match="existing local directory"):
        Config(NAME, download=False)


def test_a_directory_is_never_looked_up(model, folder):
    assert Config(str(folder), download=True, revision="v1", hf_token="x").model == str(folder)
    for path in ("~/tiny", "./tiny", "a/b/c"):
        with pytest.raises(ArgumentError, match="existing local directory"):
            Config(path, download=True)
    assert not model.requests


def test_revision_token_and_cache_are_the_given_ones(model, folder, tmp_path):
    model.add(NAME, folder, "v1", **{"generation_config.json": b'{"temperature": 0.25}'})
    model.token = "secret"
    with pytest.raises(ArgumentError, match="or it is private.*give hf_token, or run 'hf auth"):
        Config(NAME, download=True)
    given = {"download": True, "hf_token": "secret", "revision": "v1"}
    config = Config(NAME, **given, download_dir=tmp_path / "elsewhere")
    path = tmp_path / "elsewhere" / "models--somebody--tiny" / "snapshots" / commit_of("v1")
    assert config.model == str(path) and config.hf_token is None
    assert "secret" not in repr(config) + repr(EngineArgs(NAME, hf_token="secret"))
    same = Config(NAME, download=True, revision=commit_of("v1"),
                  download_dir=tmp_path / "elsewhere")  # fmt: skip
    assert same.model == str(path)
    for wrong in (5, "", "sécret"):
        with pytest.raises(ArgumentError, match="hf_token must be a token, True or False") as error:
            Config(NAME, download=True, hf_token=wrong)
        assert "sécret" not in str(error.value)


def test_a_tokenizer_has_a_name_and_a_revision_of_its_own(model, folder, tmp_path):
    other = tmp_path / "tokenizer"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, other)
    model.add("somebody/tokenizer", other, "v2", **OTHERS)
    given = {"tokenizer": "somebody/tokenizer", "download": True, "tokenizer_revision": "v2"}
    llm = tiny_engine(folder, **given)
    assert files_of(llm.config.tokenizer) == {"tokenizer.json", "tokenizer_config.json"}
    assert llm.tokenizer.name_or_path == llm.config.tokenizer
    model.add(NAME, folder, "v3")
    config = Config(NAME, download=True, tokenizer_revision="v3")
    assert "tokenizer.json" not in files_of(config.model)
    assert Path(config.tokenizer).name == commit_of("v3")
    with pytest.raises(ArgumentError, match="tokenizer must be an existing local directory"):
        tiny_engine(folder, tokenizer="nobody/tokenizer")


@pytest.mark.parametrize(("load_format", "num_files"), [("auto", 3), ("dummy", 0)])
def test_the_index_says_which_weights_are_fetched(hub, folder, tmp_path, load_format, num_files):
    split = tmp_path / "split"
    shutil.copytree(folder, split)
    weights = load_file(split / "model.safetensors")
    os.unlink(split / "model.safetensors")
    names = sorted(weights)
    places = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    for place in set(places.values()):
        save_file({n: weights[n] for n in names if places[n] == place}, split / place)
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    hub.add(NAME, split, **{"consolidated.safetensors": b"x"})
    config = Config(NAME, download=True, load_format=load_format, skip_tokenizer_init=True)
    found = {n for n in files_of(config.model) if n.endswith(".safetensors")}
    assert found == set(places.values()) and len(found) == 3 if num_files else not found
    assert "tokenizer.json" not in files_of(config.model)
    del hub.models[NAME]["main"]["model-1.safetensors"]
    hub.models[NAME]["again"] = hub.models[NAME].pop("main")
    with pytest.raises(ArgumentError, match="index.json names 'model-1.safetensors', which is not"):
        Config(NAME, download=True, revision="again")


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("model.safetensors", "holds no .*safetensors file; 'model.gguf' is of a kind that is not"),
        ("config.json", "holds no config.json: GGUF files are not supported"),
    ],
)
def test_what_a_repository_lacks_is_named(model, removed, message):
    del model.models[NAME]["main"][removed]
    with pytest.raises(ArgumentError, match=f"model '{NAME}' {message}"):
        Config(NAME, download=True)
    assert "model.safetensors" not in model.downloaded()


@pytest.mark.parametrize(
    ("refusal", "given", "message"),
    [
        ((404, "RepoNotFound"), {}, "no such directory here and no such model at http://127"),
        ((401, "RepoNotFound"), {}, "or it is private: check the name, or give hf_token"),
        ((403, "GatedRepo"), {}, "it is gated: ask for access at http.*/somebody/tiny"),
        ((403, ""), {}, r"it may not be read \(403\): give hf_token"),
        ((404, "RevisionNotFound"), {"revision": "v9"}, "at revision 'v9': there is no such rev"),
        (None, {"hf_token": True}, "no token is stored: run 'hf auth login'"),
    ],
)
def test_what_the_hub_refuses_is_explained(model, refusal, given, message):
    if refusal:
        model.refused[NAME] = refusal
    with pytest.raises(ArgumentError, match=f"cannot download model '{NAME}'.*{message}"):
        Config(NAME, download=True, **given)


def test_a_download_that_breaks_off_is_taken_up_where_it_ended(model, folder, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)
    model.breaks["model.safetensors"] = 1000
    config = Config(NAME, download=True)
    assert (
        Path(config.model, "model.safetensors").read_bytes()
        == (folder / "model.safetensors").read_bytes()
    )
    ranges = [r for method, path, r in model.requests
              if method == "GET" and path.endswith("/model.safetensors")]  # fmt: skip
    assert ranges == [None, "bytes=1000-"]


def test_the_cache_is_enough_without_a_hub(model, folder, cache, monkeypatch):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ArgumentError, match="HF_HUB_OFFLINE is set.*hf download somebody/tiny"):
        Config(NAME, download=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # As other libraries use the cache: file by file, without a listing.
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        huggingface_hub.hf_hub_download(NAME, name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model.requests.clear()
    config = Config(NAME, download=True)
    assert files_of(config.model) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert not model.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    Config(NAME, download=True)  # what is missing is noticed as soon as the hub can be asked
    assert files_of(config.model) == NEEDED
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    os.unlink(Path(config.model, "1_Pooling", "config.json"))
    with pytest.raises(ArgumentError, match="HF_HUB_OFFLINE is set, and not all of it is in the"):
        Config(NAME, download=True)


def test_a_hub_that_cannot_be_reached_is_an_error_of_the_name(model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ArgumentError, match=f"cannot download model '{NAME}': .*call again"):
        Config(NAME, download=True)


def test_an_estimate_fetches_no_weights_and_no_tokenizer(model, capsys):
    pytest.importorskip("triton")
    assert estimate_main([NAME, "--download", "--gpu-memory", "8GiB"]) == 0
    of_tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert model.downloaded() == NEEDED - {"model.safetensors"} - of_tokenizer
    assert estimate_main([NAME, "--gpu-memory", "8GiB"]) == 2
    assert f"hf download {NAME}" in capsys.readouterr().err
