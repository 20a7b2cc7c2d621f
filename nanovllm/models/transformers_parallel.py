"""Splits a module of transformers over tensor-parallel ranks, as its own `tp_plan` says.

Each rank holds slices of the planned weights. Hooks of the modules split, gather or sum what goes
through them. Embedding and LM head stay whole on every rank.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nanovllm.kernels.types import Unreduced
from nanovllm.layers.context import ModelContext
from nanovllm.layers.weights import Parameter, Shard
from nanovllm.models.tp_plan import COLUMNS, STYLES, WHOLE, Style

LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def as_whole(parameter: nn.Parameter) -> None:
    """Let the loader fill a parameter of transformers with a tensor of its shape."""
    everything = tuple(slice(0, n) for n in parameter.shape)
    parameter.__class__ = Parameter
    assert isinstance(parameter, Parameter)
    parameter.shards = {"": Shard(tuple(parameter.shape), everything, everything)}


def split(module: PreTrainedModel, plan: Mapping[str, str], context: ModelContext) -> None:
    """Keep this rank's slices of what `plan` names; the parameters have the loader's shards then.

    Args:
        module: a whole model on the CPU, its weights not loaded; it is moved to the rank's device.
        plan: names of modules and parameters, with "*" for numbers -> styles of `STYLES`.
        context: of the rank.

    Raises:
        ValueError: a module or a shape does not go with its style.
    """
    kept_whole = {module.get_input_embeddings(), module.get_output_embeddings()}
    width = module.config.get_text_config(decoder=True).hidden_size
    modules = dict(module.named_modules())
    styles = {name: _style(plan, name) for name in modules if modules[name] not in kept_whole}
    split_parameters: dict[nn.Parameter, Parameter] = {}
    for name, parameter in [*module.named_parameters(remove_duplicate=False)]:
        owner_name, _, own_name = name.rpartition(".")
        if owner_name not in styles:
            continue
        style = _style(plan, name) or styles[owner_name]
        if style is None or style == WHOLE:
            continue
        if parameter not in split_parameters:
            split_parameters[parameter] = _slice(name, parameter, style, context)
        setattr(modules[owner_name], own_name, split_parameters[parameter])
    for name, style in styles.items():
        if style is not None and (style.output or style.splits_input):
            _hook(name, modules[name], style, context, width)
    nn.Module.to(module, context.device)
    for parameter in module.parameters():
        if not isinstance(parameter, Parameter):
            as_whole(parameter)


def _style(plan: Mapping[str, str], name: str) -> Style | None:
    """What a plan says of a module or parameter itself."""
    found = plan.get(LAYER_NUMBER.sub(".*", name))
    return None if found is None else STYLES[found]


def _slice(name: str, whole: nn.Parameter, style: Style, context: ModelContext) -> Parameter:
    """A rank's slice of a parameter, not filled.

    A vector of a module that is split by columns is its bias, which is rank 0's term of the sum.
    """
    rank, num_ranks, full_shape = context.tp.rank, context.tp.size, tuple(whole.shape)
    if style.dim is None:
        raise ValueError(f"its tp_plan does not say how {name} is split")
    dim = max(len(full_shape) + style.dim, 0)
    if len(full_shape) == 1 and style.dim == COLUMNS:
        data = torch.zeros(full_shape, dtype=whole.dtype, device=context.device)
        bias = Parameter(data, requires_grad=False)
        own = slice(0, full_shape[0] if rank == 0 else 0)
        bias.shards = {"": Shard(full_shape, (own,), (own,))}
        return bias
    size, rest = divmod(full_shape[dim], num_ranks * style.parts)
    if rest:
        raise ValueError(
            f"{num_ranks} ranks cannot share {name}, whose dimension {dim} is {full_shape[dim]}"
        )
    shape = list(full_shape)
    shape[dim] = size * style.parts
    parameter = Parameter(
        torch.empty(shape, dtype=whole.dtype, device=context.device), requires_grad=False
    )
    parameter.shards = {}
    source, target = ([slice(0, n) for n in sizes] for sizes in (full_shape, shape))
    for part in range(style.parts):
        start = (part * num_ranks + rank) * size
        source[dim], target[dim] = slice(start, start + size), slice(part * size, (part + 1) * size)
        shard = Shard(full_shape, tuple(source), tuple(target), fused_name="")
        parameter.shards[str(part)] = shard
    return parameter


def _hook(name: str, module: nn.Module, style: Style, context: ModelContext, width: int) -> None:
    """Let a module split its input, and gather or sum its outputs [..., width]."""
    tp = context.tp
    if style.dim is not None and type(module).forward is not nn.Linear.forward:
        raise ValueError(f"{name} is a {type(module).__name__}, not a linear layer")

    def own_part(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *others = args
        return x.chunk(tp.size, -1)[tp.rank], *others

    def gathered(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return tp.gather(output.flatten(0, -2)).unflatten(0, output.shape[:-1])

    def reduced(module: nn.Module, args: object, output: Tensor) -> Tensor:
        if output.shape[-1] != width:
            raise ValueError(f"{name} does not give the {width} elements of a hidden state")
        term = Unreduced(output.flatten(0, -2).to(context.dtype).contiguous())
        return tp.all_reduce(term).to(output.dtype).unflatten(0, output.shape[:-1])

    if style.splits_input:
        module.register_forward_pre_hook(own_part)
    if style.output is not None:
        module.register_forward_hook(gathered if style.output == "gather" else reduced)
