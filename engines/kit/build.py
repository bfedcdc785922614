"""Build the engine on this device: python3 build.py

Checks the kit's files, the GPU and TensorRT's version, then writes engine.plan and engine.json. Exit codes: 0 built,
1 TensorRT could not build it, 2 refused (wrong files, machine or version).
"""

from __future__ import annotations

import argparse
import hashlib
import re
import time
from typing import Any

from device import last_error, load_plugin, open_device
from shared import FOLDER, PLAN, RECORD, REPORT, KitError, read_kit, run, write, write_json

CACHE = "timing.cache"
_MEMORY = re.compile(r"out ?of ?memory|insufficient (memory|workspace)|cudaErrorMemoryAllocation", re.IGNORECASE)


def main() -> int:
    arguments = parse()
    manifest, kit = read_kit()
    cuda, trt, log = open_device(manifest)
    library = load_plugin(trt, manifest)
    workspace = manifest["build"]["workspace_bytes"]
    if arguments.workspace_gib is not None:
        workspace = int(arguments.workspace_gib * 2**30)
    settings = {**manifest["build"], "workspace_bytes": workspace}
    if arguments.optimization_level is not None:
        settings["optimization_level"] = arguments.optimization_level
    # Nothing of a former engine may outlive the attempt to replace it.
    for name in (RECORD, PLAN, REPORT):
        if (FOLDER / name).exists():
            (FOLDER / name).unlink()
    print(f"building for {cuda.name}, TensorRT {trt.__version__}; this takes minutes", flush=True)
    started = time.monotonic()
    for level, profile in enumerate(manifest["profiles"]):
        plan = build(trt, log, manifest, profile, settings)
        if plan is not None:
            break
        if not any(_MEMORY.search(error) for error in log.errors) or level + 1 == len(manifest["profiles"]):
            print(f"not built: {last_error(log)}")
            return 1
        print("not enough memory; trying a smaller profile", flush=True)
        log.errors.clear()
    write(FOLDER / PLAN, plan)
    record = {
        "schema_version": 1,
        "kit": kit,
        "plan_sha256": hashlib.sha256(plan).hexdigest(),
        "plugin_sha256": library,
        "profile_level": level,
        "profile": profile,
        "compatibility": {
            "backend": "tensorrt",
            "tensorrt": trt.__version__,
            "cuda_driver": cuda.driver,
            "device": cuda.name,
            "sm": str(cuda.sm),
            "precision": manifest["precision"],
        },
        "settings": settings,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(FOLDER / RECORD, record)
    print(f"{PLAN}: {len(plan) / 2**20:.1f} MiB in {record['seconds']} s; now run verify.py")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the engine of this kit on this device.")
    parser.add_argument("--workspace-gib", type=float, help="memory that layers may use; the target's by default")
    parser.add_argument("--optimization-level", type=int, choices=range(6), help="more takes longer and may run faster")
    arguments = parser.parse_args()
    if arguments.workspace_gib is not None and not 0 < arguments.workspace_gib < 1e4:
        raise KitError(f"--workspace-gib {arguments.workspace_gib}: give GiB above 0")
    return arguments


def build(trt: Any, log: Any, manifest: dict[str, Any], profile: dict[str, Any], settings: dict[str, Any]) -> Any:
    """The serialised engine, or None; `log` then has the reasons."""
    builder = trt.Builder(log)
    # The number behind this name differs between versions, so it is asked for.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(FOLDER / manifest["model"])):
        if parser.num_errors:
            error = parser.get_error(0)
            log.errors.append(f"{error.node_name()} ({error.node_operator()}): {error.desc()}")
        return None
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings["workspace_bytes"])
    config.builder_optimization_level = settings["optimization_level"]
    # verify.py counts fused attention in it.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not settings["tf32"]:
        # On by default, with ten bits of mantissa: fp32 tolerances would not be met.
        config.clear_flag(trt.BuilderFlag.TF32)
    if manifest["target"]["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if manifest["target"]["hardware_compatible"]:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    shapes = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        name = tensor.name
        if tensor.is_shape_tensor:
            raise KitError(f"shapes depend on the values of {name}, which no profile states; make the kit again")
        if name not in profile:
            raise KitError(f"the model's input {name} has no profile in manifest.json; make the kit again")
        shapes.set_shape(name, *(tuple(profile[name][corner]) for corner in ("min", "opt", "max")))
    config.add_optimization_profile(shapes)
    path = FOLDER / CACHE
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return None
    write(path, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


if __name__ == "__main__":
    run(main)
