"""ONNX Runtime behind the calls of TensorRT's Python API that a kit's scripts make, for tests without a GPU.

Device memory is the host's (see ``libcuda.c`` beside this folder). Calls are checked as strictly as the real ones:
enums are enums, shapes must lie in the profile. Environment variables plant faults:

- STANDIN_VERSION      ``tensorrt.__version__``
- STANDIN_MEMORY       largest number of values of the first input that the builder has memory for
- STANDIN_FUSED        how many fused attention layers the inspector tells of
- STANDIN_VERBOSITY    "names": the inspector has no details
- STANDIN_OUTPUT       "features", "scale", "nan" or "swap": what is done to the outputs
"""

from __future__ import annotations

import abc
import ctypes
import enum
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

__version__ = os.environ.get("STANDIN_VERSION", "10.3.0")
_SINCE_11 = int(__version__.split(".")[0]) >= 11
_MAGIC = b"stand-in plan\n"


def _must(condition: object, text: str) -> None:
    if not condition:
        raise TypeError(text)


# ── Enums; the numbers of two of them differ between versions, as the real ones do ──

DataType = enum.IntEnum(
    "DataType", {"FLOAT": 0, "HALF": 1, "INT8": 2, "INT32": 3, "BOOL": 4, "UINT8": 5, "FP8": 6, "BF16": 7, "INT64": 8}
)
NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 0 if _SINCE_11 else 1})
BuilderFlag = enum.IntEnum("BuilderFlag", {"TF32": 7, "VERSION_COMPATIBLE": 12 if _SINCE_11 else 13})
MemoryPoolType = enum.IntEnum("MemoryPoolType", {"WORKSPACE": 0})
ProfilingVerbosity = enum.IntEnum("ProfilingVerbosity", {"LAYER_NAMES_ONLY": 0, "NONE": 1, "DETAILED": 2})
HardwareCompatibilityLevel = enum.IntEnum("HardwareCompatibilityLevel", {"NONE": 0, "AMPERE_PLUS": 1})
LayerInformationFormat = enum.IntEnum("LayerInformationFormat", {"ONELINE": 0, "JSON": 1})
TensorIOMode = enum.IntEnum("TensorIOMode", {"NONE": 0, "INPUT": 1, "OUTPUT": 2})
TensorLocation = enum.IntEnum("TensorLocation", {"DEVICE": 0, "HOST": 1})
_Severity = enum.IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})
_TYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
    "tensor(int32)": (DataType.INT32, np.int32),
    "tensor(int64)": (DataType.INT64, np.int64),
}


class ILogger(abc.ABC):
    Severity = _Severity

    @abc.abstractmethod
    def log(self, severity: _Severity, msg: str) -> None:
        """Take a message; whoever inherits says how."""


class Logger(ILogger):
    INTERNAL_ERROR, ERROR = _Severity.INTERNAL_ERROR, _Severity.ERROR


# ── Building ──


class Builder:
    def __init__(self, logger):
        _must(isinstance(logger, ILogger), "logger")
        self._logger = logger

    def create_network(self, flags: int = 0):
        _must(flags == 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED), "the network must be strongly typed")
        return _Network()

    def create_builder_config(self):
        return _Config()

    def create_optimization_profile(self):
        return _Profile()

    def build_serialized_network(self, network, config):
        problem = config.problem(network)
        if problem:
            self._logger.log(Logger.ERROR, problem)
            return None
        model = Path(network.model)
        parts = [model.read_bytes(), model.with_name(f"{model.name}.data").read_bytes()]
        header = {
            "version": __version__,
            "profile": config.profiles[0].shapes,
            "detailed": config.profiling_verbosity == ProfilingVerbosity.DETAILED,
            "sizes": [len(part) for part in parts],
            "sha256": hashlib.sha256(b"".join(parts)).hexdigest(),
        }
        return _MAGIC + json.dumps(header).encode() + b"\n" + b"".join(parts)


