"""Opening and running an engine: what fits, what does not, and what a run is given."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from contracts.fake_tensorrt import VERSIONS
from contracts.machines import PROFILE, install, libcuda, target_of, tiny_model

from infoprune_export.doctor import probes
from infoprune_export.doctor.probes import Driver, Gpu
from infoprune_export.engine import backend_of, open_engine
from infoprune_export.engine.onnxruntime import session_options
from infoprune_export.engine.tensorrt.build import PLAN, RECORD, STRIPPED
from infoprune_export.engine.tensorrt.runtime import check_here
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import load_target
from infoprune_export.recipe.targets import GIB

NEW = VERSIONS[-1]
TARGET = target_of(NEW)
X = np.random.default_rng(0).normal(size=(3, 3, 4, 4)).astype(np.float32)


@pytest.fixture
def machine(monkeypatch):
    return install(monkeypatch, NEW)


@pytest.fixture
def built(machine, tmp_path):
    (tmp_path / "engine").mkdir()
    backend_of(TARGET).build(tiny_model(tmp_path / "onnx"), tmp_path / "engine", TARGET, profile=PROFILE)
    return tmp_path / "engine"


def refusal(call, *arguments, **options):
    with pytest.raises(InfopruneError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


# ── Running ──────────────────────────────────────────────────────────────────


def test_every_batch_within_the_profile_runs_and_outputs_follow_it(built):
    engine = open_engine(built, TARGET)
    whole = engine.run(pixel_values=np.concatenate([X, X, X[:2]]))["image_features"]
    assert whole.shape == (8, 2, 8)
    for count in (1, 2, 3):
        np.testing.assert_allclose(engine.run(pixel_values=X[:count])["image_features"], whole[:count], rtol=1e-5)


def test_arrays_and_tensors_of_any_layout_run(built):
    engine = open_engine(built, TARGET)
    straight = engine.run(pixel_values=X)["image_features"]
    backwards = np.ascontiguousarray(X[::-1])[::-1]
    np.testing.assert_array_equal(engine.run(pixel_values=backwards)["image_features"], straight)
    turned = torch.from_numpy(X.swapaxes(2, 3).copy()).transpose(2, 3)
    assert not turned.is_contiguous()
    np.testing.assert_array_equal(engine.run_tensors({"pixel_values": turned})["image_features"].numpy(), straight)


def test_tensors_run_and_are_converted_to_the_engine_s_type(built):
    engine = open_engine(built, TARGET)
    outputs = engine.run_tensors({"pixel_values": torch.from_numpy(X).double()})
    np.testing.assert_array_equal(outputs["image_features"].numpy(), engine.run(pixel_values=X)["image_features"])


def test_the_run_is_queued_on_a_stream_of_its_own_with_every_address_set(machine, built):
    engine = open_engine(built, TARGET)
    machine.trt.calls.clear()
    engine.run(pixel_values=X)
    assert machine.arguments("IExecutionContext.execute_async_v3") == [{"stream_handle": 7}]
    (given,) = machine.arguments("IExecutionContext.set_input_shape")
    assert given == {"name": "pixel_values", "shape": (3, 3, 4, 4)}
    named = [bound["name"] for bound in machine.arguments("IExecutionContext.set_tensor_address")]
    assert named == ["pixel_values", "image_features"]
    order = [name for name in machine.called if name.endswith(("infer_shapes", "get_tensor_shape", "async_v3"))]
    assert order == [f"IExecutionContext.{name}" for name in ("infer_shapes", "get_tensor_shape", "execute_async_v3")]


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"pixel_values": np.zeros((9, 3, 4, 4), np.float32)}, "[9, 3, 4, 4], the engine takes [1, 3, 4, 4] to [8,"),
        ({"pixel_values": np.zeros((2, 3, 4, 5), np.float32)}, "[2, 3, 4, 5]"),
        ({"pixel_values": np.zeros((3, 4, 4), np.float32)}, "[3, 4, 4]"),
        ({"pixel_values": np.zeros((2, 3, 4, 4))}, "pixel_values is float64, the engine takes float32"),
        ({}, "got none"),
        ({"pixels": X}, "got pixels"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_refused(machine, built, inputs, named):
    engine = open_engine(built, TARGET)
    machine.trt.calls.clear()
    assert named in refusal(engine.run, **inputs)
    assert machine.called == [], "before TensorRT hears of them"
    assert engine.covers({name: value.shape for name, value in inputs.items()}) is not None or "float64" in named


@pytest.mark.parametrize("method", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
def test_what_tensorrt_refuses_is_said(machine, built, method):
    engine = open_engine(built, TARGET)
    machine.trt.behaviour[f"IExecutionContext.{method}"] = lambda this, **bound: False
    assert "TensorRT refuses" in refusal(engine.run, pixel_values=X)


def test_shapes_that_cannot_be_inferred_are_refused(machine, built):
    engine = open_engine(built, TARGET)
    machine.trt.behaviour["IExecutionContext.infer_shapes"] = lambda this: ["pixel_values"]
    assert "cannot infer shapes from pixel_values" in refusal(engine.run, pixel_values=X)
    machine.trt.behaviour["IExecutionContext.infer_shapes"] = lambda this: []
    machine.trt.behaviour["IExecutionContext.get_tensor_shape"] = lambda this, name: (3, -1, 8)
    assert "output image_features is [3, -1, 8]" in refusal(engine.run, pixel_values=X)


def test_bfloat16_is_float32_outside(machine, built):
    machine.trt.behaviour["ICudaEngine.get_tensor_dtype"] = lambda this, name: machine.trt.DataType.BF16
    seen = {}

    def execute(this, stream_handle):
        seen.update(this._addresses)
        return True

    machine.trt.behaviour["IExecutionContext.infer_shapes"] = lambda this: []
    machine.trt.behaviour["IExecutionContext.get_tensor_shape"] = lambda this, name: (3, 2, 8)
    machine.trt.behaviour["IExecutionContext.execute_async_v3"] = execute
    engine = open_engine(built, TARGET)
    assert engine.input_types() == {"pixel_values": np.dtype(np.float32)}
    assert engine.run(pixel_values=X)["image_features"].dtype == np.float32
    assert set(seen) == {"pixel_values", "image_features"}


def test_a_type_that_torch_lacks_is_refused(machine, built):
    machine.trt.behaviour["ICudaEngine.get_tensor_dtype"] = lambda this, name: machine.trt.DataType.FP4
    assert "pixel_values is FP4" in refusal(open_engine, built, TARGET)


# ── Opening ──────────────────────────────────────────────────────────────────


def change(folder, **fields):
    record = json.loads((folder / RECORD).read_text())
    record["compatibility"].update(fields)
    (folder / RECORD).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tensorrt": "11.3.0.1"}, "built with TensorRT 11.3.0.1, here is 11.4.0.106"),
        ({"sm": "89"}, "built for compute capability 8.9, Fake GPU has 9.0"),
        ({"sm": "ninety"}, "built for compute capability 0.0"),
        ({"architecture": "pdp11"}, "built on pdp11"),
    ],
)
def test_an_engine_of_another_machine_is_refused(machine, built, fields, named):
    change(built, **fields)
    machine.trt.calls.clear()
    assert named in refusal(open_engine, built, TARGET)
    assert machine.called == []


@pytest.mark.parametrize(
    ("here", "flags", "fits"),
    [
        ({"version": "11.5.0"}, {}, False),
        ({"version": "11.5.0"}, {"version_compatible": True}, True),
        ({"version": "11.3.9"}, {"version_compatible": True}, False),
        ({"version": "12.0.0"}, {"version_compatible": True}, False),
        ({"sm": 120}, {}, False),
        ({"sm": 120}, {"hardware_compatible": True}, True),
        ({"sm": 75}, {"hardware_compatible": True}, False),
        ({"cuda": "12.9"}, {}, False),
        ({"cuda": "13.9"}, {}, True),
    ],
)
def test_compatible_plans_fit_more_machines(here, flags, fits):
    import platform

    told = {"version": "11.4.0.106", "sm": 90, "cuda": "13.0", **here}
    record = {"tensorrt": "11.4.0.106", "sm": "90", "architecture": platform.machine()}
    gpu, driver = Gpu("g", told["sm"], GIB), Driver(1, told["cuda"])
    assert (check_here(record, target_of(NEW, **flags), told["version"], gpu, driver) is None) == fits


def test_without_a_driver_no_runtime_is_made(machine, built, monkeypatch):
    library = libcuda(sm=90, cuda="13.0", memory=GIB, devices=0)
    monkeypatch.setattr(probes, "load_library", lambda name: library)
    machine.trt.calls.clear()
    assert "needs an NVIDIA GPU: the NVIDIA driver offers no device" in refusal(open_engine, built, TARGET)
    assert machine.called == []


@pytest.mark.parametrize("damage", [lambda plan: plan[:-1], lambda plan: plan[:-1] + b"?", lambda plan: b""])
def test_a_damaged_plan_is_refused_before_tensorrt_reads_it(machine, built, damage):
    (built / PLAN).write_bytes(damage((built / PLAN).read_bytes()))
    machine.trt.calls.clear()
    assert "engine.plan: truncated or changed" in refusal(open_engine, built, TARGET)
    assert machine.called == []


def test_a_missing_plan_is_refused(built):
    (built / PLAN).unlink()
    assert "engine.plan: missing" in refusal(open_engine, built, TARGET)


def test_a_plan_that_tensorrt_refuses_is_named(machine, built):
    machine.trt.behaviour["Runtime.deserialize_cuda_engine"] = lambda this, serialized_engine: None
    assert "engine.plan: TensorRT 11.4.0.106 refuses it (TensorRT gave no reason)" in refusal(
        open_engine, built, TARGET
    )


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"compatibility": {}, "target": {}, "profile": {}, "hashes": {}}'],
)
def test_a_damaged_record_is_refused(built, content):
    (built / RECORD).write_text(content)
    assert "engine.json: cannot be read; build the engine again" in refusal(open_engine, built, TARGET)


def test_a_record_without_the_plan_s_hash_is_refused(built):
    record = json.loads((built / RECORD).read_text())
    (built / RECORD).write_text(json.dumps({**record, "hashes": {}}))
    assert "engine.json: cannot be read" in refusal(open_engine, built, TARGET)


def test_a_plan_of_other_inputs_than_its_record_s_is_refused(built):
    record = json.loads((built / RECORD).read_text())
    record["profile"] = {"pictures": record["profile"]["pixel_values"]}
    (built / RECORD).write_text(json.dumps(record))
    assert "the plan takes pixel_values, its record says pictures" in refusal(open_engine, built, TARGET)


def test_too_little_memory_to_run_is_said_with_what_it_takes(machine, built):
    machine.context_memory = False
    machine.trt.behaviour["ICudaEngine.device_memory_size_v2"] = lambda this: 3 * 2**20
    assert "it takes 3 MiB besides its weights" in refusal(open_engine, built, TARGET)


def test_a_torch_without_cuda_is_refused(built, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "has no CUDA here" in refusal(open_engine, built, TARGET)


def test_a_plan_without_weights_does_not_run_on_other_weights(machine, tmp_path):
    target = target_of(NEW, strip_weights=True)
    (tmp_path / "engine").mkdir()
    backend_of(target).build(tiny_model(tmp_path / "onnx"), tmp_path / "engine", target, profile=PROFILE)
    machine.trt.behaviour["Refitter.refit_cuda_engine"] = lambda this: False
    assert "the weights do not fit the plan" in refusal(open_engine, tmp_path / "engine", target)
    (weights,) = (tmp_path / "engine" / STRIPPED).glob("*.onnx")
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert "model.onnx: truncated or changed" in refusal(open_engine, tmp_path / "engine", target)


# ── Backends ─────────────────────────────────────────────────────────────────


def test_each_backend_refuses_the_other_s_targets(machine):
    from infoprune_export.engine.tensorrt.runtime import TensorRtBackend

    assert "is for onnxruntime, not for TensorRT" in refusal(TensorRtBackend().check, load_target("onnxruntime-cpu"))
    assert "h200 is for tensorrt, and this runs in ONNX Runtime" in refusal(session_options, load_target("h200"))


def test_a_build_without_a_profile_is_refused(machine, tmp_path):
    assert "is built for shapes" in refusal(backend_of(TARGET).build, tmp_path / "model.onnx", tmp_path, TARGET)
