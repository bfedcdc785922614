"""TensorRT engines at work: opened only where they fit, run on torch's CUDA tensors."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infoprune_export.artifacts import sha256_file
from infoprune_export.doctor.probes import Driver, Gpu, release
from infoprune_export.engine.base import Backend, Compatibility, Engine
from infoprune_export.engine.tensorrt import api, routes
from infoprune_export.engine.tensorrt.build import PLAN, PLUGIN, RECORD, STRIPPED, build_engine
from infoprune_export.engine.tensorrt.profiles import Profile
from infoprune_export.engine.tensorrt.progress import last_error, message_log
from infoprune_export.errors import InfopruneError
from infoprune_export.export.onnx import MODEL
from infoprune_export.recipe import Target, TensorRtTarget

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress
    from torch import Tensor

    from infoprune_export.recipe import Recipe

_TORCH_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
_CUDA = "cuda"
_AGAIN = "build it again on this machine with: infoprune-export build"


@dataclass(frozen=True)
class _Binding:
    """One input or output of an engine."""

    name: str
    dtype: torch.dtype
    on_host: bool
    """TensorRT reads its values for shapes, from the CPU's memory."""


class TensorRtEngine(Engine):
    """A deserialised plan with one execution context, on the current CUDA device."""

    def __init__(self, trt: Any, engine: Any, profile: Profile, record: Compatibility, log: Any) -> None:
        import torch

        self._engine, self._profile, self._record, self._log = engine, profile, record, log
        self._stream = torch.cuda.Stream()
        self._context = engine.create_execution_context()
        if self._context is None:
            raise InfopruneError(
                f"no room to run the engine ({last_error(log)}); it takes "
                f"{engine.device_memory_size_v2 / 2**20:.0f} MiB besides its weights: close what else uses the device"
            )
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        bindings = {name: _binding(trt, engine, name) for name in names}
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self._inputs = {name: binding for name, binding in bindings.items() if is_input[name]}
        self._outputs = {name: binding for name, binding in bindings.items() if not is_input[name]}
        if self._inputs.keys() != profile.shapes.keys():
            raise InfopruneError(
                f"the plan takes {', '.join(self._inputs)}, its record says {', '.join(profile.shapes)}; {_AGAIN}"
            )

    def run(self, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """As `Engine.run`. bfloat16, which NumPy does not have, is float32 here on both sides."""
        import torch

        self._check({name: tuple(value.shape) for name, value in inputs.items()})
        for name, dtype in self.input_types().items():
            if inputs[name].dtype != dtype:
                raise InfopruneError(f"{name} is {inputs[name].dtype}, the engine takes {dtype}")
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        outputs = self.run_tensors(tensors)
        return {
            name: (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
            for name, value in outputs.items()
        }

    def run_tensors(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same on tensors of any device; outputs are on the current CUDA device, in the engine's types.

        Raises:
            InfopruneError: names or shapes do not fit the profile, or the run failed.
        """
        import torch

        self._check({name: tuple(value.shape) for name, value in inputs.items()})
        # TensorRT synchronises the whole device around runs on the default stream.
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            placed = {
                name: inputs[name].to(_device(binding), binding.dtype).contiguous()
                for name, binding in self._inputs.items()
            }
            for name, value in placed.items():
                self._require(self._context.set_input_shape(name, tuple(value.shape)), f"the shape of {name}")
                self._require(self._context.set_tensor_address(name, value.data_ptr()), f"the address of {name}")
            if missing := self._context.infer_shapes():
                raise InfopruneError(f"TensorRT cannot infer shapes from {', '.join(missing)}: {last_error(self._log)}")
            outputs = {name: self._output(binding) for name, binding in self._outputs.items()}
            for name, value in outputs.items():
                self._require(self._context.set_tensor_address(name, value.data_ptr()), f"the address of {name}")
            self._require(self._context.execute_async_v3(stream.cuda_stream), "the run")
        stream.synchronize()
        return outputs

    def _output(self, binding: _Binding) -> Tensor:
        import torch

        shape = tuple(self._context.get_tensor_shape(binding.name))
        if any(extent < 0 for extent in shape):
            raise InfopruneError(
                f"output {binding.name} is {list(shape)}: its extents depend on values, which this runtime does not "
                "serve; see infoprune-export lint"
            )
        return torch.empty(shape, dtype=binding.dtype, device=_device(binding))

    def covers(self, inputs: Mapping[str, tuple[int, ...]]) -> str | None:
        return self._profile.covers(inputs)

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if problem := self.covers(shapes):
            raise InfopruneError(
                f"{problem}; give fewer or smaller images at once, or build with other engine.images and "
                "engine.image_sizes"
            )

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise InfopruneError(f"TensorRT refuses {what}: {last_error(self._log)}")

    def input_types(self) -> dict[str, np.dtype[Any]]:
        import torch

        def numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
            named = torch.float32 if dtype == torch.bfloat16 else dtype
            return np.dtype(str(named).removeprefix("torch."))

        return {name: numpy_type(binding.dtype) for name, binding in self._inputs.items()}

    def describe(self) -> Compatibility:
        return dict(self._record)


def _binding(trt: Any, engine: Any, name: str) -> _Binding:
    import torch

    kind = engine.get_tensor_dtype(name).name
    if kind not in _TORCH_TYPES:
        raise InfopruneError(f"{name} is {kind}, which torch has no type for; export in fp32, fp16 or bf16")
    on_host = engine.get_tensor_location(name) == trt.TensorLocation.HOST
    return _Binding(name, getattr(torch, _TORCH_TYPES[kind]), on_host)


def _device(binding: _Binding) -> str:
    return "cpu" if binding.on_host else _CUDA


# ── Opening ──────────────────────────────────────────────────────────────────


class TensorRtBackend(Backend):
    """Engines for the GPU of this machine."""

    def check(self, target: Target) -> None:
        api.check_buildable(tensorrt_target(target))

    def check_recipe(self, recipe: Recipe, target: Target) -> None:
        target, export = tensorrt_target(target), recipe.export
        precision = export.numerics
        if precision not in target.precisions:
            raise InfopruneError(
                f"export.precision and quantization give {precision}, target {target.name} runs "
                f"{', '.join(target.precisions)}"
            )
        if recipe.tokens.method != "none":
            routes.check_route(target, target.token_select)

    def build(
        self,
        onnx_model: Path,
        folder: Path,
        target: Target,
        *,
        profile: Profile | None = None,
        progress: Progress | None = None,
    ) -> Engine:
        if profile is None:
            raise InfopruneError(f"target {target.name}: a TensorRT engine is built for shapes, and none were given")
        build_engine(onnx_model, folder, tensorrt_target(target), profile, progress=progress)
        return self.open(folder)

    def open(self, folder: Path) -> Engine:
        """Open a built engine. It holds code for the device, so open only engines that you trust."""
        record, target, profile = _read(folder)
        trt = api.load_tensorrt()
        gpu, driver = api.find_gpu()
        if problem := check_here(record["compatibility"], target, trt.__version__, gpu, driver):
            raise InfopruneError(f"{folder}: {problem}; {_AGAIN}")
        _check_files(folder, record["hashes"])
        _check_torch()
        log = message_log(trt)
        runtime = trt.Runtime(log)
        if (folder / PLUGIN).is_file():
            routes.load_library(runtime.get_plugin_registry(), folder / PLUGIN, log)
        # A version-compatible plan brings its own runtime along, which is code that runs on the CPU.
        runtime.engine_host_code_allowed = target.version_compatible
        engine = runtime.deserialize_cuda_engine((folder / PLAN).read_bytes())
        if engine is None:
            raise InfopruneError(
                f"{folder / PLAN}: TensorRT {trt.__version__} refuses it ({last_error(log)}); {_AGAIN}"
            )
        if target.strip_weights:
            _put_weights_back(trt, engine, folder / STRIPPED / MODEL, log)
        return TensorRtEngine(trt, engine, profile, record["compatibility"], log)


def tensorrt_target(target: Target) -> TensorRtTarget:
    """The target, if TensorRT serves it.

    Raises:
        InfopruneError: it is another backend's.
    """
    if not isinstance(target, TensorRtTarget):
        raise InfopruneError(f"target {target.name} is for {target.backend}, not for TensorRT")
    return target


def _read(folder: Path) -> tuple[dict[str, Any], TensorRtTarget, Profile]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        target = TensorRtTarget.model_validate(record["target"])
        profile = Profile.from_dict(record["profile"])
        if (
            not all(isinstance(record[key], dict) for key in ("compatibility", "hashes"))
            or PLAN not in record["hashes"]
        ):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InfopruneError(f"{folder / RECORD}: cannot be read; build the engine again") from None
    return record, target, profile


def check_here(record: Mapping[str, Any], target: TensorRtTarget, version: str, gpu: Gpu, driver: Driver) -> str | None:
    """How this machine differs from the one an engine was built on so that it cannot run here; None if it can."""
    built_with = str(record.get("tensorrt"))
    if built_with != version and not (target.version_compatible and _newer_of_major(version, built_with)):
        return f"built with TensorRT {built_with}, here is {version}"
    built_for = int(record["sm"]) if str(record.get("sm")).isdigit() else 0
    if built_for != gpu.sm and not (target.hardware_compatible and min(built_for, gpu.sm) >= api.AMPERE):
        return f"built for compute capability {api.dotted(built_for)}, {gpu.name} has {api.dotted(gpu.sm)}"
    if record.get("architecture") != platform.machine():
        return f"built on {record.get('architecture')}, here is {platform.machine()}"
    if release(driver.cuda)[:1] < release(target.cuda)[:1]:
        return f"built for CUDA {target.cuda}, the driver offers {driver.cuda}"
    return None


def _newer_of_major(here: str, built_with: str) -> bool:
    return release(here)[:1] == release(built_with)[:1] and release(here) >= release(built_with)


def _check_files(folder: Path, hashes: Mapping[str, str]) -> None:
    for name, expected in hashes.items():
        if not (path := folder / name).is_file():
            raise InfopruneError(f"{path}: missing from the engine; {_AGAIN}")
        if (actual := sha256_file(path)) != expected:
            raise InfopruneError(
                f"{path}: truncated or changed (sha256 {actual[:12]}, built as {expected[:12]}); {_AGAIN}"
            )


def _check_torch() -> None:
    import torch

    if not torch.cuda.is_available():
        raise InfopruneError(
            f"torch {torch.__version__} has no CUDA here, and an engine's inputs and outputs are torch's CUDA tensors; "
            "install a torch for CUDA (on Jetson, NVIDIA's), or verify with a kit: infoprune-export kit"
        )


def _put_weights_back(trt: Any, engine: Any, model: Path, log: Any) -> None:
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(str(model)) or not refitter.refit_cuda_engine():
        raise InfopruneError(f"{model}: the weights do not fit the plan ({last_error(log)}); {_AGAIN}")
