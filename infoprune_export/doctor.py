"""What is installed, what runs here, and the command that mends what does not: ``infoprune-export doctor``.

1. Packages   every distribution the toolkit uses: version, supported range, whether it imports
2. Devices    the NVIDIA driver, and what torch can do with it
3. Backends   the engines that can be opened here
4. Conflicts  installed things that exclude each other
5. Report     the same findings for a person; `dataclasses.asdict` gives them to a program

A finding of status ``problem`` means a run will fail: the command exits with 1, in all other cases with 0. Only the
standard library is needed, so ``python -m infoprune_export.doctor`` still speaks when the command itself cannot start.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import platform
import re
import struct
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

import infoprune_export

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Status = Literal["ok", "info", "warning", "problem"]
"""From harmless to a run that fails: `info` needs no action, `warning` is something installed that cannot be used."""
Group = Literal["packages", "devices", "backends", "conflicts"]


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis. `fix` is a shell command that can be pasted as it is."""

    group: Group
    subject: str
    status: Status
    detail: str
    fix: str | None = None


@dataclass(frozen=True)
class Package:
    """A distribution the toolkit uses. Without an extra it is required."""

    name: str
    minimum: str = ""
    extra: str = ""
    module: str = ""
    """Imported to see that it loads. Empty for backends, which have their own check, and for tools run as commands."""
    aliases: tuple[str, ...] = ()
    """Distributions that install the same thing under another name."""
    below: str = ""

    @property
    def supported(self) -> str:
        """The supported range as pip writes it; empty when any version does."""
        bounds = ((">=", self.minimum), ("<", self.below))
        return ",".join(sign + bound for sign, bound in bounds if bound)

    @property
    def requirement(self) -> str:
        return self.name + self.supported

    @property
    def install(self) -> str:
        return f"pip install 'infoprune-export[{self.extra}]'" if self.extra else f"pip install '{self.requirement}'"

    @property
    def reinstall(self) -> str:
        # Its own files first, then whatever the fresh copy depends on; the other order can leave the latter undone.
        return f"pip install --force-reinstall --no-deps '{self.requirement}' && pip install '{self.requirement}'"


ONNXRUNTIME = Package("onnxruntime", "1.22", extra="cpu")
ONNXRUNTIME_GPU = Package("onnxruntime-gpu", "1.22", extra="gpu")
TENSORRT = Package("tensorrt", "10.3", extra="tensorrt", aliases=("tensorrt-cu13", "tensorrt-cu12"), below="12")
TORCH = Package("torch", "2.11", module="torch")

PACKAGES = (
    Package("numpy", "1.26", module="numpy"),
    TORCH,
    Package("transformers", "5.17", module="transformers"),
    Package("tokenizers", "0.21", module="tokenizers"),
    Package("safetensors", "0.4.3", module="safetensors"),
    Package("accelerate", "1.0", module="accelerate"),
    Package("optimum", "2.0", module="optimum"),
    Package("requests", "2.31", module="requests"),
    Package("onnx", "1.19", module="onnx"),
    Package("onnxscript", "0.6", module="onnxscript"),
    Package("onnx-ir", "0.1.9", module="onnx_ir"),
    Package("pillow", "10.1", module="PIL.Image"),
    Package("matplotlib", "3.9", module="matplotlib"),
    Package("jinja2", "3.1", module="jinja2"),
    Package("pyyaml", "6.0", module="yaml"),
    Package("pydantic", "2.10", module="pydantic"),
    Package("filelock", "3.12", module="filelock"),
    Package("click", "8.1", module="click"),
    Package("rich", "13.7", module="rich"),
    ONNXRUNTIME,
    ONNXRUNTIME_GPU,
    TENSORRT,
    Package("lmms-eval", "0.3", extra="lmms"),
    Package("pytest", "8.0", extra="dev"),
    Package("pytest-cov", "5.0", extra="dev"),
    Package("hypothesis", "6.100", extra="dev"),
    Package("ruff", "0.9", extra="dev"),
    Package("mypy", "1.15", extra="dev"),
    Package("scipy", "1.11", extra="dev"),
    Package("types-pyyaml", extra="dev"),
)
"""What pyproject.toml declares, with what it cannot say; a test holds the two together."""

