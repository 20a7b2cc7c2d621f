"""Rotations that pair other features than the kernels do: against transformers' own functions."""

import pytest
import torch
from fp8_models import quantize_blocks, through_blocks, through_rows
from transformers import Glm4Config, Phi3Config
from transformers.models.glm4 import modeling_glm4
from transformers.models.phi3 import modeling_phi3

from nanovllm.kernels.select import select_ops
from nanovllm.kernels.torch_ops import dequantize_weight, qk_norm_rope, rms_norm
from nanovllm.kernels.types import FP8_DTYPE
from nanovllm.layers.context import ModelContext
from nanovllm.layers.linear import ColumnParallelLinear
from nanovllm.layers.rotary import cos_sin_table
from nanovllm.layers.rotary_order import HeadNorm, rotary_order
from nanovllm.layers.weights import Heads
from nanovllm.models.fp8_checkpoint import DequantizedCheckpoint
from nanovllm.models.loader import expected_tensors, load_tensor
from nanovllm.parallel.tensor_parallel import TensorParallel

CPU = torch.device("cpu")
PHI = (modeling_phi3, modeling_phi3.Phi3RotaryEmbedding, Phi3Config)
GLM = (modeling_glm4, modeling_glm4.Glm4RotaryEmbedding, Glm4Config)
INPUTS = 40


def context(rank: int = 0, size: int = 1, fp8_scales=None, keeps_fp8: bool = True) -> ModelContext:
    ops = select_ops("torch", CPU, torch.float32, 16, compile_torch_ops=False)
    ops.has_fp8_products = keeps_fp8
    return ModelContext(ops, TensorParallel(rank, size), torch.float32, CPU, fp8_scales=fp8_scales)


