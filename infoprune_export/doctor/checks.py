"""Packages, devices, backends, targets, conflicts: from what the machine says to findings with the command that mends.

Each check takes the driver from its caller, so a machine with another one can be judged.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from infoprune_export import __version__
from infoprune_export.doctor.findings import Finding, Status
from infoprune_export.doctor.packages import ONNXRUNTIME, ONNXRUNTIME_GPU, PACKAGES, TENSORRT, TORCH, Package
from infoprune_export.doctor.probes import (
    BrokenError,
    Driver,
    find_driver,
    find_package,
    guard,
    load_library,
    load_module,
    on_jetson,
    provider_libraries,
    providers_of_onnxruntime,
    release,
    torch_cuda,
)

_REPLACE_TORCH = f"pip uninstall -y torch && {TORCH.install}"
"""Pip's default build of torch for Linux is one with CUDA."""


def _unless_jetson(fix: str) -> str | None:
    """JetPack brings its own CUDA, TensorRT and builds on top of them; pip's would not fit its driver."""
    return None if on_jetson() else fix


# ── 1. Packages ──────────────────────────────────────────────────────────────


def check_packages(driver: Driver) -> list[Finding]:
    return [
        Finding("packages", "python", "ok", platform.python_version()),
        Finding("packages", "infoprune-export", "ok", __version__),
        *(check_package(package, driver) for package in PACKAGES),
    ]


def check_package(package: Package, driver: Driver) -> Finding:
    role = f"extra {package.extra}" if package.extra else "required"
    wanted = f"{role}, {package.supported}" if package.supported else role

    def finding(status: Status, detail: str, fix: str | None = None) -> Finding:
        return Finding("packages", package.name, status, f"{detail} ({wanted})", fix)

    found = find_package(package)
    if found is None:
        if package in (ONNXRUNTIME, ONNXRUNTIME_GPU):
            return _absent_onnxruntime(package, driver, finding)
        if package is TENSORRT and on_jetson():
            detail = "not visible: it comes with JetPack, and a venv sees it only with --system-site-packages"
            return finding("info", detail, "sudo apt-get install python3-libnvinfer")
        return finding("info" if package.extra else "problem", "not installed", package.install)
    name, version = found
    shown = version if name == package.name else f"{version} as {name}"
    if version == "unknown":
        return finding("problem", "version unknown, its metadata is damaged", package.reinstall)
    if release(version) < release(package.minimum):
        return finding("problem", f"{shown} is too old", package.install)
    if package.below and release(version) >= release(package.below):
        return finding("problem", f"{shown} is too new", package.install)
    if package.module:
        try:
            load_module(package.module)
        except BrokenError as reason:
            return finding("problem", f"{shown} cannot be imported: {reason}", package.reinstall)
    return finding("ok", shown)


def _absent_onnxruntime(package: Package, driver: Driver, finding: Callable[..., Finding]) -> Finding:
    """Exactly one of the two distributions is needed, so offer neither to someone who has the other."""
    other = ONNXRUNTIME_GPU if package is ONNXRUNTIME else ONNXRUNTIME
    if find_package(other):
        return finding("info", f"not installed; {other.name} takes its place")
    fitting = ONNXRUNTIME_GPU if driver.devices else ONNXRUNTIME
    if package is not fitting:
        return finding("info", f"not installed; {other.name} fits this machine")
    return finding("problem", "not installed; without ONNX Runtime no engine can be built or checked", package.install)


# ── 2. Devices ───────────────────────────────────────────────────────────────


def check_devices(driver: Driver) -> list[Finding]:
    cpu = Finding("devices", "cpu", "ok", f"{platform.machine()}, {os.cpu_count()} logical processors")
    built_for = torch_cuda()
    if not driver.devices:
        cuda = Finding("devices", "cuda", "info", f"{driver.reason}; everything runs on the CPU")
        unused = Finding("devices", "torch", "info", f"built for CUDA {built_for}, which has no device here")
        return [cpu, cuda, unused] if built_for else [cpu, cuda]
    cuda = Finding("devices", "cuda", "ok", f"{driver.devices} device(s), NVIDIA driver for CUDA up to {driver.cuda}")
    return [cpu, cuda, *_check_torch_cuda(built_for, driver)]


def _check_torch_cuda(built_for: str | None, driver: Driver) -> list[Finding]:
    if find_package(TORCH) is None:
        return []  # reported as a package, and so is a torch that cannot be imported
    if built_for is None:
        return [
            Finding("devices", "torch", "info", "built without CUDA: the GPU is idle", _unless_jetson(_REPLACE_TORCH))
        ]
    try:
        torch = load_module("torch")
    except BrokenError:
        return []
    reason = "torch finds no device"
    try:
        with guard():
            names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except BrokenError as error:
        names, reason = [], str(error)
    if not names:
        detail = f"built for CUDA {built_for}, driver for up to {driver.cuda}: {reason}; update the driver"
        return [Finding("devices", "torch", "warning", detail)]
    return [Finding("devices", f"cuda:{index}", "ok", name) for index, name in enumerate(names)]