class _Tensor:
    is_shape_tensor = False

    def __init__(self, value):
        self.name, self.shape = value.name, value.shape


class _Network:
    def __init__(self):
        self.inputs, self.model = [], ""

    @property
    def num_inputs(self):
        return len(self.inputs)

    def get_input(self, index):
        return self.inputs[index]


class _ParserError:
    def __init__(self, text):
        self._text = text

    def node_name(self):
        return "node"

    def node_operator(self):
        return "operator"

    def desc(self):
        return self._text


class OnnxParser:
    def __init__(self, network, logger):
        self._network, self._errors = network, []

    def parse_from_file(self, model: str) -> bool:
        _must(type(model) is str, "model must be text")
        try:
            session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        except Exception as error:
            self._errors.append(_ParserError(str(error)))
            return False
        self._network.inputs, self._network.model = [_Tensor(value) for value in session.get_inputs()], model
        return True

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return self._errors[index]


class _Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, min, opt, max):  # noqa: A002  (the real names)
        _must(all(type(shape) is tuple for shape in (min, opt, max)), "shapes must be tuples")
        self.shapes[name] = [list(min), list(opt), list(max)]


class _Cache:
    def __init__(self, content):
        self._content = content or b"timings"

    def serialize(self):
        return self._content


class _Config:
    builder_optimization_level = 3
    profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
    hardware_compatibility_level = HardwareCompatibilityLevel.NONE

    def __init__(self):
        self.profiles, self.flags, self._cache = [], {BuilderFlag.TF32}, None

    def __setattr__(self, name, value):
        kind = type(getattr(type(self), name, None))
        _must(name in ("profiles", "flags", "_cache") or isinstance(value, kind), f"{name} must be {kind.__name__}")
        object.__setattr__(self, name, value)

    def set_memory_pool_limit(self, pool, pool_size):
        _must(isinstance(pool, MemoryPoolType) and type(pool_size) is int and pool_size > 0, "pool and size")

    def set_flag(self, flag):
        _must(isinstance(flag, BuilderFlag), "flag")
        self.flags.add(flag)

    def clear_flag(self, flag):
        _must(isinstance(flag, BuilderFlag), "flag")
        self.flags.discard(flag)

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache):
        _must(type(serialized_timing_cache) is bytes, "cache must be bytes")
        return _Cache(serialized_timing_cache)

    def set_timing_cache(self, cache, ignore_mismatch):
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache

    def problem(self, network):
        if not self.profiles:
            return "Network has dynamic inputs, but no optimization profile has been defined"
        for tensor in network.inputs:
            corners = self.profiles[0].shapes.get(tensor.name)
            if corners is None:
                return f"{tensor.name}: no shape in the optimization profile"
            for extent, values in zip(tensor.shape, zip(*corners, strict=True), strict=True):
                if isinstance(extent, int) and set(values) != {extent}:
                    return f"{tensor.name}: extent {extent} is not {values}"
        largest = int(np.prod(self.profiles[0].shapes[network.inputs[0].name][2]))
        if largest > int(os.environ.get("STANDIN_MEMORY", 10**12)):
            return "Error Code 2: OutOfMemory (Requested size was 1 bytes.)"
        return ""


# ── Running ──


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger):
        self._logger = logger

    def deserialize_cuda_engine(self, plan):
        _must(type(plan) is bytes, "plan must be bytes")
        try:
            _must(plan.startswith(_MAGIC), "Magic tag does not match")
            line, _, rest = plan[len(_MAGIC) :].partition(b"\n")
            header = json.loads(line)
            _must(hashlib.sha256(rest).hexdigest() == header["sha256"], "The plan file is truncated")
            _must(header["version"] == __version__, "The engine plan file is not compatible with this version")
        except (TypeError, ValueError, KeyError) as error:
            self._logger.log(Logger.ERROR, str(error))
            return None
        return _Engine(header, rest)


