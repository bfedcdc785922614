"""Static INT8 of an exported encoder, as QuantizeLinear / DequantizeLinear pairs around its Linear layers.

Stages of `quantize_int8`:

1. The layers are listed: every MatMul or Gemm with a constant weight, except the patch embedding, which sees pixels,
   and on request the projector (or merger). Attention's own products have no constant operand and stay fp32.
2. One pass over the calibration data gives the range and mean square of each layer's input. ONNX Runtime reduces them
   inside the graph, so memory does not grow with the number of images.
3. A layer whose input 8 bits cannot hold, because of outliers, is left in fp32; see `MAX_NOISE`.
4. ONNX Runtime's quantizer inserts the pairs: weights symmetric INT8 per output channel, activations per tensor.
   Outputs stay fp32, so that residual sums, norms, softmax and ``infoprune::TokenSelect`` compute as before.
5. The file is written as `export_onnx` writes it, with the operator's function body, and checked by onnx.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from infoprune_export.errors import InfopruneError
from infoprune_export.export import operator
from infoprune_export.export.onnx import MODEL, WEIGHTS

Scheme = Literal["cpu", "tensorrt"]
"""``cpu``: unsigned asymmetric activations, the faster kernels of x86. ``tensorrt``: signed symmetric ones, which is
all that TensorRT takes; no TensorRT has built such a file yet."""

MAX_NOISE = 2e-3
"""Largest rounding noise of a quantized layer's input, as a share of its mean square. A layer at this limit has outputs
of cosine 1 / sqrt(1 + 0.002) = 0.999 to its fp32 outputs."""

_LINEAR = ("MatMul", "Gemm")
_STATISTICS = ("min", "max", "square")


@dataclass(frozen=True)
class Quantized:
    """What became of the Linear layers, by ONNX node name."""

    int8: list[str]
    float32: dict[str, float]
    """Layers left in fp32 and the rounding noise that their input would have had; see `MAX_NOISE`."""


@dataclass(frozen=True)
class _Range:
    """Statistics of one activation over the calibration data."""

    low: float
    high: float
    mean_square: float

    def noise(self, scheme: Scheme) -> float:
        """Mean squared rounding error of 8 bits over this range, as a share of the mean square."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        step = (high - low) / 255 if scheme == "cpu" else max(-low, high) / 127
        return step**2 / 12 / self.mean_square if self.mean_square else 0.0


def quantize_int8(
    source: Path,
    folder: Path,
    calibration: Iterable[Mapping[str, NDArray[Any]]],
    *,
    scheme: Scheme = "cpu",
    keep_float: Collection[str] = (),
    max_noise: float = MAX_NOISE,
    projector: bool = True,
    threads: int = 0,
) -> Quantized:
    """Write an INT8 version of ``source/model.onnx`` into an existing folder.

    Args:
        source: folder that `export_onnx` wrote from an fp32 tower.
        folder: another folder; gets `MODEL` and `WEIGHTS`.
        calibration: inputs of one call each, by ONNX name, as the encoder will see them; consumed once.
        scheme: see `Scheme`.
        keep_float: ONNX names of further MatMul or Gemm nodes to leave in fp32.
        max_noise: see `MAX_NOISE`.
        projector: quantize the projector (or merger) too. Nothing is added to its outputs, so its rounding noise
            reaches the language model undiluted, while a block's is small against the residual stream; False keeps it
            (and what only the token prior reads) in fp32, at its share of the time.
        threads: of the calibration run; 0 for all cores.

    Raises:
        InfopruneError: no fp32 encoder in `source`, `folder` is the same, an unknown name in `keep_float`, or
            calibration data that is empty, unlike the encoder's inputs, or makes a layer see NaN or infinity.
    """
    if not (source / MODEL).is_file():
        raise InfopruneError(f"{source}: no {MODEL} here; give the folder of an export")
    if source.resolve() == folder.resolve():
        raise InfopruneError(f"{folder}: the INT8 file would replace its source; give another folder")
    graph = onnx.load(source / MODEL, load_external_data=False)
    layers = _linear_layers(graph, source / MODEL)
    if not projector:
        residual = _reaching_residual_sums(graph.graph)
        layers = {name: activation for name, activation in layers.items() if name in residual}
    if unknown := sorted(set(keep_float) - layers.keys()):
        raise InfopruneError(f"keep_float: {unknown[0]!r} is no Linear layer of {source / MODEL}")
    ranges = _activation_ranges(graph, list(dict.fromkeys(layers.values())), source, calibration, threads)
    noise = {name: ranges[activation].noise(scheme) for name, activation in layers.items()}
    chosen = [name for name in layers if name not in keep_float and noise[name] <= max_noise]
    del graph
    if chosen:
        proto = _insert_pairs(onnx.load(source / MODEL), chosen, {layers[n]: ranges[layers[n]] for n in chosen}, scheme)
    else:
        proto = onnx.load(source / MODEL)
    _write(proto, folder)
    return Quantized(chosen, {name: noise[name] for name in layers if name not in chosen})


# ── Layers ───────────────────────────────────────────────────────────────────


def _linear_layers(model: onnx.ModelProto, path: Path) -> dict[str, str]:
    """Node name -> name of its input, for every layer that can be quantized."""
    graph = model.graph
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph.node):
        raise InfopruneError(f"{path}: is quantized already; give the fp32 export")
    weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
    inputs = {value.name for value in graph.input}
    layers: dict[str, str] = {}
    for node in graph.node:
        if node.op_type not in _LINEAR or node.input[1] not in weights or node.input[0] in inputs:
            continue
        if (dtype := weights[node.input[1]]) != onnx.TensorProto.FLOAT:
            name = onnx.TensorProto.DataType.Name(dtype).lower()
            raise InfopruneError(f"{path}: its weights are {name}; INT8 starts from an fp32 export")
        layers[node.name] = node.input[0]
    return layers


