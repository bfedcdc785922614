"""From an ONNX file to a TensorRT engine, on the machine that it is for.

Steps of `build_engine`:

1. The machine is compared with the target; TensorRT is started only after that.
2. The file is prepared for the target's parser and linted.
3. The network is parsed, strongly typed: the precision is the one the file was exported in.
4. The engine is built for the profile. For want of memory it is tried again with a smaller one, and the record and the
   screen say so.
5. Plan, then record are renamed into place; a folder without a record holds no engine.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from infoprune_export.artifacts import canonical_json, sha256_file, write_text, writing
from infoprune_export.engine.tensorrt import api, routes
from infoprune_export.engine.tensorrt.profiles import Profile
from infoprune_export.engine.tensorrt.progress import (
    interruptible,
    last_error,
    message_log,
    monitor,
    ran_out_of_memory,
)
from infoprune_export.engine.tensorrt.source import Source, check_profile, inspect
from infoprune_export.errors import InfopruneError
from infoprune_export.export.onnx import WEIGHTS
from infoprune_export.recipe.targets import GIB

if TYPE_CHECKING:
    from rich.progress import Progress

    from infoprune_export.doctor.probes import Driver, Gpu
    from infoprune_export.recipe import Route, TensorRtTarget

PLAN, RECORD = "engine.plan", "engine.json"
PLUGIN = "token_select.so"
"""The compiled plugin, kept beside a plan that calls it."""
STRIPPED = "weights"
"""Folder of the prepared file, kept beside a plan without weights; opening the engine puts them back."""


def build_engine(
    model: Path, folder: Path, target: TensorRtTarget, profile: Profile, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Write `PLAN` and `RECORD` into an existing folder; returns the record.

    Timings of kernels are kept beside the folder and used by the next build with the same TensorRT and device.

    Raises:
        InfopruneError: the machine is not the target's, the file breaks a rule of its parser, the plugin is missing,
            the profile does not fit the file, or the builder fails.
        KeyboardInterrupt: Ctrl-C; what was in the folder is untouched.
    """
    trt, gpu, driver = api.check_buildable(target)
    progress = progress or _silent()
    source = inspect(model)
    if source.precision not in target.precisions:
        raise InfopruneError(
            f"{model}: precision {source.precision}, target {target.name} runs {', '.join(target.precisions)}; change "
            "export.precision or export.quantization"
        )
    check_profile(source, profile, model)
    route: Route = target.token_select if source.selects else "function"
    library = routes.check_route(target, route)
    if route == "aot":
        routes.register_ahead_of_time(trt)
    timings = folder.absolute().parent / f"timing-{trt.__version__}-sm{gpu.sm}.cache"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".prepared-") as scratch, writing(folder):
        prepared = _prepare(model, Path(scratch) / STRIPPED, route, target, profile, progress)
        attempt = partial(_attempt, trt, prepared, target, gpu, source.precision, timings, library, progress)
        plan, built_for = _within_memory(attempt, profile, progress)
        # The record is what makes the folder an engine, so an old one goes first and the new one comes last.
        (folder / RECORD).unlink(missing_ok=True)
        kept = _keep_beside(folder, prepared if target.strip_weights else None, library)
        _replace(folder / PLAN, plan)
    record = {
        "compatibility": _compatibility(trt, gpu, driver, target, source),
        "target": target.model_dump(mode="json"),
        "route": route,
        "flags": [name for name in _FLAGS if getattr(target, name)],
        "workspace_bytes": workspace_bytes(target, gpu),
        "profile": built_for.to_dict(),
        "asked_for": profile.to_dict(),
        "hashes": {str(path.relative_to(folder)): sha256_file(path) for path in (folder / PLAN, *kept)},
        "onnx": {path.name: sha256_file(path) for path in (model, model.with_name(WEIGHTS)) if path.is_file()},
    }
    write_text(folder / RECORD, canonical_json(record))
    return record


def _silent() -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), disable=True)


def _prepare(
    model: Path, folder: Path, route: Route, target: TensorRtTarget, profile: Profile, progress: Progress
) -> Path:
    """The file as the target's parser reads it, with no rule broken."""
    from infoprune_export.engine.tensorrt.lint import lint
    from infoprune_export.engine.tensorrt.prepare import prepare

    prepared = prepare(model, folder, route, opset=target.opset)
    findings = lint(prepared, target, profile)
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        first, more = errors[0], f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise InfopruneError(f"{model}: {first.node}: {first.problem}{more}; {first.fix}")
    for finding in findings:
        progress.console.print(f"{finding.node}: {finding.problem}; {finding.fix}", markup=False, style="dim")
    return prepared


def _keep_beside(folder: Path, prepared: Path | None, library: Path | None) -> list[Path]:
    """What opening the engine needs besides the plan."""
    shutil.rmtree(folder / STRIPPED, ignore_errors=True)
    (folder / PLUGIN).unlink(missing_ok=True)
    if prepared is not None:
        prepared.parent.rename(folder / STRIPPED)
    if library is not None:
        shutil.copyfile(library, folder / PLUGIN)
    return [path for path in (folder / PLUGIN, *sorted((folder / STRIPPED).glob("*"))) if path.is_file()]


