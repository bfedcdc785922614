"""OpenVINO, which reads the same ONNX files that ONNX Runtime runs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
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

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": case.spec.threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": _PRECISIONS[case.dtype],
    }
    compiled = core.compile_model(core.read_model(case.onnx / side / MODEL), "CPU", settings)
    return lambda load: _running(compiled, load, side)


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


OPENVINO = Peer("openvino", SIDES, _missing, _prepare, own_limits=False)