class _Engine:
    num_optimization_profiles = 1

    def __init__(self, header, content):
        self._folder = tempfile.TemporaryDirectory()
        size = header["sizes"][0]
        for name, part in (("model.onnx", content[:size]), ("model.onnx.data", content[size:])):
            Path(self._folder.name, name).write_bytes(part)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = Path(self._folder.name, "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.shapes, self._detailed = header["profile"], header["detailed"]

    @property
    def num_io_tensors(self):
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index):
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return _TYPES[{**self.inputs, **self.outputs}[name].type][0]

    def get_tensor_location(self, name):
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name, profile_index):
        _must(profile_index == 0, "profile_index")
        return [tuple(shape) for shape in self.shapes[name]]

    def create_execution_context(self):
        return _Context(self)

    def create_engine_inspector(self):
        return _Inspector(self._detailed)


class _Inspector:
    def __init__(self, detailed):
        self._detailed = detailed and os.environ.get("STANDIN_VERBOSITY") != "names"

    def get_engine_information(self, format):  # noqa: A002
        _must(format is LayerInformationFormat.JSON, "format")
        # A product whose name holds its module's is no fused attention.
        layers = [{"Name": "/mha/attn/MatMul", "LayerType": "gemm", "TacticName": "sm80_xmma_gemm_f16f16"}]
        for number in range(int(os.environ.get("STANDIN_FUSED", "0"))):
            tactic = f"_gemm_mha_v2_0x{number:032x}"
            layers.append({"Name": f"_gemm_mha_v2_myl0_{number}", "LayerType": "kgen", "TacticName": tactic})
        return json.dumps({"Layers": layers if self._detailed else [layer["Name"] for layer in layers], "Bindings": []})


class _Context:
    def __init__(self, engine):
        self._engine, self._shapes, self._addresses = engine, {}, {}

    def set_input_shape(self, name, shape):
        _must(name in self._engine.inputs and type(shape) is tuple, "name and shape")
        low, _, high = self._engine.shapes[name]
        inside = len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
        if inside:
            self._shapes[name] = shape
        return inside

    def infer_shapes(self):
        return [name for name in self._engine.inputs if name not in self._shapes]

    def get_tensor_shape(self, name):
        if name in self._engine.inputs:
            return self._shapes[name]
        zeros = {key: np.zeros(shape, _TYPES[self._engine.inputs[key].type][1]) for key, shape in self._shapes.items()}
        return self._engine.session.run([name], zeros)[0].shape

    def set_tensor_address(self, name, memory):
        _must(type(memory) is int, "memory")
        self._addresses[name] = memory
        return memory != 0

    def execute_async_v3(self, stream_handle):
        _must(type(stream_handle) is int and stream_handle, "stream")
        inputs = {}
        for name, shape in self._shapes.items():
            dtype = np.dtype(_TYPES[self._engine.inputs[name].type][1])
            size = dtype.itemsize * int(np.prod(shape))
            inputs[name] = np.frombuffer(ctypes.string_at(self._addresses[name], size), dtype).reshape(shape)
        names = list(self._engine.outputs)
        outputs = dict(zip(names, self._engine.session.run(names, inputs), strict=True))
        for name, value in _faulty(outputs).items():
            value = np.ascontiguousarray(value)
            ctypes.memmove(self._addresses[name], value.ctypes.data, value.nbytes)
        return True


def _faulty(outputs):
    fault, features = os.environ.get("STANDIN_OUTPUT", ""), outputs["image_features"].copy()
    if fault == "features":
        features[-1, 0, 0] += 0.01 * np.abs(features).max()
    elif fault == "scale":
        features *= 1.001
    elif fault == "nan":
        features[0, 0, 0] = np.nan
    elif fault == "swap":
        kept = outputs["kept_indices"].copy()
        # The first token that is not kept in the place of the last one that is.
        other = min(set(range(int(kept[0].max()))) - set(kept[0].tolist()))
        kept[0] = np.sort(np.append(kept[0][:-1], other))
        outputs["kept_indices"] = kept
    return {**outputs, "image_features": features}