def _replace(path: Path, content: Any) -> None:
    """Write a buffer to a file in one step."""
    partial_file = path.with_name(f".{path.name}.partial")
    try:
        with partial_file.open("wb") as file:
            file.write(content)
        os.replace(partial_file, path)
    finally:
        partial_file.unlink(missing_ok=True)


# ── Record ───────────────────────────────────────────────────────────────────

_FLAGS = ("version_compatible", "hardware_compatible", "strip_weights")


def _compatibility(trt: Any, gpu: Gpu, driver: Driver, target: TensorRtTarget, source: Source) -> dict[str, str]:
    """What decides where the engine runs; `runtime.check_here` reads it."""
    return {
        "backend": "tensorrt",
        "target": target.name,
        "tensorrt": trt.__version__,
        "sm": str(gpu.sm),
        "device": gpu.name,
        "cuda": target.cuda,
        "driver_cuda": driver.cuda,
        "architecture": platform.machine(),
        "precision": source.precision,
    }


def workspace_bytes(target: TensorRtTarget, gpu: Gpu) -> int:
    """Memory that layers may use for themselves: the target's figure, or a quarter of what this device has."""
    wanted = gpu.memory / 4 if target.workspace_gib is None else target.workspace_gib * GIB
    return int(min(wanted, gpu.memory))


# ── One attempt ──────────────────────────────────────────────────────────────


class _OutOfMemoryError(Exception):
    """The builder had too little memory; the message is its own."""


def _within_memory(attempt: Callable[[Profile], Any], profile: Profile, progress: Progress) -> tuple[Any, Profile]:
    """The plan, and the profile that it was built for in the end."""
    while True:
        try:
            return attempt(profile), profile
        except _OutOfMemoryError as error:
            smaller = profile.shrunk()
            if smaller is None:
                raise InfopruneError(
                    f"TensorRT ran out of memory even for the least shapes ({error}); close what else uses the device, "
                    "or give the target a smaller workspace_gib"
                ) from None
            progress.console.print(
                f"[yellow]out of memory for {_largest(profile)}; trying {_largest(smaller)} instead[/yellow]"
            )
            profile = smaller


def _largest(profile: Profile) -> str:
    return ", ".join(f"{name} up to {list(corners[2])}".replace("[", r"\[") for name, corners in profile.shapes.items())


def _attempt(
    trt: Any,
    model: Path,
    target: TensorRtTarget,
    gpu: Gpu,
    precision: str,
    timings: Path,
    library: Path | None,
    progress: Progress,
    profile: Profile,
) -> Any:
    """Parse and build once; returns the plan as TensorRT holds it, a buffer.

    A builder that failed is not used again: it may hold memory.
    """
    log, cancelled = message_log(trt), Event()
    builder = trt.Builder(log)
    if library is not None:
        routes.load_library(builder.get_plugin_registry(), library, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    # The parser owns the weights until the build is done.
    parser = _parse(trt, network, model, log)
    config = _configure(trt, builder, target, gpu, precision)
    _add_profile(builder, config, network, profile, log)
    _set_timing_cache(config, timings)
    config.progress_monitor = monitor(trt, progress, cancelled)
    plan = interruptible(partial(builder.build_serialized_network, network, config), cancelled)
    if plan is None:
        if ran_out_of_memory(log):
            raise _OutOfMemoryError(last_error(log))
        raise InfopruneError(
            f"TensorRT {trt.__version__} cannot build {model.name}: {last_error(log)}; see infoprune-export lint"
        )
    _replace(timings, config.get_timing_cache().serialize())
    del parser
    return plan


def _parse(trt: Any, network: Any, model: Path, log: Any) -> Any:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(model)):
        return parser
    if not parser.num_errors:
        raise InfopruneError(f"TensorRT {trt.__version__} cannot read {model.name}: {last_error(log)}")
    error = parser.get_error(0)
    more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    node = f"node {error.node_name() or error.node()} ({error.node_operator() or 'unknown operator'})"
    raise InfopruneError(
        f"TensorRT {trt.__version__} does not read {node}: {' '.join(error.desc().split())}{more}; see "
        "infoprune-export lint"
    )


def _configure(trt: Any, builder: Any, target: TensorRtTarget, gpu: Gpu, precision: str) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes(target, gpu))
    config.builder_optimization_level = target.optimization_level
    # The inspector then names layers and tactics, which tells whether attention was fused.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if precision == "fp32":
        # On by default, with ten bits of mantissa: fp32 tolerances would not be met.
        config.clear_flag(trt.BuilderFlag.TF32)
    if target.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if target.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if target.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    return config


def _add_profile(builder: Any, config: Any, network: Any, profile: Profile, log: Any) -> None:
    optimization = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            raise InfopruneError(
                f"input {tensor.name}: TensorRT takes its values for shapes, and profiles here give shapes only; set "
                "export.images to one"
            )
        optimization.set_shape(tensor.name, *profile.shapes[tensor.name])
    if config.add_optimization_profile(optimization) < 0:
        raise InfopruneError(f"TensorRT refuses the profile of {_largest(profile)}: {last_error(log)}")


def _set_timing_cache(config: Any, path: Path) -> None:
    """Start from the timings of earlier builds; those of another device or TensorRT are left out."""
    stored = path.read_bytes() if path.is_file() else b""
    for content in (stored, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return
