"""Names that say where a graph's values and nodes come from: ``blocks.3.attention``, ``blocks.3.ffn/MatMul_1``.

1. While the encoder is traced, each boundary (see `models.boundaries`) leaves an ``infoprune::Mark`` node.
2. `name_boundaries` takes the marks out before anything is optimised and gives their names to the values they stood
   at. So the graph that is optimised is the one there was without them.
3. `name_nodes` calls each node after the first part that needs it, by backward reachability from the boundaries. What
   several blocks need (shapes, rotary angles, masks) is ``shared``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from infoprune_export.export.functions import DOMAIN, OPERATORS, VERSION
from infoprune_export.models.boundaries import block_of, is_boundary, order_of, part_of

SHARED = "shared"
_MARK = "Mark"

# mypy: disable-error-code="no-untyped-def"


@torch.library.custom_op("infoprune::mark", mutates_args=())
def mark(value: Tensor, name: str) -> Tensor:
    """The value, and a node in a traced graph; a `boundaries.Visitor`."""
    return value.clone()


@mark.register_fake
def _(value: Tensor, name: str) -> Tensor:
    return torch.empty_like(value)


def register_schema() -> None:
    """Tell onnx about the marks, once; no finished file has one."""
    if onnx.defs.has(_MARK, DOMAIN):
        return
    schema = onnx.defs.OpSchema
    types = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(int64)"]
    onnx.defs.register_schema(
        schema(
            _MARK,
            DOMAIN,
            VERSION,
            inputs=[schema.FormalParameter("value", "T")],
            outputs=[schema.FormalParameter("same", "T")],
            type_constraints=[("T", types, "")],
            attributes=[schema.Attribute("boundary", schema.AttrType.STRING, required=True)],
        )
    )


def translation() -> dict[Any, Any]:
    """For ``torch.onnx.export(custom_translation_table=...)``."""
    register_schema()

    def translate(value, name: str):
        return OPERATORS.Mark(value, boundary=name)

    return {torch.ops.infoprune.mark.default: translate}


def name_boundaries(model: ir.Model) -> None:
    """Take the marks out and give their names to the values; a graph's outputs keep theirs.

    Where two boundaries are one value it has the first one's name.
    """
    graph = model.graph
    taken = {value.name for value in graph.outputs}
    for node in list(graph):
        if node.domain != DOMAIN or node.op_type != _MARK:
            continue
        value, result = node.inputs[0], node.outputs[0]
        assert value is not None
        name = node.attributes["boundary"].as_string()
        output = result.name if result.is_graph_output() else None
        ir.convenience.replace_all_uses_with(result, value, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if output is not None:
            value.name = output
        elif name not in taken and not value.is_graph_input() and not is_boundary(value.name or ""):
            _free(graph, name, value)
            value.name = name
            taken.add(name)
    if not any(node.domain == DOMAIN for node in graph):
        model.opset_imports.pop(DOMAIN, None)


def _free(graph: ir.Graph, name: str, owner: ir.Value) -> None:
    """Rename whatever else the exporter happened to call so."""
    for node in graph:
        for value in node.outputs:
            if value.name == name and value is not owner:
                value.name = f"{name}_value"


def name_nodes(model: ir.Model) -> None:
    """Call each node ``{part}/{operator}_{number}``; see the module."""
    counts: Counter[str] = Counter()
    for node, part in parts_of(model).items():
        stem = f"{part}/{node.op_type}"
        node.name = stem if not counts[stem] else f"{stem}_{counts[stem]}"
        counts[stem] += 1


def boundaries_of(model: ir.Model) -> list[str]:
    """Names of the boundaries that a graph has, in the order of an encoder."""
    names = {value.name or "" for node in model.graph for value in node.outputs}
    return sorted(filter(is_boundary, names), key=order_of)


def parts_of(model: ir.Model) -> dict[ir.Node, str]:
    """The part of every node, in the graph's order."""
    present = boundaries_of(model)
    feeds: dict[ir.Node, set[str]] = {}
    for node in reversed(model.graph):
        feeds[node] = set()
        for value in node.outputs:
            if is_boundary(value.name or ""):
                feeds[node].add(value.name or "")
            else:
                for user in value.consumers():
                    # A node of a subgraph is of no part by itself.
                    feeds[node] |= feeds.get(user, set())
    found = {}
    for node in model.graph:
        ends = feeds[node]
        blocks = {block for end in ends if (block := block_of(end)) is not None}
        shared = len(blocks) > 1 or not ends
        found[node] = SHARED if shared else part_of(min(ends, key=order_of), present)
    return found
