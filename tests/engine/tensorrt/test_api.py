"""TensorRT and the GPU of a machine, as the package finds them, and every way in which they are not there."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from contracts.fake_tensorrt import VERSIONS, FakeTensorRt
from contracts.machines import TARGETS, install, libcuda, target_of

from infoprune_export.doctor import probes
from infoprune_export.doctor.probes import Driver, Gpu
from infoprune_export.engine import backend_of
from infoprune_export.engine.tensorrt import api
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe.targets import GIB

NEW = VERSIONS[-1]


def hide(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def refusal(call, *arguments):
    with pytest.raises(InfopruneError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


# ── Importing ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_bindings"])
def test_tensorrt_is_found_under_both_of_its_names(name, monkeypatch):
    hide(monkeypatch, "tensorrt", "tensorrt_bindings")
    module = FakeTensorRt(NEW)
    monkeypatch.setitem(sys.modules, name, module)
    assert api.load_tensorrt() is module


def test_missing_tensorrt_is_refused_with_the_command_that_installs_it(monkeypatch):
    hide(monkeypatch, "tensorrt", "tensorrt_bindings")
    monkeypatch.setattr(api, "on_jetson", lambda: False)
    assert "pip install 'infoprune-export[tensorrt]'" in refusal(api.load_tensorrt)
    monkeypatch.setattr(api, "on_jetson", lambda: True)
    assert "apt-get install python3-libnvinfer" in refusal(api.load_tensorrt)


def test_a_folder_called_tensorrt_is_not_tensorrt(monkeypatch, tmp_path):
    hide(monkeypatch, "tensorrt_bindings")
    empty = ModuleType("tensorrt")
    empty.__path__ = [str(tmp_path / "tensorrt")]
    monkeypatch.setitem(sys.modules, "tensorrt", empty)
    assert str(tmp_path / "tensorrt") in refusal(api.load_tensorrt)


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert "libnvinfer.so.11" in refusal(api.load_tensorrt)


@pytest.mark.parametrize(
    ("version", "fits"), [("10.2.0", False), ("10.3.0", True), ("11.9.1.2", True), ("12.0", False)]
)
def test_only_supported_releases_are_taken(version, fits, monkeypatch):
    module = FakeTensorRt(NEW)
    module.__version__ = version
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    if fits:
        assert api.load_tensorrt() is module
    else:
        assert f"TensorRT {version}: supported is 10.3 to below 12" in refusal(api.load_tensorrt)


# ── The driver ───────────────────────────────────────────────────────────────


def test_the_driver_describes_its_gpus(monkeypatch):
    library = libcuda(sm=110, cuda="13.2", memory=128 * GIB, devices=2)
    monkeypatch.setattr(probes, "load_library", lambda name: library)
    gpu = Gpu("Fake GPU", 110, 128 * GIB)
    assert probes.find_driver() == Driver(2, "13.2", gpus=(gpu, gpu))
    assert api.find_gpu()[0] == gpu


def test_without_a_driver_nothing_of_tensorrt_is_started(monkeypatch):
    machine = install(monkeypatch, NEW, init=100)
    message = refusal(backend_of, target_of(NEW))
    assert "cuInit returned CUDA error 100" in message
    assert "infoprune-export kit RECIPE --target h200" in message
    assert machine.called == [], "a Runtime without a driver ends the process"


def test_a_driver_that_does_not_describe_its_device_is_no_gpu(monkeypatch):
    install(monkeypatch, NEW)
    library = libcuda(sm=90, cuda="13.0", memory=GIB)
    library.cuDeviceTotalMem_v2 = lambda *_: 999
    monkeypatch.setattr(probes, "load_library", lambda name: library)
    assert "does not describe its devices" in refusal(api.find_gpu)


# ── Machine and target ───────────────────────────────────────────────────────


@pytest.mark.parametrize("version", VERSIONS)
def test_a_target_s_own_machine_builds_for_it_and_no_other_does(version, monkeypatch):
    install(monkeypatch, version)
    for other in VERSIONS:
        reason = api.why_not_here(target_of(other))
        assert (reason is None) == (other == version), TARGETS[other]


@pytest.mark.parametrize(
    ("here", "problem"),
    [
        ({}, None),
        ({"version": "11.4.9.1"}, None),
        ({"version": "11.3.0"}, "h200 has TensorRT 11.4, here is 11.3.0"),
        ({"sm": 89}, "h200 has compute capability 9.0, Fake has 8.9"),
        ({"cuda": "12.8"}, "h200 needs CUDA 13.0, the driver offers 12.8"),
        ({"cuda": "14.0"}, None),
        ({"cuda": ""}, "the driver offers "),
    ],
)
def test_what_must_match_and_what_need_not(here, problem):
    told = {"version": "11.4.0.106", "sm": 90, "cuda": "13.0", **here}
    found = api.mismatch(target_of(NEW), told["version"], Gpu("Fake", told["sm"], GIB), told["cuda"])
    assert (found is None) if problem is None else problem in found


@pytest.mark.parametrize(("sm", "fits"), [(80, True), (89, True), (120, True), (75, False)])
def test_a_hardware_compatible_target_is_built_on_any_gpu_from_ampere_on(sm, fits):
    target = target_of(NEW, hardware_compatible=True)
    assert (api.mismatch(target, "11.4.0", Gpu("Fake", sm, GIB), "13.0") is None) == fits