# ── 3. Backends ──────────────────────────────────────────────────────────────


def check_backends(driver: Driver) -> list[Finding]:
    return [*_check_onnxruntime(driver), _check_tensorrt(driver)]


def _check_onnxruntime(driver: Driver) -> list[Finding]:
    installed = next((package for package in (ONNXRUNTIME_GPU, ONNXRUNTIME) if find_package(package)), None)
    if installed is None:
        return [Finding("backends", "onnxruntime", "info", "not installed")]
    try:
        providers = providers_of_onnxruntime()
    except BrokenError as reason:
        return [Finding("backends", "onnxruntime", "problem", f"installed but unusable: {reason}", installed.reinstall)]
    return [Finding("backends", "onnxruntime", "ok", ", ".join(providers)), *_check_cuda_provider(providers, driver)]


def _check_tensorrt(driver: Driver) -> Finding:
    found = find_package(TENSORRT)
    if found is None:
        return Finding("backends", "tensorrt", "info", "not installed; engines are built on the device")
    name, version = found
    try:
        load_module("tensorrt")
    except BrokenError as reason:
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
    for library in provider_libraries("cuda"):
        # Its dependencies one by one, never the provider: outside a session it is not initialised and stays that way.
        try:
            load_library(library)
        except OSError:
            missing.append(library)
    if missing:
        detail = f"cannot start: {', '.join(missing)} not found; torch built for that CUDA version brings them"
        return [Finding("backends", provider, "warning", detail, _unless_jetson(_REPLACE_TORCH))]
    return [Finding("backends", provider, "ok", "the driver and CUDA's libraries are in place")]


def _replace_onnxruntime(wanted: Package) -> str:
    # Both go: they share a folder, and removing one of two takes files of the other with it.
    return f"pip uninstall -y {ONNXRUNTIME.name} {ONNXRUNTIME_GPU.name} && {wanted.install}"


# ── 4. Targets ───────────────────────────────────────────────────────────────


def check_targets(driver: Driver) -> list[Finding]:
    """For every target file whether this machine can build its engines; that most are for others is no fault."""
    try:
        recipe = load_module("infoprune_export.recipe")
        with guard():
            targets = [recipe.load_target(name) for name in recipe.assets("targets")]
    except BrokenError as reason:
        # Whatever they are read with is missing, and reported as a package.
        return [Finding("targets", "targets", "info", f"cannot be read: {reason}")]
    return [_check_target(target, driver) for target in targets]


def _check_target(target: Any, driver: Driver) -> Finding:
    try:
        if target.backend == "tensorrt":
            api = load_module("infoprune_export.engine.tensorrt.api")
            with guard():
                reason = api.why_not_here(target, driver)
        else:
            missing = target.providers[0] not in providers_of_onnxruntime()
            reason = f"this ONNX Runtime has no {target.providers[0]}" if missing else None
    except BrokenError as error:
        reason = str(error)
    if reason is None:
        return Finding("targets", target.name, "ok", f"engines can be built here: {target.description}")
    return Finding("targets", target.name, "info", f"not here: {reason}")


# ── 5. Conflicts ─────────────────────────────────────────────────────────────


def check_onnxruntime_twice(driver: Driver) -> list[Finding]:
    """Both distributions write the same files; what imports is a mixture that depends on the order of installation."""
    if not (find_package(ONNXRUNTIME) and find_package(ONNXRUNTIME_GPU)):
        return []
    subject = f"{ONNXRUNTIME.name} + {ONNXRUNTIME_GPU.name}"
    detail = "both are installed and overwrite each other's files; keep one"
    fix = _replace_onnxruntime(ONNXRUNTIME_GPU if driver.devices else ONNXRUNTIME)
    return [Finding("conflicts", subject, "problem", detail, fix)]


def check_tensorrt_twice(driver: Driver) -> list[Finding]:
    """ONNX Runtime's TensorRT provider is linked to one major version of libnvinfer; another does not do.

    A warning only: TensorRT itself and the CUDA provider work beside each other.
    """
    libraries = [re.fullmatch(r"libnvinfer\.so\.(\d+)", library) for library in provider_libraries("tensorrt")]
    linked = next((int(match[1]) for match in libraries if match), None)
    found = find_package(TENSORRT)
    if linked is None or found is None or release(found[1])[:1] in ((), (linked,)):
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
    check_targets,
    check_onnxruntime_twice,
    check_tensorrt_twice,
)


def examine() -> list[Finding]:
    """Run every check. Takes as long as importing the packages does (seconds); changes nothing, raises nothing.

    Packages come first on purpose: a torch built for CUDA brings CUDA's libraries into the process, where ONNX
    Runtime's CUDA provider finds them in a real run too.
    """
    driver = find_driver()
    return [finding for check in CHECKS for finding in check(driver)]
