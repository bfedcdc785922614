"""What this machine says: its driver, the versions installed, what imports, what a library links to."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import re
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from infoprune_export.doctor.packages import Package

_DRIVER_LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
_JETSON_RELEASE = Path("/etc/nv_tegra_release")


@dataclass(frozen=True)
class Gpu:
    """A device as the driver describes it."""

    name: str
    sm: int
    """Compute capability: 87 is 8.7, 120 is 12.0."""
    memory: int
    """Bytes."""


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver: how many devices it offers, and up to which CUDA version; or why it offers none."""

    devices: int
    cuda: str = ""
    reason: str = ""
    gpus: tuple[Gpu, ...] = ()
    """The devices in order; empty where the driver does not describe them."""


class BrokenError(Exception):
    """Foreign code failed; the message is the reason in one line."""


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Around foreign code: a damaged package or native library can raise anything, and warns before it does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        raise BrokenError(f"{type(error).__name__}: {text[:197] + '...' if len(text) > 200 else text}") from error


def installed_version(name: str) -> str | None:
    """Version by a distribution's metadata; None when absent, "unknown" when the metadata is damaged."""
    try:
        return metadata.version(name) or "unknown"
    except metadata.PackageNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def load_module(name: str) -> ModuleType:
    with guard():
        return importlib.import_module(name)


def package_folder(name: str) -> Path | None:
    """Where a top-level package lies, without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(folders[0]) if folders else None


def load_library(name: str) -> Any:
    return ctypes.CDLL(name)


def find_driver() -> Driver:
    """Ask the driver itself, through its C interface: needs no CUDA toolkit and no package.

    TensorRT's Runtime and Builder are never created by the doctor: without a driver they crash the process.
    """
    try:
        library = load_library(_DRIVER_LIBRARY)
        count, version = ctypes.c_int(), ctypes.c_int()
        if code := library.cuInit(0):
            return Driver(0, reason=f"cuInit returned CUDA error {code}")
        if code := library.cuDeviceGetCount(ctypes.byref(count)):
            return Driver(0, reason=f"cuDeviceGetCount returned CUDA error {code}")
        library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError) as error:
        return Driver(0, reason=f"no NVIDIA driver ({error})")
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    reason = "" if count.value else "the NVIDIA driver offers no device"
    return Driver(count.value, cuda, reason, _gpus(library, count.value))


_COMPUTE_CAPABILITY = (75, 76)
"""CUdevice_attribute numbers of the major and minor version, the same in every release."""


def _gpus(library: Any, count: int) -> tuple[Gpu, ...]:
    gpus = []
    for index in range(count):
        device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(128)
        major, minor = ctypes.c_int(), ctypes.c_int()
        try:
            failed = library.cuDeviceGet(ctypes.byref(device), index)
            for out, attribute in zip((major, minor), _COMPUTE_CAPABILITY, strict=True):
                failed |= library.cuDeviceGetAttribute(ctypes.byref(out), attribute, device)
            failed |= library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
            failed |= library.cuDeviceGetName(name, len(name), device)
        except AttributeError:
            return ()
        if failed:
            return ()
        gpus.append(Gpu(name.value.decode(errors="replace"), 10 * major.value + minor.value, memory.value))
    return tuple(gpus)


def torch_cuda() -> str | None:
    """CUDA version torch was built for, read from its version file; the distribution's version does not always say."""
    folder = package_folder("torch")
    try:
        text = (folder / "version.py").read_text(encoding="utf-8") if folder else ""
    except (OSError, UnicodeDecodeError):
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)", text, re.MULTILINE)
    return match[1] if match else None


def providers_of_onnxruntime() -> list[str]:
    """ONNX Runtime's execution providers; what removing one of its two distributions leaves imports, but has none."""
    runtime = load_module("onnxruntime")
    with guard():
        return list(runtime.get_available_providers())


def needed_libraries(path: Path) -> list[str]:
    """DT_NEEDED names of a 64-bit little-endian ELF file; nothing for any other or damaged file.

    Scanning the bytes for names would be shorter, but a CUDA provider has 300 MB and names libraries it never links.
    """
    try:
        with path.open("rb") as file:

            def read(layout: str, offset: int) -> tuple[int, ...]:
                file.seek(offset)
                return struct.unpack(layout, file.read(struct.calcsize(layout)))

            if file.read(6) != b"\x7fELF\x02\x01":
                return []
            (table,) = read("<Q", 32)
            size, count = read("<HH", 54)
            # type, flags, offset in the file, address when loaded, physical address, size in the file
            segments = [read("<IIQQQQ", table + size * index) for index in range(count)]
            start, extent = next((s[2], s[5]) for s in segments if s[0] == 2)  # PT_DYNAMIC
            entries = [read("<qQ", start + at) for at in range(0, extent, 16)]
            address = next(value for tag, value in entries if tag == 5)  # DT_STRTAB is an address: find its PT_LOAD
            strings = next(address - s[3] + s[2] for s in segments if s[0] == 1 and 0 <= address - s[3] < s[5])
            names = []
            for tag, value in entries:
                if tag == 1:  # DT_NEEDED
                    file.seek(strings + value)
                    names.append(file.read(256).partition(b"\0")[0].decode())
            return names
    except (OSError, ValueError, OverflowError, struct.error, StopIteration):
        return []


def provider_libraries(provider: Literal["cuda", "tensorrt"]) -> list[str]:
    """Shared libraries an execution provider links to; nothing when ONNX Runtime comes without that provider."""
    folder = package_folder("onnxruntime")
    return needed_libraries(folder / "capi" / f"libonnxruntime_providers_{provider}.so") if folder else []


def on_jetson() -> bool:
    """Whether JetPack runs here."""
    return _JETSON_RELEASE.exists()


def release(version: str) -> tuple[int, ...]:
    """Numbers of a version without trailing zeros; () when it has none.

    Pre-release and local parts are dropped: NVIDIA's own builds are called 2.11.0a0+hash and count as 2.11.
    """
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def find_package(package: Package) -> tuple[str, str] | None:
    """Name and version of the distribution that provides a package."""
    for name in (package.name, *package.aliases):
        if version := installed_version(name):
            return name, version
    return None