_DRIVER_LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
_JETSON_RELEASE = Path("/etc/nv_tegra_release")
_REPLACE_TORCH = f"pip uninstall -y torch && {TORCH.install}"
"""Pip's default build of torch for Linux is one with CUDA."""


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver: how many devices it offers, and up to which CUDA version; or why it offers none."""

    devices: int
    cuda: str = ""
    reason: str = ""


def examine() -> list[Finding]:
    """Run every check. Takes as long as importing the packages does (seconds); changes nothing, raises nothing.

    Packages come first on purpose: a torch built for CUDA brings CUDA's libraries into the process, where ONNX
    Runtime's CUDA provider finds them in a real run too.
    """
    driver = find_driver()
    return [finding for check in CHECKS for finding in check(driver)]


def worst(findings: Sequence[Finding]) -> Status:
    """The gravest status; ``problem`` is the one that fails the command."""
    order: tuple[Status, ...] = get_args(Status)
    return max((finding.status for finding in findings), key=order.index, default="ok")


# ── The machine, as seen from here ───────────────────────────────────────────


class _BrokenError(Exception):
    """Foreign code failed; the message is the reason in one line."""


@contextlib.contextmanager
def _guard() -> Iterator[None]:
    """Around foreign code: a damaged package or native library can raise anything, and warns before it does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        raise _BrokenError(f"{type(error).__name__}: {text[:197] + '...' if len(text) > 200 else text}") from error


def _installed_version(name: str) -> str | None:
    """Version by a distribution's metadata; None when absent, "unknown" when the metadata is damaged."""
    try:
        return metadata.version(name) or "unknown"
    except metadata.PackageNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def _import(name: str) -> ModuleType:
    with _guard():
        return importlib.import_module(name)


def _package_folder(name: str) -> Path | None:
    """Where a top-level package lies, without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(folders[0]) if folders else None


def _load_library(name: str) -> Any:
    return ctypes.CDLL(name)


def find_driver() -> Driver:
    """Ask the driver itself, through its C interface: needs no CUDA toolkit and no package.

    TensorRT's Runtime and Builder are never created by the doctor: without a driver they crash the process.
    """
    try:
        library = _load_library(_DRIVER_LIBRARY)
        count, version = ctypes.c_int(), ctypes.c_int()
        if code := library.cuInit(0):
            return Driver(0, reason=f"cuInit returned CUDA error {code}")
        if code := library.cuDeviceGetCount(ctypes.byref(count)):
            return Driver(0, reason=f"cuDeviceGetCount returned CUDA error {code}")
        library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError) as error:
        return Driver(0, reason=f"no NVIDIA driver ({error})")
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Driver(count.value, cuda, "" if count.value else "the NVIDIA driver offers no device")


def _torch_cuda() -> str | None:
    """CUDA version torch was built for, read from its version file; the distribution's version does not always say."""
    folder = _package_folder("torch")
    try:
        text = (folder / "version.py").read_text(encoding="utf-8") if folder else ""
    except (OSError, UnicodeDecodeError):
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)", text, re.MULTILINE)
    return match[1] if match else None


def _providers() -> list[str]:
    """ONNX Runtime's execution providers; what removing one of its two distributions leaves imports, but has none."""
    runtime = _import("onnxruntime")
    with _guard():
        return list(runtime.get_available_providers())


def _needed_libraries(path: Path) -> list[str]:
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


def _provider_libraries(provider: Literal["cuda", "tensorrt"]) -> list[str]:
    """Shared libraries an execution provider links to; nothing when ONNX Runtime comes without that provider."""
    folder = _package_folder("onnxruntime")
    return _needed_libraries(folder / "capi" / f"libonnxruntime_providers_{provider}.so") if folder else []


