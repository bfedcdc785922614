"""Rules about types and widths: what overflows, what misses the tensor cores, what keeps attention from being fused.

TensorRT fuses MatMul, Softmax, MatMul into one kernel where both products are fp16 or bf16, only a mask and a scale
stand between, and heads are 16 to 256 wide. Breaches cost speed, so they are warnings; overflow is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from infoprune_export.engine.tensorrt.findings import LintFinding
from infoprune_export.engine.tensorrt.limits import ALIGNMENT, HEAD_DIMS, QDQ
from infoprune_export.engine.tensorrt.lint_graph import FLOATS, HALF, GraphView, label

_PRODUCTS = ("MatMul", "Gemm")
_LAYOUT = ("Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Gather", "Slice")
_BETWEEN_SCORES = (*_LAYOUT, *QDQ, "Add", "Sub", "Mul", "Div", "Where")
_BETWEEN_WEIGHTS = (*_LAYOUT, *QDQ, "Dropout", "Mul", "Where")
_FUSED_BETWEEN_WEIGHTS = ("Cast", "Identity", "Dropout", *QDQ)
_FP16_MAX = 65504.0
_INT32 = np.iinfo(np.int32)


def precision_rules(view: GraphView) -> Iterator[LintFinding]:
    """All of this module's rules."""
    yield from _weight_rules(view)
    for node in view.nodes:
        if node.op_type in _PRODUCTS:
            yield from _width_rules(view, node)
    for attention in attentions(view):
        yield from _attention_rules(view, attention)


def _warning(rule: str, node: ir.Node, problem: str, fix: str) -> LintFinding:
    return LintFinding(rule, "warning", label(node), problem, fix)


# ── Weights ──────────────────────────────────────────────────────────────────


def _weight_rules(view: GraphView) -> Iterator[LintFinding]:
    constants = [value for node in view.nodes if node.op_type == "Constant" for value in node.outputs]
    for graph in view.model.graphs():
        constants += graph.initializers.values()
    for value in constants:
        tensor = view.constant(value)
        if tensor is None or not tensor.size:
            continue
        name = str(value.name)
        if tensor.dtype == ir.DataType.INT64 and not all(_is_slice_end(*use) for use in value.uses()):
            numbers = tensor.numpy()
            extreme = max(int(numbers.max()), int(numbers.min()), key=abs)
            if not _INT32.min <= extreme <= _INT32.max:
                problem = f"holds {extreme}; indices and extents of TensorRT fit in int32"
                yield LintFinding("int64-range", "warning", name, problem, "use numbers within +-2^31")
        elif tensor.dtype in HALF and any(user.op_type in _WEIGHTED for user in _users(value)):
            numbers = tensor.numpy()
            if not np.isfinite(numbers.astype(np.float32)).all():
                problem = f"{HALF[tensor.dtype]} weight holds NaN or infinity"
                yield LintFinding("overflow", "error", name, problem, "export.precision=bf16 or fp32")
        elif tensor.dtype == ir.DataType.FLOAT:
            yield from _narrowed(value, tensor)


_WEIGHTED = (*_PRODUCTS, "Conv", "LayerNormalization")


def _narrowed(value: ir.Value, tensor: ir.TensorProtocol) -> Iterator[LintFinding]:
    casts = [n for n, _ in value.uses() if n.op_type == "Cast" and n.attributes["to"].as_int() == ir.DataType.FLOAT16]
    if not casts:
        return
    numbers = tensor.numpy()
    largest = float(np.abs(numbers[np.isfinite(numbers)]).max(initial=0.0))
    if largest > _FP16_MAX:
        problem = f"holds {largest:.6g} and is cast to fp16 by {label(casts[0])}; the largest fp16 is {_FP16_MAX:.0f}"
        yield LintFinding("overflow", "error", str(value.name), problem, "export.precision=bf16 or fp32")


def _is_slice_end(user: ir.Node, number: int) -> bool:
    """Exporters write "to the end" as the largest number there is."""
    return user.op_type == "Slice" and number in (1, 2)


def _users(value: ir.Value) -> Iterator[ir.Node]:
    """Nodes that use a weight, in whatever layout."""
    for user, _ in value.uses():
        if user.op_type in ("Reshape", "Transpose"):
            yield from _users(user.outputs[0])
        else:
            yield user


# ── Widths ───────────────────────────────────────────────────────────────────


def _width_rules(view: GraphView, node: ir.Node) -> Iterator[LintFinding]:
    left, right = node.inputs[:2]
    if left is None or right is None or right.shape is None or view.computed(right) or len(right.shape) != 2:
        return
    dtype = node.outputs[0].dtype
    kind = "int8" if _dequantized(left) and _dequantized(right) else FLOATS.get(dtype) if dtype is not None else None
    multiple = ALIGNMENT.get(kind or "")
    odd = [extent for extent in right.shape if isinstance(extent, int) and multiple and extent % multiple]
    if odd:
        problem = f"weight of {list(right.shape)}: {' and '.join(map(str, odd))} is no multiple of {multiple} ({kind})"
        fix = f"prune to a multiple of {multiple}, better of 64; it runs, padded"
        yield _warning("width", node, problem, fix)


