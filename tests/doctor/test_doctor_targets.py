"""For which targets the doctor says that engines can be built here."""

from __future__ import annotations

from pathlib import Path

import pytest
from planting import diagnose, plant_package

from infoprune_export.doctor import checks
from infoprune_export.doctor.probes import BrokenError
from infoprune_export.recipe import assets

GPU = "Driver(1, '{cuda}', gpus=(__import__('infoprune_export').doctor.probes.Gpu('planted', {sm}, 2**34),))"
TENSORRT = "__version__ = {version!r}\ndef Runtime(*_): raise SystemExit('crash')\nBuilder = Logger = Runtime\n"


@pytest.mark.parametrize(
    ("version", "sm", "cuda", "buildable"),
    [
        ("10.3.0", 87, "12.6", {"jetson-orin-jp62"}),
        ("10.16.2", 87, "13.2", {"jetson-orin-jp72"}),
        ("10.16.1.11", 110, "13.2", {"jetson-thor-jp72"}),
        ("11.4.0.106", 90, "13.1", {"h100", "h200"}),
        ("11.4.0.106", 120, "12.9", set()),
    ],
)
def test_a_machine_builds_for_its_own_targets(
    version: str, sm: int, cuda: str, buildable: set[str], tmp_path: Path
) -> None:
    plant_package(tmp_path, "tensorrt", TENSORRT.format(version=version))
    found = diagnose(f"check_targets({GPU.format(cuda=cuda, sm=sm)})", tmp_path)
    assert found.keys() == set(assets("targets"))
    named = {name for name, finding in found.items() if finding.status == "ok" and not name.startswith("onnxruntime")}
    assert named == buildable
    assert found["onnxruntime-cpu"].status == "ok"
    assert all(finding.detail.startswith("not here: ") for finding in found.values() if finding.status == "info")


def test_without_tensorrt_every_target_says_how_to_get_it(tmp_path: Path) -> None:
    plant_package(tmp_path, "tensorrt", "raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    found = diagnose("check_targets(Driver(0, reason='no NVIDIA driver'))", tmp_path)
    assert found["h200"].status == "info"
    assert "libnvinfer.so.11" in found["h200"].detail


def test_targets_that_cannot_be_read_are_no_problem_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise BrokenError("ModuleNotFoundError: No module named 'pydantic'")

    monkeypatch.setattr(checks, "load_module", broken)
    (finding,) = checks.check_targets(checks.find_driver())
    assert (finding.status, "pydantic" in finding.detail) == ("info", True)
