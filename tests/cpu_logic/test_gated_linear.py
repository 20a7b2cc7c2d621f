"""Which products are left to the operation that reads them; all give the same numbers."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from new_tokens import new_tokens

from nanovllm.kernels.torch_ops import TorchOps
from nanovllm.kernels.types import DecodeMetadata, KVCache, PackedWeight, Product
from nanovllm.layers.context import ModelContext
from nanovllm.layers.lora import AdapterLayer, AdapterStep
from nanovllm.layers.weight_format import WeightFormat
from nanovllm.models.decoder import GatedMLP
from nanovllm.models.extras import linear_later
from nanovllm.parallel.tensor_parallel import TensorParallel

CPU = torch.device("cpu")


class CountingOps(TorchOps):
    """Counts the calls of `gated_linear`."""

    has_fp8_products = True
    calls = 0

    def gated_linear(self, x, weight):
        self.calls += 1
        return super().gated_linear(x, weight)


def new_mlp(act="silu", bias=False, **formats) -> GatedMLP:
    """With numbers for weights in the model's dtype, and without a down projection."""
    config = SimpleNamespace(hidden_size=64, intermediate_size=48, hidden_act=act)
    mlp = GatedMLP(
        config, ModelContext(CountingOps(), TensorParallel(), torch.float32, CPU, **formats), bias
    )
    for parameter in mlp.parameters():
        if parameter.is_floating_point() and parameter.dtype == torch.float32:
            parameter.data.normal_()
    mlp.down_proj = torch.nn.Identity()
    return mlp


@pytest.mark.parametrize(("act", "bias"), [("silu", False), ("silu", True), ("gelu", False)])
def test_one_operation_for_silu_without_a_bias(act, bias):
    mlp, x = new_mlp(act, bias), torch.randn(5, 64)
    gate, up = F.linear(x, mlp.gate_up_proj.weight, mlp.gate_up_proj.bias).chunk(2, dim=-1)
    torch.testing.assert_close(mlp(x), getattr(F, act)(gate) * up)
    assert mlp.gate_up_proj.ops.calls == (act == "silu" and not bias)


def test_compact_weights_keep_their_own_products():
    packed = new_mlp(weight_format=WeightFormat(4, 32))
    assert isinstance(packed.gate_up_proj.weight, PackedWeight)
    fp8 = new_mlp(fp8_scales="rows")
    assert fp8.gate_up_proj.weight_scale is not None
    for mlp in (packed, fp8):
        assert mlp(torch.randn(5, 64)).shape == (5, 48)
        assert mlp.gate_up_proj.ops.calls == 0


def test_adapters_get_the_product_itself():
    mlp, x = new_mlp(), torch.randn(5, 64)
    ops = mlp.gate_up_proj.ops
    expected = mlp(x)
    step = AdapterStep(ops, 2, torch.ones(4, dtype=torch.int32))
    context = ModelContext(ops, TensorParallel(), torch.float32, CPU)
    weights = AdapterLayer(mlp.gate_up_proj, step, 16, context).weights
    torch.testing.assert_close(mlp(x), expected)
    weights.a.normal_()
    weights.b.normal_()
    step.is_on, rows = True, torch.zeros(5, dtype=torch.int32)
    step.begin(mlp, (rows, rows, DecodeMetadata(rows.long(), rows[:, None], rows, rows=rows)))
    assert not torch.allclose(mlp(x), expected)
    assert ops.calls == 1
    assert isinstance(linear_later(mlp.gate_up_proj, x), torch.Tensor)


def test_attention_multiplies_what_is_left_to_it():
    heads = num_q_heads, num_kv_heads, head_dim = 4, 2, 16
    inputs, cache, metadata, scale = new_tokens([5, 40, 1], heads, torch.float32, CPU)
    x, weight = torch.randn(3, 24), torch.randn((num_q_heads + 2 * num_kv_heads) * head_dim, 24)
    ops, outputs, caches = TorchOps(), [], []
    for qkv in (Product(x, weight), F.linear(x, weight)):
        caches.append(KVCache(cache.key.clone(), cache.value.clone()))
        outputs.append(ops.attention(inputs._replace(qkv=qkv), caches[-1], metadata, scale))
    assert torch.equal(*outputs)
    slots = metadata.slot_mapping
    keys = [one.key.flatten(0, 1)[slots] for one in caches]
    assert torch.equal(*keys) and keys[0].isfinite().all()
