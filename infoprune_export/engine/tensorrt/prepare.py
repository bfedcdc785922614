"""From an exported file to one that a target's ONNX parser reads.

`prepare` decides how the package's two operators get in. ``ReceivedAttention`` becomes its standard operators. So does
``TokenSelect`` on the route "function"; on "plugin" and "aot" it becomes the node that a plugin is made for, between
casts to the types that plugins have. A Clip of integers becomes Max and Min. Weights go from file to file without being
held in memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from infoprune_export.artifacts import make_folder, writing
from infoprune_export.errors import InfopruneError
from infoprune_export.export.functions import DOMAIN
from infoprune_export.export.onnx import MODEL, WEIGHTS, widen_convolutions
from infoprune_export.recipe.targets import Route

TOKEN_SELECT = "TokenSelect"  # noqa: S105  (an operator)
PLUGIN_DOMAIN = "infoprune.tensorrt"
"""The plugin's node has other types than the exported operator, so it cannot share its domain. Parsers look at the
operator's name and at ``plugin_namespace``."""
PLUGIN_NAMESPACE, PLUGIN_VERSION = "infoprune", "1"
_ATTRIBUTES = {
    "keep_numerator": ir.AttributeType.INT,
    "keep_denominator": ir.AttributeType.INT,
    "pool_factor": ir.AttributeType.FLOAT,
    "temperature": ir.AttributeType.FLOAT,
    "exponent": ir.AttributeType.FLOAT,
    "epsilon": ir.AttributeType.FLOAT,
}
_LOWEST_SAME = 20
"""Opsets 21 and 22 only add types and attributes to what exports use, so a graph of those that has neither is one of
opset 20 too; GroupNormalization alone means something else."""


def prepare(model: Path, folder: Path, route: Route, *, opset: tuple[int, int] | None = None) -> Path:
    """Write `MODEL` and its `WEIGHTS` into a folder, which is made if it is not there; returns the file's path.

    Args:
        model: a file that `export_onnx` or `quantize_int8` wrote.
        folder: not the folder of `model`.
        route: how TokenSelect gets in; see `recipe.targets.Route`. All are alike for a file that selects nothing.
        opset: lowest and highest that the parser reads; a newer graph is lowered.

    Raises:
        InfopruneError: no ONNX file, its weights are missing, an operator without a body that the route needs, or an
            opset that cannot be met.
    """
    if model.parent.resolve() == folder.resolve():
        raise InfopruneError(f"{folder}: the prepared file would replace its source; give another folder")
    graph = read_graph(model)
    insert_operators(graph, route, model)
    if opset is not None:
        _fit_opset(graph, opset, model)
    make_folder(folder)
    with writing(folder), tempfile.TemporaryDirectory(prefix=".prepared-", dir=folder) as scratch:
        written = Path(scratch)
        ir.save(graph, written / MODEL, external_data=WEIGHTS)
        _check(written / MODEL, model)
        # The graph last: it is what makes the folder complete.
        for name in (WEIGHTS, MODEL):
            if (written / name).exists():
                os.replace(written / name, folder / name)
    return folder / MODEL


def read_graph(path: Path) -> ir.Model:
    """A model whose weights stay in their file until they are looked at.

    Raises:
        InfopruneError: no such file, not ONNX, or its weights are not beside it.
    """
    if not path.is_file():
        raise InfopruneError(f"{path}: no such file; give an ONNX file")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's, and whatever onnx_ir makes of a graph that is none
        raise InfopruneError(f"{path}: not an ONNX file that can be read ({_brief(error)}); export it again") from None
    if not model.graph.outputs:
        raise InfopruneError(f"{path}: not an ONNX file that can be read (it has no outputs); export it again")
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            weights = Path(tensor.path)
            if not weights.is_file():
                raise InfopruneError(f"{weights}: the weights of {path.name} are missing; copy them beside it")
            if weights.stat().st_size < (tensor.offset or 0) + (tensor.length or 0):
                raise InfopruneError(f"{weights}: ends before the weights of {path.name} do; export it again")
    return model


def insert_operators(model: ir.Model, route: Route, path: Path) -> None:
    """Replace every node that calls a local function, as the module says; `path` is named in errors.

    Raises:
        InfopruneError: see `prepare`.
    """
    for function in model.functions.values():
        _name_nodes(function.name, function)
    body = next((f for f in model.functions.values() if (f.domain, f.name) == (DOMAIN, TOKEN_SELECT)), None)
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_identifier() not in model.functions:
            raise InfopruneError(f"{path}: {node.name} has no body in this file; give the file as it was exported")
        if body is not None and node.op_identifier() == body.identifier() and route != "function":
            _to_plugin(node, body, aot=route == "aot")
            model.opset_imports[PLUGIN_DOMAIN] = 1
    if body is not None and route != "function":
        del model.functions[body.identifier()]
    try:
        passes.InlinePass()(model)
    except Exception as error:  # a cycle, another opset than the model's, an input too many
        raise InfopruneError(
            f"{path}: its local functions cannot be inlined ({_brief(error)}); export it again"
        ) from None
    model.opset_imports.pop(DOMAIN, None)
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        types = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
        if node.op_type == "Clip" and types & {ir.DataType.INT32, ir.DataType.INT64}:
            _clip_by_comparing(node)


