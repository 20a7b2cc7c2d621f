"""Every tensor of a checkpoint is accounted for, whole or in slices."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit_config, save_model
from torch import nn
from transformers import AutoConfig

from nanovllm import ArgumentError
from nanovllm.kernels.select import select_ops
from nanovllm.layers import weights
from nanovllm.layers.context import ModelContext
from nanovllm.models.family import Family
from nanovllm.models.loader import MAX_NAMES_IN_ERROR, expected_tensors, load_model
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.parallel.tensor_parallel import TensorParallel

CPU = torch.device("cpu")
NORM = "model.norm.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def build(directory: Path, rank: int = 0, size: int = 1, dtype=torch.float32) -> Qwen3ForCausalLM:
    """One rank's model, not loaded; without a process group it cannot run."""
    config = ModelConfig.from_hf(AutoConfig.from_pretrained(directory), Family("", ""))
    ops = select_ops("torch", CPU, dtype, config.head_dim, compile_torch_ops=False)
    return Qwen3ForCausalLM(config, ModelContext(ops, TensorParallel(rank, size), dtype, CPU))


def load(directory: Path, rank: int = 0, size: int = 1, load_format="auto", **kwargs) -> nn.Module:
    model = build(directory, rank, size)
    for shards in expected_tensors(model).values():  # so that what is not loaded shows
        for parameter, shard in shards:
            parameter.data[shard.target] = torch.nan
    load_model(model, str(directory), load_format, **kwargs)
    return model


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Checkpoint tensor name -> this rank's part of it, padding left out."""
    return {
        name: parameter[shard.target]
        for name, [(parameter, shard)] in expected_tensors(model).items()
    }


def put_together(models: list[nn.Module]) -> dict[str, torch.Tensor]:
    """The whole tensors, from the parts of all ranks; parts held twice must agree."""
    whole = {}
    for model in models:
        for name, [(parameter, shard)] in expected_tensors(model).items():
            tensor = whole.setdefault(name, torch.full(shard.full_shape, torch.nan))
            part = parameter[shard.target]
            held = tensor[shard.source]
            assert ((held == part) | held.isnan()).all(), name
            tensor[shard.source] = part
    return whole


def assert_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("untied"),
        tie_word_embeddings=False,
        attention_bias=True,
        num_hidden_layers=2,
        num_key_value_heads=2,
        vocab_size=300,
    )


