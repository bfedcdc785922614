"""A machine with a GPU and the fake TensorRT of one release, and something small to build."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from contracts.fake_behaviour import Machine
from onnx import TensorProto, helper, numpy_helper

from infoprune_export.doctor import probes
from infoprune_export.engine.tensorrt.profiles import Profile
from infoprune_export.recipe import TensorRtTarget, load_target
from infoprune_export.recipe.targets import GIB

TARGETS = {"10.3.0": "jetson-orin-jp62", "10.16.1": "jetson-thor-jp72", "11.4.0": "h200"}
PROFILE = Profile({"pixel_values": ((1, 3, 4, 4), (2, 3, 4, 4), (8, 3, 4, 4))})
_AOT = "infoprune_export.engine.tensorrt.plugin"


def target_of(version: str, **changes: Any) -> TensorRtTarget:
    """The shipped target of a release; TokenSelect as standard operators, unless `changes` say otherwise."""
    target = load_target(TARGETS[version])
    assert isinstance(target, TensorRtTarget)
    return target.model_copy(update={"token_select": "function", **changes})


def install(patch: pytest.MonkeyPatch, version: str, **gpu: Any) -> Machine:
    """Put the fake where the package looks for TensorRT, the driver, and torch's CUDA."""
    import torch

    from infoprune_export.engine import tensorrt as package
    from infoprune_export.engine.tensorrt import runtime

    machine, target = Machine(version), target_of(version)
    patch.setitem(sys.modules, "tensorrt", machine.trt)
    patch.setitem(sys.modules, "tensorrt.plugin", getattr(machine.trt, "plugin", None))
    # Imported anew, since it keeps the TensorRT that it was imported with; what was there before comes back.
    patch.setitem(sys.modules, _AOT, None)
    del sys.modules[_AOT]
    patch.setattr(package, "plugin", None, raising=False)
    library = libcuda(**{"sm": target.sm, "cuda": target.cuda, "memory": 16 * GIB, **gpu})
    patch.setattr(probes, "load_library", lambda name: library)
    without_cuda(patch, runtime)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "Stream", _Stream)
    patch.setattr(torch.cuda, "current_stream", _Stream)
    patch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    return machine


def without_cuda(patch: pytest.MonkeyPatch, runtime: Any) -> None:
    """Let an engine's buffers be in the CPU's memory, where the fake reads and writes them."""
    patch.setattr(runtime, "_CUDA", "cpu")


class _Stream:
    cuda_stream = 7

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


def libcuda(*, sm: int, cuda: str, memory: int, devices: int = 1, init: int = 0) -> Any:
    """The driver's C interface, as ctypes calls it."""
    major, minor = (int(part) for part in cuda.split("."))

    def answer(value: int) -> Any:
        return lambda out, *_: setattr(out._obj, "value", value) or 0

    def attribute(out: Any, number: int, device: Any) -> int:
        out._obj.value = {75: sm // 10, 76: sm % 10}[number]
        return 0

    def name(buffer: Any, size: int, device: Any) -> int:
        buffer.value = b"Fake GPU"
        return 0

    return SimpleNamespace(
        cuInit=lambda flags: init,
        cuDeviceGetCount=answer(devices),
        cuDriverGetVersion=answer(1000 * major + 10 * minor),
        cuDeviceGet=answer(0),
        cuDeviceGetAttribute=attribute,
        cuDeviceTotalMem_v2=answer(memory),
        cuDeviceGetName=name,
    )


def tiny_model(folder: Path, dtype: Any = np.float32, side: int = 4) -> Path:
    """pixel_values [batch, 3, side, side] to image_features [batch, 2, 8], by one matrix product."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weight = np.random.default_rng(0).normal(size=(3 * side**2 // 2, 8)).astype(dtype)
    nodes = [
        helper.make_node("Reshape", ["pixel_values", "shape"], ["rows"], name="rows"),
        helper.make_node("MatMul", ["rows", "weight"], ["image_features"], name="product"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("pixel_values", kind, ["batch", 3, side, side])],
        [helper.make_tensor_value_info("image_features", kind, ["batch", 2, 8])],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.array([-1, 2, 3 * side**2 // 2]), "shape"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert model.graph.input[0].type.tensor_type.elem_type in (TensorProto.FLOAT, TensorProto.FLOAT16)
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"
