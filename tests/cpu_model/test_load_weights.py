"""New weights in a running engine: from then on its tokens are those of the other model."""

import pytest
import torch
from engine_checks import (
    check_nothing_is_held,
    drain,
    generate,
    greedy,
    random_prompts,
    tiny_engine,
)
from safetensors.torch import load_file, save_file
from tiny_models import reference_greedy, save_family, save_model
from transformers import Qwen3ForCausalLM

from nanovllm import ArgumentError

MAX_TOKENS = 10
PROMPTS = random_prompts((5, 257, 300), seed=70)
EMBEDDING = "model.embed_tokens.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "other", seed=5)


@pytest.fixture(scope="module")
def references(tiny_dir, other_dir):
    old, new = (reference_greedy(path, PROMPTS, MAX_TOKENS) for path in (tiny_dir, other_dir))
    assert all(a != b for a, b in zip(old, new, strict=True))
    return old, new


@pytest.fixture(scope="module")
def state(other_dir):
    """The other model's tensors, `lm_head.weight` beside the embedding it is tied to."""
    model = Qwen3ForCausalLM.from_pretrained(other_dir, dtype=torch.float32)
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def engine(tiny_dir):
    with tiny_engine(tiny_dir) as llm:
        yield llm


@pytest.fixture
def llm(engine):
    engine.reload_weights()
    yield engine
    check_nothing_is_held(engine)


def check_generates(llm, expected):
    assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == expected


@pytest.mark.parametrize("kind", ["dict", "items", "list", "iterator"])
def test_tokens_are_the_other_models(llm, references, state, kind):
    old, new = references
    check_generates(llm, old)  # and fills the prefix cache
    addresses = [parameter.data_ptr() for parameter in llm.model_runner.model.parameters()]
    weights = {
        "dict": state,
        "items": state.items(),
        "list": list(state.items()),
        "iterator": iter(state.items()),
    }[kind]
    assert llm.load_weights(weights) == set(state) - {"lm_head.weight"}
    check_generates(llm, new)
    # In place: CUDA graphs read the weights where they were.
    parameters = list(llm.model_runner.model.parameters())
    assert [parameter.data_ptr() for parameter in parameters] == addresses
    llm.reload_weights()
    check_generates(llm, old)


def test_a_part_of_the_weights(llm, references, state):
    old, new = references
    names = sorted(state)
    llm.load_weights([(name, state[name]) for name in names[::2]])
    assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) not in (old, new)
    llm.load_weights([(name, state[name]) for name in names[1::2]])
    check_generates(llm, new)


def test_other_dtypes_strides_and_parameters_are_taken(llm, state):
    [gate] = llm.apply_model(lambda model: model.model.layers[1].mlp.gate_up_proj.weight)
    size = len(state[GATE])
    up = gate[size:].clone()
    trained = torch.nn.Parameter(state[GATE].to(torch.bfloat16).t().contiguous().t())
    assert not trained.is_contiguous()
    llm.load_weights([(GATE, trained)])
    assert torch.equal(gate[:size], trained.detach().float())
    assert torch.equal(gate[size:], up)


def test_what_the_model_leaves_out_may_be_anything(llm, references):
    weights = {
        "lm_head.weight": torch.empty(384, 64, device="meta"),
        "model.layers.0.self_attn.rotary_emb.inv_freq": None,
    }
    assert llm.load_weights(weights) == set()
    check_generates(llm, references[0])