def _reaching_residual_sums(graph: onnx.GraphProto) -> set[str]:
    """Names of nodes that a residual sum depends on: a sum of two computed values, other than token merging's."""
    computed = {name for node in graph.node if node.op_type != "Constant" for name in node.output}
    selected: set[str] = set()
    for node in graph.node:
        if node.domain == operator.DOMAIN or not selected.isdisjoint(node.input):
            selected.update(node.output)
    values: set[str] = set()
    nodes: set[str] = set()
    for node in reversed(graph.node):
        sums = node.op_type == "Add" and computed.issuperset(node.input) and selected.isdisjoint(node.output)
        if sums or not values.isdisjoint(node.output):
            nodes.add(node.name)
            values.update(node.input)
    return nodes


# ── Calibration ──────────────────────────────────────────────────────────────


def _activation_ranges(
    model: onnx.ModelProto,
    activations: Sequence[str],
    source: Path,
    calibration: Iterable[Mapping[str, NDArray[Any]]],
    threads: int,
) -> dict[str, _Range]:
    """Statistics of these tensors over all calls; `model` comes without its weights."""
    import onnxruntime

    graph = model.graph
    expected = {value.name for value in graph.input}
    for number, name in enumerate(activations):
        square = f"calibration_{number}_product"
        graph.node.extend(
            [
                onnx.helper.make_node("ReduceMin", [name], [_output(number, "min")], keepdims=0),
                onnx.helper.make_node("ReduceMax", [name], [_output(number, "max")], keepdims=0),
                onnx.helper.make_node("Mul", [name, name], [square]),
                onnx.helper.make_node("ReduceMean", [square], [_output(number, "square")], keepdims=0),
            ]
        )
        graph.output.extend(
            onnx.helper.make_tensor_value_info(_output(number, which), onnx.TensorProto.FLOAT, [])
            for which in _STATISTICS
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # The graph is in memory, its weights stay where they are: nothing is copied, nothing has to be cleaned up.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(source.resolve()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = [_output(number, which) for number in range(len(activations)) for which in _STATISTICS]
    low = np.full(len(activations), np.inf)
    high, square_sum, calls = -low, np.zeros(len(activations)), 0
    misfits: tuple[type[Exception], ...] = (ValueError, *_runtime_errors())
    for inputs in calibration:
        if inputs.keys() != expected:
            raise InfopruneError(f"calibration data has {sorted(inputs)}, the encoder takes {sorted(expected)}")
        try:
            values = np.array(session.run(outputs, dict(inputs)), np.float64).reshape(-1, len(_STATISTICS))
        except misfits as error:
            raise InfopruneError(f"calibration data {calls} does not fit the encoder: {error}") from error
        if not np.isfinite(values).all():
            name = activations[int(np.argmax(~np.isfinite(values).all(1)))]
            raise InfopruneError(f"calibration data {calls} makes {name!r} infinite or NaN; check the inputs")
        low, high = np.minimum(low, values[:, 0]), np.maximum(high, values[:, 1])
        square_sum += values[:, 2]
        calls += 1
    if not calls:
        raise InfopruneError("no calibration data; INT8 needs at least one image, a few dozen are better")
    return {
        name: _Range(float(a), float(b), float(c) / calls)
        for name, a, b, c in zip(activations, low, high, square_sum, strict=True)
    }


def _output(number: int, which: str) -> str:
    return f"calibration_{number}_{which}"


def _runtime_errors() -> tuple[type[Exception], ...]:
    """What a session raises for inputs that do not fit it."""
    from onnxruntime.capi import onnxruntime_pybind11_state

    state: Any = onnxruntime_pybind11_state
    return state.InvalidArgument, state.RuntimeException, state.Fail


# ── Quantization ─────────────────────────────────────────────────────────────


def _insert_pairs(
    model: onnx.ModelProto, layers: Sequence[str], ranges: Mapping[str, _Range], scheme: Scheme
) -> onnx.ModelProto:
    """`model`, which is used up, with pairs around these layers."""
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import add_infer_metadata

    # Types of all values are in the file already; without this mark the library would infer them on a copy on disk.
    add_infer_metadata(model)
    extremes = {
        name: (np.array(value.low, np.float32), np.array(value.high, np.float32)) for name, value in ranges.items()
    }
    symmetric = scheme == "tensorrt"
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, extremes),
        nodes_to_quantize=list(layers),
        nodes_to_exclude=[],
        op_types_to_quantize=list(_LINEAR),
        extra_options={
            "WeightSymmetric": True,
            "ActivationSymmetric": symmetric,
            "OpTypesToExcludeOutputQuantization": list(_LINEAR),
            # An int32 bias saves nothing, TensorRT refuses it, and equal biases share a tensor with norms.
            "QuantizeBias": False,
            # TensorRT does not share a pair between layers.
            "DedicatedQDQPair": symmetric,
        },
    )
    return quantizer.quantize_model()


def _write(proto: onnx.ModelProto, folder: Path) -> None:
    del proto.metadata_props[:]
    model = ir.serde.deserialize_model(proto)
    model.graph.sort()
    ClearMetadataAndDocStringPass()(model)
    ir.save(model, folder / MODEL, external_data=WEIGHTS)
    onnx.checker.check_model(folder / MODEL, full_check=True)
