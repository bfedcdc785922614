"""ONNX Runtime as the embedded engine.

Building optimises the graph ahead of time (constant folding, fusion, the function body inlined) and stores the result,
so that the device starts without doing it again. An optimised graph may hold operators and layouts of one version, one
provider and one processor architecture; those are the engine's compatibility, checked when it is opened.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infoprune_export.artifacts import canonical_json
from infoprune_export.engine.base import Backend, Compatibility, Engine, check_array
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import OnnxRuntimeTarget, Target

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from infoprune_export.engine.tensorrt.profiles import Profile

ENGINE = "engine.onnx"
RECORD = "engine.json"
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
_EXTRAS = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "gpu", "TensorrtExecutionProvider": "gpu"}


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise InfopruneError(
            f"onnxruntime cannot be imported ({error}); install it with: pip install 'infoprune-export[cpu]'"
        ) from None
    return onnxruntime


def runtime_target(target: Target) -> OnnxRuntimeTarget:
    """The target, if ONNX Runtime serves it.

    Raises:
        InfopruneError: it is another backend's.
    """
    if not isinstance(target, OnnxRuntimeTarget):
        raise InfopruneError(
            f"target {target.name} is for {target.backend}, and this runs in ONNX Runtime; use onnxruntime-cpu, "
            "onnxruntime-cuda or a target file of yours with backend: onnxruntime"
        )
    return target


def session_options(target: Target, threads: int | None = None) -> Any:
    """Options for a target; `threads` overrides the target's."""
    ort, target = _runtime(), runtime_target(target)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = {
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }[target.graph_optimization]
    options.intra_op_num_threads = target.threads if threads is None else threads
    return options


def open_session(model: Path, target: Target, threads: int | None = None) -> Any:
    """An ``InferenceSession`` for an ONNX file on a target's providers."""
    providers = list(runtime_target(target).providers)
    return _runtime().InferenceSession(model, session_options(target, threads), providers=providers)


def load_runtime(target: Target) -> None:
    """Open and close a session on a target whose graph does nothing: what a process takes once, whatever it runs."""
    from onnx import TensorProto, helper

    value, result = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "nothing", [value], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    providers = list(runtime_target(target).providers)
    session = _runtime().InferenceSession(model.SerializeToString(), session_options(target, 1), providers=providers)
    session.run(None, {"x": np.zeros(1, np.float32)})


def feed_of(session: Any, planned: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Planned tensors as a session takes them: only its inputs, floats in its precision."""
    return {
        value.name: planned[value.name].cpu().numpy().astype(_DTYPES[value.type], copy=False)
        for value in session.get_inputs()
    }


class OnnxRuntimeEngine(Engine):
    """A session with checked inputs."""

    def __init__(self, session: Any, record: Compatibility) -> None:
        self._session = session
        self._record = record
        self._inputs = {
            value.name: (
                tuple(extent if isinstance(extent, int) else None for extent in value.shape),
                np.dtype(_DTYPES[value.type]),
            )
            for value in session.get_inputs()
        }
        self._outputs = [value.name for value in session.get_outputs()]

    def run(self, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        if inputs.keys() != self._inputs.keys():
            raise InfopruneError(f"engine inputs are {sorted(self._inputs)}, got {sorted(inputs)}")
        for name, (shape, dtype) in self._inputs.items():
            if problem := check_array(name, inputs[name], shape, dtype):
                raise InfopruneError(f"{problem}; let the model's own processor prepare the images")
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))

    def input_types(self) -> dict[str, np.dtype[Any]]:
        return {name: dtype for name, (_, dtype) in self._inputs.items()}

    def describe(self) -> Compatibility:
        return dict(self._record)


def open_portable(model: Path) -> OnnxRuntimeEngine:
    """An exported file in ONNX Runtime on the CPU, which every machine has; on as many threads as it sees fit."""
    target = OnnxRuntimeTarget(
        name="onnx",
        description="an exported file",
        backend="onnxruntime",
        providers=("CPUExecutionProvider",),
        threads=0,
    )
    return OnnxRuntimeEngine(open_session(model, target), {})


class OnnxRuntimeBackend(Backend):
    def check(self, target: Target) -> None:
        available = _runtime().get_available_providers()
        if (wanted := runtime_target(target).providers[0]) not in available:
            extra = _EXTRAS.get(wanted, "gpu")
            raise InfopruneError(
                f"target {target.name} needs {wanted}, this ONNX Runtime has {', '.join(available)}; "
                f"install it with: pip install 'infoprune-export[{extra}]'"
            )

    def build(
        self,
        onnx_model: Path,
        folder: Path,
        target: Target,
        *,
        profile: Profile | None = None,
        progress: Progress | None = None,
    ) -> Engine:
        target = runtime_target(target)
        options = session_options(target)
        options.optimized_model_filepath = str(folder / ENGINE)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{ENGINE}.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        try:
            _runtime().InferenceSession(onnx_model, options, providers=list(target.providers))
        except Exception as error:
            if "NOT_IMPLEMENTED" in str(error) or "bfloat16" in str(error):
                raise InfopruneError(
                    f"target {target.name}: {target.providers[0]} cannot run this graph's types "
                    f"({' '.join(str(error).split())[:160]}); use export.precision fp32 or fp16"
                ) from None
            raise
        record = {**_compatibility(target), "graph_optimization": target.graph_optimization, "target": target.name}
        (folder / RECORD).write_text(
            canonical_json({"compatibility": record, "target": target.model_dump(mode="json")})
        )
        return self.open(folder)

    def open(self, folder: Path) -> Engine:
        try:
            content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            record, target = content["compatibility"], OnnxRuntimeTarget.model_validate(content["target"])
        except (OSError, ValueError, KeyError, TypeError):
            raise InfopruneError(f"{folder / RECORD}: cannot be read; build the engine again") from None
        for name, here in _compatibility(target).items():
            if record.get(name) != here:
                raise InfopruneError(
                    f"{folder}: engine was built for {name} {record.get(name)}, here it is {here}; build it again"
                )
        ort = _runtime()
        options = session_options(target)
        # It is optimised already; doing it again could only cost time.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(folder / ENGINE, options, providers=list(target.providers))
        if session.get_providers()[0] != target.providers[0]:
            raise InfopruneError(
                f"{folder}: {target.providers[0]} did not start, only {session.get_providers()[0]}; "
                "run infoprune-export doctor"
            )
        return OnnxRuntimeEngine(session, record)


def _compatibility(target: OnnxRuntimeTarget) -> Compatibility:
    return {
        "backend": "onnxruntime",
        "onnxruntime": _runtime().__version__,
        "provider": target.providers[0],
        "architecture": platform.machine(),
        "processor_features": _vector_width(),
    }


def _vector_width() -> str:
    """ONNX Runtime packs convolution weights for the widest vector unit it finds, so the engine depends on it."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return "unknown"
    return next((name for name in ("avx512f", "avx2", "asimd") if name in flags), "baseline")