def _unless_jetson(fix: str) -> str | None:
    """JetPack brings its own CUDA, TensorRT and builds on top of them; pip's would not fit its driver."""
    return None if _JETSON_RELEASE.exists() else fix


def _release(version: str) -> tuple[int, ...]:
    """Numbers of a version without trailing zeros; () when it has none.

    Pre-release and local parts are dropped: NVIDIA's own builds are called 2.11.0a0+hash and count as 2.11.
    """
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _find(package: Package) -> tuple[str, str] | None:
    """Name and version of the distribution that provides a package."""
    for name in (package.name, *package.aliases):
        if version := _installed_version(name):
            return name, version
    return None


# ── 1. Packages ──────────────────────────────────────────────────────────────


def check_packages(driver: Driver) -> list[Finding]:
    return [
        Finding("packages", "python", "ok", platform.python_version()),
        Finding("packages", "infoprune-export", "ok", infoprune_export.__version__),
        *(_check_package(package, driver) for package in PACKAGES),
    ]


def _check_package(package: Package, driver: Driver) -> Finding:
    role = f"extra {package.extra}" if package.extra else "required"
    wanted = f"{role}, {package.supported}" if package.supported else role

    def finding(status: Status, detail: str, fix: str | None = None) -> Finding:
        return Finding("packages", package.name, status, f"{detail} ({wanted})", fix)

    found = _find(package)
    if found is None:
        if package in (ONNXRUNTIME, ONNXRUNTIME_GPU):
            return _absent_onnxruntime(package, driver, finding)
        if package is TENSORRT and _JETSON_RELEASE.exists():
            detail = "not visible: it comes with JetPack, and a venv sees it only with --system-site-packages"
            return finding("info", detail, "sudo apt-get install python3-libnvinfer")
        return finding("info" if package.extra else "problem", "not installed", package.install)
    name, version = found
    shown = version if name == package.name else f"{version} as {name}"
    if version == "unknown":
        return finding("problem", "version unknown, its metadata is damaged", package.reinstall)
    if _release(version) < _release(package.minimum):
        return finding("problem", f"{shown} is too old", package.install)
    if package.below and _release(version) >= _release(package.below):
        return finding("problem", f"{shown} is too new", package.install)
    if package.module:
        try:
            _import(package.module)
        except _BrokenError as reason:
            return finding("problem", f"{shown} cannot be imported: {reason}", package.reinstall)
    return finding("ok", shown)


def _absent_onnxruntime(package: Package, driver: Driver, finding: Callable[..., Finding]) -> Finding:
    """Exactly one of the two distributions is needed, so offer neither to someone who has the other."""
    other = ONNXRUNTIME_GPU if package is ONNXRUNTIME else ONNXRUNTIME
    if _find(other):
        return finding("info", f"not installed; {other.name} takes its place")
    fitting = ONNXRUNTIME_GPU if driver.devices else ONNXRUNTIME
    if package is not fitting:
        return finding("info", f"not installed; {other.name} fits this machine")
    return finding("problem", "not installed; without ONNX Runtime no engine can be built or checked", package.install)


# ── 2. Devices ───────────────────────────────────────────────────────────────


def check_devices(driver: Driver) -> list[Finding]:
    cpu = Finding("devices", "cpu", "ok", f"{platform.machine()}, {os.cpu_count()} logical processors")
    built_for = _torch_cuda()
    if not driver.devices:
        cuda = Finding("devices", "cuda", "info", f"{driver.reason}; everything runs on the CPU")
        unused = Finding("devices", "torch", "info", f"built for CUDA {built_for}, which has no device here")
        return [cpu, cuda, unused] if built_for else [cpu, cuda]
    cuda = Finding("devices", "cuda", "ok", f"{driver.devices} device(s), NVIDIA driver for CUDA up to {driver.cuda}")
    return [cpu, cuda, *_check_torch_cuda(built_for, driver)]