@pytest.mark.parametrize("head_dim", [16, 24, 128])
@pytest.mark.parametrize("factor", [0.25, 0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("family", [PHI, GLM], ids=["half-split", "interleaved"])
def test_rotated_heads_are_those_of_transformers_in_our_order(family, factor, head_dim):
    module, embedding, config_class = family
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": factor}
    config = config_class(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=rope
    )
    order = rotary_order(head_dim, rope, interleaved=family is GLM)
    assert (order == ()) == (family is PHI and factor == 1.0)
    order = list(order) or list(range(head_dim))
    assert sorted(order) == list(range(head_dim))
    generator = torch.Generator().manual_seed(head_dim)
    query, key, value = (torch.randn(9, n, head_dim, generator=generator) for n in (4, 2, 2))
    positions = torch.tensor([0, 1, 2, 3, 50, 51, 700, 701, 4000], dtype=torch.int32)
    cos, sin = embedding(config)(query, positions[None])
    rotated = module.apply_rotary_pos_emb(
        query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin
    )
    expected = [x[0].transpose(0, 1)[..., order] for x in rotated]
    qkv = torch.cat([query[..., order], key[..., order], value], dim=1).flatten(1)
    table = cos_sin_table(head_dim, 4001, rope, CPU)
    ours = qk_norm_rope(qkv, None, None, 0.0, table, positions, 2, head_dim)
    torch.testing.assert_close(ours, tuple(expected))
    # What is not rotated is not touched by a bit.
    num_pairs = int((table[1:, : head_dim // 2] != 1).any(0).sum())
    kept = [*range(num_pairs, head_dim // 2), *range(head_dim // 2 + num_pairs, head_dim)]
    assert torch.equal(ours[0][..., kept], query[..., order][..., kept])
    assert len(kept) == head_dim - 2 * num_pairs
    assert num_pairs == (int(head_dim * factor) + 1) // 2


def test_a_table_without_rotation():
    table = cos_sin_table(8, 5, None, CPU)
    assert torch.equal(table, torch.tensor([[1.0] * 4 + [0.0] * 4] * 5))
    assert rotary_order(8, None) == ()


def reordered(weight: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The rows of each head of weight [heads * len(order), ...], one by one."""
    rows = [head + row for head in range(0, len(weight), len(order)) for row in order]
    return weight[rows]


def of_rank(weight: torch.Tensor, num_heads: int, rank: int, size: int) -> torch.Tensor:
    """The rows of a rank's heads: with more ranks than heads, of one that several hold."""
    heads = weight.unflatten(0, (num_heads, -1))
    first = rank * num_heads // size
    return heads[first : first + max(num_heads // size, 1)].flatten(0, 1)


ORDER = rotary_order(16, {"rope_type": "default", "partial_rotary_factor": 0.5}, interleaved=True)
NUM_HEADS = {"q_proj": 8, "k_proj": 2, "v_proj": 2}


@pytest.mark.parametrize("fp8", [None, "kept", "rounded"])
@pytest.mark.parametrize("fused_name", [None, "", "query_key_value"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_has_its_heads_in_order_of_fused_and_single_tensors(size, fused_name, fp8):
    generator = torch.Generator().manual_seed(size)
    sizes = {name: 16 * n for name, n in NUM_HEADS.items()}
    weights = {name: torch.randn(n, 64, generator=generator) for name, n in sizes.items()}
    biases = {name: torch.randn(n, generator=generator) for name, n in sizes.items()}
    for rank in range(size):
        heads = {
            name: Heads(n, 16, () if name == "v_proj" else ORDER, fused_name)
            for name, n in NUM_HEADS.items()
        }
        module = torch.nn.Module()
        module.qkv_proj = ColumnParallelLinear(
            64, heads, True, context(rank, size, "rows" if fp8 else None, fp8 == "kept")
        )
        tensors = {}
        for kind, parts in (("weight", weights), ("bias", biases)):
            if fused_name is None:
                tensors |= {f"{name}.{kind}": part for name, part in parts.items()}
            else:
                tensors[f"{fused_name or 'qkv_proj'}.{kind}"] = torch.cat(list(parts.values()))
        assert expected_tensors(module).keys() == tensors.keys()
        for name, tensor in tensors.items():
            load_tensor(module, name, tensor)
        for kind, parts in (("weight", weights), ("bias", biases)):
            own = {name: of_rank(part, NUM_HEADS[name], rank, size) for name, part in parts.items()}
            expected = torch.cat(
                [reordered(own[n], ORDER) for n in ("q_proj", "k_proj")] + [own["v_proj"]]
            )
            found = getattr(module.qkv_proj, kind)
            if kind == "weight" and fp8:
                expected = through_rows(expected)
                if fp8 == "kept":
                    assert found.dtype == FP8_DTYPE
                    found = dequantize_weight(found, module.qkv_proj.weight_scale)
            torch.testing.assert_close(found.data, expected)


class Tensors:
    """A checkpoint in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def names(self):
        return set(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def read(self, name, index):
        return self.tensors[name][index]


@pytest.mark.parametrize(
    ("head_dim", "fused", "size", "kept"),
    [
        (64, None, 1, True),
        (64, "", 1, True),
        (128, None, 2, True),
        (128, "", 2, True),
        (32, "", 2, False),  # a rank's part of k is 64 rows
        (256, None, 1, False),  # a row may go to the other block of its head
        (256, "", 2, False),
        (96, None, 1, False),
    ],
)
def test_an_fp8_checkpoint_keeps_its_blocks_where_no_row_leaves_one(head_dim, fused, size, kept):
    rope = {"rope_type": "default", "partial_rotary_factor": 0.5}
    order = rotary_order(head_dim, rope)
    numbers = {"q_proj": 8, "k_proj": 4}
    generator = torch.Generator().manual_seed(head_dim)
    # Blocks of very different size: a row with another's scale would show.
    weights = {
        name: torch.randn(n * head_dim, 48, generator=generator)
        * 4.0 ** (torch.arange(n * head_dim) // 64)[:, None]
        for name, n in numbers.items()
    }
    stored = weights if fused is None else {"qk_proj": torch.cat(list(weights.values()))}
    tensors, exact = {}, {}
    for name, weight in stored.items():
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = quantize_blocks(weight)
        exact[name] = through_blocks(weight)
    if fused is not None:
        rows = [len(weight) for weight in weights.values()]
        exact = dict(zip(weights, exact["qk_proj"].split(rows), strict=True))
    for rank in range(size):
        heads = {name: Heads(n, head_dim, order, fused) for name, n in numbers.items()}
        module = torch.nn.Module()
        module.qk_proj = ColumnParallelLinear(48, heads, False, context(rank, size, "blocks"))
        linear = module.qk_proj
        assert (linear.weight.dtype == FP8_DTYPE) == kept
        expected_names = expected_tensors(module)
        checkpoint = DequantizedCheckpoint(Tensors(tensors), expected_names.keys())
        assert checkpoint.names() == expected_names.keys()
        for name, shards in expected_names.items():
            for parameter, shard in shards:
                assert checkpoint.shape(name) == shard.full_shape
                parameter.fill(shard, checkpoint.read(name, shard.source))
        found = dequantize_weight(linear.weight, linear.weight_scale) if kept else linear.weight
        expected = torch.cat(
            [reordered(of_rank(exact[name], n, rank, size), order) for name, n in numbers.items()]
        )
        torch.testing.assert_close(found.data, expected)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_of_heads_has_its_weight_in_their_order(offset):
    norm = HeadNorm(16, 1e-6, context(), ORDER, offset)
    x, weight = torch.randn(5, 16), torch.randn(16)
    load_tensor(norm, "weight", weight)
    expected = rms_norm(x, weight + offset, 1e-6)[..., list(ORDER)]
    torch.testing.assert_close(norm(x[..., list(ORDER)]), expected)
