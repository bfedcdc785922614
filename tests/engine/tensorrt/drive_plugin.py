"""The ahead-of-time plugin in TensorRT's own Python layer and registry, without a GPU: a script for one subprocess.

``python drive_plugin.py BINDINGS LEAN STUBS [VERSION] < requests.json``: BINDINGS is the folder tensorrt_bindings, LEAN
the lean runtime's library, whose registry is the real one, STUBS a folder of the stand-in libraries that `STUB_SOURCE`
makes, so that the bindings load; VERSION is what the bindings say they are. They give no constructors for symbolic
extents, which the builder makes; `Extent` and `Builder` do here.
"""

from __future__ import annotations

import ctypes
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

STUB_SOURCE = """
void *createInferBuilder_INTERNAL(void *log, int version) { return 0; }
void *createNvOnnxParser_INTERNAL(void *network, void *log, int version) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *log, int version) { return 0; }
void *getBuilderPluginRegistry(int capability) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(void *log, const char *space) { return 1; }
"""
LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")


class Extent:
    """A number that may stand for an unknown one."""

    def __init__(self, value: int, constant: bool = True):
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        return self.value

    def is_size_tensor(self) -> bool:
        return False


class Extents(list):
    def __init__(self, size: int):
        super().__init__([None] * size)


class Arguments:
    """Where the plugin puts its scalar arguments."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}

    def __setitem__(self, place: int, value: Any) -> None:
        self.values[place] = value


def load(bindings: Path, lean: Path, stubs: Path) -> Any:
    """The module ``tensorrt`` over the bindings; ``tensorrt.plugin`` can be imported then."""
    ctypes.CDLL(str(lean), mode=ctypes.RTLD_GLOBAL)
    for name in LIBRARIES:
        ctypes.CDLL(str(stubs / name), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(bindings.parent))
    import tensorrt_bindings

    trt: Any = types.ModuleType("tensorrt")
    trt.__dict__.update(vars(tensorrt_bindings))
    trt.__name__, trt.__package__, trt.__path__ = "tensorrt", "tensorrt", [str(bindings)]
    trt.IDimensionExpr, trt.DimsExprs, trt.ISymExpr = Extent, Extents, object
    sys.modules["tensorrt"] = trt
    return trt


class Builder:
    """Arithmetic on extents, as the engine builder offers it to plugins."""

    def __init__(self, trt: Any):
        kinds = trt.DimensionOperation
        self.operations = {
            kinds.SUM: lambda a, b: a + b,
            kinds.SUB: lambda a, b: a - b,
            kinds.PROD: lambda a, b: a * b,
            kinds.MAX: max,
            kinds.MIN: min,
            kinds.FLOOR_DIV: lambda a, b: a // b,
            kinds.CEIL_DIV: lambda a, b: -(-a // b),
        }

    def constant(self, value: int) -> Extent:
        return Extent(value)

    def operation(self, kind: Any, left: Extent, right: Extent) -> Extent:
        return Extent(self.operations[kind](left.value, right.value), left.constant and right.constant)


def drive(trt: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What the registered plugin answers for one shape [B, N, D], of which B and N are dynamic."""
    import numpy as np

    import infoprune_export.engine.tensorrt.plugin  # noqa: F401  (registers)

    creator = trt.get_plugin_registry().get_creator("TokenSelect", "1", "infoprune")
    kinds = {int: (np.int64, trt.PluginFieldType.INT64), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    arrays = {name: np.array([value], kinds[type(value)][0]) for name, value in request["attributes"].items()}
    fields = [trt.PluginField(name, array, kinds[type(array[0].item())][1]) for name, array in arrays.items()]
    plugin = creator.create_plugin(
        "TokenSelect",
        "infoprune",
        trt.PluginFieldCollection(fields),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    batch, tokens, width = request["shape"]
    dtype = getattr(trt, request["dtype"])
    types_in = [dtype, trt.float32, trt.int32]
    types_out = plugin.get_output_data_types(types_in, [3, 2, 1])

    def extents(*values: int) -> Extents:
        result = Extents(len(values))
        result[:] = [Extent(value, place == 2) for place, value in enumerate(values)]
        return result

    def describe(shape: tuple[int, ...], kind: Any) -> Any:
        tensor = trt.DynamicPluginTensorDesc()
        tensor.min, tensor.opt, tensor.max = (1,) * len(shape), shape, shape
        tensor.desc.dims = tuple(-1 if place < 2 else extent for place, extent in enumerate(shape))
        tensor.desc.type, tensor.desc.format = kind, trt.TensorFormat.LINEAR
        return tensor

    builder, inputs = Builder(trt), [extents(batch, tokens, width), extents(batch, tokens), extents(batch)]
    shapes = [[extent.value for extent in shape] for shape in plugin.get_output_shapes(inputs, [], builder)]
    shapes_in = [(batch, tokens, width), (batch, tokens), (batch,)]
    tensors = [
        describe(tuple(shape), kind) for shape, kind in zip(shapes_in + shapes, types_in + types_out, strict=True)
    ]
    combinations = plugin.get_supported_format_combinations(tensors, 3)
    plugin.configure_plugin(tensors[:3], tensors[3:])
    tactics = plugin.get_valid_tactics()
    plugin.set_tactic(tactics[0])
    launch, arguments = SimpleNamespace(), Arguments()
    plugin.get_launch_params(inputs, tensors, 3, launch, arguments, builder)
    name, ptx = plugin.get_kernel([t.desc for t in tensors[:3]], [t.desc for t in tensors[3:]])
    return {
        "version": trt.__version__,
        "types": [str(kind) for kind in types_out],
        "combinations": [str(tensor.type) for tensor in combinations],
        "tactics": tactics,
        "shapes": shapes,
        "launch": {key: value.expr.value for key, value in vars(launch).items()},
        "arguments": [value.expr.value for _, value in sorted(arguments.values.items())],
        "kinds": sorted({str(value.dtype) for value in arguments.values.values()}),
        "kernel": name,
        "ptx": ptx.decode(),
    }


def answers(trt: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the plugin answers for each request, or ``{"refused": why}``."""
    from infoprune_export.errors import InfopruneError

    results = []
    for request in requests:
        try:
            results.append(drive(trt, request))
        except InfopruneError as error:
            results.append({"refused": str(error)})
    return results


if __name__ == "__main__":
    module = load(*map(Path, sys.argv[1:4]))
    module.__version__ = (*sys.argv[4:], module.__version__)[0]
    # TensorRT's log goes to the same stream; this is its last line.
    sys.stdout.write(f"\n{json.dumps(answers(module, json.load(sys.stdin)))}\n")
