"""Reinforcement learning: a trainer beside the engine, and the ways by which its weights come."""

from threading import Thread

import pytest
import rank_functions
import torch
from engine_checks import check_nothing_is_held, generate, greedy, random_prompts, tiny_engine
from nanovllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from nanovllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerSendWeightsArgs,
    NCCLWeightTransferEngine,
)
from nanovllm.utils.network_utils import get_ip, get_open_port
from tiny_models import VOCAB_SIZE, greedy_tokens
from transformers import AutoModelForCausalLM

from nanovllm import LLM, ArgumentError, SamplingParams
from nanovllm.config import WeightTransferConfig

PROMPTS = random_prompts((5, 257, 40), seed=90)
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def engine(tiny_dir):
    with tiny_engine(
        tiny_dir,
        weight_transfer_config=WeightTransferConfig(backend="nccl"),
        worker_extension_cls="rank_functions.Extension",
    ) as llm:
        yield llm


@pytest.fixture
def llm(engine):
    engine.reload_weights()
    yield engine
    check_nothing_is_held(engine)


@pytest.fixture
def trainer(tiny_dir):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)


def disturb(model):
    """A step of training, as far as an engine can tell."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


def metadata(model):
    pairs = list(model.named_parameters())
    return {
        "names": [name for name, _ in pairs],
        "dtype_names": [str(p.dtype).removeprefix("torch.") for _, p in pairs],
        "shapes": [list(p.shape) for _, p in pairs],
    }


class InBackground(Thread):
    """A call that runs beside the test; `result` waits for it."""

    def __init__(self, function, *args, **kwargs):
        super().__init__(daemon=True)
        self.call = lambda: function(*args, **kwargs)
        self.start()

    def run(self):
        self.value = self.call()

    def result(self):
        self.join(60)
        return self.value


@pytest.fixture(scope="module")
def group(engine):
    """The trainer's end of the group that the engine has joined."""
    address = {"master_address": "127.0.0.1", "master_port": get_open_port(), "world_size": 2}
    trainer = InBackground(NCCLWeightTransferEngine.trainer_init, address, device="cpu")
    engine.init_weight_transfer_engine({"init_info": address | {"rank_offset": 1}})
    return trainer.result()


def send(group, model, **options):
    """Let the trainer send its weights in the background."""
    args = NCCLTrainerSendWeightsArgs(group=group, **options)
    return InBackground(
        NCCLWeightTransferEngine.trainer_send_weights, model.named_parameters(), args
    )


def rewards_of(outputs) -> torch.Tensor:
    """Even tokens are good."""
    tokens = [output.token_ids for request in outputs for output in request.outputs]
    return torch.tensor([sum(t % 2 == 0 for t in ids) / len(ids) for ids in tokens])


def train(model, optimizer, outputs):
    """A step of REINFORCE with the mean reward as baseline."""
    rewards = rewards_of(outputs)
    advantages = (rewards - rewards.mean()).split(len(outputs[0].outputs))
    loss = 0.0
    for request, of_request in zip(outputs, advantages, strict=True):
        prompt = request.prompt_token_ids
        ids = torch.tensor([output.token_ids for output in request.outputs])
        tokens = torch.cat([torch.tensor([prompt] * len(ids)), ids], dim=1)
        logprobs = model(tokens).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
        taken = logprobs.gather(2, ids[:, :, None])[:, :, 0]
        loss = loss - (of_request * taken.mean(dim=1)).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return rewards.mean().item()


