"""The GPU and TensorRT: driver calls through ctypes, versions checked before a runtime is made, engines run.

TensorRT ends the process with a segmentation fault when its runtime is used where no CUDA device is, so the driver is
asked first.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from shared import FOLDER, KitError, sha256

# ── CUDA ─────────────────────────────────────────────────────────────────────

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceGetPCIBusId": (c_char_p, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_uint64),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}
_MAJOR, _MINOR = 75, 76  # device attributes: compute capability
_NON_BLOCKING, _THREAD_LOCAL = 1, 1  # stream flag, capture mode


class Cuda:
    """The first CUDA device, one stream and two events on it."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise KitError("no NVIDIA driver here (libcuda.so.1 cannot be loaded); run this on the device") from None
        version, count, number = c_int(), c_int(), c_int()
        try:
            self._call("cuInit", 0)
            self._call("cuDriverGetVersion", byref(version))
            self._call("cuDeviceGetCount", byref(count))
        except KitError as error:
            raise KitError(f"the NVIDIA driver does not start: {error}; check nvidia-smi") from None
        if not count.value:
            raise KitError("the NVIDIA driver finds no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES")
        self.driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
        self._call("cuDeviceGet", byref(number), 0)
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, len(name), number)
        self.name = name.value.decode(errors="replace")
        self._call("cuDeviceGetPCIBusId", name, len(name), number)
        self.bus = name.value.decode(errors="replace")
        major, minor = c_int(), c_int()
        self._call("cuDeviceGetAttribute", byref(major), _MAJOR, number)
        self._call("cuDeviceGetAttribute", byref(minor), _MINOR, number)
        self.sm = 10 * major.value + minor.value
        context = c_void_p()
        # The primary context is the one that TensorRT uses.
        self._call("cuDevicePrimaryCtxRetain", byref(context), number)
        self._call("cuCtxSetCurrent", context)
        stream, self._events = c_void_p(), (c_void_p(), c_void_p())
        self._call("cuStreamCreate", byref(stream), _NON_BLOCKING)
        self.stream = int(stream.value or 0)
        for event in self._events:
            self._call("cuEventCreate", byref(event), 0)

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name)
        function.argtypes, function.restype = _SIGNATURES[name], c_int
        code = function(*arguments)
        if code:
            text = c_char_p()
            known = self._library.cuGetErrorName(c_int(code), byref(text)) == 0 and text.value
            raise KitError(f"{name} failed with {text.value.decode() if known and text.value else code}")

    # ── Memory ──

    def allocate(self, size: int) -> int:
        """Address of `size` bytes on the device."""
        address = c_uint64()
        self._call("cuMemAlloc_v2", byref(address), max(size, 1))
        return int(address.value)

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", address)

    def to_device(self, address: int, array: np.ndarray) -> None:
        self._call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self.stream)

    def to_host(self, array: np.ndarray, address: int) -> None:
        self._call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self.stream)

    # ── Stream ──

    def synchronise(self) -> None:
        self._call("cuStreamSynchronize", self.stream)

    def start(self) -> None:
        """Mark where a measurement on the stream begins."""
        self._call("cuEventRecord", self._events[0], self.stream)

    def stop(self) -> float:
        """Milliseconds on the device since `start`; waits for them."""
        self._call("cuEventRecord", self._events[1], self.stream)
        self.synchronise()
        elapsed = c_float()
        self._call("cuEventElapsedTime", byref(elapsed), *self._events)
        return float(elapsed.value)

    def capture(self, enqueue: Any) -> Any:
        """Record what `enqueue` puts on the stream as a CUDA graph; returns a function that launches it."""
        graph, executable = c_void_p(), c_void_p()
        self._call("cuStreamBeginCapture_v2", self.stream, _THREAD_LOCAL)
        enqueue()
        self._call("cuStreamEndCapture", self.stream, byref(graph))
        self._call("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
        return lambda: self._call("cuGraphLaunch", executable, self.stream)


# ── TensorRT ─────────────────────────────────────────────────────────────────


def open_device(manifest: dict[str, Any]) -> tuple[Cuda, Any, Any]:
    """The device, the ``tensorrt`` module and a logger that remembers errors; all fit the kit's target."""
    target, cuda = manifest["target"], Cuda()
    fits = cuda.sm >= 80 if target["hardware_compatible"] else cuda.sm == target["sm"]
    if not fits:
        wanted = "8.0 or higher" if target["hardware_compatible"] else f"{target['sm'] // 10}.{target['sm'] % 10}"
        raise KitError(
            f"{cuda.name} has compute capability {cuda.sm // 10}.{cuda.sm % 10}, the kit is for {target['name']} "
            f"({wanted}); make a kit for this device"
        )
    try:
        import tensorrt as trt
    except ImportError as error:
        raise KitError(
            f"TensorRT's Python module cannot be imported ({error}); on Jetson: sudo apt install python3-libnvinfer"
        ) from None
    if trt.__version__.split(".")[:2] != target["tensorrt"].split(".")[:2]:
        raise KitError(
            f"TensorRT {trt.__version__} is here, the kit is for {target['tensorrt']} ({target['software']}); "
            "make a kit for a target with this version"
        )

    class Log(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        """Prints errors and keeps them."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.Logger.INTERNAL_ERROR, trt.Logger.ERROR):
                self.errors.append(msg)
                print(f"TensorRT: {msg}", flush=True)

    return cuda, trt, Log()


def load_plugin(trt: Any, manifest: dict[str, Any]) -> str:
    """Register the compiled token-selection plugin where the model needs it; returns its sha256, or nothing."""
    library = manifest["token_select"]["library"]
    if library is None:
        return ""
    path = Path(FOLDER, library)
    if not path.is_file():
        raise KitError(f"{library}: not compiled yet; run the cmake commands of README.txt")
    registry = trt.get_plugin_registry()
    if registry.load_library(str(path)) is None or registry.get_creator("TokenSelect", "1", "infoprune") is None:
        raise KitError(f"{library}: TensorRT cannot load the plugin; compile it against this TensorRT's headers")
    return sha256(path)


def last_error(log: Any) -> str:
    """What TensorRT complained about last, shortened to fit a line."""
    return " ".join(log.errors[-1].split())[:300] if log.errors else "TensorRT gave no reason"


class Session:
    """An engine with one context. Inputs and outputs are float32 or integers, whatever the engine computes in."""

    def __init__(self, cuda: Cuda, trt: Any, log: Any, plan: bytes, manifest: dict[str, Any]) -> None:
        self._cuda, self._trt, self._log = cuda, trt, log
        self._types = {
            trt.DataType.FLOAT: np.dtype(np.float32),
            trt.DataType.HALF: np.dtype(np.float16),
            trt.DataType.BF16: np.dtype(np.uint16),  # its bits; NumPy has no such type
            trt.DataType.INT32: np.dtype(np.int32),
            trt.DataType.INT64: np.dtype(np.int64),
        }
        self._runtime = trt.Runtime(log)
        if manifest["target"]["version_compatible"]:
            self._runtime.engine_host_code_allowed = True
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise KitError(f"TensorRT {trt.__version__} cannot read the engine ({last_error(log)}); run build.py again")
        self._context = self.engine.create_execution_context()
        if self._context is None:
            raise KitError(f"no memory for an execution context ({last_error(log)}); close other programs")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.inputs = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in names if n not in self.inputs]
        self._check(manifest)
        self._memory: dict[str, tuple[int, int]] = {}
        self._results: dict[str, np.ndarray] = {}

    def _check(self, manifest: dict[str, Any]) -> None:
        for kind, names in (("inputs", self.inputs), ("outputs", self.outputs)):
            if sorted(names) != sorted(manifest[kind]):
                raise KitError(f"the engine's {kind} are {sorted(names)}, not {sorted(manifest[kind])}; build again")
        for name in (*self.inputs, *self.outputs):
            if self.engine.get_tensor_dtype(name) not in self._types:
                raise KitError(f"{name} is {self.engine.get_tensor_dtype(name)}, which no encoder of a kit has")
            if self.engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE:
                raise KitError(f"shapes depend on the values of {name}, which no kit can state; make the kit again")

    def profile(self) -> dict[str, Any]:
        """Least, usual and largest shapes of the first optimisation profile."""
        if self.engine.num_optimization_profiles < 1:
            raise KitError("the engine has no optimisation profile; run build.py again")
        shapes = {name: self.engine.get_tensor_profile_shape(name, 0) for name in self.inputs}
        return {
            name: {corner: list(dims) for corner, dims in zip(("min", "opt", "max"), corners)}
            for name, corners in shapes.items()
        }

    def layers(self) -> str:
        """What the engine tells about its layers, as JSON text."""
        inspector = self.engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def load(self, inputs: dict[str, np.ndarray]) -> None:
        """Copy inputs to the device and settle all shapes and addresses."""
        kept = []
        for name in self.inputs:
            array = np.ascontiguousarray(self._encoded(name, inputs[name]))
            kept.append(array)
            if not self._context.set_input_shape(name, tuple(array.shape)):
                raise KitError(f"{name} of shape {list(array.shape)} lies outside the engine's profile; build again")
            self._cuda.to_device(self._place(name, array.nbytes), array)
        if self._context.infer_shapes():
            raise KitError(f"TensorRT cannot settle the engine's shapes ({last_error(self._log)}); build again")
        self._results = {}
        for name in self.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            if any(extent < 0 for extent in shape):
                raise KitError(f"the shape of {name} depends on data, {list(shape)}; make the kit again")
            self._results[name] = np.empty(shape, self._types[self.engine.get_tensor_dtype(name)])
            self._place(name, self._results[name].nbytes)
        self._cuda.synchronise()  # until then the arrays must stay
        del kept

    def enqueue(self) -> None:
        """Put one call on the stream."""
        if not self._context.execute_async_v3(self._cuda.stream):
            raise KitError(f"the engine does not run ({last_error(self._log)})")

    def fetch(self) -> dict[str, np.ndarray]:
        """The outputs of the last call."""
        for name, array in self._results.items():
            self._cuda.to_host(array, self._memory[name][0])
        self._cuda.synchronise()
        return {name: self._decoded(name, array) for name, array in self._results.items()}

    def _place(self, name: str, size: int) -> int:
        address, room = self._memory.get(name, (0, -1))
        if room < size:
            if room >= 0:
                self._cuda.free(address)
            address = self._cuda.allocate(size)
            self._memory[name] = (address, size)
        if not self._context.set_tensor_address(name, address):
            raise KitError(f"TensorRT does not accept memory for {name} ({last_error(self._log)})")
        return address

    def _encoded(self, name: str, array: np.ndarray) -> np.ndarray:
        dtype = self.engine.get_tensor_dtype(name)
        return to_bfloat16(array) if dtype == self._trt.DataType.BF16 else array.astype(self._types[dtype])

    def _decoded(self, name: str, array: np.ndarray) -> np.ndarray:
        if self.engine.get_tensor_dtype(name) == self._trt.DataType.BF16:
            return from_bfloat16(array)
        return array.astype(np.float32) if array.dtype == np.float16 else array.copy()


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, uint16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    return np.where(np.isnan(array), 0x7FC0, rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16, uint16, to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