def _check_torch_cuda(built_for: str | None, driver: Driver) -> list[Finding]:
    if _find(TORCH) is None:
        return []  # reported as a package, and so is a torch that cannot be imported
    if built_for is None:
        return [
            Finding("devices", "torch", "info", "built without CUDA: the GPU is idle", _unless_jetson(_REPLACE_TORCH))
        ]
    try:
        torch = _import("torch")
    except _BrokenError:
        return []
    reason = "torch finds no device"
    try:
        with _guard():
            names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except _BrokenError as error:
        names, reason = [], str(error)
    if not names:
        detail = f"built for CUDA {built_for}, driver for up to {driver.cuda}: {reason}; update the driver"
        return [Finding("devices", "torch", "warning", detail)]
    return [Finding("devices", f"cuda:{index}", "ok", name) for index, name in enumerate(names)]


# ── 3. Backends ──────────────────────────────────────────────────────────────


def check_backends(driver: Driver) -> list[Finding]:
    return [*_check_onnxruntime(driver), _check_tensorrt(driver)]


def _check_onnxruntime(driver: Driver) -> list[Finding]:
    installed = next((package for package in (ONNXRUNTIME_GPU, ONNXRUNTIME) if _find(package)), None)
    if installed is None:
        return [Finding("backends", "onnxruntime", "info", "not installed")]
    try:
        providers = _providers()
    except _BrokenError as reason:
        return [Finding("backends", "onnxruntime", "problem", f"installed but unusable: {reason}", installed.reinstall)]
    return [Finding("backends", "onnxruntime", "ok", ", ".join(providers)), *_check_cuda_provider(providers, driver)]


def _check_tensorrt(driver: Driver) -> Finding:
    found = _find(TENSORRT)
    if found is None:
        return Finding("backends", "tensorrt", "info", "not installed; engines are built on the device")
    name, version = found
    try:
        _import("tensorrt")
    except _BrokenError as reason:
        fix = _unless_jetson(replace(TENSORRT, name=name).reinstall)
        return Finding("backends", "tensorrt", "warning", f"{version} cannot be imported: {reason}", fix)
    if not driver.devices:
        return Finding("backends", "tensorrt", "info", f"{version}; no NVIDIA device to build or run an engine on")
    return Finding("backends", "tensorrt", "ok", version)


def _check_cuda_provider(providers: Sequence[str], driver: Driver) -> list[Finding]:
    """Being available means compiled in; whether it starts depends on the driver and on CUDA's libraries."""
    provider = "CUDAExecutionProvider"
    if provider not in providers:
        if not driver.devices:
            return []
        detail = "not in this ONNX Runtime: the GPU is idle"
        return [Finding("backends", provider, "info", detail, _unless_jetson(_replace_onnxruntime(ONNXRUNTIME_GPU)))]
    if not driver.devices:
        detail = "cannot start without NVIDIA's driver; install it if there is a GPU, else ONNX Runtime for the CPU"
        return [Finding("backends", provider, "warning", detail, _replace_onnxruntime(ONNXRUNTIME))]
    missing = []
    for library in _provider_libraries("cuda"):
        # Its dependencies one by one, never the provider: outside a session it is not initialised and stays that way.
        try:
            _load_library(library)
        except OSError:
            missing.append(library)
    if missing:
        detail = f"cannot start: {', '.join(missing)} not found; torch built for that CUDA version brings them"
        return [Finding("backends", provider, "warning", detail, _unless_jetson(_REPLACE_TORCH))]
    return [Finding("backends", provider, "ok", "the driver and CUDA's libraries are in place")]


def _replace_onnxruntime(wanted: Package) -> str:
    # Both go: they share a folder, and removing one of two takes files of the other with it.
    return f"pip uninstall -y {ONNXRUNTIME.name} {ONNXRUNTIME_GPU.name} && {wanted.install}"


# ── 4. Conflicts ─────────────────────────────────────────────────────────────


