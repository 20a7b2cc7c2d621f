"""What `Ops.attention` takes of a decode step's new tokens, for tests of kernels."""

import torch

from nanovllm.kernels.types import DecodeMetadata, HeadInputs, KVCache, PartialSums


def new_tokens(
    lens: list[int],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    block_size: int = 32,
    num_parts: int = 1,
) -> tuple[HeadInputs, KVCache, DecodeMetadata, float]:
    """Heads (query, KV, dimension) of rows with so many tokens, the new one included.

    NaN keys and large values stand outside the sequences' earlier slots, new tokens' included.
    """
    num_heads, num_kv_heads, head_dim = heads
    width = -(-max(lens) // block_size) + 1
    num_blocks = width * len(lens)
    caches = torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), torch.nan).to(dtype)
    caches[1] = 1e4  # values in a cache are finite
    tables = torch.randperm(num_blocks).view(len(lens), width).int()
    slots = torch.full((len(lens),), -1)
    for row, length in enumerate(lens):
        position = torch.arange(length)
        own = tables[row, position // block_size].long() * block_size + position % block_size
        caches.flatten(1, 2)[:, own[:-1]] = torch.randn(2, len(own[:-1]), *heads[1:]).to(dtype)
        slots[row] = own[-1] if length else -1
    parts = torch.randn(num_parts, len(lens), (num_heads + 2 * num_kv_heads) * head_dim)
    norms = (torch.rand(2, head_dim) + 0.5).to(dtype).to(device)
    inputs = HeadInputs(
        PartialSums(parts.to(device), dtype) if num_parts > 1 else parts[0].to(dtype).to(device),
        *norms,
        1e-6,
        torch.randn(max(lens) + 1, head_dim).to(device),
        (torch.tensor(lens) - 1).clamp(min=0).int().to(device),
    )
    lengths = torch.tensor(lens, dtype=torch.int32).to(device)
    metadata = DecodeMetadata(slots.to(device), tables.to(device), lengths)
    return inputs, KVCache(*caches.to(device)), metadata, head_dim**-0.5
