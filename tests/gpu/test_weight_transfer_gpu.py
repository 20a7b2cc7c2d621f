"""Weights from a trainer on another GPU, by NCCL; and those of a class that extends the workers."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from nanovllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from nanovllm.utils.network_utils import get_open_port
from tiny_models import reference_greedy, save_model
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams

PROMPTS = [[1, 2, 3], list(range(5, 305)), [9] * 40]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save_model(folder / str(seed), seed=seed) for seed in (3, 4)]


def generate(llm):
    return [output["token_ids"] for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


@pytest.mark.two_gpus
@pytest.mark.parametrize("packed", [False, True])
def test_a_trainer_on_another_gpu_sends_its_weights(model_dirs, packed):
    before, after = (reference_greedy(path, PROMPTS, 12) for path in model_dirs)
    trained = AutoModelForCausalLM.from_pretrained(model_dirs[1], dtype=torch.float32).to("cuda:1")
    pairs = list(trained.named_parameters())
    address = {"master_address": "127.0.0.1", "master_port": get_open_port(), "world_size": 2}
    with (
        LLM(
            str(model_dirs[0]),
            num_kvcache_blocks=64,
            weight_transfer_config={"backend": "nccl"},
            worker_extension_cls="rank_functions.Extension",
        ) as llm,
        ThreadPoolExecutor() as pool,
    ):
        assert generate(llm) == before
        joining = pool.submit(NCCLWeightTransferEngine.trainer_init, address, 1)
        llm.init_weight_transfer_engine({"init_info": address | {"rank_offset": 1}})
        group = joining.result(120)
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        llm.start_weight_update()
        sending = pool.submit(
            NCCLWeightTransferEngine.trainer_send_weights, pairs, group=group, packed=packed
        )
        update = {
            "names": [name for name, _ in pairs],
            "dtype_names": ["float32"] * len(pairs),
            "shapes": [list(tensor.shape) for _, tensor in pairs],
            "packed": packed,
        }
        llm.update_weights({"update_info": update})
        sending.result(120)
        llm.finish_weight_update()
        llm.wake_up(tags=["kv_cache"])
        assert generate(llm) == after
        llm.reload_weights()
        # A state on the GPU stays there: no copy by way of the host.
        state = {name: tensor.to("cuda:0") for name, tensor in pairs}
        assert llm.collective_rpc("take_weights", args=(state,)) == [sorted(state)]
        llm.reset_prefix_cache()
        assert generate(llm) == after
        group.shutdown()
