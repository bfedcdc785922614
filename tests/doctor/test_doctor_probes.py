"""What the doctor reads from drivers, native libraries and version numbers, damaged ones included."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from planting import plant_provider

from infoprune_export.doctor import Driver, probes


def fake_driver(*, init: int = 0, devices: int = 1, version: int = 13010) -> Any:
    class Library:
        def cuInit(self, flags: int) -> int:  # noqa: N802
            return init

        def cuDeviceGetCount(self, out: Any) -> int:  # noqa: N802
            out._obj.value = devices
            return 0

        def cuDriverGetVersion(self, out: Any) -> int:  # noqa: N802
            out._obj.value = version
            return 0

    return Library()


def test_driver_is_asked_through_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        probes, "load_library", lambda name: asked.append(name) or fake_driver(devices=2, version=12060)
    )
    assert probes.find_driver() == Driver(2, "12.6")
    assert asked == ["libcuda.so.1" if os.name != "nt" else "nvcuda.dll"]


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (fake_driver(init=100), "cuInit returned CUDA error 100"),
        (fake_driver(devices=0), "the NVIDIA driver offers no device"),
        (object(), "no NVIDIA driver"),  # a library without the symbols, such as a stub
    ],
)
def test_driver_without_devices_says_why(library: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "load_library", lambda name: library)
    driver = probes.find_driver()
    assert driver.devices == 0
    assert reason in driver.reason


def test_library_that_cannot_be_loaded_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "load_library", lambda name: ctypes.CDLL("libsurely_absent.so.1"))
    assert "libsurely_absent.so.1" in probes.find_driver().reason


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.lists(st.integers(0, 99), min_size=1, max_size=4))
def test_versions_compare_as_pip_compares_releases(left: list[int], right: list[int]) -> None:
    a, b = (".".join(map(str, numbers)) for numbers in (left, right))
    assert (probes.release(a) < probes.release(b)) == (Version(a) < Version(b))


def test_vendor_builds_count_as_their_release() -> None:
    assert probes.release("2.11.0a0+1a2b3c.nv25.1") == probes.release("2.11")
    assert probes.release("unknown") == ()


def test_linked_libraries_are_read_from_a_real_library() -> None:
    import onnxruntime

    (library,) = Path(onnxruntime.__file__).parent.glob("capi/onnxruntime_pybind11_state*.so")
    assert "libc.so.6" in probes.needed_libraries(library)


def test_damaged_libraries_have_no_links(tmp_path: Path) -> None:
    path = plant_provider(tmp_path, "tensorrt", "libnvinfer.so.10")
    whole = path.read_bytes()
    assert probes.needed_libraries(path) == ["libnvinfer.so.10"]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert probes.needed_libraries(path) == []
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        assert isinstance(probes.needed_libraries(path), list)
    assert probes.needed_libraries(tmp_path / "absent.so") == []
