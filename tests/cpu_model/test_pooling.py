"""embed and score against transformers in float32: pooled sequences beside those that generate."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_checks import check_nothing_is_held, drain, greedy, random_prompts, tiny_engine
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, reference_greedy, save_model
from tokenizers import Tokenizer, processors
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from nanovllm import ArgumentError, PoolingParams
from nanovllm.engine.sequence import Wants
from nanovllm.features.scoring import QUESTION_AFTER, QUESTION_BEFORE, WEB_SEARCH

HIDDEN_SIZE = 64
QUERY = "the quick brown fox?"
DOCUMENTS = ["a paged cache keeps the keys", "lazy dog " * 30, "sleeps in the {warm} sun"]


def add_tokens(model_dir: Path) -> None:
    """What Qwen3's tokenizer has beside the tiny one; texts end with <|endoftext|>."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_tokens(["yes", "no", "<think>", "</think>"])
    tokenizer.save_pretrained(model_dir)
    path = str(model_dir / "tokenizer.json")
    raw = Tokenizer.from_file(path)
    end = ("<|endoftext|>", raw.token_to_id("<|endoftext|>"))
    raw.post_processor = processors.TemplateProcessing(
        single=f"$A {end[0]}", pair=f"$A {end[0]} $B {end[0]}", special_tokens=[end]
    )
    raw.save(path)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """Untied, with a vocabulary that two ranks do not divide."""
    path = tmp_path_factory.mktemp("models") / "pooling"
    save_model(path, seed=6, vocab_size=VOCAB_SIZE + 5, tie_word_embeddings=False)
    add_tokens(path)
    return path


@pytest.fixture(scope="module")
def llm(model_dir):
    with tiny_engine(model_dir) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    [shared] = random_prompts([520], seed=7)
    return [*random_prompts((1, 2, 60, 255, 256, 257), seed=8), shared[:512], shared, shared]


@pytest.fixture(scope="module")
def expected(model_dir, prompts) -> np.ndarray:
    """[prompts, HIDDEN_SIZE] the final hidden state of each last token."""
    return last_hidden_states(model_dir, prompts)


@torch.inference_mode()
def last_hidden_states(model_dir: Path, prompts: list[list[int]]) -> np.ndarray:
    model = AutoModel.from_pretrained(model_dir, dtype=torch.float32)
    states = [model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in prompts]
    return torch.stack(states).numpy()


