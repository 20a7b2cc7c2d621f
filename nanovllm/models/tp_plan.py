"""Transformers' plans of tensor parallelism: what each style says of weights, inputs and outputs.

A plan, `base_model_tp_plan` of a configuration, gives modules and parameters of a model styles.
The styles' meanings are those of transformers' `distributed/tensor_parallel.py`.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from nanovllm.errors import ArgumentError


class Style(NamedTuple):
    """What a rank holds and does of a module with this style.

    Attributes:
        dim: of a matrix, which a rank holds a slice of, -2 (rows) or -1 (columns); None: all of it.
        parts: stacked along `dim`, of which a rank has a slice each.
        splits_input: whether the module's input is whole, and the rank takes its slice first.
        output: "gather" puts the ranks' outputs side by side, "reduce" adds them up.
    """

    dim: int | None = None
    parts: int = 1
    splits_input: bool = False
    output: Literal["gather", "reduce"] | None = None


ROWS, COLUMNS = -2, -1
WHOLE = Style()
STYLES = {
    "colwise": Style(ROWS),
    "packed_colwise": Style(ROWS, parts=2),
    **dict.fromkeys(("colwise_gather_output", "colwise_rep"), Style(ROWS, output="gather")),
    "rowwise": Style(COLUMNS, output="reduce"),
    "packed_rowwise": Style(COLUMNS, parts=2),
    **dict.fromkeys(
        ("rowwise_split_input", "rowwise_rep"), Style(COLUMNS, splits_input=True, output="reduce")
    ),
    "moe_tp_experts": Style(output="reduce"),
    # Of training alone; parameters with entries of their own; and embeddings, which stay whole.
    **dict.fromkeys("replicated_with_grad_allreduce replicate mla_kv_a_proj".split(), WHOLE),
    "local_params": WHOLE,
    **dict.fromkeys(("embedding_rowwise", "embedding_colwise"), WHOLE),
}


def check_plan(plan: Mapping[str, str], architecture: str, size: int) -> None:
    """ArgumentError unless `size` ranks can share a model by its plan; the shapes are not checked.

    Raises:
        ArgumentError: there is no plan, none of it splits a weight, or a style is unknown here.
    """
    refusal = (
        f"tensor_parallel_size must be 1 for {architecture}, which runs on transformers' own "
        f"module, got {size}: "
    )
    unknown = sorted({style for style in plan.values() if style not in STYLES})
    if unknown:
        raise ArgumentError(f"{refusal}its tp_plan has {unknown[0]!r}, which is not supported")
    if all(STYLES[style].dim is None for style in plan.values()):
        raise ArgumentError(f"{refusal}it has no tp_plan that splits its layers")
