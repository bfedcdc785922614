"""OpenVINO, which reads the same ONNX files that ONNX Runtime runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import torch
from numpy.typing import NDArray
from torch import Tensor

from infoprune_export.export.onnx import MODEL
from infoprune_export.validate.bench_case import SIDES, BenchCase, Load, Side
from infoprune_export.validate.bench_running import Arrays, Running
from infoprune_export.validate.peers import Peer, Start

# Else a processor with bfloat16 units computes fp32 graphs in it.
_PRECISIONS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def _missing(case: BenchCase) -> str | None:
    if find_spec("openvino") is None:
        return "OpenVINO is not installed; pip install openvino"
    if case.device != "cpu":
        return f"OpenVINO runs on the CPU, target {case.target.name} does not"
    return None


def _prepare(case: BenchCase, side: Side) -> Start:
    """Latency mode, as many threads as ONNX Runtime has, one request at a time; shapes stay dynamic, as in the file."""
    import openvino  # type: ignore[import-not-found, unused-ignore]

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": case.spec.threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": _PRECISIONS[case.dtype],
    }
    scratch = TemporaryDirectory()
    model = _without_functions(case.onnx / side / MODEL, Path(scratch.name))
    _check_survives(model)
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", settings)

    def start(load: Load) -> Running:
        _ = scratch  # (weights may be read when they are first used)
        return _running(compiled, load, side)

    return start


def _without_functions(model: Path, scratch: Path) -> Path:
    """The file, or a copy with its functions inlined: with them, OpenVINO 2026.4 crashes."""
    if not onnx.load(model, load_external_data=False).functions:
        return model
    inlined = onnx.inliner.inline_local_functions(onnx.load(model))
    onnx.save(inlined, scratch / MODEL, save_as_external_data=True, location=f"{MODEL}.data")
    return scratch / MODEL


def _check_survives(model: Path) -> None:
    """Read and compile the graph in a process of its own, which may crash.

    Raises:
        RuntimeError: it does.
    """
    script = "import sys, openvino; openvino.Core().compile_model(sys.argv[1], 'CPU')"
    done = subprocess.run([sys.executable, "-c", script, str(model)], capture_output=True, check=False)  # noqa: S603
    if done.returncode < 0:
        raise RuntimeError(f"OpenVINO ends its process with signal {-done.returncode} over this graph")


def _running(compiled: Any, load: Load, side: Side) -> Running:
    request = compiled.create_infer_request()
    names = [port.get_any_name() for port in compiled.outputs]
    feeds = [_feed(compiled, planned) for planned in load.calls[side]]
    latest: list[list[NDArray[Any]]] = []

    def call() -> None:
        latest[:] = []
        for feed in feeds:
            request.infer(feed, share_inputs=True)
            # Copied out as ONNX Runtime does it; the next call writes where these are.
            latest.append([np.array(request.get_tensor(name).data) for name in names])

    def outputs() -> list[Arrays]:
        return [
            {
                name: value.astype(np.float32) if np.issubdtype(value.dtype, np.floating) else value
                for name, value in zip(names, values, strict=True)
            }
            for values in latest
        ]

    return Running(call, outputs)


def _feed(compiled: Any, planned: Mapping[str, Tensor]) -> Arrays:
    return {
        port.get_any_name(): planned[port.get_any_name()].numpy().astype(port.get_element_type().to_dtype(), copy=False)
        for port in compiled.inputs
    }


def _load(case: BenchCase) -> None:
    import openvino

    openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")


OPENVINO = Peer("openvino", SIDES, _missing, _prepare, load=_load, own_limits=False)
