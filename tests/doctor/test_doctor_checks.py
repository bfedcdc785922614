"""Every condition the doctor names, planted for real where that is possible."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from planting import (
    NO_DRIVER,
    ONE_GPU,
    PROVIDERS,
    diagnose,
    diagnose_package,
    plant_distribution,
    plant_package,
    plant_provider,
)

from infoprune_export import doctor
from infoprune_export.doctor import Driver, checks, probes


def without(*absent: str) -> Callable[[str], str | None]:
    real = probes.installed_version
    return lambda name: None if name in absent else real(name)


# ── Packages ──────────────────────────────────────────────────────────────────


def test_table_says_what_pyproject_declares() -> None:
    path = Path(__file__).parents[2] / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    declared = {"": project["dependencies"], **project["optional-dependencies"]}
    expected = {
        (canonicalize_name(requirement.name), requirement.specifier, extra)
        for extra, entries in declared.items()
        for requirement in map(Requirement, entries)
    }
    assert {(p.name, SpecifierSet(p.supported), p.extra) for p in doctor.PACKAGES} == expected


@pytest.mark.parametrize("name", [p.name for p in doctor.PACKAGES if not p.extra])
def test_absent_required_package_is_a_problem(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "installed_version", without(name))
    finding = next(f for f in checks.check_packages(NO_DRIVER) if f.subject == name)
    package = next(p for p in doctor.PACKAGES if p.name == name)
    assert finding.status == "problem"
    assert finding.fix == f"pip install '{name}>={package.minimum}'"


def test_packages_outside_the_supported_range_are_problems(tmp_path: Path) -> None:
    plant_distribution(tmp_path, "click", "8.0.4")
    plant_distribution(tmp_path, "onnxruntime", "1.9.0")
    plant_distribution(tmp_path, "tensorrt", "12.0.1")
    found = diagnose("check_packages(Driver(0))", tmp_path)
    assert (found["click"].status, found["click"].fix) == ("problem", "pip install 'click>=8.1'")
    assert found["click"].detail == "8.0.4 is too old (required, >=8.1)"
    assert (found["onnxruntime"].status, found["onnxruntime"].fix) == ("problem", "pip install 'infoprune-export[cpu]'")
    assert found["tensorrt"].status == "problem"
    assert found["tensorrt"].detail == "12.0.1 is too new (extra tensorrt, >=10.3,<12)"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise OSError('libfoo.so.3: cannot open shared object file')", "OSError: libfoo.so.3"),
        ("raise RuntimeError('first line\\nsecond line')", "RuntimeError: first line second line"),
        ("import surely_absent", "ModuleNotFoundError: No module named 'surely_absent'"),
        ("import sys; sys.exit('no')", "SystemExit: no"),
    ],
)
def test_package_that_breaks_on_import_is_a_problem_with_its_reason(source: str, reason: str, tmp_path: Path) -> None:
    plant_package(tmp_path, "jinja2", source)
    plant_distribution(tmp_path, "jinja2", "3.1.6")
    finding = diagnose_package("jinja2", tmp_path)
    assert finding.status == "problem"
    assert reason in finding.detail
    assert finding.fix == "pip install --force-reinstall --no-deps 'jinja2>=3.1' && pip install 'jinja2>=3.1'"


def test_damaged_metadata_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "click-8.5.0.dist-info").mkdir()
    finding = diagnose_package("click", tmp_path)
    assert finding.status == "problem"
    assert "metadata is damaged" in finding.detail


def test_absent_extra_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "installed_version", without("lmms-eval", "mypy"))
    found = {f.subject: f for f in checks.check_packages(NO_DRIVER)}
    assert (found["lmms-eval"].status, found["lmms-eval"].fix) == ("info", "pip install 'infoprune-export[lmms]'")
    assert (found["mypy"].status, found["mypy"].fix) == ("info", "pip install 'infoprune-export[dev]'")


@pytest.mark.parametrize(("driver", "extra"), [(NO_DRIVER, "cpu"), (ONE_GPU, "gpu")])
def test_without_onnxruntime_the_one_that_fits_is_offered(
    driver: Driver, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "installed_version", without("onnxruntime", "onnxruntime-gpu"))
    runtimes = [f for f in checks.check_packages(driver) if f.subject.startswith("onnxruntime")]
    assert sorted(f.status for f in runtimes) == ["info", "problem"]
    assert doctor.commands(runtimes) == [f"pip install 'infoprune-export[{extra}]'"]
    assert doctor.commands(runtimes, optional=True) == []


def test_the_second_onnxruntime_is_never_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"onnxruntime": None, "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(probes, "installed_version", lambda name: versions.get(name))
    found = {f.subject: f for f in checks.check_packages(NO_DRIVER)}
    assert (found["onnxruntime"].status, found["onnxruntime"].fix) == ("info", None)
    assert found["onnxruntime-gpu"].status == "ok"


# ── Devices ───────────────────────────────────────────────────────────────────


def test_cuda_torch_without_gpu_is_information(tmp_path: Path) -> None:
    folder = plant_package(tmp_path, "torch", "raise OSError('never imported without a driver')")
    (folder / "version.py").write_text("from typing import Optional\ncuda: Optional[str] = '13.0'\nhip = None\n")
    finding = diagnose("check_devices(Driver(0, reason='none'))", tmp_path)["torch"]
    assert (finding.status, finding.fix) == ("info", None)
    assert "CUDA 13.0" in finding.detail


def test_torch_names_the_gpus(tmp_path: Path) -> None:
    source = "from types import SimpleNamespace as N\n"
    source += "cuda = N(device_count=lambda: 2, get_device_name=lambda index: f'GPU {index}')"
    folder = plant_package(tmp_path, "torch", source)
    (folder / "version.py").write_text("cuda: str | None = '13.0'\n")
    found = diagnose("check_devices(Driver(2, '13.0'))", tmp_path)
    assert [found[name].detail for name in ("cuda:0", "cuda:1")] == ["GPU 0", "GPU 1"]


def test_torch_that_cannot_use_the_driver_is_a_warning(tmp_path: Path) -> None:
    source = "class cuda:\n    def device_count():\n        raise RuntimeError('driver too old')"
    folder = plant_package(tmp_path, "torch", source)
    (folder / "version.py").write_text("cuda: str | None = '13.0'\n")
    finding = diagnose("check_devices(Driver(1, '12.2'))", tmp_path)["torch"]
    assert finding.status == "warning"
    assert all(part in finding.detail for part in ("13.0", "12.2", "driver too old"))


# ── Backends ──────────────────────────────────────────────────────────────────


def test_onnxruntime_lists_its_real_providers() -> None:
    import onnxruntime

    found = {f.subject: f for f in checks.check_backends(probes.find_driver())}
    assert found["onnxruntime"].detail == ", ".join(onnxruntime.get_available_providers())
    assert found["onnxruntime"].status == "ok"


@pytest.mark.parametrize(
    ("source", "reason"),
    [("raise OSError('libonnxruntime.so.1: cannot open')", "libonnxruntime.so.1"), ("", "get_available_providers")],
)
def test_unusable_onnxruntime_is_a_problem(source: str, reason: str, tmp_path: Path) -> None:
    plant_package(tmp_path, "onnxruntime", source)
    plant_distribution(tmp_path, "onnxruntime", "1.31.1")
    finding = diagnose("check_backends(Driver(0))", tmp_path)["onnxruntime"]
    assert finding.status == "problem"
    assert reason in finding.detail
    assert "--force-reinstall" in str(finding.fix)


def test_cuda_provider_without_driver_is_a_warning(tmp_path: Path) -> None:
    plant_package(tmp_path, "onnxruntime", PROVIDERS)
    finding = diagnose("check_backends(Driver(0, reason='none'))", tmp_path)["CUDAExecutionProvider"]
    assert finding.status == "warning"
    assert finding.fix == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'infoprune-export[cpu]'"


def test_cuda_provider_names_the_libraries_it_lacks(tmp_path: Path) -> None:
    folder = plant_package(tmp_path, "onnxruntime", PROVIDERS)
    plant_provider(folder, "cuda", "libsurely_absent.so.13", "libc.so.6")
    finding = diagnose("check_backends(Driver(1, '13.0'))", tmp_path)["CUDAExecutionProvider"]
    assert finding.status == "warning"
    assert "libsurely_absent.so.13 not found" in finding.detail
    plant_provider(folder, "cuda", "libc.so.6")
    assert diagnose("check_backends(Driver(1, '13.0'))", tmp_path)["CUDAExecutionProvider"].status == "ok"


def test_gpu_left_idle_by_the_cpu_package_is_information(tmp_path: Path) -> None:
    plant_package(tmp_path, "onnxruntime", PROVIDERS.replace("'CUDAExecutionProvider', ", ""))
    finding = diagnose("check_backends(Driver(1, '13.0'))", tmp_path)["CUDAExecutionProvider"]
    assert finding.status == "info"
    assert finding.fix == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'infoprune-export[gpu]'"


def test_tensorrt_is_imported_and_never_started(tmp_path: Path) -> None:
    plant_package(tmp_path, "tensorrt", "def Runtime(*_): raise SystemExit('crash')\nBuilder = Logger = Runtime")
    plant_distribution(tmp_path, "tensorrt-cu12", "10.16.1")
    assert diagnose("check_backends(Driver(0, reason='none'))", tmp_path)["tensorrt"].status == "info"
    assert diagnose("check_backends(Driver(1, '13.0'))", tmp_path)["tensorrt"].status == "ok"
    assert "10.16.1 as tensorrt-cu12" in diagnose_package("tensorrt", tmp_path).detail


def test_tensorrt_that_breaks_on_import_is_a_warning(tmp_path: Path) -> None:
    plant_package(tmp_path, "tensorrt", "raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    plant_distribution(tmp_path, "tensorrt", "11.4.0")
    finding = diagnose("check_backends(Driver(1, '13.0'))", tmp_path)["tensorrt"]
    assert finding.status == "warning"
    assert "libnvinfer.so.11" in finding.detail


# ── Conflicts ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("driver", "extra"), [("Driver(0)", "cpu"), ("Driver(1)", "gpu")])
def test_two_onnxruntimes_clash(driver: str, extra: str, tmp_path: Path) -> None:
    plant_distribution(tmp_path, "onnxruntime", "1.31.1")
    plant_distribution(tmp_path, "onnxruntime-gpu", "1.31.1")
    (finding,) = diagnose(f"check_onnxruntime_twice({driver})", tmp_path).values()
    assert (finding.group, finding.status) == ("conflicts", "problem")
    assert finding.fix == f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'infoprune-export[{extra}]'"


@pytest.mark.parametrize(("version", "clash"), [("11.4.0", True), ("10.16.1.11", False), ("8.6.1", True)])
def test_tensorrt_of_another_major_than_the_provider_links_clashes(version: str, clash: bool, tmp_path: Path) -> None:
    folder = plant_package(tmp_path, "onnxruntime", PROVIDERS)
    plant_provider(folder, "tensorrt", "libcudart.so.13", "libnvinfer.so.10", "libnvonnxparser.so.10")
    plant_distribution(tmp_path, "tensorrt", version)
    findings = list(diagnose("check_tensorrt_twice(Driver(1))", tmp_path).values())
    assert len(findings) == clash
    if clash:
        assert findings[0].status == "warning"
        assert "libnvinfer.so.10" in findings[0].detail
        assert version in findings[0].detail
        assert findings[0].fix == "pip install 'tensorrt==10.*'"


def test_no_clash_without_either_side(tmp_path: Path) -> None:
    plant_package(tmp_path, "onnxruntime", PROVIDERS)
    plant_distribution(tmp_path, "tensorrt", "11.4.0")
    assert diagnose("check_tensorrt_twice(Driver(0))", tmp_path) == {}
    assert diagnose("check_onnxruntime_twice(Driver(0))", tmp_path) == {}


def test_jetson_gets_no_pip_command_for_what_jetpack_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = tmp_path / "nv_tegra_release"
    release.touch()
    monkeypatch.setattr(probes, "_JETSON_RELEASE", release)
    monkeypatch.setattr(probes, "installed_version", lambda name: {"tensorrt": "11.4.1"}.get(name))
    monkeypatch.setattr(checks, "provider_libraries", lambda provider: ["libnvinfer.so.10"])
    (finding,) = checks.check_tensorrt_twice(ONE_GPU)
    assert finding.fix is None
    monkeypatch.setattr(probes, "installed_version", lambda name: None)
    (missing,) = [f for f in checks.check_packages(ONE_GPU) if f.subject == "tensorrt"]
    assert missing.fix == "sudo apt-get install python3-libnvinfer"