def test_a_loop_of_reinforcement_learning(llm, trainer, group):
    """Generate, sleep, train, wake up, update, generate: rewards grow, and tokens are the
    trainer's own."""
    optimizer = torch.optim.Adam(trainer.parameters(), lr=5e-3)
    params = SamplingParams(temperature=1.0, n=8, max_tokens=MAX_TOKENS, ignore_eos=True, seed=7)
    before = generate(llm, PROMPTS, greedy(MAX_TOKENS))
    rewards = []
    for _ in range(4):
        outputs = llm.generate([p[:20] for p in PROMPTS], params, use_tqdm=False)
        llm.sleep(level=1)
        rewards.append(train(trainer, optimizer, outputs))
        llm.wake_up(tags=["weights"])
        llm.start_weight_update(is_checkpoint_format=True)
        sending = send(group, trainer, packed=True)
        llm.update_weights({"update_info": metadata(trainer) | {"packed": True}})
        llm.finish_weight_update()
        sending.result()
        llm.wake_up(tags=["kv_cache"])
    assert rewards[-1] > rewards[0] + 0.1, rewards
    after = generate(llm, PROMPTS, greedy(MAX_TOKENS))
    assert after == greedy_tokens(trainer, PROMPTS, MAX_TOKENS) != before


@pytest.mark.parametrize("packed_bytes", [None, 1, 100_000])
def test_an_update_of_one_call_while_a_request_runs(llm, trainer, group, packed_bytes):
    disturb(trainer)
    options = {"packed": True, "packed_buffer_size_bytes": packed_bytes} if packed_bytes else {}
    llm.generate(PROMPTS[1], greedy(2), use_tqdm=False)  # the prefix is cached
    llm.add_request(PROMPTS[1], greedy(MAX_TOKENS))
    llm.step()
    sequence = llm.scheduler.running[0]
    sending = send(group, trainer, **options)
    llm.update_weights(WeightTransferUpdateRequest(metadata(trainer) | options))
    sending.result()
    first = list(sequence.completion_token_ids)  # of the old weights
    while not llm.is_finished():
        finished, _ = llm.step()
    [(_, completion)] = finished
    prompt = PROMPTS[1] + completion[: len(first)]
    rest = greedy_tokens(trainer, [prompt], MAX_TOKENS - len(first))
    assert completion[len(first) :] == rest[0]


@pytest.mark.parametrize(
    "reach",
    [
        lambda llm: llm.llm_engine.model_executor.driver_worker.model_runner.model,
        lambda llm: llm.llm_engine.model_executor.driver_worker.worker.get_model(),
        lambda llm: llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner
        .model,
    ],
)  # fmt: skip
def test_trainers_reach_the_model(llm, trainer, reach):
    generate(llm, PROMPTS, greedy(1))
    disturb(trainer)
    model = reach(llm)
    assert model.load_weights(trainer.state_dict().items()) >= {"model.norm.weight"}
    assert model.model.layers[0] is llm.model_runner.model.model.layers[0]
    assert dict(model.named_parameters()).keys() and repr(model) == repr(llm.model_runner.model)
    expected = greedy_tokens(trainer, PROMPTS, MAX_TOKENS)
    assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == expected  # cached prefixes are forgotten
    with pytest.raises(ArgumentError, match="the model has no weight 'x'"):
        model.load_weights([("x", torch.ones(1))])


def load_one(worker, name, tensor):
    return worker.model_runner.model.load_weights([(name, tensor)])


def test_methods_of_a_users_class_run_on_the_worker(llm, trainer):
    assert llm.collective_rpc("remember", args=({"a": 1},)) == [None]
    assert llm.collective_rpc("recall") == [(0, "cpu", {"a": 1})]
    disturb(trainer)
    state = dict(trainer.named_parameters())
    assert llm.collective_rpc("take_weights", args=(state,)) == [sorted(state)]
    llm.reset_prefix_cache()
    expected = greedy_tokens(trainer, PROMPTS, MAX_TOKENS)
    assert generate(llm, PROMPTS, greedy(MAX_TOKENS)) == expected
    [loaded] = llm.collective_rpc(load_one, args=("model.norm.weight", torch.ones(64)))
    assert loaded == {"model.norm.weight"}
    with pytest.raises(ArgumentError, match="workers have no method 'forget'"):
        llm.collective_rpc("forget")


