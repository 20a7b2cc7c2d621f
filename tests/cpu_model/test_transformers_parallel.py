"""Transformers' modules on several ranks by their own plans: what one module gives, all give."""

import threading

import pytest
import torch
from engine_checks import greedy, token_ids
from tiny_transformers import (
    ENGINE,
    MAX_TOKENS,
    architectures,
    best_tokens,
    prompts,
    tiny_config,
    tiny_model,
)

from nanovllm import LLM
from nanovllm.errors import ArgumentError
from nanovllm.kernels.torch_ops import TorchOps
from nanovllm.kernels.types import Unreduced, summed
from nanovllm.layers.context import ModelContext
from nanovllm.models.loader import load_tensor
from nanovllm.models.tp_plan import check_plan
from nanovllm.models.transformers_model import TransformersForCausalLM
from nanovllm.parallel.tensor_parallel import TensorParallel

# Plain, gathered and packed projections, biases, experts (of packed rows, of packed columns),
# soft caps, norms of whole projections, layers without experts among others.
NAMES = """LlamaForCausalLM Gemma2ForCausalLM Olmo2ForCausalLM Glm4ForCausalLM Phi3ForCausalLM
    Starcoder2ForCausalLM MixtralForCausalLM DeepseekV3ForCausalLM Llama4ForCausalLM
    Qwen2MoeForCausalLM GraniteMoeSWAForCausalLM GPTNeoXForCausalLM""".split()


class Meeting:
    """Where the threads of all ranks exchange tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.given: dict[int, torch.Tensor] = {}

    def all_of(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self.given[rank] = x
        self.barrier.wait(60)
        found = [self.given[r] for r in sorted(self.given)]
        self.barrier.wait(60)
        return found


class Thread(TensorParallel):
    """A rank that is a thread of this process."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        super().__init__(rank, size)
        self.meeting = meeting

    def all_reduce(self, x: Unreduced) -> torch.Tensor:
        return torch.stack(self.meeting.all_of(self.rank, summed(x.term))).sum(0)

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.meeting.all_of(self.rank, logits), 1)


def logits_of_ranks(whole, size: int, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each of `size` ranks gives for ids [1, T], with the weights of a whole model."""
    meeting, found, errors = Meeting(size), {}, []
    config = type(whole.config).from_dict(whole.config.to_dict())
    config.architectures = [type(whole).__name__]
    models = []
    for rank in range(size):
        tp = Thread(rank, size, meeting)
        context = ModelContext(TorchOps(), tp, torch.float32, torch.device("cpu"), 64)
        model = TransformersForCausalLM(config, 96, context)
        for name, parameter in whole.named_parameters():
            load_tensor(model, name, parameter)
        state = dict(whole.named_buffers())
        for name, buffer in model.module.named_buffers():
            torch.testing.assert_close(buffer, state[name])
        models.append(model)

    @torch.inference_mode()
    def run(rank: int) -> None:
        try:
            found[rank] = models[rank].module(input_ids=ids, use_cache=False).logits
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    sizes = [sum(p.numel() for p in model.module.parameters()) for model in models]
    assert max(sizes) < sum(p.numel() for p in whole.parameters())
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize("name", NAMES)
def test_ranks_give_the_logits_of_the_whole(name):
    whole = tiny_model(tiny_config(architectures()[name], name), name)
    ids = torch.tensor([prompts()[3]])
    with torch.inference_mode():
        expected = whole(input_ids=ids, use_cache=False).logits
    for logits in logits_of_ranks(whole, 2, ids):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_what_a_plan_does_not_say_is_not_guessed():
    whole = tiny_model(tiny_config("mixtral", "MixtralForCausalLM"), "MixtralForCausalLM")
    plan = dict(type(whole.config).base_model_tp_plan)
    del plan["layers.*.mlp.experts.down_proj"]
    type(whole.config).base_model_tp_plan, original = plan, type(whole.config).base_model_tp_plan
    try:
        with pytest.raises(ArgumentError, match=r"does not say how .*experts\.down_proj is split"):
            logits_of_ranks(whole, 2, torch.tensor([prompts()[3]]))
    finally:
        type(whole.config).base_model_tp_plan = original


def test_shapes_that_ranks_cannot_share_are_refused():
    whole = tiny_model(tiny_config("llama", "LlamaForCausalLM"), "LlamaForCausalLM")
    with pytest.raises(ArgumentError, match=r"3 ranks cannot share .*q_proj\.weight"):
        logits_of_ranks(whole, 3, torch.tensor([prompts()[3]]))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "no tp_plan that splits"),
        ({"embed_tokens": "embedding_rowwise", "norm": "replicate"}, "no tp_plan that splits"),
        ({"layers.*.mlp": "sequence_parallel"}, "its tp_plan has 'sequence_parallel'"),
    ],
)
def test_plans_that_are_refused(plan, message):
    with pytest.raises(ArgumentError, match=f"must be 1 for SomeModel.*got 4: .*{message}"):
        check_plan(plan, "SomeModel", 4)


@pytest.mark.slow
def test_an_engine_of_two_ranks(tmp_path):
    name = "Gemma2ForCausalLM"
    model = tiny_model(tiny_config(architectures()[name], name), name)
    model.save_pretrained(tmp_path)
    one, two = (LLM(str(tmp_path), **ENGINE, tensor_parallel_size=n) for n in (1, 2))
    params = greedy(MAX_TOKENS)
    params.prompt_logprobs = 1
    found = []
    for llm in (one, two):
        outputs = llm.generate(prompts(), params, use_tqdm=False)
        found_tokens = token_ids(outputs)
        assert found_tokens == best_tokens(model, found_tokens)
        found.append(
            [e.logprob for o in outputs for p in o["prompt_logprobs"][1:] for e in p.values()]
        )
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    other = tiny_model(model.config, name, seed=1)
    two.load_weights(other.state_dict())
    outputs = two.generate(prompts(), greedy(MAX_TOKENS), use_tqdm=False)
    found_tokens = token_ids(outputs)
    assert found_tokens == best_tokens(other, found_tokens)
    one.exit()
    two.exit()


@pytest.mark.slow
def test_a_plan_that_changes_results_is_refused(tmp_path):
    """Gemma 3n takes statistics over the features that its plan splits."""
    name = "Gemma3nForCausalLM"
    tiny_model(tiny_config(architectures()[name], name), name).save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=f"{name} does not run.*its tp_plan changes results"):
        LLM(str(tmp_path), **ENGINE, tensor_parallel_size=2)