def check_onnxruntime_twice(driver: Driver) -> list[Finding]:
    """Both distributions write the same files; what imports is a mixture that depends on the order of installation."""
    if not (_find(ONNXRUNTIME) and _find(ONNXRUNTIME_GPU)):
        return []
    subject = f"{ONNXRUNTIME.name} + {ONNXRUNTIME_GPU.name}"
    detail = "both are installed and overwrite each other's files; keep one"
    fix = _replace_onnxruntime(ONNXRUNTIME_GPU if driver.devices else ONNXRUNTIME)
    return [Finding("conflicts", subject, "problem", detail, fix)]


def check_tensorrt_twice(driver: Driver) -> list[Finding]:
    """ONNX Runtime's TensorRT provider is linked to one major version of libnvinfer; another does not do.

    A warning only: TensorRT itself and the CUDA provider work beside each other.
    """
    libraries = [re.fullmatch(r"libnvinfer\.so\.(\d+)", library) for library in _provider_libraries("tensorrt")]
    linked = next((int(match[1]) for match in libraries if match), None)
    found = _find(TENSORRT)
    if linked is None or found is None or _release(found[1])[:1] in ((), (linked,)):
        return []
    name, version = found
    detail = (
        f"ONNX Runtime's TensorrtExecutionProvider needs libnvinfer.so.{linked}, {name} is {version}; "
        "use CUDAExecutionProvider, or install the TensorRT it needs"
    )
    fix = f"pip install '{name}=={linked}.*'"
    return [Finding("conflicts", "onnxruntime + tensorrt", "warning", detail, _unless_jetson(fix))]


CHECKS: tuple[Callable[[Driver], list[Finding]], ...] = (
    check_packages,
    check_devices,
    check_backends,
    check_onnxruntime_twice,
    check_tensorrt_twice,
)


# ── 5. Report ────────────────────────────────────────────────────────────────

_STYLES: dict[Status, str] = {"ok": "green", "info": "cyan", "warning": "yellow", "problem": "bold red"}


def render(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Print a table, the commands to paste and the verdict; plain lines when rich itself is what is broken."""
    lines = []
    for title, fixes in (("To mend:", commands(findings)), ("Optional:", commands(findings, optional=True))):
        lines += [title, *(f"  {fix}" for fix in fixes)] if fixes else []
    counts = {status: sum(f.status == status for f in findings) for status in ("problem", "warning")}
    lines.append(", ".join(f"{count} {status}{'s' * (count != 1)}" for status, count in counts.items()))
    try:
        console = console or _import("rich.console").Console()
        _import("rich.table")
    except _BrokenError:
        rows = [f"{f.group:10} {f.subject:28} {f.status:8} {f.detail}" for f in findings]
        sys.stdout.write("\n".join([*rows, *lines]) + "\n")
        return
    console.print(_table(findings))
    for line in lines:
        # Outside the table and unwrapped, or a long command could not be pasted; markup would swallow the [cpu].
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def commands(findings: Sequence[Finding], *, optional: bool = False) -> list[str]:
    """Fixes of warnings and problems in order, each once; with `optional`, those of all other findings instead."""
    needed = dict.fromkeys(f.fix for f in findings if f.fix and f.status in ("warning", "problem"))
    offered = dict.fromkeys(f.fix for f in findings if f.fix and f.fix not in needed)
    return list(offered if optional else needed)


def _table(findings: Sequence[Finding]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("group", "subject", "status", "detail")
    for group in get_args(Group):
        members = [finding for finding in findings if finding.group == group]
        for index, finding in enumerate(members):
            status = Text(finding.status, _STYLES[finding.status])
            table.add_row(group if index == 0 else "", Text(finding.subject), status, Text(finding.detail))
        if not members:
            table.add_row(group, "", Text("ok", _STYLES["ok"]), "none found")
        table.add_section()
    return table


if __name__ == "__main__":
    result = examine()
    render(result)
    sys.exit(1 if worst(result) == "problem" else 0)
