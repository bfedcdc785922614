"""The ONNX operators ``infoprune::TokenSelect`` and ``infoprune::ReceivedAttention``: schemas, translation, bodies.

An exported graph that selects holds one node of each. The file also carries their definitions as model-local
functions, so any ONNX runtime can run it; a runtime with a native kernel of that name uses the kernel.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import values

from infoprune_export.export.functions import DOMAIN, OPERATORS, VERSION, ReceivedAttention, TokenSelect
from infoprune_export.models import attention
from infoprune_export.tokens import select

__all__ = ["DOMAIN", "VERSION", "attach_bodies", "function_bodies", "register_schemas", "translation_table"]

# mypy: disable-error-code="no-untyped-def"


# ── Schemas and translation ──────────────────────────────────────────────────


@cache
def register_schemas() -> None:
    """Tell onnx about the operators; without it a bare node cannot be built or checked."""
    schema = onnx.defs.OpSchema
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]

    def attribute(name: str, value: float) -> Any:
        return schema.Attribute(name, onnx.helper.make_attribute(name, value))

    def register(name: str, operator: Any, inputs: dict[str, str], output: tuple[str, str], attributes: list[Any]):
        onnx.defs.register_schema(
            schema(
                name,
                DOMAIN,
                VERSION,
                doc=operator._init_fn.__doc__ or "",
                inputs=[schema.FormalParameter(*pair) for pair in inputs.items()],
                outputs=[schema.FormalParameter(*output)],
                type_constraints=[(t, floats, "") for t in ("T", "A") if t in inputs.values()],
                attributes=attributes,
            )
        )

    register(
        "TokenSelect",
        select.token_select,
        {"features": "T", "prior": "A", "counts": "tensor(int64)"},
        ("indices", "tensor(int64)"),
        [
            schema.Attribute("keep_numerator", schema.AttrType.INT, required=True),
            schema.Attribute("keep_denominator", schema.AttrType.INT, required=True),
            attribute("pool_factor", 2.0),
            attribute("temperature", 0.7),
            attribute("exponent", 0.5),
            attribute("epsilon", select.EPSILON),
        ],
    )
    register(
        "ReceivedAttention",
        attention.received_attention,
        {"query": "T", "key": "T", "row_weight": "tensor(float)", "key_bias": "tensor(float)"},
        ("received", "tensor(float)"),
        [schema.Attribute("scale", schema.AttrType.FLOAT, required=True)],
    )


def _translate_token_select(
    features,
    prior,
    counts,
    keep_numerator: int,
    keep_denominator: int,
    pool_factor: float = 2.0,
    temperature: float = 0.7,
    exponent: float = 0.5,
    epsilon: float = 1e-5,
):
    return OPERATORS.TokenSelect(
        features,
        prior,
        counts,
        keep_numerator=keep_numerator,
        keep_denominator=keep_denominator,
        pool_factor=pool_factor,
        temperature=temperature,
        exponent=exponent,
        epsilon=epsilon,
    )


def _translate_received_attention(query, key, row_weight, key_bias, scale: float):
    return OPERATORS.ReceivedAttention(query, key, row_weight, key_bias, scale=scale)


def translation_table() -> dict[Any, Any]:
    """For ``torch.onnx.export(custom_translation_table=...)``: each PyTorch op becomes one bare node."""
    register_schemas()
    return {
        torch.ops.infoprune.token_select.default: _translate_token_select,
        torch.ops.infoprune.received_attention.default: _translate_received_attention,
    }


# ── Bodies ───────────────────────────────────────────────────────────────────


@cache
def function_bodies() -> tuple[onnx.FunctionProto, ...]:
    """The functions, with the same bytes in every process.

    onnxscript keeps a loop's carried variables in a set, so their order and the numbers in all names follow Python's
    hash seed. Here they are sorted by variable name and numbered anew.
    """
    return tuple(_settled(function) for function in (TokenSelect, ReceivedAttention))


def _settled(scripted: values.OnnxFunction) -> onnx.FunctionProto:
    function = scripted.to_function_proto()
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
        if attribute.type != onnx.AttributeProto.GRAPH:
            continue  # only to look at its graph would give it one
        graph = attribute.g
        for value in graph.input:
            value.name = fresh(value.name)
        for inner in graph.node:
            _rename(inner, names)
        for value in graph.output:
            value.name = fresh(value.name)
        graph.name = "body"
    node.output[:] = [fresh(name) for name in node.output]


def attach_bodies(model: ir.Model) -> None:
    """Add the bodies of the operators a model has; last, because the exporter's optimiser would inline them."""
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for body in function_bodies():
        if body.name in used:
            function = ir.serde.deserialize_function(body)
            function.opset_imports[""] = model.opset_imports[""]
            model.functions[function.identifier()] = function
            model.opset_imports[DOMAIN] = VERSION