def edited(source: Path, target: Path, edit) -> Path:
    """A copy of a model directory whose tensors `edit` has changed."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


# Whole and in slices


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_every_tensor_of_the_file_is_loaded(kind, request):
    directory = request.getfixturevalue(kind)
    assert_same(tensors_of(load(directory)), load_file(directory / "model.safetensors"))


def test_merged_projections_hold_their_parts_in_order(untied):
    attention = load(untied).model.layers[0].self_attn
    tensors = load_file(untied / "model.safetensors")
    for kind in ("weight", "bias"):
        parts = [tensors[f"model.layers.0.self_attn.{n}_proj.{kind}"] for n in "qkv"]
        assert torch.equal(getattr(attention.qkv_proj, kind), torch.cat(parts))


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_together_hold_every_tensor(kind, size, request):
    """With 2 KV heads and 4 ranks, two ranks hold each; 300 ids are padded to whole ranks."""
    directory = request.getfixturevalue(kind)
    models = [load(directory, rank, size) for rank in range(size)]
    assert_same(put_together(models), load_file(directory / "model.safetensors"))
    embeddings = [model.model.embed_tokens for model in models]
    rows = {embedding.weight.shape[0] for embedding in embeddings}
    assert len(rows) == 1
    [rows_per_rank] = rows
    assert [e.first_token_id for e in embeddings] == [r * rows_per_rank for r in range(size)]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_padding_rows_of_the_vocabulary_are_zero(size, untied):
    weights = [load(untied, rank, size).lm_head.weight for rank in range(size)]
    whole = torch.cat(weights)
    assert len(whole) >= 300
    assert whole[300:].eq(0).all()
    assert torch.equal(whole[:300], load_file(untied / "model.safetensors")["lm_head.weight"])


def test_query_heads_stay_with_their_kv_head(untied):
    """8 query and 2 KV heads on 4 ranks: rank r has queries 2r and 2r + 1, and KV head r // 2."""
    tensors = load_file(untied / "model.safetensors")
    q, k = (tensors[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qk")
    for rank in range(4):
        weight = load(untied, rank, 4).model.layers[0].self_attn.qkv_proj.weight
        assert torch.equal(weight[:32], q[32 * rank : 32 * (rank + 1)])
        assert torch.equal(weight[32:48], k[16 * (rank // 2) : 16 * (rank // 2 + 1)])


def test_weights_are_converted_to_the_models_dtype(tied):
    model = build(tied, dtype=torch.bfloat16)
    load_model(model, str(tied), "auto")
    tensors = load_file(tied / "model.safetensors")
    assert_same(tensors_of(model), {k: v.to(torch.bfloat16) for k, v in tensors.items()})


# Several files


@pytest.fixture
def sharded(tmp_path) -> Path:
    directory = save_model(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def test_sharded_checkpoint_equals_the_single_file(sharded, tied):
    assert_same(tensors_of(load(sharded)), tensors_of(load(tied)))


def test_files_that_the_index_does_not_name_are_ignored(sharded, tied):
    save_file({"stray": torch.zeros(1)}, sharded / "consolidated.safetensors")
    assert_same(tensors_of(load(sharded)), tensors_of(load(tied)))


def test_all_files_count_without_an_index(sharded, tied):
    (sharded / "model.safetensors.index.json").unlink()
    assert_same(tensors_of(load(sharded)), tensors_of(load(tied)))


def test_the_file_that_transformers_reads_counts(tied, untied, sharded, tmp_path):
    """model.safetensors beside other files, of another model and with an index."""
    directory = edited(tied, tmp_path, lambda tensors: None)
    others = load_file(untied / "model.safetensors")
    save_file(others, directory / "z.safetensors")
    shutil.copy(sharded / "model.safetensors.index.json", directory)
    assert_same(tensors_of(load(directory)), tensors_of(load(tied)))


def test_a_tensor_in_two_files_is_refused(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    save_file({NORM: torch.zeros(64)}, sharded / "old.safetensors")
    with pytest.raises(ArgumentError, match=f"tensor '{NORM}' is in both .* and .* of"):
        load(sharded)


def test_the_index_says_which_file_counts(sharded, tied):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(name for name in sorted(set(index.values())) if name != index[NORM])
    tensors = load_file(sharded / other) | {NORM: torch.full((64,), 9.0)}
    save_file(tensors, sharded / other)
    assert_same(tensors_of(load(sharded)), tensors_of(load(tied)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e5m2])
def test_weights_that_are_no_numbers_of_a_model_are_refused(dtype, tied, tmp_path):
    def edit(tensors):
        tensors[Q_PROJ] = tensors[Q_PROJ].to(dtype)

    with pytest.raises(ArgumentError, match=f"tensor '{Q_PROJ}' of .* is {dtype}"):
        load(edited(tied, tmp_path, edit))


def test_missing_shard_is_named(sharded):
    name = sorted(path.name for path in sharded.glob("*.safetensors"))[1]
    (sharded / name).unlink()
    with pytest.raises(ArgumentError, match=f"cannot read .*{name}"):
        load(sharded)


def test_index_that_names_a_file_which_never_was_is_refused(tied, tmp_path):
    directory = edited(tied, tmp_path, lambda tensors: None)
    (directory / "model.safetensors").rename(directory / "model-00001.safetensors")
    index = {"weight_map": {NORM: "model-00009-of-00009.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArgumentError, match=r"cannot read .*model-00009-of-00009\.safetensors"):
        load(directory)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_damaged_index_is_named(text, tied, tmp_path):
    directory = edited(tied, tmp_path, lambda tensors: None)
    (directory / "model.safetensors").rename(directory / "model-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ArgumentError, match=r"model\.safetensors\.index\.json"):
        load(directory)


# What does not fit


def test_missing_tensor_is_named(tied, tmp_path):
    directory = edited(tied, tmp_path, lambda tensors: tensors.pop(NORM))
    with pytest.raises(ArgumentError, match=f"missing tensors: {NORM}") as raised:
        load(directory)
    assert str(directory) in str(raised.value)
    assert "unexpected" not in str(raised.value)


def test_unexpected_tensor_is_named(tied, tmp_path):
    directory = edited(tied, tmp_path, lambda t: t.update({"model.extra.qweight": torch.ones(2)}))
    with pytest.raises(ArgumentError, match="unexpected tensors: model.extra.qweight") as raised:
        load(directory)
    assert "missing" not in str(raised.value)


def test_renamed_tensor_is_both_missing_and_unexpected(tied, tmp_path):
    directory = edited(tied, tmp_path, lambda t: t.update({"norm.weight": t.pop(NORM)}))
    message = f"missing tensors: {NORM}; unexpected tensors: norm.weight"
    with pytest.raises(ArgumentError, match=message):
        load(directory)


def test_many_names_are_cut_short(tied, tmp_path):
    def rename_all(tensors):
        for name in list(tensors):
            tensors[f"transformer.{name}"] = tensors.pop(name)

    directory = edited(tied, tmp_path, rename_all)
    num_more = len(load_file(tied / "model.safetensors")) - MAX_NAMES_IN_ERROR
    with pytest.raises(ArgumentError, match=f", and {num_more} more; unexpected .* more$"):
        load(directory)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("name", "shape"),
    [(Q_PROJ, (64, 64)), (Q_PROJ, (128, 65)), (NORM, (65,)), (NORM, (1, 64)), (NORM, ())],
)
def test_misshapen_tensor_is_named_with_both_shapes(name, shape, size, tied, tmp_path):
    full = [64] if name == NORM else [128, 64]
    directory = edited(tied, tmp_path, lambda t: t.update({name: torch.zeros(shape)}))
    with pytest.raises(ArgumentError) as raised:
        load(directory, size - 1, size)
    message = f"tensor {name!r} has shape {list(shape)}, the config asks for {full}"
    assert message in str(raised.value)


def test_folder_without_weights_is_refused(tied, tmp_path):
    shutil.copy(tied / "config.json", tmp_path)
    with pytest.raises(ArgumentError, match=r"holds no \*\.safetensors file") as raised:
        load(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "directory"])
def test_damaged_file_is_named(damage, tied, tmp_path):
    shutil.copy(tied / "config.json", tmp_path)
    path = tmp_path / "model.safetensors"
    content = (tied / "model.safetensors").read_bytes()
    if damage == "directory":
        path.mkdir()
    else:
        damaged = {"empty": b"", "cut": content[: len(content) // 2], "garbage": b"\xff" * 500}
        path.write_bytes(damaged[damage])
    with pytest.raises(ArgumentError, match=r"cannot read .*model\.safetensors"):
        load(tmp_path)


# Tied embeddings


EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("names", [(EMBEDDING, LM_HEAD), (LM_HEAD,)])
def test_tied_model_may_have_its_embedding_under_either_name(names, tied, tmp_path):
    embedding = load_file(tied / "model.safetensors")[EMBEDDING]

    def edit(tensors):
        del tensors[EMBEDDING]
        tensors.update({name: embedding.clone() for name in names})

    model = load(edited(tied, tmp_path, edit))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, embedding)


def test_tied_model_with_another_lm_head_is_refused(tied, tmp_path):
    """transformers would not tie them, even if one row differs: that of an added token, say."""

    def edit(tensors):
        tensors[LM_HEAD] = tensors[EMBEDDING].clone()
        tensors[LM_HEAD][301, 5] += 1e-3

    directory = edited(tied, tmp_path, edit)
    with pytest.raises(ArgumentError, match="lm_head.weight differs from the embedding, but its"):
        load(directory)
    edit_config(directory, tie_word_embeddings=False)
    assert (
        load(directory).lm_head.weight[301, 5] != load(directory).model.embed_tokens.weight[301, 5]
    )


def test_untied_model_keeps_both(untied):
    model = load(untied)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_untied_model_needs_an_lm_head(tied, tmp_path):
    directory = edited(tied, tmp_path, lambda tensors: None)
    edit_config(directory, tie_word_embeddings=False)
    with pytest.raises(ArgumentError, match="missing tensors: lm_head.weight"):
        load(directory)


def test_biases_that_the_config_does_not_ask_for_are_unexpected(untied, tmp_path):
    directory = edited(untied, tmp_path, lambda tensors: None)
    edit_config(directory, attention_bias=False)
    with pytest.raises(ArgumentError, match="unexpected tensors: .*k_proj.bias"):
        load(directory)


def test_rotary_tables_of_old_checkpoints_are_ignored(tied, tmp_path):
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    directory = edited(tied, tmp_path, lambda tensors: tensors.update(table))
    assert_same(tensors_of(load(directory)), tensors_of(load(tied)))


# Decoders saved alone: names without "model."


def without_prefix(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def test_bare_names_with_an_lm_head(untied, tmp_path):
    directory = edited(untied, tmp_path, without_prefix)
    assert_same(tensors_of(load(directory)), load_file(untied / "model.safetensors"))
    assert load_model(build(directory), str(directory), "auto") is True


def test_bare_names_without_an_lm_head(untied, tmp_path):
    directory = edited(untied, tmp_path, lambda tensors: tensors.pop(LM_HEAD))
    edited(directory, directory / "bare", without_prefix)
    with pytest.raises(ArgumentError, match="missing tensors: lm_head.weight$"):
        load(directory)
    model = build(directory / "bare")
    assert load_model(model, str(directory / "bare"), "auto") is False
    assert model.lm_head.weight.eq(0).all()


def test_bare_names_of_a_tied_model(tied, tmp_path):
    directory = edited(tied, tmp_path / "bare", without_prefix)
    assert load_model(build(directory), str(directory), "auto") is True

    def edit(tensors):
        tensors[LM_HEAD] = tensors["embed_tokens.weight"] + 1

    with pytest.raises(ArgumentError, match="lm_head.weight differs from the embedding, but its"):
        load(edited(directory, tmp_path / "differs", edit))


# Dummy weights


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_dummy_weights_are_the_same_for_any_number_of_ranks(kind, request):
    directory = request.getfixturevalue(kind)
    whole = tensors_of(load(directory, load_format="dummy"))
    assert_same(tensors_of(load(directory, load_format="dummy")), whole)
    for size in (2, 4):
        ranks = [load(directory, rank, size, load_format="dummy") for rank in range(size)]
        assert_same(put_together(ranks), whole)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_large_tensors_are_loaded_in_pieces(untied, load_format, monkeypatch):
    whole = tensors_of(load(untied, load_format=load_format))
    shapes, fill = [], weights.Parameter.fill
    monkeypatch.setattr(weights, "MAX_PIECE", 1)

    def fill_and_note(parameter, shard, part):
        shapes.append(part.shape)
        fill(parameter, shard, part)

    monkeypatch.setattr(weights.Parameter, "fill", fill_and_note)
    in_pieces = tensors_of(load(untied, load_format=load_format))
    assert max(shape[0] for shape in shapes) == weights.PIECE_ALIGNMENT
    if load_format == "dummy":  # each piece is drawn alone
        assert not torch.equal(in_pieces["lm_head.weight"], whole["lm_head.weight"])
        whole = in_pieces
    assert_same(in_pieces, whole)
    ranks = [load(untied, rank, 2, load_format=load_format) for rank in range(2)]
    assert_same(put_together(ranks), whole)


def test_dummy_weights_need_no_file_and_are_random_with_the_deviation_asked_for(untied, tmp_path):
    shutil.copy(untied / "config.json", tmp_path)
    tensors = tensors_of(load(tmp_path, load_format="dummy", std=0.5))
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            assert tensor.eq(0).all(), name
        elif tensor.dim() == 1:
            assert tensor.eq(1).all(), name
        else:
            assert abs(tensor.mean().item()) < 0.05, name
            assert tensor.std().item() == pytest.approx(0.5, rel=0.1), name
    matrices = [tensor for tensor in tensors.values() if tensor.dim() == 2]
    first_rows = {tuple(matrix[0, :8].tolist()) for matrix in matrices}
    assert len(first_rows) == len(matrices), "two matrices are alike"


def test_drawing_dummy_weights_leaves_the_global_generator_alone(tied):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(tied, load_format="dummy")
    assert torch.equal(torch.rand(3), expected)
