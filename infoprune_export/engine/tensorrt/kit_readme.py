"""README.txt of a kit: what is in it, and every command a device needs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

_SINCE_11 = (11, 0)


def readme(manifest: Mapping[str, Any]) -> str:
    """The text, from a kit's manifest."""
    target, attention = manifest["target"], manifest["attention"]
    parts = [
        f"Engine build kit: {manifest['name']}, {manifest['precision']}, for {target['name']}",
        f"({target['software']}, TensorRT {target['tensorrt']}, compute capability {target['sm'] / 10:.1f})",
        "",
        "Nothing in here was built or run on a device yet. The engine counts as verified when verify.py has written",
        "report.json with the verdict PASS, and infoprune-export has read it back against this kit.",
        "",
        "Needs on the device: Python 3.8 or newer, TensorRT with its Python module, NumPy. Nothing is downloaded.",
        *_plugin_needs(manifest),
        "",
        "Commands, in this folder:",
        "",
        *_plugin_commands(manifest),
        "  python3 build.py",
        "  python3 verify.py",
        "  python3 bench.py",
        "",
        "and where infoprune-export is installed:",
        "",
        "  infoprune-export validate --kit-report report.json",
        "",
        f"verify.py expects fused attention in {attention['expected_fused']} of {attention['layers']} blocks:",
        f"{attention['why']}.",
        "Exit codes: 0 done or passed, 1 failed, 2 refused (wrong files, machine or version; one line says which).",
        "For steady figures fix the clocks first (Jetson: sudo nvpmodel -m 0; sudo jetson_clocks).",
        "",
        "The same with trtexec (build and speed only; it compares no numbers, so it proves nothing):",
        "",
        *_trtexec(manifest),
        "",
        "serving/ holds a model repository for Triton (copy engine.plan to serving/triton/NAME/1/model.plan) and, for",
        "encoders that take pictures of one size, a configuration for DeepStream.",
        "",
    ]
    for bug in manifest["known_bugs"]:
        parts += [*textwrap.wrap(f"Known bug: {bug['affects']} {bug['advice']}", 118), f"  {bug['reference']}", ""]
    return "\n".join(parts)


def _plugin_needs(manifest: Mapping[str, Any]) -> list[str]:
    if manifest["token_select"]["library"] is None:
        return []
    return [
        "The plugin that selects tokens is compiled there: CMake, nvcc and TensorRT's headers (Jetson and Debian:",
        "libnvinfer-headers-dev). Without them make the kit for a target file with token_select: function.",
    ]


def _plugin_commands(manifest: Mapping[str, Any]) -> list[str]:
    if manifest["token_select"]["library"] is None:
        return []
    architecture = f"-DCMAKE_CUDA_ARCHITECTURES={manifest['target']['sm']}"
    return [f"  cmake -S plugin -B plugin/build {architecture} && cmake --build plugin/build"]


def _trtexec(manifest: Mapping[str, Any]) -> list[str]:
    """One build and one timing command; what is the default in 11 has to be said in 10."""
    target, settings = manifest["target"], manifest["build"]
    since_11 = tuple(map(int, target["tensorrt"].split(".")[:2])) >= _SINCE_11
    plugin = manifest["token_select"]["library"]
    loading = [f"--dynamicPlugins={plugin}"] if plugin else []
    profile = manifest["profiles"][0]
    shapes = {
        corner: ",".join(f"{name}:{'x'.join(map(str, profile[name][corner]))}" for name in sorted(profile))
        for corner in ("min", "opt", "max")
    }
    build = [
        f"trtexec --onnx={manifest['model']} --saveEngine=trtexec.plan --skipInference",
        *(f"--{corner}Shapes={text}" for corner, text in shapes.items()),
        f"--memPoolSize=workspace:{settings['workspace_bytes'] // 2**20}",
        f"--builderOptimizationLevel={settings['optimization_level']}",
        "--profilingVerbosity=detailed --timingCacheFile=timing.cache",
        *([] if settings["tf32"] else ["--noTF32"]),
        *([] if since_11 else ["--stronglyTyped"]),
        *(["--versionCompatible"] if target["version_compatible"] else []),
        *(["--hardwareCompatibilityLevel=ampere+"] if target["hardware_compatible"] else []),
        *loading,
    ]
    time = [
        f"trtexec --loadEngine=trtexec.plan --shapes={shapes['opt']}",
        "--exportLayerInfo=layers.json --exportTimes=times.json",
        *([] if since_11 else ["--useCudaGraph --noDataTransfers --useSpinWait"]),
        *loading,
    ]
    return ["  " + " \\\n    ".join(lines) for lines in (build, time)]
