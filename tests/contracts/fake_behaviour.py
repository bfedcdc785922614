"""What the fake TensorRT does: its plan is the ONNX file it was built from, and ONNX Runtime runs it.

So everything of ours between the call and the kernel is real: the prepared file, shapes, addresses, types, order.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from contracts.fake_tensorrt import FakeTensorRt

_TYPES = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.INT64: "INT64"}
PLUGIN = b"a compiled plugin"
PHASES = (("Building", None, 2), ("Timing kernels", "Building", 3))


class Machine:
    """A machine with the fake TensorRT of one release, and what goes wrong on it."""

    def __init__(self, version: str) -> None:
        self.trt: Any = FakeTensorRt(version, self._behaviour())
        self.room: int | None = None
        """Largest volume of an input that there is memory for."""
        self.on_step: Callable[[], None] = lambda: None
        """Called between two steps of a build."""
        self.parser_error: tuple[str, str, str] | None = None
        """Node, operator and description."""
        self.failure: str | None = None
        """What the builder logs before it gives up."""
        self.shape_tensor: str | None = None
        self.context_memory = True
        self.plugins: set[str] = set()
        self.steps: list[tuple[str, int]] = []
        self.networks: list[Any] = []

    @property
    def called(self) -> list[str]:
        return [name for name, _ in self.trt.calls]

    def arguments(self, name: str) -> list[Any]:
        """Of every call of a method or setting of a property (``Class.name=``)."""
        return [bound for called, bound in self.trt.calls if called == name]

    def _behaviour(self) -> dict[str, Callable[..., Any]]:
        def stored(attribute: str) -> Callable[..., Any]:
            return lambda this: this.__dict__[attribute]

        def keep(**values: str) -> Callable[..., None]:
            return lambda this, **bound: this.__dict__.update({own: bound[name] for own, name in values.items()})

        return {
            "Builder.__init__": keep(_log="logger"),
            "Runtime.__init__": keep(_log="logger"),
            "Refitter.__init__": keep(_engine="engine"),
            "OnnxParserRefitter.__init__": keep(_refitter="refitter"),
            "OnnxParser.__init__": keep(_network="network"),
            "Builder.create_network": self._network,
            "OnnxParser.parse_from_file": self._parse,
            "OnnxParser.num_errors": lambda this: int(self.parser_error is not None),
            "OnnxParser.get_error": lambda this, index: self.trt.make("ParserError"),
            "ParserError.node_name": lambda this: (self.parser_error or ("", "", ""))[0],
            "ParserError.node_operator": lambda this: (self.parser_error or ("", "", ""))[1],
            "ParserError.desc": lambda this: (self.parser_error or ("", "", ""))[2],
            "INetworkDefinition.num_inputs": lambda this: len(this._model.graph.input),
            "INetworkDefinition.get_input": self._input,
            "ITensor.name": stored("_name_of"),
            "ITensor.is_shape_tensor": lambda this: this._name_of == self.shape_tensor,
            "IOptimizationProfile.set_shape": self._set_shape,
            "IBuilderConfig.add_optimization_profile": self._add_profile,
            "IBuilderConfig.set_flag": lambda this, flag: this.__dict__.setdefault("_flags", []).append(flag.name),
            "IBuilderConfig.create_timing_cache": self._create_cache,
            "IBuilderConfig.set_timing_cache": self._set_cache,
            "IBuilderConfig.get_timing_cache": stored("_cache"),
            "ITimingCache.serialize": lambda this: f"timings of {self.trt.__version__}; used".encode(),
            "Builder.build_serialized_network": self._build,
            "Builder.get_plugin_registry": lambda this: self.trt.make("IPluginRegistry"),
            "Runtime.get_plugin_registry": lambda this: self.trt.make("IPluginRegistry"),
            "IPluginRegistry.get_creator": self._creator,
            "IPluginRegistry.load_library": self._load_library,
            "Runtime.deserialize_cuda_engine": self._deserialise,
            "OnnxParserRefitter.refit_from_file": self._refit,
            "ICudaEngine.num_io_tensors": lambda this: len(self._values(this)),
            "ICudaEngine.get_tensor_name": lambda this, index: list(self._values(this))[index],
            "ICudaEngine.get_tensor_mode": self._mode,
            "ICudaEngine.get_tensor_dtype": self._dtype,
            "ICudaEngine.get_tensor_location": lambda this, name: self.trt.TensorLocation.DEVICE,
            "ICudaEngine.create_execution_context": self._context,
            "IExecutionContext.set_input_shape": lambda this, name, shape: this._shapes.update({name: shape}) is None,
            "IExecutionContext.set_tensor_address": lambda this, name, memory: (
                this._addresses.update({name: memory}) is None
            ),
            "IExecutionContext.infer_shapes": self._infer,
            "IExecutionContext.get_tensor_shape": lambda this, name: this._results[name].shape,
            "IExecutionContext.execute_async_v3": self._execute,
            "plugin.register": lambda plugin_id, lazy_register=False: lambda function: function,
            "plugin.autotune": lambda plugin_id: lambda function: function,
            "plugin.aot_impl": lambda plugin_id: lambda function: function,
        }

    # ── Building ──

    def _network(self, this: Any, flags: int = 0) -> Any:
        members = self.trt.NetworkDefinitionCreationFlag.__members__
        network = self.trt.make("INetworkDefinition")
        named = {name for name, member in members.items() if flags >> int(member) & 1}
        assert sum(1 << int(members[name]) for name in named) == flags, f"unknown bits in {flags:b}"
        network.__dict__.update(_flags=named, _log=this._log)
        self.networks.append(network)
        return network

    def _parse(self, this: Any, model: str) -> bool:
        if self.parser_error is not None:
            return False
        loaded = onnx.load(model)
        known = self.plugins | ({"TokenSelect"} if hasattr(self.trt, "plugin") else set())
        foreign = [node for node in loaded.graph.node if node.domain and node.op_type not in known]
        if foreign:
            self.parser_error = (foreign[0].name, foreign[0].op_type, "no plugin of this name")
            return False
        this._network.__dict__["_model"] = loaded
        return True

    def _input(self, this: Any, index: int) -> Any:
        tensor = self.trt.make("ITensor")
        tensor.__dict__["_name_of"] = this._model.graph.input[index].name
        return tensor

    def _set_shape(self, this: Any, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
        this.__dict__.setdefault("_shapes", {})[input] = (tuple(min), tuple(opt), tuple(max))

    def _add_profile(self, this: Any, profile: Any) -> int:
        this.__dict__["_profile"] = profile._shapes
        return 0

    def _create_cache(self, this: Any, serialized_timing_cache: bytes) -> Any:
        cache = self.trt.make("ITimingCache")
        cache.__dict__["_content"] = bytes(serialized_timing_cache)
        return cache

    def _set_cache(self, this: Any, cache: Any, ignore_mismatch: bool) -> bool:
        fits = not cache._content or cache._content.startswith(f"timings of {self.trt.__version__};".encode())
        if fits:
            this.__dict__["_cache"] = cache
        return fits

    def _build(self, this: Any, network: Any, config: Any) -> bytes | None:
        monitor = config.__dict__["progress_monitor"]
        for name, parent, steps in PHASES:
            monitor.phase_start(name, parent, steps)
            for step in range(steps):
                self.on_step()
                self.steps.append((name, step))
                if not monitor.step_complete(name, step):
                    monitor.phase_finish(name)
                    return None
            monitor.phase_finish(name)
        severity = self.trt.ILogger.Severity
        if self.failure is not None:
            this._log.log(severity.ERROR, self.failure)
            return None
        largest = max(int(np.prod(shapes[2])) for shapes in config._profile.values())
        if self.room is not None and largest > self.room:
            this._log.log(severity.ERROR, "Error Code 2: OutOfMemory (Requested size was 1 bytes.)")
            return None
        stripped = "STRIP_PLAN" in config.__dict__.get("_flags", [])
        head = {"version": self.trt.__version__, "stripped": stripped}
        content = network._model
        if stripped:
            content = onnx.ModelProto.FromString(content.SerializeToString())
            for tensor in content.graph.initializer:
                tensor.raw_data = bytes(len(tensor.raw_data))
        return json.dumps(head).encode() + b"\n" + content.SerializeToString()

    # ── Plugins ──

    def _creator(self, this: Any, type: str, version: str, plugin_namespace: str = "") -> Any:  # noqa: A002
        return SimpleNamespace(name=type) if type in self.plugins else None

    def _load_library(self, this: Any, plugin_path: str) -> Any:
        if Path(plugin_path).read_bytes() != PLUGIN:
            return None
        self.plugins.add("TokenSelect")
        return SimpleNamespace()

    # ── Running ──

    def _deserialise(self, this: Any, serialized_engine: bytes) -> Any:
        head, _, content = serialized_engine.partition(b"\n")
        if not head.startswith(b"{") or json.loads(head)["version"] != self.trt.__version__:
            this._log.log(self.trt.ILogger.Severity.ERROR, "the engine plan file is not compatible")
            return None
        engine = self.trt.make("ICudaEngine")
        engine.__dict__["_model"] = onnx.ModelProto.FromString(content)
        return engine

    def _refit(self, this: Any, model: str) -> bool:
        this._refitter._engine.__dict__["_model"] = onnx.load(model)
        return True

    def _values(self, engine: Any) -> dict[str, Any]:
        graph = engine._model.graph
        return {value.name: value for value in (*graph.input, *graph.output)}

    def _mode(self, this: Any, name: str) -> Any:
        given = any(value.name == name for value in this._model.graph.input)
        return self.trt.TensorIOMode.INPUT if given else self.trt.TensorIOMode.OUTPUT

    def _dtype(self, this: Any, name: str) -> Any:
        return getattr(self.trt.DataType, _TYPES[self._values(this)[name].type.tensor_type.elem_type])

    def _context(self, this: Any, strategy: Any = None) -> Any:
        if not self.context_memory:
            return None
        context = self.trt.make("IExecutionContext")
        context.__dict__.update(_model=this._model, _shapes={}, _addresses={}, _results={})
        return context

    def _infer(self, this: Any) -> list[str]:
        session = onnxruntime.InferenceSession(this._model.SerializeToString(), providers=["CPUExecutionProvider"])
        wanted = {value.name: value.type for value in session.get_inputs()}
        if missing := [name for name in wanted if name not in this._shapes or not this._addresses.get(name)]:
            return missing
        feed = {name: self._read(this, name, wanted[name]) for name in wanted}
        names = [value.name for value in session.get_outputs()]
        this.__dict__["_results"] = dict(zip(names, session.run(names, feed), strict=True))
        return []

    def _read(self, this: Any, name: str, kind: str) -> Any:
        dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}[kind]
        shape = this._shapes[name]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(ctypes.string_at(this._addresses[name], size), dtype).reshape(shape)

    def _execute(self, this: Any, stream_handle: int) -> bool:
        for name, value in this._results.items():
            content = np.ascontiguousarray(value)
            ctypes.memmove(this._addresses[name], content.ctypes.data, content.nbytes)
        return True
