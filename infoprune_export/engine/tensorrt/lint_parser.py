"""Rules about what the ONNX parser and the builder read; each breach is an error unless it says otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from infoprune_export.engine.tensorrt.findings import LintFinding, Severity
from infoprune_export.engine.tensorrt.limits import (
    DATA_DEPENDENT,
    FLOAT_ONLY,
    MAX_FUNCTION_DEPTH,
    MAX_RANK,
    ONE_OUTPUT,
    QDQ,
    RESERVED_PREFIX,
    RESERVED_PRODUCER,
    TOPK_LIMIT,
    Limits,
)
from infoprune_export.engine.tensorrt.lint_graph import FLOATS, GraphView, label
from infoprune_export.engine.tensorrt.prepare import TOKEN_SELECT

# Inputs that say how large an output is.
_EXTENTS = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Upsample": (1,),
}
_INTEGERS = {ir.DataType.INT32, ir.DataType.INT64, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.BOOL}
_TYPES = {*FLOATS, *_INTEGERS, ir.DataType.FLOAT8E4M3FN, ir.DataType.INT4, ir.DataType.FLOAT4E2M1}
_CARRIED_GROWTH = ("Concat", "Pad", "Tile")


def _error(rule: str, node: ir.Node | str, problem: str, fix: str, severity: Severity = "error") -> LintFinding:
    return LintFinding(rule, severity, node if isinstance(node, str) else label(node), problem, fix)


# ── The file and its functions ───────────────────────────────────────────────


def file_rules(model: ir.Model, limits: Limits, opset: tuple[int, int]) -> Iterator[LintFinding]:
    """Of a file as it is, before functions are inlined. `opset` is the range that the target declares."""
    lowest, highest = max(opset[0], limits.opset[0]), min(opset[1], limits.opset[1])
    version = model.opset_imports.get("", 1)
    if not lowest <= version <= highest:
        best = min(highest, 22)
        yield _error("opset", "model", f"opset {version}, read are {lowest} to {highest}", f"export.opset={best}")
    if model.producer_name == RESERVED_PRODUCER:
        fix = "set another producer_name"
        yield _error("producer", "model", f"producer_name {RESERVED_PRODUCER!r} is TensorRT's own", fix)
    yield from _function_rules(model)
    yield from _plugin_rules(model, limits)


def _function_rules(model: ir.Model) -> Iterator[LintFinding]:
    names: set[str] = set()
    for function in model.functions.values():
        if function.name in names:
            fix = "give each function a name of its own"
            yield _error("function-name", function.name, "two functions; domains are ignored, one is never read", fix)
        names.add(function.name)
        if (depth := _depth(function, model)) > MAX_FUNCTION_DEPTH:
            fix = "inline the inner functions"
            yield _error("function-depth", function.name, f"calls go {depth} deep, read are {MAX_FUNCTION_DEPTH}", fix)
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in ir.traversal.RecursiveGraphIterator(graph):
            called = model.functions.get(node.op_identifier())
            if called is not None and sum(value is not None for value in node.inputs) != len(called.inputs):
                problem = f"passes {len(node.inputs)} of the {len(called.inputs)} inputs of function {called.name}"
                yield _error("function-inputs", node, problem, "pass every input, or inline the function")
            if node.domain not in ("", "ai.onnx") and _is_builtin(node.op_type):
                problem = f"{node.domain}::{node.op_type} is read as the standard {node.op_type}; domains are ignored"
                yield _error("name-clash", node, problem, "give the operator a name that ONNX does not have")


def _is_builtin(name: str) -> bool:
    return onnx.defs.has(name)


def _depth(function: ir.Function, model: ir.Model, seen: tuple[ir.OperatorIdentifier, ...] = ()) -> int:
    """How many calls deep a function goes, itself included; endless ones count as one too many."""
    if function.identifier() in seen:
        return MAX_FUNCTION_DEPTH + 1
    called = {node.op_identifier() for node in ir.traversal.RecursiveGraphIterator(function.graph)}
    inner = [
        _depth(model.functions[name], model, (*seen, function.identifier()))
        for name in called
        if name in model.functions
    ]
    return 1 + max(inner, default=0)


def _plugin_rules(model: ir.Model, limits: Limits) -> Iterator[LintFinding]:
    names = {function.name for function in model.functions.values()}
    inside = {
        node for function in model.functions.values() for node in ir.traversal.RecursiveGraphIterator(function.graph)
    }
    for node in (*ir.traversal.RecursiveGraphIterator(model.graph), *inside):
        if "plugin_namespace" not in node.attributes:
            continue
        if "aot" in node.attributes and not limits.aot_plugins:
            fix = "token_select: plugin, or TensorRT 10.9 and later"
            yield _error("plugin", node, "this release has no plugins compiled ahead of time", fix)
        if node in inside:
            yield _error("plugin", node, "a plugin inside a function is never looked up", "inline the function")
        elif node.op_type in names and not limits.plugins_first:
            problem = f"function {node.op_type} in the same file hides the plugin on this release"
            yield _error("plugin", node, problem, "remove the function; infoprune_export's prepare does")


# ── Nodes ────────────────────────────────────────────────────────────────────


def node_rules(view: GraphView, limits: Limits) -> Iterator[LintFinding]:
    """Of every node, in subgraphs too."""
    for node in view.nodes:
        if "plugin_namespace" in node.attributes:
            continue
        if node.op_type.startswith(RESERVED_PREFIX):
            continue
        if node.op_type not in limits.operators:
            release = ".".join(map(str, limits.release))
            problem = f"operator {node.op_type} is not read by TensorRT {release}"
            yield _error("operator", node, problem, "compute it from other operators, or name a plugin for it")
            continue
        yield from _constant_rules(view, node, limits)
        yield from _extent_rules(view, node)
        yield from _operator_rules(view, node, limits)
        yield from _tensor_rules(view, node)


def _constant_rules(view: GraphView, node: ir.Node, limits: Limits) -> Iterator[LintFinding]:
    for number in limits.constant_inputs.get(node.op_type, ()):
        value = node.inputs[number] if number < len(node.inputs) else None
        if value is not None and view.constant(value) is None:
            problem = f"input {number} of {node.op_type} ({value.name}) must be a constant"
            yield _error("constant-input", node, problem, "make it an initializer; constant folding often does")


def _extent_rules(view: GraphView, node: ir.Node) -> Iterator[LintFinding]:
    if node.op_type in DATA_DEPENDENT:
        fix = "mask with Where and keep the extent, or choose a fixed number with TopK"
        yield _error("data-dependent", node, f"the extent of {node.op_type}'s output is known only when it ran", fix)
    for number in _EXTENTS.get(node.op_type, ()):
        value = node.inputs[number] if number < len(node.inputs) else None
        if view.computed(value):
            problem = f"{node.op_type} takes an extent from a tensor's values ({value.name})"  # type: ignore[union-attr]
            yield _error("data-dependent", node, problem, "compute extents from Shape of the inputs alone")


def _operator_rules(view: GraphView, node: ir.Node, limits: Limits) -> Iterator[LintFinding]:
    match node.op_type:
        case "TopK":
            yield from _topk(view, node)
        case "Loop":
            yield from _loop(view, node)
        case "If":
            yield from _branches(node)
        case "ScatterND" | "ScatterElements":
            yield from _scatter(node, limits)
        case "Attention":
            yield from _attention(node)
        case "QuantizeLinear" | "DequantizeLinear":
            yield from _quantization(view, node)
    if node.op_type in ONE_OUTPUT and any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        fix = "compute the other output from standard operators"
        yield _error("outputs", node, f"only the first output of {node.op_type} is read", fix)


def _topk(view: GraphView, node: ir.Node) -> Iterator[LintFinding]:
    if (ordered := node.attributes.get("sorted")) is not None and not ordered.as_int():
        yield _error("topk", node, "sorted=0 is not read", "sorted=1; the order costs nothing there")
    known = view.constant(node.inputs[1])
    count = view.topk.get(label(node)) if known is None else int(known.numpy().reshape(-1)[0])
    if count is not None and count >= TOPK_LIMIT:
        fix = "fewer tokens: smaller images in the profile, or less of tokens.keep_ratio"
        if node.name is not None and node.name.startswith(f"{TOKEN_SELECT}/"):
            fix = f"token_select: plugin in the target, which takes this node's place; or {fix}"
        yield _error("topk", node, f"K is {count}, the limit is {TOPK_LIMIT - 1}", fix)


def _loop(view: GraphView, node: ir.Node) -> Iterator[LintFinding]:
    body = node.attributes["body"].as_graph()
    trips, condition, *states = node.inputs
    scans = list(body.outputs[1 + len(states) :])
    if scans and (trips is None or view.constant(trips) is None):
        problem = f"{len(scans)} scan outputs of a length that is no constant"
        yield _error("loop", node, problem, "a constant trip count, or carry a tensor of the final size")
    if condition is not None and view.constant(condition) is None:
        problem = "has a condition besides its trip count" if trips is not None else "has a condition only"
        yield _error("loop", node, problem, "a trip count alone, and masks for what should not happen", "warning")
    if trips is not None and view.computed(trips):
        problem = f"trip count {trips.name} comes from a tensor's values or another loop's counter"
        yield _error("loop", node, problem, "compute it from Shape of the inputs, outside of loops", "warning")
    for start, before, after in zip(states, body.inputs[2:], body.outputs[1:], strict=False):
        if start is not None and _grows(start, before, after):
            problem = f"carried tensor {start.name} changes its shape from turn to turn"
            yield _error("loop", node, problem, "carry the final size and write into it by ScatterND or a mask")


def _grows(start: ir.Value, before: ir.Value, after: ir.Value) -> bool:
    producer = after.producer()
    if producer is not None and producer.op_type in _CARRIED_GROWTH and before in producer.inputs:
        return True
    if start.shape is None or after.shape is None:
        return False
    if len(start.shape) != len(after.shape):
        return True
    pairs = zip(start.shape, after.shape, strict=True)
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)


def _branches(node: ir.Node) -> Iterator[LintFinding]:
    yes, no = (node.attributes[name].as_graph().outputs for name in ("then_branch", "else_branch"))
    for first, second in zip(yes, no, strict=False):
        if first.name == second.name:
            fix = "name the outputs of the branches apart"
            yield _error("branches", node, f"both branches call their output {first.name}", fix)
        if first.shape is not None and second.shape is not None and len(first.shape) != len(second.shape):
            problem = f"the branches' outputs {first.name} and {second.name} differ in rank"
            yield _error("branches", node, problem, "reshape one of them")


def _scatter(node: ir.Node, limits: Limits) -> Iterator[LintFinding]:
    attribute = node.attributes.get("reduction")
    reduction = "none" if attribute is None else attribute.as_string()
    if node.op_type == "ScatterElements":
        if reduction != "none":
            problem = f"reduction={reduction} comes from a plugin of libnvinfer_plugin"
            fix = "initialise TensorRT's plugins before parsing; trtexec and infoprune-export build do"
            yield _error("scatter", node, problem, fix, "warning")
    elif reduction != "none" or (attribute is not None and not limits.scatter_nd_reduction):
        problem = f"ScatterND with reduction={reduction}"
        fix = "leave the attribute out" if reduction == "none" else "a one-hot matrix and MatMul"
        yield _error("scatter", node, problem, fix)


def _attention(node: ir.Node) -> Iterator[LintFinding]:
    for number, name in ((4, "past_key"), (5, "past_value"), (6, "nonpad_kv_seqlen")):
        if number < len(node.inputs) and node.inputs[number] is not None:
            yield _error("attention", node, f"input {name} is not read", "attention over the whole sequence")
    for name in ("softcap", "softmax_precision", "qk_matmul_output_mode"):
        if (attribute := node.attributes.get(name)) is not None and attribute.value:
            yield _error("attention", node, f"attribute {name} is not read", "export MatMul, Softmax, MatMul")
    flat = [v for v in node.inputs[:4] if v is not None and v.shape is not None and len(v.shape) != 4]
    if flat:
        problem = f"{flat[0].name} has rank {len(flat[0].shape or ())}, read is 4"
        yield _error("attention", node, problem, "reshape it to [batch, heads, length, head size]")


def _quantization(view: GraphView, node: ir.Node) -> Iterator[LintFinding]:
    fix = 'quantize with scheme="tensorrt": signed, symmetric, float biases'
    zero = view.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if zero is not None and zero.numpy().astype("float32").any():
        yield _error("quantization", node, "zero point is not 0", fix)
        return
    quantized = node.outputs[0] if node.op_type == QDQ[0] else node.inputs[0]
    if quantized is not None and quantized.dtype in (ir.DataType.UINT8, ir.DataType.INT32):
        yield _error("quantization", node, f"{quantized.dtype.name.lower()} is no quantized type of TensorRT", fix)


# ── Tensors ──────────────────────────────────────────────────────────────────


def _tensor_rules(view: GraphView, node: ir.Node) -> Iterator[LintFinding]:
    first = node.inputs[0] if node.inputs else None
    if first is not None and node.op_type in FLOAT_ONLY and first.dtype in _INTEGERS:
        problem = f"{node.op_type} of {first.dtype.name.lower()} {first.name}; it reads floats only"
        yield _error("operand-type", node, problem, "Max and Min instead of Clip; else cast to float and back")
    for value in node.outputs:
        if value.shape is not None and len(value.shape) > MAX_RANK:
            problem = f"{value.name} has rank {len(value.shape)}, the limit is {MAX_RANK}"
            yield _error("rank", node, problem, "reshape so that axes are merged")
        if value.dtype == ir.DataType.DOUBLE:
            problem = f"{value.name} is double; TensorRT computes it in fp32"
            yield _error("dtype", node, problem, "cast to float in the model", "warning")
        elif value.dtype is not None and value.dtype not in _TYPES:
            problem = f"{value.name} is {value.dtype.name.lower()}, which TensorRT does not have"
            yield _error("dtype", node, problem, "use float, int32 or int64")
