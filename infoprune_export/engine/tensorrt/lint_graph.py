"""A graph as the lint rules see it: all nodes of all subgraphs, and what each tensor's values depend on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes

from infoprune_export.engine.tensorrt.prepare import insert_operators, read_graph
from infoprune_export.engine.tensorrt.profiles import Profile
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe.targets import Route


class Source(IntEnum):
    """What a tensor's values are computed from at most."""

    CONSTANT = 0
    SHAPE = 1
    """Extents of inputs: known before a call runs."""
    DATA = 2
    """Inputs' values, random numbers, or the counter of a loop."""


HALF = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
FLOATS = {ir.DataType.FLOAT: "fp32", **HALF}


@dataclass(frozen=True)
class GraphView:
    """Functions are inlined, except those that a plugin takes the place of."""

    model: ir.Model
    topk: Mapping[str, int]
    """K of TopK nodes by name, at a profile's largest shapes; empty without a profile."""

    @cached_property
    def nodes(self) -> tuple[ir.Node, ...]:
        return tuple(ir.traversal.RecursiveGraphIterator(self.model.graph))

    @cached_property
    def sources(self) -> dict[ir.Value, Source]:
        return _sources(self.model)

    @cached_property
    def precision(self) -> str:
        """Type of most weights: fp32, fp16 or bf16."""
        sizes = dict.fromkeys(FLOATS, 0)
        for value in self.model.graph.initializers.values():
            if value.dtype in sizes and value.const_value is not None:
                sizes[value.dtype] += value.const_value.size
        return FLOATS[max(sizes, key=lambda dtype: sizes[dtype])]

    def computed(self, value: ir.Value | None) -> bool:
        """Whether a tensor depends on inputs' values."""
        return value is not None and self.sources.get(value, Source.DATA) == Source.DATA

    def constant(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        """A tensor's values where they are known at build time."""
        return None if value is None else ir.convenience.get_const_tensor(value)


def label(node: ir.Node) -> str:
    """The node's name, or what it computes where it has none."""
    return node.name or f"{node.op_type} of {', '.join(value.name or '?' for value in node.outputs)}"


def view_of(path: Path, route: Route, profile: Profile | None) -> GraphView:
    """Read a graph as `prepare` would write it for this route.

    Raises:
        InfopruneError: the file cannot be read, or the profile is not for it.
    """
    model = _prepared(path, route)
    topk = {} if profile is None else _largest_k(_prepared(path, route), profile, path)
    passes.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    return GraphView(model, topk)


def _prepared(path: Path, route: Route) -> ir.Model:
    model = read_graph(path)
    insert_operators(model, route, path)
    return model


# ── Extents under a profile ──────────────────────────────────────────────────


def _largest_k(model: ir.Model, profile: Profile, path: Path) -> dict[str, int]:
    """K of every TopK node that the largest shapes of a profile determine; uses up the model."""
    from onnxscript import optimizer

    inputs = {value.name: value for value in model.graph.inputs}
    if inputs.keys() != profile.shapes.keys():
        taken = ", ".join(sorted(map(str, inputs)))
        raise InfopruneError(f"profile: has {', '.join(sorted(profile.shapes))}, {path} takes {taken}")
    for name, (_, _, largest) in profile.shapes.items():
        declared = inputs[name].shape
        if declared is not None and (
            len(declared) != len(largest)
            or any(isinstance(have, int) and have != want for have, want in zip(declared, largest, strict=True))
        ):
            raise InfopruneError(f"profile: {name} is {list(largest)} at most, {path} takes {declared}")
        inputs[name].shape = ir.Shape(largest)
    optimizer.fold_constants_ir(model, onnx_shape_inference=True)
    found = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        count = node.inputs[1] if node.op_type == "TopK" else None
        if count is not None and (tensor := ir.convenience.get_const_tensor(count)) is not None:
            found[label(node)] = int(tensor.numpy().reshape(-1)[0])
    return found


# ── What values depend on ────────────────────────────────────────────────────


def _sources(model: ir.Model) -> dict[ir.Value, Source]:
    sources: dict[ir.Value, Source] = dict.fromkeys(model.graph.inputs, Source.DATA)
    _visit(model.graph, sources)
    return sources


def _visit(graph: ir.Graph, sources: dict[ir.Value, Source]) -> None:
    sources.update(dict.fromkeys(graph.initializers.values(), Source.CONSTANT))
    for node in graph:
        sources.update(zip(node.outputs, _outputs(node, sources), strict=True))


def _outputs(node: ir.Node, sources: dict[ir.Value, Source]) -> Iterator[Source]:
    given = [sources.get(value, Source.CONSTANT) for value in node.inputs if value is not None]
    if node.op_type == "Loop":
        yield from _loop_outputs(node, sources)
        return
    bodies = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    for body in bodies:
        sources.update(dict.fromkeys(body.inputs, Source.DATA))
        _visit(body, sources)
    if node.op_type in ("Shape", "Size"):
        given = [Source.SHAPE]
    elif node.op_type.startswith("Random"):
        given = [Source.DATA]
    for number in range(len(node.outputs)):
        branches = [sources.get(body.outputs[number], Source.CONSTANT) for body in bodies]
        yield max([*given, *branches], default=Source.CONSTANT)


def _loop_outputs(node: ir.Node, sources: dict[ir.Value, Source]) -> Iterator[Source]:
    body = node.attributes["body"].as_graph()
    trips, states = sources.get(node.inputs[0], Source.CONSTANT) if node.inputs[0] else Source.DATA, node.inputs[2:]
    carried = [sources.get(value, Source.CONSTANT) if value is not None else Source.CONSTANT for value in states]
    while True:
        sources.update(zip(body.inputs, [Source.DATA, Source.CONSTANT, *carried], strict=True))
        _visit(body, sources)
        results = [sources.get(value, Source.CONSTANT) for value in body.outputs[1:]]
        joined = [max(old, new) for old, new in zip(carried, results, strict=False)]
        if joined == carried:
            break
        carried = joined
    # How often it ran matters to what comes out, except to what every turn leaves alone.
    yield from (max(trips, source) for source in [*carried, *results[len(carried) :]])