def look_at_vllms_configuration(worker):
    return worker.vllm_config


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (lambda llm: llm.model_executor.workers, "the executor has no 'workers' here, but driver_"),
        (lambda llm: llm.engine_core.scheduler, "the engine core has no 'scheduler' here"),
        (lambda llm: llm.collective_rpc(look_at_vllms_configuration), "no 'vllm_config' here"),
    ],
)
def test_what_is_not_there_says_what_is(llm, look, message):
    with pytest.raises(AttributeError, match=message) as raised:
        look(llm)
    assert "llm.apply_model(function)" in str(raised.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("Extension", "a class at the top level of a module, or its 'module.Class', got 'Ext"),
        (5, "must be a class at the top level of a module"),
        ("no_such_module.Extension", "is not there: No module named 'no_such_module'"),
        ("rank_functions.Absent", "is not there: module 'rank_functions' has no attribute"),
        ("rank_functions.echo_rank", "must be a class, got <function"),
        (rank_functions.Conflicting, "worker has an attribute 'reload_weights' of its own"),
    ],
)
def test_wrong_extensions_are_refused_before_anything_starts(given, message):
    with pytest.raises(ArgumentError, match=message):
        LLM("no directory is looked at", worker_extension_cls=given)


def test_weights_are_not_loaded_while_they_sleep(llm, trainer, group):
    llm.sleep(level=2)
    with pytest.raises(RuntimeError, match="the weights sleep"):
        llm.collective_rpc("take_weights", args=(dict(trainer.named_parameters()),))
    for call in (llm.start_weight_update, lambda: llm.update_weights({"update_info": metadata(
            trainer)})):  # fmt: skip
        with pytest.raises(RuntimeError, match="the weights sleep"):
            call()
    llm.wake_up()


INIT = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}
UPDATE = {"names": ["model.norm.weight"], "dtype_names": ["float32"], "shapes": [[64]]}


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("init", {"rank_offset": 2}, "world_size must be > 2, the engine's last rank, got 2"),
        ("init", {"master_port": 0}, "master_port must be between 1 and 65535, got 0"),
        ("init", {"rank": 1}, "init_info: got an unexpected keyword argument 'rank'"),
        ("init", {"master_address": ""}, "master_address must be a host, got ''"),
        ("update", {"names": []}, "must be of one length, got 0, 1 and 1"),
        ("update", {"names": ["x"]}, "the model has no weight 'x'"),
        ("update", {"shapes": [[65]]}, r"has shape \[65\], the model asks for \[64\]"),
        ("update", {"shapes": [["64"]]}, "shapes must be an integer"),
        ("update", {"dtype_names": ["int8"]}, "dtype_names must be of bfloat16, .* got 'int8'"),
        ("update", {"packed": 1}, "packed must be True or False"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_waited_for(llm, method, changes, message):
    with pytest.raises(ArgumentError, match=message):
        if method == "init":
            llm.init_weight_transfer_engine(WeightTransferInitRequest(INIT | changes))
        else:
            llm.update_weights({"update_info": UPDATE | changes})


def test_an_update_begins_and_ends_once(llm):
    with pytest.raises(RuntimeError, match="no weight update goes on"):
        llm.finish_weight_update()
    llm.start_weight_update()
    with pytest.raises(RuntimeError, match="goes on already"):
        llm.start_weight_update()
    llm.finish_weight_update()
    with pytest.raises(ArgumentError, match="is_checkpoint_format=False is not supported"):
        llm.start_weight_update(is_checkpoint_format=False)
    with pytest.raises(ArgumentError, match="must have update_info, a dict, got 5"):
        llm.update_weights(5)


def test_transfer_must_be_asked_for_and_other_backends_are_refused(tiny_dir):
    with pytest.raises(ArgumentError, match="backend='ipc' is not supported"):
        LLM(str(tiny_dir), weight_transfer_config={"backend": "ipc"})
    with tiny_engine(tiny_dir) as llm, pytest.raises(ArgumentError, match="weight transfer is off"):
        llm.init_weight_transfer_engine({"init_info": INIT})


def test_addresses():
    assert get_ip().count(".") == 3 and 0 < get_open_port() < 65536
    assert max(max(prompt) for prompt in PROMPTS) < VOCAB_SIZE
