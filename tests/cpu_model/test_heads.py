"""Classification heads and pooling types against transformers and plain torch in float32.

Prompts of many lengths, in whole and in chunks, with a warm prefix cache, beside each other.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from engine_checks import (
    check_nothing_is_held,
    drain,
    greedy,
    random_prompts,
    tiny_engine,
)
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, edit_config, reference_greedy, save_model
from transformers import AutoModel, modeling_layers

from nanovllm import ArgumentError, PoolerConfig, PoolingParams
from nanovllm.config import Config
from nanovllm.models.head_config import TEXT_DECODERS, split_architecture
from nanovllm.models.registry import ARCHITECTURES
from nanovllm.models.size import num_weights

HIDDEN_SIZE = 64
CHUNKED = {"enable_chunked_prefill": True, "max_num_batched_tokens": 90, "num_kvcache_blocks": 8}
# What a family's config needs beside the sizes of `save_model`: the first of FAMILIES for each.
SETTINGS: dict[str, dict] = {}
for settings in FAMILIES.values():
    own = dict(settings)
    SETTINGS.setdefault(own.pop("architecture", "Qwen3ForCausalLM").partition("For")[0], own)
ENDINGS = ("ForSequenceClassification", "ForTokenClassification")
LOGITS = PoolingParams(use_activation=False)


def prompts_of_many_lengths() -> list[list[int]]:
    [shared] = random_prompts([520], seed=7)
    return [*random_prompts((1, 2, 60, 89, 90, 91, 257), seed=8), shared[:512], shared, shared]


PROMPTS = prompts_of_many_lengths()


def save_head(path: Path, family: str, ending: str, **overrides) -> Path:
    """A tiny random model with a head."""
    settings = SETTINGS[family] | overrides
    return save_model(path, seed=5, architecture=head_name(family, ending), **settings)


def head_name(family: str, ending: str) -> str:
    """The class of transformers with a head on the decoder of a family."""
    names = {family: name for name, family in TEXT_DECODERS.items()}
    return f"{names.get(family, family)}{ending}"


def families_with(ending: str) -> list[str]:
    """The families whose head transformers has, which is the oracle."""
    return [family for family in SETTINGS if hasattr(transformers, head_name(family, ending))]


@torch.inference_mode()
def logits_of_transformers(path: Path, prompts=PROMPTS) -> list[np.ndarray]:
    """[labels] of each prompt, or [tokens, labels] by a head for tokens."""
    [name] = json.loads((path / "config.json").read_text())["architectures"]
    model = getattr(transformers, name).from_pretrained(path, dtype=torch.float32).eval()
    return [model(torch.tensor([ids])).logits[0].numpy() for ids in prompts]


@torch.inference_mode()
def states_of_transformers(path: Path, prompts=PROMPTS) -> list[torch.Tensor]:
    """[tokens, HIDDEN_SIZE] of each prompt."""
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    return [model(torch.tensor([ids])).last_hidden_state[0] for ids in prompts]


def check_close(found, expected, atol: float = 3e-5) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=atol, rtol=2e-4)


def probs(llm, prompts=PROMPTS, **kwargs) -> list[list[float]]:
    return [o.outputs.probs for o in llm.classify(prompts, use_tqdm=False, **kwargs)]


def data(llm, task: str, params=None, prompts=PROMPTS) -> list[torch.Tensor]:
    outputs = llm.encode(prompts, params, pooling_task=task, use_tqdm=False)
    return [output.outputs.data for output in outputs]


# ---- heads of every family --------------------------------------------------------------------


def families_and_endings() -> list[tuple[str, str]]:
    """Each family with a head of one kind in turn; with both where names are not the usual ones."""
    both = sorted(set(families_with(ENDINGS[0])) & set(families_with(ENDINGS[1])))
    left_out = {(ENDINGS[i % 2], name) for i, name in enumerate(both)}
    left_out = {case for case in left_out if case[1] not in TEXT_DECODERS.values()}
    cases = [(ending, name) for ending in ENDINGS for name in families_with(ending)]
    return [case for case in cases if case not in left_out]


@pytest.mark.parametrize(("ending", "family"), families_and_endings())
def test_heads_of_every_family(ending, family, tmp_path):
    path = save_head(tmp_path / "model", family, ending, num_labels=3)
    task = "classify" if ending == ENDINGS[0] else "token_classify"
    few = PROMPTS[:6]
    expected = logits_of_transformers(path, few)
    with tiny_engine(path, **CHUNKED) as llm:
        check_close(data(llm, task, LOGITS, few), expected, atol=5e-4)  # recurrences are sums
        check_nothing_is_held(llm)


def test_sequence_classification(tmp_path):
    path = save_head(tmp_path / "model", "Qwen3", "ForSequenceClassification", num_labels=3)
    expected = logits_of_transformers(path)
    assert np.ptp(expected, axis=0).min() > 0.1  # worth comparing
    with tiny_engine(path) as llm:
        for _ in range(2):  # the second time with a warm prefix cache
            check_close(probs(llm, pooling_params=LOGITS), expected)
        outputs = llm.classify(PROMPTS, use_tqdm=False)
        softmax = torch.tensor(np.array(expected)).softmax(1)
        check_close([o.outputs.probs for o in outputs], softmax)
        assert [o.num_cached_tokens for o in outputs][-2:] == [512, 512]
        assert outputs[0].outputs.num_classes == 3 and outputs[0].prompt_token_ids == PROMPTS[0]
        check_nothing_is_held(llm)


def test_token_classification(tmp_path):
    path = save_head(tmp_path / "model", "Qwen3", "ForTokenClassification", num_labels=5)
    expected = logits_of_transformers(path)
    assert expected[3].shape == (89, 5)
    with tiny_engine(path, **CHUNKED) as llm:
        for _ in range(2):  # the prefix cache is warm, and not read
            check_close(data(llm, "token_classify", LOGITS), expected)
        found = llm.reward(PROMPTS, use_tqdm=False)
        assert {o.num_cached_tokens for o in found} == {0}
        assert found[0].outputs.data.dtype == torch.float32
        softmax = [torch.tensor(rows).softmax(1) for rows in expected]
        check_close([o.outputs.data for o in found], softmax)
        check_nothing_is_held(llm)


def test_the_heads_of_transformers_are_those_that_are_computed():
    """A family whose own classes do more needs an exception in `models.head_config`."""
    assert {name.partition("For")[0] for name in ARCHITECTURES} == SETTINGS.keys()
    for ending in ENDINGS:
        assert len(families_with(ending)) >= 5
        for family in families_with(ending):
            theirs = getattr(transformers, head_name(family, ending))
            assert issubclass(theirs, getattr(modeling_layers, f"Generic{ending}"))
            assert "forward" not in vars(theirs)


def test_names_of_decoders_and_heads():
    for name, expected in {
        "Qwen3ForCausalLM": ("Qwen3ForCausalLM", None),
        "Qwen3Model": ("Qwen3ForCausalLM", None),
        "Qwen3ForTokenClassification": ("Qwen3ForCausalLM", "token"),
        "Gemma3TextForSequenceClassification": ("Gemma3ForCausalLM", "sequence"),
        "Gemma3TextModel": ("Gemma3ForCausalLM", None),
        "Qwen2ForRewardModel": ("Qwen2ForCausalLM", "reward"),
    }.items():
        assert split_architecture(name) == expected
    # These read images as well, or have a head of another kind.
    for name in ("Gemma3ForSequenceClassification", "Gemma3Model", "Qwen3ForRewardModel"):
        assert split_architecture(name)[0] not in ARCHITECTURES


# ---- rewards ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_dir(tmp_path_factory) -> Path:
    """The layout of Qwen2.5-Math-PRM: two layers on top, and an LM head that nobody uses."""
    path = tmp_path_factory.mktemp("models") / "reward"
    settings = SETTINGS["Qwen2"] | {"tie_word_embeddings": False}
    save_model(path, seed=9, architecture="Qwen2ForCausalLM", **settings)
    tensors = load_file(path / "model.safetensors")
    assert "lm_head.weight" in tensors
    generator = torch.Generator().manual_seed(1)
    for name, shape in {
        "score.0.weight": (HIDDEN_SIZE, HIDDEN_SIZE),
        "score.0.bias": (HIDDEN_SIZE,),
        "score.2.weight": (2, HIDDEN_SIZE),
        "score.2.bias": (2,),
    }.items():
        tensors[name] = 0.2 * torch.randn(shape, generator=generator)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    edit_config(path, architectures=["Qwen2ForProcessRewardModel"])
    return path


@pytest.fixture(scope="module")
def step_rewards(reward_dir) -> list[torch.Tensor]:
    """[tokens, 2] logits of each prompt."""
    w = load_file(reward_dir / "model.safetensors")
    return [
        (states @ w["score.0.weight"].T + w["score.0.bias"]).relu() @ w["score.2.weight"].T
        + w["score.2.bias"]
        for states in states_of_transformers(reward_dir)
    ]


def test_process_rewards(reward_dir, step_rewards):
    tag = PROMPTS[-1][40]
    where = [[i for i, token in enumerate(ids) if token == tag] for ids in PROMPTS]
    assert max(map(len, where)) > 1 and min(map(len, where)) == 0
    at_steps = [rows[i] for rows, i in zip(step_rewards, where, strict=True)]
    with tiny_engine(reward_dir, pooler_config={"step_tag_id": tag}, **CHUNKED) as llm:
        found = [o.outputs.data for o in llm.reward(PROMPTS, use_tqdm=False)]
        assert found[0].shape == (0, 2)
        check_close(found, [rows.softmax(1) for rows in at_steps])
        one = PoolingParams(returned_token_ids=[1])
        check_close(data(llm, "token_classify", one), [r[:, 1:].sigmoid() for r in at_steps])
        both = PoolingParams(
            returned_token_ids=[1, 0], use_activation=False, step_tag_id=PROMPTS[1][0]
        )
        [rows] = data(llm, "token_classify", both, PROMPTS[1:2])
        check_close(rows[:1], step_rewards[1][:1].flip(1))
        for params, message in (
            (PoolingParams(returned_token_ids=[2]), "returned_token_ids must be between 0 and 1"),
            (PoolingParams(step_tag_id=10**6), "step_tag_id must be between 0 and 383"),
        ):
            with pytest.raises(ArgumentError, match=message):
                llm.reward(PROMPTS, pooling_params=params)
        check_nothing_is_held(llm)
    with tiny_engine(reward_dir) as llm:  # without a tag: of all tokens
        check_close(data(llm, "token_classify"), [rows.softmax(1) for rows in step_rewards])


def test_rewards_of_one_label(reward_dir, step_rewards, tmp_path):
    path = Path(shutil.copytree(reward_dir, tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    for name in ("score.2.weight", "score.2.bias"):
        tensors[name] = tensors[name][1:].clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    edit_config(path, architectures=["Qwen2ForRewardModel"])
    with tiny_engine(path, **CHUNKED) as llm:
        check_close(data(llm, "token_classify"), [rows[:, 1:].sigmoid() for rows in step_rewards])


def test_a_reward_for_a_prompt_is_the_last_of_those_for_its_tokens(tmp_path):
    path = save_head(tmp_path / "model", "Llama", "ForSequenceClassification", num_labels=1)
    expected = logits_of_transformers(path)
    with tiny_engine(path) as llm:
        check_close(probs(llm, pooling_params=LOGITS), expected)
        check_close(probs(llm), 1 / (1 + np.exp(-np.array(expected))))
        each = [rows[-1] for rows in data(llm, "token_classify", LOGITS)]
        check_close(each, expected)


# ---- ranks, weights ---------------------------------------------------------------------------


@pytest.mark.usefixtures("ranks_are_threads")
def test_two_ranks(tmp_path):
    settings = {"num_labels": 3, "num_key_value_heads": 2}
    path = save_head(tmp_path / "model", "Qwen3", "ForSequenceClassification", **settings)
    expected = logits_of_transformers(path)
    with tiny_engine(path, tensor_parallel_size=2, **CHUNKED) as llm:
        check_close(probs(llm, pooling_params=LOGITS), expected)
        check_close([rows[-1] for rows in data(llm, "token_classify", LOGITS)], expected)
        check_nothing_is_held(llm)


def test_weights_of_a_head(tmp_path):
    """Missing, random, replaced, read again."""
    path = save_head(tmp_path / "model", "Qwen3", "ForSequenceClassification", num_labels=4)
    expected = logits_of_transformers(path)
    with tiny_engine(path) as llm:
        score = llm.apply_model(lambda model: model.score.weight.clone())[0]
        assert llm.load_weights([("score.weight", 2 * score)]) == {"score.weight"}
        check_close(probs(llm, pooling_params=LOGITS), [2 * row for row in expected])
        llm.reload_weights()
        check_close(probs(llm, pooling_params=LOGITS), expected)
        llm.sleep(level=1)
        llm.wake_up()
        check_close(probs(llm, pooling_params=LOGITS), expected)
    with tiny_engine(path, load_format="dummy") as llm:
        rows = np.array(probs(llm))
        assert rows.shape == (len(PROMPTS), 4) and rows.sum(1) == pytest.approx(1)
    tensors = load_file(path / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArgumentError, match=r"missing tensors: score\.weight"):
        tiny_engine(path)


# ---- pooling types ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states(tiny_dir) -> list[torch.Tensor]:
    return states_of_transformers(tiny_dir)


def unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)


POOLINGS = {
    "LAST": lambda rows: rows[-1],
    "CLS": lambda rows: rows[0],
    "FIRST": lambda rows: rows[0],
    "MEAN": lambda rows: rows.mean(0),
}


@pytest.mark.parametrize("pooling_type", POOLINGS)
def test_pooling_types_beside_requests_that_generate(tiny_dir, states, pooling_type):
    pooled = [POOLINGS[pooling_type](rows) for rows in states]
    config = PoolerConfig(pooling_type=pooling_type, normalize=False)
    with tiny_engine(tiny_dir, pooler_config=config, max_num_seqs=4, **CHUNKED) as llm:
        ids = [llm.add_request(prompt, greedy(6)) for prompt in PROMPTS[2:4]]
        llm.step()
        scored = greedy(1)
        scored.prompt_logprobs = 0  # every hidden state of this one is wanted as well
        also = llm.add_request(PROMPTS[4], scored)
        outputs = llm.embed(PROMPTS, use_tqdm=False)
        check_close([o.outputs.embedding for o in outputs], pooled)
        few = PROMPTS[2:6]
        normalized = PoolingParams(use_activation=True)
        check_close(data(llm, "embed", normalized, few), map_list(unit, pooled[2:6]))
        short = PoolingParams(dimensions=5)
        check_close(data(llm, "embed", short, few), [row[:5] for row in pooled[2:6]])
        completions, _ = drain(llm)
        found = [completions[i] for i in ids]
        assert found == reference_greedy(tiny_dir, PROMPTS[2:4], 6, found)
        assert len(completions[also]) == 1
        check_nothing_is_held(llm)


def map_list(function, items) -> list:
    return [function(item) for item in items]


@pytest.mark.parametrize("overlap", [True, False])
def test_embeddings_of_all_tokens(tiny_dir, states, overlap):
    with tiny_engine(tiny_dir, async_scheduling=overlap, **CHUNKED) as llm:
        for _ in range(2):
            check_close(data(llm, "token_embed"), map_list(unit, states))
        check_close(data(llm, "token_embed", PoolingParams(use_activation=False)), states)
        check_nothing_is_held(llm)


def test_embeddings_of_steps(tiny_dir, states):
    tag = PROMPTS[-1][40]
    with tiny_engine(tiny_dir, pooler_config={"pooling_type": "STEP", "step_tag_id": tag}) as llm:
        steps = [r[[t == tag for t in ids]] for r, ids in zip(states, PROMPTS, strict=True)]
        check_close(data(llm, "token_embed"), map_list(unit, steps))
        check_close(data(llm, "embed"), [unit(rows[-1]) for rows in states])


def test_late_interaction(tiny_dir):
    query, documents = "the quick fox", ["a paged cache", "the lazy dog sleeps", "warm sun"]
    config = PoolerConfig(task="token_embed")
    with tiny_engine(tiny_dir, pooler_config=config) as llm:
        ids = [llm.tokenizer(text)["input_ids"] for text in (query, *documents)]
        ours, *theirs = map_list(unit, states_of_transformers(tiny_dir, ids))
        expected = [(ours @ rows.T).max(1).values.sum().item() for rows in theirs]
        outputs = llm.score(query, documents, use_tqdm=False)
        assert [o.outputs.score for o in outputs] == pytest.approx(expected, abs=1e-4)
        assert [o.prompt_token_ids for o in outputs] == [ids[0] + rest for rest in ids[1:]]
        [encoded] = llm.encode(query, use_tqdm=False)  # the task is said already
        check_close([encoded.outputs.data], [ours])
        assert [task for task in llm.supported_tasks if task != "generate"] == ["token_embed"]
        for call in (llm.embed, lambda prompt: llm.encode(prompt, pooling_task="embed")):
            with pytest.raises(ArgumentError, match=r"try PoolerConfig\(task='embed'\)"):
                call(query)
        with pytest.raises(ArgumentError, match="chat_template"):
            llm.score(query, documents, chat_template="{{ messages }}")


def test_parameters_for_each_prompt(tiny_dir, states):
    each = [PoolingParams(dimensions=n + 1) for n in range(len(PROMPTS))]
    with tiny_engine(tiny_dir) as llm:
        found = [
            o.outputs.embedding for o in llm.embed(PROMPTS, pooling_params=each, use_tqdm=False)
        ]
        check_close(found, [unit(rows[-1, : n + 1]) for n, rows in enumerate(states)])
        fresh = PoolingParams(skip_reading_prefix_cache=True)
        outputs = llm.embed(PROMPTS, pooling_params=fresh, use_tqdm=False)
        assert {o.num_cached_tokens for o in outputs} == {0}
        for wrong, message in (
            (each[:2], r"prompts \(10\) and pooling_params \(2\) must be the same"),
            (
                [*each[:-1], 5],
                r"pooling_params\[9\]: pooling_params must be a PoolingParams, got 5",
            ),
            (
                [*each[:-1], PoolingParams(dimensions=65)],
                r"\[9\]: dimensions must be between 1 and",
            ),
        ):
            with pytest.raises(ArgumentError, match=message):
                llm.embed(PROMPTS, pooling_params=wrong)
        check_nothing_is_held(llm)


def test_a_head_on_pooled_states(tmp_path):
    path = save_head(tmp_path / "model", "Qwen3", "ForSequenceClassification", num_labels=3)
    weight = load_file(path / "model.safetensors")["score.weight"]
    expected = [rows.mean(0) @ weight.T for rows in states_of_transformers(path)]
    settings = {"seq_pooling_type": "MEAN", "logit_mean": 0.5, "logit_sigma": 2.0}
    with tiny_engine(path, pooler_config=settings, **CHUNKED) as llm:
        check_close(probs(llm, pooling_params=LOGITS), [(row - 0.5) / 2 for row in expected])
        check_close(probs(llm), [((row - 0.5) / 2).softmax(0) for row in expected])


# ---- files of sentence-transformers -----------------------------------------------------------


def write_modules(path: Path, *kinds: str, pooling: dict | None = None, **bert) -> None:
    modules = [
        {
            "idx": i,
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir(exist_ok=True)
    if pooling is not None:
        (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (path / "sentence_bert_config.json").write_text(json.dumps(bert))


def test_files_of_sentence_transformers(tmp_path):
    path = save_model(tmp_path / "model", seed=3)
    few = PROMPTS[:6]
    rows = states_of_transformers(path, few)
    mean = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    with tiny_engine(path, **CHUNKED) as llm:
        write_modules(path, "Transformer", "Pooling", pooling=mean)
        check_close(data(llm, "embed", prompts=few), [r.mean(0) for r in rows])
        write_modules(path, "Transformer", "Pooling", "Normalize", pooling=mean)
        check_close(data(llm, "embed", prompts=few), [unit(r.mean(0)) for r in rows])
        check_close(data(llm, "token_embed", prompts=few), map_list(unit, rows))
        check_close(
            data(llm, "embed", PoolingParams(use_activation=False), few), [r.mean(0) for r in rows]
        )
        write_modules(path, "Transformer", "Pooling", pooling={"pooling_mode_cls_token": True})
        check_close(data(llm, "embed", prompts=few), [r[0] for r in rows])
        check_close(data(llm, "token_embed", prompts=few), rows)
        write_modules(path, "Transformer", "Pooling", "Normalize", max_seq_length=90)
        with pytest.raises(ArgumentError, match=r"prompts\[5\] has 91 tokens, the max_seq_length"):
            llm.embed(few)
        [cut] = llm.embed("fox " * 300, truncate_prompt_tokens=-1, use_tqdm=False)
        assert len(cut.prompt_token_ids) == 90
        write_modules(path, "Transformer", "Pooling", do_lower_case=True)
        with pytest.raises(ArgumentError, match="do_lower_case is not supported"):
            llm.embed(few)
        check_nothing_is_held(llm)
    write_modules(path, "Transformer", "Pooling", "Normalize", pooling=mean)
    with tiny_engine(path, pooler_config={"pooling_type": "LAST", "normalize": False}) as llm:
        check_close(
            data(llm, "embed", prompts=few), [r[-1] for r in rows]
        )  # it wins over the files
        [pair] = llm.score("the quick", "brown fox", use_tqdm=False)  # by embeddings, as they say
        assert "_" in pair.request_id


# ---- scores -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "cross"
    return save_head(path, "Qwen2", "ForSequenceClassification", num_labels=1)


def test_scores_of_a_cross_encoder(cross_encoder):
    query, documents = "the quick fox", ["a paged cache", "the lazy dog sleeps " * 20, "warm sun"]
    with tiny_engine(cross_encoder) as llm:
        ids = [llm.tokenizer(query, document)["input_ids"] for document in documents]
        logits = np.concatenate(logits_of_transformers(cross_encoder, ids))
        outputs = llm.score(query, documents, use_tqdm=False)
        assert [o.prompt_token_ids for o in outputs] == ids
        found = [o.outputs.score for o in outputs]
        assert found == pytest.approx(1 / (1 + np.exp(-logits)), abs=2e-5)
        template = "{{ messages[1]['role'] }}: {{ messages[1]['content'] }}"
        by_template = llm.score(query, documents, chat_template=template, use_tqdm=False)
        prompts = [llm.tokenizer(f"document: {document}")["input_ids"] for document in documents]
        assert [o.prompt_token_ids for o in by_template] == prompts
        found = llm.score([query] * 3, documents, pooling_params=LOGITS, use_tqdm=False)
        assert [o.outputs.score for o in found] == pytest.approx(logits, abs=2e-5)
        [cut] = llm.score(query, documents[1], truncate_prompt_tokens=9, use_tqdm=False)
        assert len(cut.prompt_token_ids) == 9
        for call, message in (
            (lambda: llm.score("a", "b", method="reranker"), "has a classification head: method"),
            (lambda: llm.score("a", "b", method="embedding"), "has a classification head: method"),
            (lambda: llm.score("a", "b", instruction="x"), "instruction is for method='reranker'"),
            (
                lambda: llm.score("a", "b", pooling_params=PoolingParams(dimensions=3)),
                "dimensions is not for scores",
            ),
        ):
            with pytest.raises(ArgumentError, match=message):
                call()
        check_nothing_is_held(llm)


def test_the_activation_that_a_cross_encoder_names(cross_encoder):
    names = {"torch.nn.modules.linear.Identity": LOGITS, "torch.nn.modules.activation.Tanh": None}
    for name, params in names.items():
        edit_config(cross_encoder, sentence_transformers={"activation_fn": name, "version": "5"})
        with tiny_engine(cross_encoder) as llm:
            if params is None:
                with pytest.raises(ArgumentError, match="by 'torch.nn.modules.activation.Tanh'"):
                    llm.score("a", "b")
                continue
            [first], [second] = (
                llm.score("the fox", "the dog", pooling_params=p, use_tqdm=False)
                for p in (None, params)
            )
            assert first.outputs.score == pytest.approx(second.outputs.score)
    edit_config(cross_encoder, sentence_transformers=None)


# ---- what is refused --------------------------------------------------------------------------


def test_calls_that_a_model_does_not_answer(tiny_dir, cross_encoder, reward_dir):
    calls = {
        "generate": lambda llm: llm.generate(PROMPTS[:1]),
        "chat": lambda llm: llm.chat([{"role": "user", "content": "a"}]),
        "add_request": lambda llm: llm.add_request(PROMPTS[0]),
        "embed": lambda llm: llm.embed(PROMPTS[:1]),
        "classify": lambda llm: llm.classify(PROMPTS[:1]),
        "reward": lambda llm: llm.reward(PROMPTS[:1]),
        "score": lambda llm: llm.score("a", "b"),
        "encode": lambda llm: llm.encode(PROMPTS[:1]),
        "other": lambda llm: llm.encode(PROMPTS[:1], pooling_task="plugin"),
    }
    head = "has a classification head: it answers"
    asked = "encode needs pooling_task: .* answers"
    for path, expected in (
        (
            tiny_dir,
            {
                "classify": "does not answer 'classify': .*Qwen3ForCausalLM answers 'embed' and 't",
                "reward": "does not answer 'token_classify'",
                "encode": f"{asked} 'embed' and 'token_embed'",
            },
        ),
        (
            cross_encoder,
            {
                "generate": f"{head} classify, and generates nothing",
                "chat": head,
                "add_request": head,
                "embed": "does not answer 'embed': .* answers 'classify' and 'token_classify'",
                "encode": f"{asked} 'classify'",
                "other": "pooling_task must be one of embed, classify, token_embed, token_classify",
            },
        ),
        (
            reward_dir,
            {
                "generate": f"{head} token_classify",
                "classify": "does not answer 'classify': .*Qwen2ForProcessRewardModel answers 'tok",
                "score": "score needs a head for sequence classification with one label: .* 2 of a",
            },
        ),
    ):
        with tiny_engine(path) as llm:
            for name, message in expected.items():
                with pytest.raises(ArgumentError, match=message):
                    calls[name](llm)
            check_nothing_is_held(llm)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling_type": "MAX"}, "pooling_type must be one of LAST, CLS, MEAN, ALL, STEP"),
        ({"pooling": "MEAN"}, "unexpected keyword argument 'pooling'; the nearest known is 'pooli"),
        ({"max_embed_len": 5}, "unexpected keyword argument 'max_embed_len'"),
        ({"pooling_type": "ALL", "tok_pooling_type": "STEP"}, "are names of one thing: give one"),
        ({"normalize": True, "use_activation": False}, "are names of one thing: give one"),
        ({"normalize": True, "softmax": True}, "softmax=True, but Qwen3ForCausalLM has no classif"),
        ({"logit_sigma": 0.0}, "logit_sigma must not be 0"),
        ({"logit_mean": 1.0}, "logit_mean=1.0, but Qwen3ForCausalLM has no classification head"),
        ({"step_tag_id": 3}, "step_tag_id is for tok_pooling_type='STEP'"),
        (
            {"returned_token_ids": [-1]},
            "returned_token_ids must be between 0 and 2147483647, got -1",
        ),
        ({"task": "classify"}, "task='classify', but Qwen3ForCausalLM answers 'embed' and 'token_"),
        ({"dimensions": 65}, "dimensions must be between 1 and 64, got 65"),
        ("MEAN", "pooler_config must be a PoolerConfig or a dict, got 'MEAN'"),
    ],
)
def test_wrong_pooler_configs(tiny_dir, config, message):
    with pytest.raises(ArgumentError, match=message):
        tiny_engine(tiny_dir, pooler_config=config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"normalize": True}, "normalize=True, but .* makes no embeddings"),
        ({"pooling_type": "MEAN"}, "MEAN makes one result of a prompt, but Qwen2ForProcessReward"),
        ({"pooling_type": "ALL", "step_tag_id": 3}, "step_tag_id is for tok_pooling_type='STEP'"),
    ],
)
def test_wrong_pooler_configs_of_a_head(reward_dir, config, message):
    with pytest.raises(ArgumentError, match=message):
        tiny_engine(reward_dir, pooler_config=config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": ["a"]}, "id2label must name the labels 0, 1, ..., got"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label must name the labels 0, 1, ..., got"),
        ({"id2label": {}}, "id2label must name a label at least"),
        ({"id2label": {"0": "a"}, "num_labels": 2}, r"num_labels \(2\) and id2label \(1 labels\)"),
        ({"num_labels": 0}, "num_labels must be >= 1, got 0"),
        ({"problem_type": "ranking"}, "problem_type 'ranking' is not supported; supported: regr"),
        ({"sentence_transformers": 5}, "sentence_transformers must name a class of torch.nn"),
        ({"architectures": ["Qwen2ForQuestionAnswering"]}, "is not supported; supported: [A-Z]"),
        ({"architectures": ["Qwen3ForProcessRewardModel"]}, "is not supported; supported: [A-Z]"),
        ({"num_labels": 2}, r"tensor 'score.weight' has shape \[1, 64\], the config asks for \[2"),
    ],
)
def test_wrong_fields_of_a_head(cross_encoder, changes, message):
    before = (cross_encoder / "config.json").read_text()
    if "num_labels" in changes:
        edit_config(cross_encoder, id2label=None, label2id=None)
    edit_config(cross_encoder, **changes)
    try:
        with pytest.raises(ArgumentError, match=message):
            tiny_engine(cross_encoder)
    finally:
        (cross_encoder / "config.json").write_text(before)


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_the_activation_of_a_problem_type(tmp_path, problem_type):
    settings = {"num_labels": 3, "problem_type": problem_type}
    path = save_head(tmp_path / "model", "Qwen3", "ForSequenceClassification", **settings)
    logits = torch.tensor(np.array(logits_of_transformers(path, PROMPTS[:3])))
    with tiny_engine(path) as llm:
        expected = logits if problem_type == "regression" else logits.sigmoid()
        check_close(probs(llm, PROMPTS[:3]), expected)


def test_a_heads_weights_count(cross_encoder, reward_dir):
    """They are compared with the files before anything of their size is allocated."""
    for path, expected in ((cross_encoder, 64), (reward_dir, 64 * 64 + 2 * 64)):
        model = Config(str(path)).model_config
        assert num_weights(model) - num_weights(replace(model, head=None)) == expected


def test_heads_on_transformers_own_modules_are_refused(cross_encoder):
    message = "Qwen2ForSequenceClassification.* is no causal language model of transformers"
    with pytest.raises(ArgumentError, match=message):
        tiny_engine(cross_encoder, model_impl="transformers")


def test_means_on_transformers_own_module(tiny_dir, states):
    config = {"pooling_type": "MEAN", "normalize": False}
    settings = {"model_impl": "transformers", "pooler_config": config}
    with tiny_engine(tiny_dir, **settings, **CHUNKED) as llm:
        check_close(data(llm, "embed"), [rows.mean(0) for rows in states])
