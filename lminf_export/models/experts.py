"""Mixtures of experts that can be exported: every token is computed by its chosen experts only.

transformers computes experts by a grouped product that has no translation to ONNX, or by a loop
over the experts that some token chose, whose shapes depend on data. Here the pairs (token, chosen
expert) are sorted into blocks of equal size. All rows of a block belong to one expert; a block is
padded with zeros where the expert has too few pairs. The number of blocks, M, and the rows of
each, b, follow from the number of tokens alone, so that an engine can plan for them. One Loop
then multiplies one block by its expert's matrix at a time.

Letters: T tokens, F features, E experts, k experts of each token, P = T · k pairs.

Cost. A step of few tokens (b = 1) reads the chosen experts and no others. Each matrix is copied
out of the stack before it is used, which is two more passes over it: standard operators have no
product with one matrix of a stack. A long chunk computes at most 3 rows for each pair, in at most
1.5 · E blocks. The alternatives cost more. Computing every expert for every token reads all E
experts, 16 times as many weights in Qwen3-30B. Copying the chosen matrices of all pairs at once
needs memory for P experts.

Routing (softmax, top-k, normalisation, scaling) and the activation between the two products are
each model's own code, traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import evaluator
from onnxscript.values import Opset
from torch import Tensor

from lminf_export.errors import DependencyError
from lminf_export.models.expert_facts import CHOICE_PREFIX, has_experts
from lminf_export.models.internals import Internals

EXPERTS_NAME = "lambda_experts"
_INTERNALS = Internals("mixtures of experts")
_ONNX = Opset("", 24)


def block_shape(num_pairs: Any, num_experts: int) -> tuple[Any, Any]:
    """Return (M, b): the number of blocks that any routing of P pairs fits in, and their rows.

    Args:
        num_pairs: P, an integer or a symbol of the trace.
        num_experts: E.
    """
    # Twice the rows of a balanced routing, so that most experts fit in one block.
    rows = 2 * num_pairs // num_experts + 1
    # An expert of n pairs needs (n - 1) // b + 1 blocks: summed over m experts, at most
    # (P - m) // b + m, which is largest for the most experts that can be chosen.
    hit = torch.sym_min(num_pairs, num_experts)
    return (num_pairs - hit) // rows + hit, rows


@torch.library.custom_op("lminf::dispatch_to_experts", mutates_args=())
def dispatch_to_experts(
    hidden: Tensor, top_k_index: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort tokens into blocks of one expert each.

    Args:
        hidden: (T, F) tokens.
        top_k_index: (T, k) int64, the experts of each.
        num_experts: E.

    Returns:
        blocks (M, b, F) with zeros where a block is not full; expert (M,) int64 of each block;
        slot (T·k,) int64, the row of blocks.flatten(0, 1) that holds each pair.
    """
    expert = top_k_index.reshape(-1)  # (P,)
    num_blocks, rows = block_shape(expert.numel(), num_experts)
    # A pair's rank among the pairs of its expert: their running count, at its own expert.
    chosen = expert[:, None] == torch.arange(num_experts)  # (P, E)
    running = chosen.to(torch.int64).cumsum(0)  # (P, E)
    rank = running.gather(1, expert[:, None])[:, 0] - 1  # (P,)
    # Experts own consecutive blocks, in the order of their numbers: expert e owns those from
    # ends[e] - used[e] to ends[e] - 1. A pair's row is its rank, counted from the first of them.
    used = (chosen.sum(0) + rows - 1) // rows  # (E,) blocks of each expert
    ends = used.cumsum(0)  # (E,)
    slot = (ends - used)[expert] * rows + rank  # (P,)
    # A block's expert is the number of experts whose blocks all come before it.
    of_block = (ends[None, :] <= torch.arange(num_blocks)[:, None]).sum(1)  # (M,)
    blocks = hidden.new_zeros(num_blocks * rows, hidden.shape[1])
    blocks[slot] = hidden.repeat_interleave(top_k_index.shape[1], 0)  # (P, F), token by token
    blocks = blocks.reshape(num_blocks, rows, hidden.shape[1])
    # Blocks behind the last used one count E experts; any valid matrix will do for their zeros.
    return blocks, of_block.clamp(max=num_experts - 1), slot


