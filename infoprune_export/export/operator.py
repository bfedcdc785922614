"""The ONNX operator ``infoprune::TokenSelect``: schema, translation from PyTorch, and its portable function body.

An exported graph holds one node of this type per image batch. The file also carries the operator's definition as a
model-local function, so any ONNX runtime can run it; a runtime with a native kernel of that name uses the kernel.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset20 as op
from onnxscript import script, values

from infoprune_export.tokens import select

DOMAIN, VERSION = "infoprune", 1
_ops = values.Opset(DOMAIN, VERSION)


# mypy: disable-error-code="no-untyped-def"


# ── Function body ────────────────────────────────────────────────────────────
# Blocked pivoted Cholesky, as in tokens.select._pivots. Loop states keep their shapes and loops have trip counts only
# (TensorRT's rules).


@script(_ops, default_opset=op)
def TokenSelect(  # noqa: N802  (an ONNX operator name)
    features,
    prior,
    keep_numerator: int,
    keep_denominator: int,
    pool_factor: float = 2.0,
    temperature: float = 0.7,
    exponent: float = 0.5,
    epsilon: float = 1e-5,
):
    zero = op.Constant(value_float=0.0)
    axis0 = op.Constant(value_ints=[0])
    axis1 = op.Constant(value_ints=[1])
    axis2 = op.Constant(value_ints=[2])
    block = op.Constant(value_int=64)
    # T = ceil(N * numerator / denominator); M = min(N, ceil(alpha T))
    tokens = op.Shape(prior, start=1, end=2)
    denominator = op.Constant(value_int=keep_denominator)
    wanted = op.Mul(tokens, op.Constant(value_int=keep_numerator))
    keep = op.Div(op.Sub(op.Add(wanted, denominator), op.Constant(value_int=1)), denominator)
    over = op.Ceil(op.Mul(op.Cast(keep, to=1), op.Constant(value_float=pool_factor)))
    pool_size = op.Min(tokens, op.Cast(over, to=7))
    # q = softmax(a / tau) ^ gamma_q; the pool is ranked on a
    # (false for NaN and infinity, which count as zero)
    largest = op.Constant(value_float=3.4028234663852886e38)
    a = op.Cast(prior, to=1)
    a = op.Where(op.LessOrEqual(op.Abs(a), largest), a, zero)
    q = op.Pow(op.Softmax(op.Div(a, op.Constant(value_float=temperature)), axis=1), op.Constant(value_float=exponent))
    _, pool = op.TopK(a, pool_size, axis=1, largest=1, sorted=1)
    z = op.Cast(op.GatherND(features, op.Unsqueeze(pool, axis2), batch_dims=1), to=1)
    z = op.Where(op.LessOrEqual(op.Abs(z), largest), z, zero)
    z = op.Mul(z, op.Unsqueeze(op.Sqrt(op.GatherElements(q, pool, axis=1)), axis2))
    scale_z = op.ReduceMax(op.Abs(z), op.Constant(value_ints=[1, 2]), keepdims=1)
    z = op.Div(z, op.Max(scale_z, op.Constant(value_float=1.1754943508222875e-38)))
    # pivoted Cholesky of z z^T
    gram = op.MatMul(z, op.Transpose(z, perm=[0, 2, 1]))
    residual = op.ReduceSumSquare(z, axis2, keepdims=0)
    threshold = op.Mul(op.ReduceMax(residual, axis1, keepdims=1), op.Constant(value_float=epsilon))
    shape = op.Shape(residual)
    batch = op.Shape(residual, start=0, end=1)
    ranks = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(residual, start=1, end=2)), op.Constant(value_int=1))
    position = op.Neg(op.Cast(ranks, to=1))
    taken = op.Expand(zero, shape)
    minus_infinity = op.Expand(op.Constant(value_float=float("-inf")), op.Concat(batch, axis1, axis=0))
    blocks = op.Squeeze(op.Div(op.Sub(op.Add(keep, block), op.Constant(value_int=1)), block))
    pivots = op.Expand(op.Constant(value_int=0), op.Concat(keep, batch, axis=0))
    empty = op.Expand(zero, op.Concat(op.Reshape(block, axis1), shape, axis=0))
    for outer in range(blocks):
        factor = op.Identity(empty)
        left = op.Squeeze(op.Min(block, op.Sub(keep, op.Mul(outer, block))))
        for inner in range(left):
            free = op.Add(residual, taken)
            saturated = op.LessOrEqual(op.ReduceMax(free, axis1, keepdims=1), threshold)
            pivot = op.ArgMax(op.Where(saturated, op.Add(position, taken), free), axis=1, keepdims=1)
            row = op.GatherND(gram, pivot, batch_dims=1)
            everywhere = op.Expand(
                op.Unsqueeze(pivot, axis0), op.Concat(op.Reshape(block, axis1), batch, axis1, axis=0)
            )
            weights = op.Transpose(op.GatherElements(factor, everywhere, axis=2), perm=[1, 2, 0])
            known = op.Squeeze(op.MatMul(weights, op.Transpose(factor, perm=[1, 0, 2])), axis1)
            scale = op.Sqrt(op.Max(op.GatherElements(residual, pivot, axis=1), op.Constant(value_float=1e-30)))
            column = op.Where(saturated, zero, op.Div(op.Sub(row, known), scale))
            factor = op.ScatterND(
                factor, op.Reshape(inner, op.Constant(value_ints=[1, 1])), op.Unsqueeze(column, axis0)
            )
            residual = op.Max(op.Sub(residual, op.Mul(column, column)), zero)
            taken = op.ScatterElements(taken, pivot, minus_infinity, axis=1)
            slot = op.Reshape(op.Add(op.Mul(outer, block), inner), op.Constant(value_ints=[1, 1]))
            pivots = op.ScatterND(pivots, slot, op.Transpose(pivot, perm=[1, 0]))
        wide = op.Transpose(factor, perm=[1, 0, 2])
        gram = op.Sub(gram, op.MatMul(op.Transpose(wide, perm=[0, 2, 1]), wide))
    kept = op.GatherElements(pool, op.Transpose(pivots, perm=[1, 0]), axis=1)
    indices, _ = op.TopK(kept, keep, axis=1, largest=0, sorted=1)
    return indices


# ── Schema and translation ───────────────────────────────────────────────────


@cache
def register_schema() -> None:
    """Tell onnx about the operator; without it a bare node cannot be built or checked."""
    schema = onnx.defs.OpSchema
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]

    def parameter(name: str, kind: str) -> Any:
        return schema.FormalParameter(name, kind)

    def attribute(name: str, value: float) -> Any:
        return schema.Attribute(name, onnx.helper.make_attribute(name, value))

    onnx.defs.register_schema(
        schema(
            "TokenSelect",
            DOMAIN,
            VERSION,
            doc=select.token_select._init_fn.__doc__ or "",
            inputs=[parameter("features", "T"), parameter("prior", "A")],
            outputs=[parameter("indices", "tensor(int64)")],
            type_constraints=[("T", floats, ""), ("A", floats, "")],
            attributes=[
                schema.Attribute("keep_numerator", schema.AttrType.INT, required=True),
                schema.Attribute("keep_denominator", schema.AttrType.INT, required=True),
                attribute("pool_factor", 2.0),
                attribute("temperature", 0.7),
                attribute("exponent", 0.5),
                attribute("epsilon", select.EPSILON),
            ],
        )
    )


def _translate(
    features,
    prior,
    keep_numerator: int,
    keep_denominator: int,
    pool_factor: float = 2.0,
    temperature: float = 0.7,
    exponent: float = 0.5,
    epsilon: float = 1e-5,
):
    return _ops.TokenSelect(
        features,
        prior,
        keep_numerator=keep_numerator,
        keep_denominator=keep_denominator,
        pool_factor=pool_factor,
        temperature=temperature,
        exponent=exponent,
        epsilon=epsilon,
    )


def translation_table() -> dict[Any, Any]:
    """For ``torch.onnx.export(custom_translation_table=...)``: the PyTorch op becomes one bare node."""
    register_schema()
    return {torch.ops.infoprune.token_select.default: _translate}


@cache
def function_body() -> onnx.FunctionProto:
    """The function, with the same bytes in every process.

    onnxscript keeps a loop's carried variables in a set, so their order and the numbers in all names follow Python's
    hash seed. Here they are sorted by variable name and numbered anew.
    """
    function = TokenSelect.to_function_proto()
    for node in function.node:
        _sort_carried(node)
    names = {name: name for name in (*function.input, *function.output, "")}
    for node in function.node:
        _rename(node, names)
    return function


def _stem(name: str) -> str:
    return name.rstrip("0123456789").rstrip("_")


def _sort_carried(node: onnx.NodeProto) -> None:
    """Sort the carried variables of a Loop, and of all loops in it: its inputs, outputs, and those of its body."""
    for attribute in node.attribute:
        for inner in attribute.g.node:
            _sort_carried(inner)
    if node.op_type != "Loop":
        return
    body = node.attribute[0].g
    order = sorted(range(len(node.output)), key=lambda i: _stem(body.input[2 + i].name))
    for listed, offset in ((node.input, 2), (node.output, 0), (body.input, 2), (body.output, 1)):
        carried = [copy.deepcopy(listed[offset + i]) for i in order]
        del listed[offset:]
        listed.extend(carried)


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    """Number names in the order in which they are defined."""

    def fresh(name: str) -> str:
        return names.setdefault(name, f"{_stem(name)}_{len(names)}")

    node.input[:] = [fresh(name) for name in node.input]
    node.name = ""
    for attribute in node.attribute:
        graph = attribute.g
        graph.name = ""
        for value in graph.input:
            value.name = fresh(value.name)
        for inner in graph.node:
            _rename(inner, names)
        for value in graph.output:
            value.name = fresh(value.name)
        if attribute.type == onnx.AttributeProto.GRAPH:
            graph.name = "body"
    node.output[:] = [fresh(name) for name in node.output]


def attach_body(model: ir.Model) -> None:
    """Add the function body to a model that has the node; last, because the exporter's optimiser would inline it."""
    if not any(node.domain == DOMAIN for node in model.graph):
        return
    function = ir.serde.deserialize_function(function_body())
    function.opset_imports[""] = model.opset_imports[""]
    model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = VERSION