def _dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in ("Reshape", "Transpose"):
        value = producer.inputs[0]
        producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == QDQ[1]


# ── Attention ────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Attention:
    """One softmax attention as standard operators."""

    scores: ir.Node
    """MatMul of queries and keys."""
    between_scores: tuple[ir.Node, ...]
    softmax: ir.Node
    between_weights: tuple[ir.Node, ...]
    values: ir.Node
    """MatMul of weights and values."""


def attentions(view: GraphView) -> list[Attention]:
    """Every Softmax between two products of computed tensors."""
    found = []
    for node in view.nodes:
        if node.op_type != "Softmax":
            continue
        back = _path(view, node.inputs[0], _producers, _BETWEEN_SCORES)
        ahead = _path(view, node.outputs[0], _consumers, _BETWEEN_WEIGHTS)
        if back is not None and ahead is not None:
            found.append(Attention(back[-1], back[:-1], node, ahead[:-1], ahead[-1]))
    return found


Step = Callable[[ir.Value], list[tuple[ir.Node, list[ir.Value]]]]


def _producers(value: ir.Value) -> list[tuple[ir.Node, list[ir.Value]]]:
    producer = value.producer()
    return [] if producer is None else [(producer, [v for v in producer.inputs if v is not None])]


def _consumers(value: ir.Value) -> list[tuple[ir.Node, list[ir.Value]]]:
    return [(user, list(user.outputs)) for user, _ in value.uses()]


def _path(view: GraphView, value: ir.Value | None, step: Step, allowed: tuple[str, ...]) -> tuple[ir.Node, ...] | None:
    """Nodes up to the nearest product of two computed tensors, which is the last; None if there is none that way."""
    if value is None:
        return None
    seen: set[ir.Node] = set()
    waiting: list[tuple[ir.Value, tuple[ir.Node, ...]]] = [(value, ())]
    for current, path in waiting:
        for node, onward in step(current):
            if node in seen:
                continue
            seen.add(node)
            if node.op_type == "MatMul" and all(view.computed(operand) for operand in node.inputs):
                return (*path, node)
            if node.op_type in allowed:
                waiting += [(further, (*path, node)) for further in onward if view.computed(further)]
    return None


def _attention_rules(view: GraphView, found: Attention) -> Iterator[LintFinding]:
    types = [node.outputs[0].dtype for node in (found.scores, found.values)]
    if view.precision in HALF.values() and ir.DataType.FLOAT in types:
        late = types[0] == ir.DataType.FLOAT
        node = found.scores if late else found.values
        what = "queries and keys, behind their rotary embedding," if late else "Softmax's output"
        fix = f"cast {what} to {view.precision} before the product"
        yield _warning("attention-fp32", node, f"attention in fp32 in a graph of {view.precision} is not fused", fix)
    if any(_subtracts_maximum(node) for node in found.between_scores):
        problem = "the row maximum is subtracted before Softmax, which does so itself"
        yield _warning("attention-pattern", found.softmax, problem, "feed the scores to Softmax as they are")
    if strange := [node for node in found.between_weights if node.op_type not in _FUSED_BETWEEN_WEIGHTS]:
        problem = f"{strange[0].op_type} ({label(strange[0])}) stands between Softmax and the product with values"
        yield _warning("attention-pattern", found.softmax, problem, "mask scores before Softmax instead")
    watched = [node for node in (*found.between_scores, found.scores, found.softmax) if _is_output(node)]
    if watched:
        fix = "leave it out of the graph's outputs"
        yield _warning("attention-pattern", watched[0], "an output of the graph inside attention", fix)
    yield from _head_rules(found)
    yield from _pair_rules(found)


def _subtracts_maximum(node: ir.Node) -> bool:
    operand = node.inputs[1] if node.op_type == "Sub" else None
    producer = operand.producer() if operand is not None else None
    return producer is not None and producer.op_type == "ReduceMax"


def _is_output(node: ir.Node) -> bool:
    return any(value.is_graph_output() for value in node.outputs)


def _head_rules(found: Attention) -> Iterator[LintFinding]:
    value = found.values.inputs[1]
    size = value.shape[-1] if value is not None and value.shape is not None and len(value.shape) else None
    if isinstance(size, int) and (size % 8 or not HEAD_DIMS[0] <= size <= HEAD_DIMS[1]):
        problem = f"heads of {size} channels; fused are multiples of 8 from {HEAD_DIMS[0]} to {HEAD_DIMS[1]}"
        yield _warning("head-size", found.values, problem, "prune whole heads and leave their size")


def _pair_rules(found: Attention) -> Iterator[LintFinding]:
    if misplaced := [node for node in found.between_scores if node.op_type in QDQ]:
        fix = "Q/DQ belong before both products and behind Softmax"
        yield _warning("attention-qdq", misplaced[0], "Q/DQ between the scores and Softmax", fix)
    operands = [*found.scores.inputs, *found.values.inputs]
    quantized = [_dequantized(operand) for operand in operands]
    if any(quantized) and not all(quantized):
        problem = f"{sum(quantized)} of the 4 operands of attention are quantized"
        fix = "quantize all four, or none"
        yield _warning("attention-qdq", found.scores, problem, fix)