@dispatch_to_experts.register_fake
def _(hidden: Tensor, top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    num_pairs = top_k_index.shape[0] * top_k_index.shape[1]
    num_blocks, rows = block_shape(num_pairs, num_experts)
    return (
        hidden.new_empty((num_blocks, rows, hidden.shape[1])),
        top_k_index.new_empty((num_blocks,)),
        top_k_index.new_empty((num_pairs,)),
    )


@torch.library.custom_op("lminf::expert_linear", mutates_args=())
def expert_linear(blocks: Tensor, weight: Tensor, expert: Tensor, is_transposed: bool) -> Tensor:
    """Multiply each block by its expert's matrix, one block at a time.

    Args:
        blocks: (M, b, in).
        weight: (E, out, in), or (E, in, out) where transposed.
        expert: (M,) int64.
        is_transposed: whether the matrices are stored transposed.

    Returns:
        (M, b, out).
    """
    pairs = zip(blocks, expert.tolist(), strict=True)
    matrices = weight if is_transposed else weight.transpose(1, 2)
    return torch.stack([block @ matrices[index] for block, index in pairs])


@expert_linear.register_fake
def _(blocks: Tensor, weight: Tensor, expert: Tensor, is_transposed: bool) -> Tensor:
    return blocks.new_empty((*blocks.shape[:2], weight.shape[2 if is_transposed else 1]))


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute a model's experts, as an experts implementation of transformers.

    Args:
        module: a model's experts, with stacked `gate_up_proj` (or `up_proj`) and `down_proj`.
        hidden_states: (T, F).
        top_k_index: (T, k) int64.
        top_k_weights: (T, k).

    Returns:
        (T, F): for each token the weighted sum over its experts.
    """
    num_experts, has_gate = _INTERNALS.members(module, "num_experts", "has_gate")
    blocks, expert, slot = dispatch_to_experts(hidden_states, top_k_index, num_experts)
    inner = _project(module, "gate_up_proj" if has_gate else "up_proj", blocks, expert)
    activate = _INTERNALS.member(module, "_apply_gate" if has_gate else "act_fn")
    inner = activate(inner)  # (M, b, inner features)
    # Padding ends here: slot picks the row of each pair out of the (M · b, F) rows.
    output = _project(module, "down_proj", inner, expert).flatten(0, 1).index_select(0, slot)
    if getattr(module, "has_post_expert_norm", False):  # newer than the mixtures without
        output = module.post_expert_norm(output)
    weighted = output.unflatten(0, top_k_index.shape) * top_k_weights[:, :, None]  # (T, k, F)
    return weighted.sum(1).to(hidden_states.dtype)


def _project(module: Any, name: str, blocks: Tensor, expert: Tensor) -> Tensor:
    """Multiply blocks (M, b, in) by a named stack and add its experts' biases: (M, b, out)."""
    weight, transposed, biased = _INTERNALS.members(module, name, "is_transposed", "has_bias")
    output = expert_linear(blocks, weight, expert, transposed)
    if biased:
        bias = _INTERNALS.member(module, f"{name}_bias")
        output = output + bias.index_select(0, expert)[:, None, :]
    return output


def register_experts(config: Any) -> bool:
    """Make `experts_forward` known to transformers under EXPERTS_NAME.

    Returns:
        Whether it is known; a model without experts does not need it.

    Raises:
        DependencyError: it cannot be made known, and the model of this configuration has experts.
    """
    try:
        functions = _INTERNALS.lookup("integrations.moe.ALL_EXPERTS_FUNCTIONS")
    except DependencyError:
        if has_experts(config):
            raise
        return False
    functions.register(EXPERTS_NAME, experts_forward)
    return True


def _ints(*values: int) -> Any:
    return _ONNX.Constant(value_ints=values)


def _int(value: int) -> Any:
    return _ONNX.Constant(value_int=value)


def _dispatch_to_onnx(hidden: Any, top_k_index: Any, num_experts: int) -> Any:
    """Write `dispatch_to_experts` in standard operators, step by step in the same order."""
    expert = _ONNX.Reshape(top_k_index, _ints(-1))  # (P,)
    # The name tells `lminf validate` and `lminf bench` where a graph's chosen experts are.
    expert.name = f"{CHOICE_PREFIX}{top_k_index.name}"
    # `block_shape`, of shape (1,) each.
    num_pairs = _ONNX.Shape(expert)
    rows = _ONNX.Add(_ONNX.Div(_ONNX.Mul(num_pairs, _int(2)), _int(num_experts)), _int(1))
    hit = _ONNX.Min(num_pairs, _ints(num_experts))
    num_blocks = _ONNX.Add(_ONNX.Div(_ONNX.Sub(num_pairs, hit), rows), hit)
    # The rank of each pair among those of its expert.
    column = _ONNX.Unsqueeze(expert, _ints(1))  # (P, 1)
    chosen = _ONNX.Cast(_ONNX.Equal(column, _ints(*range(num_experts))), to=ir.DataType.INT64)
    running = _ONNX.CumSum(chosen, _int(0))
    rank = _ONNX.Sub(_ONNX.Squeeze(_ONNX.GatherElements(running, column, axis=1), _ints(1)), 1)
    # The blocks of each expert, and the row of each pair.
    count = _ONNX.ReduceSum(chosen, _ints(0), keepdims=0)  # (E,)
    used = _ONNX.Div(_ONNX.Sub(_ONNX.Add(count, rows), _int(1)), rows)
    ends = _ONNX.CumSum(used, _int(0))
    start = _ONNX.Gather(_ONNX.Sub(ends, used), expert)
    slot = _ONNX.Add(_ONNX.Mul(start, rows), rank)
    # The expert of each block.
    number = _ONNX.Range(_int(0), _ONNX.Squeeze(num_blocks), _int(1))
    passed = _ONNX.LessOrEqual(ends, _ONNX.Unsqueeze(number, _ints(1)))  # (M, E)
    before = _ONNX.ReduceSum(_ONNX.Cast(passed, to=ir.DataType.INT64), _ints(1), keepdims=0)
    of_block = _ONNX.Min(before, _ints(num_experts - 1))  # unused blocks count E
    # The blocks: each token k times, written to the rows of its pairs over zeros.
    width = _ONNX.Shape(hidden, start=1, end=2)
    k = top_k_index.shape[1]
    pairs = _ONNX.Expand(_ONNX.Unsqueeze(hidden, _ints(1)), _ints(1, k, 1))
    pairs = _ONNX.Reshape(pairs, _ONNX.Concat(_ints(-1), width, axis=0))
    zero = _ONNX.CastLike(_ONNX.Constant(value_float=0.0), hidden)
    total = _ONNX.Concat(_ONNX.Mul(num_blocks, rows), width, axis=0)
    empty = _ONNX.Expand(zero, total)
    filled = _ONNX.ScatterND(empty, _ONNX.Unsqueeze(slot, _ints(1)), pairs)
    blocks = _ONNX.Reshape(filled, _ONNX.Concat(num_blocks, rows, width, axis=0))
    return blocks, of_block, slot


def _expert_linear_to_onnx(blocks: Any, weight: Any, expert: Any, is_transposed: bool) -> Any:
    """Write `expert_linear` as a Loop over the blocks.

    A Scan could do the same, but the ONNX parser of TensorRT refuses it.
    """
    number = _scalar_value("block", ir.DataType.INT64)
    going = _scalar_value("going", ir.DataType.BOOL)
    on = ir.node("Identity", [going])
    block, index = (
        ir.node("Gather", [x, number], attributes={"axis": 0}) for x in (blocks, expert)
    )
    # The stack is a value of the outer graph, so no turn copies more than one of its matrices.
    matrix = ir.node("Gather", [weight, index.outputs[0]], attributes={"axis": 0})
    factors = [block.outputs[0], matrix.outputs[0]]
    product = ir.node("Gemm", factors, attributes={"transB": int(not is_transposed)})
    on.outputs[0].type, product.outputs[0].type = going.type, ir.TensorType(blocks.dtype)
    body = ir.Graph(
        [number, going],
        [on.outputs[0], product.outputs[0]],
        nodes=[on, block, index, matrix, product],
        name="one_expert",
    )
    count = _ONNX.Squeeze(_ONNX.Shape(expert))
    loop = ir.node("Loop", [count, _ONNX.Constant(value=ir.tensor(True))], {"body": body})
    # onnxscript's call of Loop needs a value that is carried from turn to turn; there is none
    # here, so the node is given to the recorder of torch's exporter directly.
    evaluator.default().nodes.append(loop)
    return loop.outputs[0]


def _scalar_value(name: str, dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([]))


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the `custom_translation_table` of `torch.onnx.export` for these operators."""
    ops = torch.ops.lminf
    return {
        ops.dispatch_to_experts.default: _dispatch_to_onnx,
        ops.expert_linear.default: _expert_linear_to_onnx,
    }