def test_running_requests_go_on_with_the_new_weights(llm, other_dir, references, state):
    old, _ = references
    ids = [llm.add_request(prompt, greedy(MAX_TOKENS)) for prompt in PROMPTS]
    for _ in range(3):
        llm.step()
    llm.load_weights(state)
    kept = [llm.get_output(request_id)["token_ids"] for request_id in ids]
    completions, _ = drain(llm)
    for request_id, prompt, tokens, expected in zip(ids, PROMPTS, kept, old, strict=True):
        num_kept = len(tokens)
        assert 2 <= num_kept < MAX_TOKENS
        assert tokens == expected[:num_kept]
        [rest] = reference_greedy(other_dir, [prompt + tokens], MAX_TOKENS - num_kept)
        assert completions[request_id] == tokens + rest


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (("model.norm.bias", torch.zeros(64)), r"no weight 'model.norm.bias'; it has .*and \d+ mo"),
        (("model.norm.weight", torch.zeros(63)), r"shape \[63\], the model asks for \[64\]"),
        (("model.norm.weight", torch.zeros(64, dtype=torch.int32)), "floating-point.*torch.int32"),
        (
            ("model.norm.weight", torch.zeros(64, dtype=torch.float8_e4m3fn)),
            "of 16, 32 or 64 bits.*torch.float8_e4m3fn",
        ),
        (("model.norm.weight", torch.zeros(64, device="meta")), "dense tensor in memory.*meta"),
        (("model.norm.weight", torch.zeros(64).to_sparse()), "dense tensor.*torch.sparse_coo"),
        (("model.norm.weight", [0.0] * 64), "'model.norm.weight' must be a .* bits, got list"),
        ("model.norm.weight", r"must be \(name, tensor\) pairs, got str"),
    ],
)
def test_of_a_list_with_a_mistake_nothing_is_loaded(llm, references, state, item, message):
    old, _ = references
    weights = [(EMBEDDING, state[EMBEDDING]), item]
    with pytest.raises(ArgumentError, match=message):
        llm.load_weights(weights)
    check_generates(llm, old)
    with pytest.raises(ArgumentError, match=message):
        llm.load_weights(iter(weights))
    embedding = llm.model_runner.model.model.embed_tokens.weight
    assert torch.equal(embedding[: len(state[EMBEDDING])], state[EMBEDDING])


def test_the_lm_head_of_a_decoder_saved_alone(tmp_path):
    """Names without "model.", as embedding models are saved: the head is there, or comes later."""
    path = save_model(tmp_path / "model", seed=6, tie_word_embeddings=False)
    tensors = load_file(path / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, path / "model.safetensors", {"format": "pt"})
    expected = reference_greedy(path, PROMPTS, MAX_TOKENS)
    with tiny_engine(path) as llm:
        check_generates(llm, expected)
        lm_head = {"lm_head.weight": bare.pop("lm_head.weight")}
        save_file(bare, path / "model.safetensors", {"format": "pt"})
        for _ in range(2):
            llm.reload_weights()
            with pytest.raises(ArgumentError, match="was saved without an LM head"):
                generate(llm, PROMPTS, greedy(1))
            llm.load_weights({"model.norm.weight": bare["norm.weight"]})
            with pytest.raises(ArgumentError, match="was saved without an LM head"):
                generate(llm, PROMPTS, greedy(1))
            assert llm.load_weights(lm_head) == {"lm_head.weight"}
            check_generates(llm, expected)


def test_weights_that_sleep_are_not_loaded(llm, references, state):
    for level in (1, 2):
        llm.sleep(level)
        for load in (lambda: llm.load_weights(state), llm.reload_weights):
            with pytest.raises(RuntimeError, match=r"the weights sleep: call wake_up"):
                load()
        llm.wake_up(["weights"])
        llm.load_weights(state)
        llm.wake_up()
        check_generates(llm, references[1])


@pytest.mark.parametrize("name", ["phi4-mini", "glm"])
def test_fused_tensors_and_heads_in_another_order(name, tmp_path):
    """The engine starts on random weights, and gets all of them by the checkpoint's names."""
    path = save_family(tmp_path / "model", name)
    tensors = load_file(path / "model.safetensors")
    with tiny_engine(path, load_format="dummy") as llm:
        assert generate(llm, PROMPTS, greedy(1))
        llm.load_weights(tensors)
        check_generates(llm, reference_greedy(path, PROMPTS, MAX_TOKENS))
