"""The TensorRT and the GPU of this machine, looked at before anything of TensorRT is started.

TensorRT's Runtime and Builder end the whole process when there is no usable driver, so the driver is asked first,
through its own C interface.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import TYPE_CHECKING, Any

from infoprune_export.doctor.probes import Driver, Gpu, find_driver, on_jetson, release
from infoprune_export.errors import InfopruneError

if TYPE_CHECKING:
    from infoprune_export.recipe import TensorRtTarget

_MODULES = ("tensorrt", "tensorrt_bindings")
"""JetPack's python3-libnvinfer and pip's tensorrt install the first; pip's bindings alone, the second."""
_SUPPORTED = ((10, 3), (12,))
AMPERE = 80
"""Hardware-compatible engines run from this compute capability on."""
_KIT = "or write a kit that builds on the device: infoprune-export kit RECIPE --target"


def load_tensorrt() -> Any:
    """TensorRT's Python module.

    Raises:
        InfopruneError: it is not installed, does not load, is something else of that name, or is too old or too new.
    """
    reasons = []
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            reasons.append(f"no module named {error.name}")
        except (ImportError, OSError) as error:
            raise InfopruneError(
                f"{name} is installed but does not load ({' '.join(str(error).split())[:200]}); {_installing()}"
            ) from None
        else:
            # A folder called tensorrt on the path imports as an empty package.
            if hasattr(module, "Builder"):
                return _checked(module)
            reasons.append(f"the module {name} at {_place(module)} has no Builder")
    raise InfopruneError(f"TensorRT cannot be imported ({reasons[0]}); {_installing()}")


def _place(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), "an unknown place")


def _checked(module: Any) -> Any:
    low, high = _SUPPORTED
    if not low <= release(module.__version__) < high:
        raise InfopruneError(
            f"TensorRT {module.__version__}: supported is {'.'.join(map(str, low))} to below {high[0]}; {_installing()}"
        )
    return module


def _installing() -> str:
    if on_jetson():
        return (
            "install JetPack's with: sudo apt-get install python3-libnvinfer, and make the virtual environment with "
            "--system-site-packages"
        )
    return "install it with: pip install 'infoprune-export[tensorrt]'"


def find_gpu(driver: Driver | None = None) -> tuple[Gpu, Driver]:
    """The first device the driver offers; CUDA_VISIBLE_DEVICES chooses which that is.

    Raises:
        InfopruneError: there is no driver or no device.
    """
    driver = driver or find_driver()
    if not driver.gpus:
        raise InfopruneError(
            f"TensorRT needs an NVIDIA GPU: {driver.reason or 'the driver does not describe its devices'}; run it on "
            "the target machine"
        )
    return driver.gpus[0], driver


def series_of(version: str) -> str:
    """First two numbers of a version."""
    match = re.match(r"\d+\.\d+", version)
    return match[0] if match else version


def why_not_here(target: TensorRtTarget, driver: Driver | None = None) -> str | None:
    """Why this machine cannot build for a target, in one line; None if it can."""
    try:
        trt = load_tensorrt()
        gpu, driver = find_gpu(driver)
    except InfopruneError as error:
        return str(error)
    return mismatch(target, trt.__version__, gpu, driver.cuda)


def mismatch(target: TensorRtTarget, version: str, gpu: Gpu, cuda: str) -> str | None:
    """How a machine differs from a target so that an engine built on it would not be the target's."""
    if series_of(version) != target.series:
        return f"{target.name} has TensorRT {target.series}, here is {version}"
    if gpu.sm != target.sm and not (target.hardware_compatible and min(gpu.sm, target.sm) >= AMPERE):
        return f"{target.name} has compute capability {dotted(target.sm)}, {gpu.name} has {dotted(gpu.sm)}"
    if release(cuda)[:1] < release(target.cuda)[:1]:
        return f"{target.name} needs CUDA {target.cuda}, the driver offers {cuda}"
    return None


def dotted(sm: int) -> str:
    """Compute capability as NVIDIA writes it."""
    return f"{sm // 10}.{sm % 10}"


def check_buildable(target: TensorRtTarget) -> tuple[Any, Gpu, Driver]:
    """TensorRT's module, the device and the driver, if engines for the target can be built here.

    Raises:
        InfopruneError: they cannot.
    """
    trt = _or_kit(load_tensorrt, target)
    gpu, driver = _or_kit(find_gpu, target)
    if reason := mismatch(target, trt.__version__, gpu, driver.cuda):
        raise InfopruneError(
            f"{reason}: an engine built here would not run there; build on that machine, {_KIT} {target.name} -o kit"
        )
    return trt, gpu, driver


def _or_kit(find: Any, target: TensorRtTarget) -> Any:
    try:
        return find()
    except InfopruneError as error:
        raise InfopruneError(f"target {target.name}: {error}, {_KIT} {target.name} -o kit") from None