def _name_nodes(prefix: str, nodes: Iterable[ir.Node]) -> None:
    """Give nodes of a body names that say where they come from; engines name their layers after them."""
    for number, node in enumerate(nodes):
        node.name = f"{prefix}/{node.op_type}_{number}"
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                _name_nodes(f"{node.name}/{attribute.name}", attribute.as_graph())


def _clip_by_comparing(node: ir.Node) -> None:
    """Max and Min in the place of a Clip of integers, which no parser reads."""
    graph, result = node.graph, node.outputs[0]
    assert graph is not None
    value, nodes = node.inputs[0], []
    for operator, bound in zip(("Max", "Min"), (*node.inputs[1:], None, None), strict=False):
        if bound is not None:
            name = f"{node.name or result.name}_{operator.lower()}"
            nodes.append(ir.node(operator, [value, bound], name=name))
            value = nodes[-1].outputs[0]
            value.name, value.type, value.shape = name, result.type, result.shape
    if nodes:
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [result], [nodes[-1].outputs[0]])


# ── The plugin's node ────────────────────────────────────────────────────────


def _to_plugin(node: ir.Node, body: ir.Function, *, aot: bool) -> None:
    """Put the plugin's node in the place of an exported one.

    features [B, N, D] stay as they are, prior [B, N] becomes fp32, counts [B] int32; kept [B, T] is int32 and becomes
    int64 again. An AOT plugin has no workspace: its second output is one.
    """
    graph, (features, prior, counts) = node.graph, node.inputs
    assert graph is not None
    assert prior is not None
    assert counts is not None
    result = node.outputs[0]
    attributes = [_explicit(node, body, name, kind) for name, kind in _ATTRIBUTES.items()]
    attributes += [ir.AttrString("plugin_namespace", PLUGIN_NAMESPACE), ir.AttrString("plugin_version", PLUGIN_VERSION)]
    name = node.name or TOKEN_SELECT
    kept = ir.Value(name=f"{name}_kept", type=ir.TensorType(ir.DataType.INT32), shape=result.shape)
    outputs = [kept]
    if aot:
        attributes.append(ir.AttrInt64("aot", 1))
        extents = [None if result.shape is None else result.shape[0], None]
        work = ir.Value(name=f"{name}_work", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(extents))
        outputs.append(work)
    wide = _cast(prior, ir.DataType.FLOAT, f"{name}_prior")
    narrow = _cast(counts, ir.DataType.INT32, f"{name}_counts")
    plugin = ir.Node(
        PLUGIN_DOMAIN,
        TOKEN_SELECT,
        [features, wide.outputs[0], narrow.outputs[0]],
        attributes,
        outputs=outputs,
        name=name,
    )
    indices = _cast(kept, ir.DataType.INT64, result.name or f"{name}_indices")
    indices.name = f"{name}_indices"
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [wide, narrow, plugin, indices], [result], [indices.outputs[0]]
    )


def _explicit(node: ir.Node, body: ir.Function, name: str, kind: ir.AttributeType) -> ir.Attr:
    """The node's attribute, or its body's default."""
    attribute = node.attributes.get(name) or body.attributes[name]
    return ir.Attr(name, kind, attribute.value)


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype}, name=name)
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, dtype, value.shape
    return node


# ── Opset ────────────────────────────────────────────────────────────────────


def _fit_opset(model: ir.Model, allowed: tuple[int, int], path: Path) -> None:
    """Lower the graph to the highest opset allowed, in so far as its operators mean the same there."""
    (lowest, highest), version = allowed, model.opset_imports[""]
    if lowest <= version <= highest:
        return
    changed = any(node.op_type == "GroupNormalization" for node in model.graph)
    if version < lowest or highest < _LOWEST_SAME or version > 22 or changed:
        raise InfopruneError(
            f"{path}: opset {version}, the target's parser reads {lowest} to {highest}; "
            f"export with export.opset={min(highest, 22)}"
        )
    model.opset_imports[""] = highest
    widen_convolutions(model)


def _check(written: Path, source: Path) -> None:
    try:
        onnx.checker.check_model(written, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InfopruneError(
            f"{source}: what was prepared from it is no valid ONNX ({_brief(error)}); export with export.opset=20"
        ) from None


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