def normalized(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def embed(llm, prompts, **kwargs) -> np.ndarray:
    outputs = llm.embed(prompts, use_tqdm=False, **kwargs)
    return np.array([output.outputs.embedding for output in outputs])


def scores(llm, *args, **kwargs) -> list[float]:
    return [output.outputs.score for output in llm.score(*args, use_tqdm=False, **kwargs)]


def check_close(rows: np.ndarray, truth: np.ndarray) -> None:
    np.testing.assert_allclose(rows, truth, atol=2e-5, rtol=1e-4)


def test_embeddings_are_those_of_transformers(llm, prompts, expected):
    outputs = llm.embed(prompts, use_tqdm=False)
    assert all(type(x) is float for x in outputs[0].outputs.embedding)
    check_close(np.array([o.outputs.embedding for o in outputs]), normalized(expected))
    assert [o.prompt_token_ids for o in outputs] == prompts
    assert all(o.finished and o.request_id.isdigit() for o in outputs)
    again = llm.embed(prompts, use_tqdm=False)  # from the prefix cache
    assert [o.num_cached_tokens for o in again] == [0, 0, 0, 0, 255, 256, 511, 512, 512]
    check_close(np.array([o.outputs.embedding for o in again]), normalized(expected))
    check_nothing_is_held(llm)


def test_dimensions_and_plain_states(llm, prompts, expected):
    plain = PoolingParams(use_activation=False)
    check_close(embed(llm, prompts, pooling_params=plain), expected)
    short = embed(llm, prompts, pooling_params=PoolingParams(dimensions=16))
    check_close(short, normalized(expected[:, :16]))
    plain.dimensions = 3
    check_close(embed(llm, prompts[:2], pooling_params=plain), expected[:2, :3])


@pytest.mark.parametrize("overlap", [True, False])
def test_small_budgets(model_dir, prompts, expected, overlap):
    """Chunked prompts, few slots and few blocks, beside requests that generate."""
    generated = prompts[2:5]
    reference = reference_greedy(model_dir, generated, 12)
    with tiny_engine(
        model_dir,
        enable_chunked_prefill=True,
        max_num_batched_tokens=90,
        max_num_seqs=3,
        num_kvcache_blocks=6,
        enable_prefix_caching=overlap,
        async_scheduling=overlap,
    ) as llm:
        ids = [llm.add_request(prompt, greedy(12)) for prompt in generated]
        llm.step()
        check_close(embed(llm, prompts), normalized(expected))
        completions, _ = drain(llm)
        assert [completions[i] for i in ids] == reference
        check_nothing_is_held(llm)


def test_one_step_samples_and_pools(llm, model_dir, prompts, expected):
    """Sampled by the fast sampler, sampled apart and pooled, in one prefill step."""
    reference = reference_greedy(model_dir, prompts[2:4], 4)
    apart = greedy(4)
    apart.logprobs = 0
    llm.reset_prefix_cache()
    ids = [llm.add_request(prompts[2], greedy(4)), llm.add_request(prompts[3], apart)]
    steps = []
    launch = llm.executor.launch
    llm.executor.launch = lambda seqs, is_prefill: (
        steps.append([bool(seq.wants & Wants.POOLING) for seq in seqs]) or launch(seqs, is_prefill)
    )
    try:
        check_close(embed(llm, prompts[:3]), normalized(expected[:3]))
    finally:
        del llm.executor.launch
    assert steps[0] == [False, False, True, True, True]
    completions, _ = drain(llm)
    assert [completions[i] for i in ids] == reference
    assert len(llm.get_output(ids[1])["logprobs"]) == 4
    check_nothing_is_held(llm)


def test_texts_end_as_the_tokenizer_says(llm, model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = llm.embed(DOCUMENTS[1], use_tqdm=False)[0].prompt_token_ids
    assert ids[-1] == end and tokenizer.decode(ids[:-1]) == DOCUMENTS[1]
    for cut in (
        llm.embed(DOCUMENTS[1], use_tqdm=False, truncate_prompt_tokens=9),
        llm.embed(DOCUMENTS[1], use_tqdm=False, tokenization_kwargs={"max_length": 9}),
    ):
        assert cut[0].prompt_token_ids == [*ids[:8], end]
    truth = normalized(last_hidden_states(model_dir, [[*ids[:8], end]]))
    check_close(np.array([cut[0].outputs.embedding]), truth)


def test_a_prompt_may_fill_the_model_length(llm):
    [longest] = random_prompts([1024], seed=9)
    [output] = llm.embed(longest, use_tqdm=False)
    assert len(output.prompt_token_ids) == 1024
    long_text = "fox " * 2000
    [output] = llm.embed(long_text, use_tqdm=False, truncate_prompt_tokens=-1)
    assert len(output.prompt_token_ids) == 1024
    for prompt in ([*longest, 1], long_text):
        with pytest.raises(ArgumentError, match="is longer than the maximum model length of 1024"):
            llm.embed(prompt, use_tqdm=False)
    check_nothing_is_held(llm)


# ---- scores -----------------------------------------------------------------------------------


@torch.inference_mode()
def reference_scores(model_dir: Path, pairs, instruction: str = WEB_SEARCH) -> list[float]:
    """As the model card computes them, from logits."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    answers = [tokenizer.convert_tokens_to_ids(word) for word in ("no", "yes")]
    results = []
    for query, document in pairs:
        parts = [
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the "
            'Query and the Instruct provided. Note that the answer can only be "yes" or "no".'
            "<|im_end|>\n<|im_start|>user\n",
            f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}",
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ]
        ids = [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False)]
        logits = model(torch.tensor([ids])).logits[0, -1, answers]
        results.append(torch.softmax(logits, 0)[1].item())
    return results


def test_scores_are_those_of_transformers(llm, model_dir):
    truth = reference_scores(model_dir, [(QUERY, document) for document in DOCUMENTS])
    assert max(truth) - min(truth) > 0.05  # worth comparing
    assert scores(llm, QUERY, DOCUMENTS) == pytest.approx(truth, abs=2e-5)
    assert scores(llm, [QUERY] * 3, DOCUMENTS) == pytest.approx(truth, abs=2e-5)
    assert scores(llm, QUERY, DOCUMENTS[0]) == pytest.approx(truth[:1], abs=2e-5)
    own = reference_scores(model_dir, [(QUERY, DOCUMENTS[0])], "Find a fox")
    assert scores(llm, QUERY, DOCUMENTS[0], instruction="Find a fox") == pytest.approx(own, 1e-4)
    assert own != pytest.approx(truth[:1], abs=1e-3)
    # vLLM's script writes the whole question into the two texts.
    query = f"{QUESTION_BEFORE}<Instruct>: Find a fox\n<Query>: {QUERY}\n"
    document = f"<Document>: {DOCUMENTS[0]}{QUESTION_AFTER}"
    assert scores(llm, query, document) == pytest.approx(own, 1e-4)
    # Its newer script has it in a template of two messages.
    template = QUESTION_BEFORE + "<Instruct>: Find a fox\n<Query>: {{ messages[0].content }}\n"
    template += "<Document>: {{ messages[1].content }}" + QUESTION_AFTER.replace(
        "\n\n", "{{'\\n\\n'}}"
    )
    assert scores(llm, QUERY, DOCUMENTS[0], chat_template=template) == pytest.approx(own, 1e-4)
    check_nothing_is_held(llm)


def test_a_cut_question_keeps_its_end(llm):
    [whole] = llm.score(QUERY, DOCUMENTS[1], use_tqdm=False)
    length = len(whole.prompt_token_ids) - 40
    [cut] = llm.score(QUERY, DOCUMENTS[1], use_tqdm=False, truncate_prompt_tokens=length)
    assert len(cut.prompt_token_ids) == length
    num_after = len(llm.tokenizer.encode(QUESTION_AFTER, add_special_tokens=False))
    assert cut.prompt_token_ids[-num_after:] == whole.prompt_token_ids[-num_after:]
    num_kept = length - num_after
    assert cut.prompt_token_ids[:num_kept] == whole.prompt_token_ids[:num_kept]


def test_cosines_of_embeddings(llm):
    query, *rows = embed(llm, [QUERY, *DOCUMENTS])
    expected = [float(query @ row) for row in rows]
    outputs = llm.score(QUERY, DOCUMENTS, method="embedding", use_tqdm=False)
    assert [o.outputs.score for o in outputs] == pytest.approx(expected, abs=1e-5)
    first, second = outputs[1].request_id.split("_")
    assert int(second) == int(first) + 2
    assert scores(llm, DOCUMENTS, DOCUMENTS, method="embedding") == pytest.approx([1] * 3)


# ---- checkpoints, ranks, errors ---------------------------------------------------------------


def save_bare(model_dir: Path, path: Path) -> Path:
    """The decoder alone, in the layout of Qwen3-Embedding: no head, names without "model."."""
    tensors = load_file(model_dir / "model.safetensors")
    del tensors["lm_head.weight"]
    path.mkdir()
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert "layers.0.self_attn.q_proj.weight" in bare
    save_file(bare, path / "model.safetensors", {"format": "pt"})
    for file in model_dir.iterdir():
        if file.suffix == ".json":
            (path / file.name).write_text(file.read_text())
    return path


def test_a_decoder_saved_alone_embeds_and_no_more(model_dir, tmp_path, prompts, expected):
    path = save_bare(model_dir, tmp_path / "bare")
    with tiny_engine(path, runner="pooling") as llm:
        check_close(embed(llm, prompts[:4]), normalized(expected[:4]))
        llm.reload_weights()
        check_close(embed(llm, prompts[:4]), normalized(expected[:4]))
        for call in (
            lambda: llm.generate("the fox", use_tqdm=False),
            lambda: llm.score(QUERY, DOCUMENTS, use_tqdm=False),
        ):
            with pytest.raises(ArgumentError, match="was saved without an LM head"):
                call()
        check_nothing_is_held(llm)


def test_a_decoder_saved_alone_generates_if_its_embeddings_are_tied(tiny_dir, tmp_path):
    path = tmp_path / "bare"
    AutoModel.from_pretrained(tiny_dir, dtype=torch.float32).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_text((tiny_dir / name).read_text())
    assert json.loads((path / "config.json").read_text())["architectures"] == ["Qwen3Model"]
    prompts = random_prompts((5, 30))
    with tiny_engine(path) as llm:
        outputs = llm.generate(prompts, greedy(6), use_tqdm=False)
    assert [o["token_ids"] for o in outputs] == reference_greedy(tiny_dir, prompts, 6)


@pytest.mark.usefixtures("ranks_are_threads")
def test_two_ranks(model_dir, prompts, expected):
    truth = reference_scores(model_dir, [(QUERY, document) for document in DOCUMENTS])
    chunked = {"enable_chunked_prefill": True, "max_num_batched_tokens": 300}
    with tiny_engine(model_dir, tensor_parallel_size=2, **chunked) as llm:
        llm.add_request(prompts[3], greedy(3))
        check_close(embed(llm, prompts), normalized(expected))
        assert scores(llm, QUERY, DOCUMENTS) == pytest.approx(truth, abs=2e-5)
        completions, _ = drain(llm)
        assert list(completions.values()) == reference_greedy(model_dir, prompts[3:4], 3)
        check_nothing_is_held(llm)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.embed([]), None),
        (lambda llm: llm.embed([[1], []]), r"prompts\[1\]: Prompt cannot be empty"),
        (
            lambda llm: llm.embed([1], pooling_params={"dimensions": 1}),
            "must be a PoolingParams or a list of them, got",
        ),
        (
            lambda llm: llm.embed([1], pooling_params=PoolingParams(dimensions=HIDDEN_SIZE + 1)),
            "dimensions must be between 1 and 64, got 65",
        ),
        (
            lambda llm: llm.embed("x", truncate_prompt_tokens=0),
            "truncate_prompt_tokens must be between 1 and 1024, got 0",
        ),
        (lambda llm: llm.embed("x", lora_request=1), "lora_request must be a LoRARequest"),
        (lambda llm: llm.score("a", []), "data_2 must be a string or a list of strings"),
        (lambda llm: llm.score(["a", 1], ["b", "c"]), r"data_1\[1\]: a text must be a string"),
        (lambda llm: llm.score(["a", "b"], ["c"] * 3), "got 2 and 3"),
        (lambda llm: llm.score("a", "b", method="cross"), "method must be one of cross-enc"),
        (lambda llm: llm.score("a", "b", method="embedding", instruction="x"), "instruction is"),
        (lambda llm: llm.score("a", "b", instruction=5), "instruction must be a string, got 5"),
        (
            lambda llm: llm.score("a", "b", instruction="x", chat_template="{{ messages }}"),
            "write the instruction into it",
        ),
        (
            lambda llm: llm.score("a", "b", truncate_prompt_tokens=10),
            r"truncate_prompt_tokens must be between \d\d\d and 1024, got 10",
        ),
    ],
)
def test_wrong_arguments_queue_nothing(llm, call, message):
    if message is None:
        assert call(llm) == []
    else:
        with pytest.raises(ArgumentError, match=message):
            call(llm)
    check_nothing_is_held(llm)


def test_models_that_cannot_be_asked(tiny_dir):
    with (
        tiny_engine(tiny_dir) as llm,
        pytest.raises(ArgumentError, match="no token '<think>', '</think>', 'yes'"),
    ):
        llm.score("a", "b")
    with (
        tiny_engine(tiny_dir, skip_tokenizer_init=True) as llm,
        pytest.raises(ArgumentError, match="score needs the tokenizer"),
    ):
        llm.score("a", "b")


def test_modules_of_sentence_transformers(llm, model_dir):
    """Their list says where the pooling is described, and what else would change an embedding."""
    folder, path = model_dir / "pooling", model_dir / "modules.json"
    folder.mkdir()

    def write(mode, *others):
        (folder / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
        names = {"": "Transformer", "pooling": "Pooling"} | {f"{i}_{n}": n for i, n in others}
        path.write_text(
            json.dumps(
                [
                    {"path": path, "type": f"sentence_transformers.models.{name}"}
                    for path, name in names.items()
                ]
            )
        )

    try:
        expected = llm.embed([[5, 6, 7]], use_tqdm=False)
        write("lasttoken", (2, "Normalize"))
        assert llm.embed([[5, 6, 7]], use_tqdm=False)[0].outputs == expected[0].outputs
        write("max_tokens", (2, "Normalize"))
        with pytest.raises(ArgumentError, match="max_tokens'] is not supported"):
            llm.embed([[5, 6, 7]], use_tqdm=False)
        write("lasttoken", (2, "Dense"), (3, "Normalize"))
        with pytest.raises(ArgumentError, match=r"modules\.json: module 'Dense' is not supported"):
            llm.embed([[5, 6, 7]], use_tqdm=False)
        path.write_text("{}")
        assert len(llm.embed([[5, 6, 7]], use_tqdm=False)) == 1
        path.write_text("[5]")
        with pytest.raises(ArgumentError, match=r"cannot read .*modules\.json"):
            llm.embed([[5, 6, 7]], use_tqdm=False)
    finally:
        path.unlink()
    check_nothing_is_held(llm)


def test_a_question_that_fills_the_model_is_named(model_dir):
    with (
        tiny_engine(model_dir, max_model_len=64) as llm,
        pytest.raises(ArgumentError, match=r"max_model_len \(64\) leaves no room"),
    ):
        llm.score("a", "b", truncate_prompt_tokens=-1)


def test_other_poolings_of_sentence_transformers_are_refused(llm, model_dir):
    path = model_dir / "1_Pooling" / "config.json"
    path.parent.mkdir()
    last = {"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}
    both = {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}
    others = [both, {"pooling_mode": "max"}, {"pooling_mode": ["lasttoken", "cls"]}]
    try:
        new = {"pooling_mode": "lasttoken"}
        for fields in (last, new, {"pooling_mode": ["lasttoken"]}, new | last):
            path.write_text(
                json.dumps(fields | {"embedding_dimension": 64, "include_prompt": True})
            )
            assert len(llm.embed(["some words"], use_tqdm=False)) == 1
        for fields in others:
            path.write_text(json.dumps(fields | {"embedding_dimension": 64}))
            with pytest.raises(ArgumentError, match="is not supported; supported: one of last"):
                llm.embed(["some words"], use_tqdm=False)
        path.write_text("{")
        with pytest.raises(ArgumentError, match=r"cannot read .*1_Pooling"):
            llm.embed(["some words"], use_tqdm=False)
    finally:
        path.unlink()
    check_nothing_is_held(llm)


def test_parameters_are_checked(tiny_dir):
    with pytest.raises(ArgumentError, match="runner must be one of auto, generate, pooling"):
        tiny_engine(tiny_dir, runner="draft")
    for arguments in ({"dimensions": 0}, {"dimensions": 1.5}, {"use_activation": "yes"}):
        [name] = arguments
        with pytest.raises(ArgumentError, match=name):
            PoolingParams(**arguments)


def test_a_step_that_is_broken_off_drops_its_embeddings(llm, prompts, expected, monkeypatch):
    """What `add_request` queued goes on; the embeddings of the call that failed are dropped."""

    def press_ctrl_c(updates):
        raise KeyboardInterrupt

    llm.add_request(prompts[2], greedy(2))
    with monkeypatch.context() as patch:
        patch.setattr(llm.model_runner, "_update_row_table", press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            embed(llm, prompts)
    check_close(embed(llm, prompts), normalized(expected))
    drain(llm)
    check_nothing_is_held(llm)
