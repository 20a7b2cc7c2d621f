"""Transformers' own modules on CUDA: the tokens that transformers has on the CPU, in float32."""

import pytest
from tiny_transformers import (
    ENGINE,
    MAX_TOKENS,
    architectures,
    expected_tokens,
    prompts,
    tiny_config,
    tiny_model,
)

from nanovllm import LLM, SamplingParams

NAMES = """Gemma2ForCausalLM GptOssForCausalLM DeepseekV3ForCausalLM MixtralForCausalLM
    OlmoForCausalLM""".split()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("overlap", [True, False])
def test_tokens_are_transformers_own(tmp_path, name, overlap):
    model = tiny_model(tiny_config(architectures()[name], name), name)
    model.save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), **ENGINE | {"device": "cuda", "async_scheduling": overlap})
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    outputs = llm.generate(prompts(), params, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == expected_tokens(model)
    assert llm.get_metrics().get("num_preemptions") > 0
    llm.exit()


def test_bfloat16_passes_the_check_of_a_model(tmp_path):
    tiny_model(tiny_config("olmo2", "Olmo2ForCausalLM"), "Olmo2ForCausalLM").save_pretrained(
        tmp_path
    )
    llm = LLM(str(tmp_path), **ENGINE | {"device": "cuda", "dtype": "bfloat16"})
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    outputs = llm.generate(prompts(), params, use_tqdm=False)
    assert all(len(output["token_ids"]) == MAX_TOKENS for output in outputs)
    llm.exit()
