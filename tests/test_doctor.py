"""The doctor on this machine as it is, and with every condition it names planted for real where that is possible."""

from __future__ import annotations

import ctypes
import dataclasses
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from rich.console import Console

from infoprune_export import doctor
from infoprune_export.doctor import Driver, Finding

NO_DRIVER = Driver(0, reason="no NVIDIA driver (planted)")
ONE_GPU = Driver(1, cuda="13.0")


def run_python(code: str, *options: str, path: Path | None = None) -> str:
    """Output of a fresh interpreter, where what was planted in `path` wins over what is installed."""
    roots = [str(path)] if path else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*roots, str(Path(doctor.__file__).parents[1])])}
    done = subprocess.run([sys.executable, *options, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def diagnose(call: str, path: Path) -> dict[str, Finding]:
    """Findings by subject of one check, with planted packages."""
    code = "import dataclasses, json; from infoprune_export.doctor import *; from infoprune_export import doctor; "
    code += f"print(json.dumps([dataclasses.asdict(f) for f in {call}]))"
    findings = [Finding(**entry) for entry in json.loads(run_python(code, path=path))]
    return {finding.subject: finding for finding in findings}


def plant_distribution(site: Path, name: str, version: str) -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def plant_package(site: Path, name: str, source: str) -> Path:
    folder = site / name
    folder.mkdir()
    (folder / "__init__.py").write_text(source)
    return folder


def plant_provider(package: Path, provider: str, *libraries: str) -> Path:
    """An ELF file that holds nothing but what the dynamic linker reads: two program headers and a dynamic table."""
    names = b"\0" + b"".join(library.encode() + b"\0" for library in libraries)
    offsets = [names.index(b"\0" + library.encode() + b"\0") + 1 for library in libraries]
    base, strings = 0x10000, 64 + 2 * 56
    dynamic = b"".join(struct.pack("<qQ", 1, offset) for offset in offsets)
    dynamic += struct.pack("<qQqQ", 5, base + strings, 0, 0)
    start = strings + len(names)
    header = b"\x7fELF\x02\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    load = struct.pack("<IIQQQQQQ", 1, 4, 0, base, base, start + len(dynamic), 0, 0x1000)
    table = struct.pack("<IIQQQQQQ", 2, 4, start, base + start, base + start, len(dynamic), 0, 8)
    path = package / "capi" / f"libonnxruntime_providers_{provider}.so"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header + load + table + names + dynamic)
    return path


def without(*absent: str) -> Callable[[str], str | None]:
    real = doctor._installed_version
    return lambda name: None if name in absent else real(name)


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


# ── As it is ─────────────────────────────────────────────────────────────────


def test_examine_describes_this_machine() -> None:
    findings = doctor.examine()
    by_subject = {f.subject: f for f in findings if f.group == "packages"}
    for package in doctor.PACKAGES:
        finding = by_subject[package.name]
        try:
            version = metadata.version(package.name)
        except metadata.PackageNotFoundError:
            assert finding.status in ("info", "problem")
            assert "not installed" in finding.detail or "not visible" in finding.detail
        else:
            assert version in finding.detail
            assert finding.status == "ok", finding
        role = f"extra {package.extra}" if package.extra else "required"
        assert role in finding.detail
        assert not package.minimum or f">={package.minimum}" in finding.detail
    assert {f.group for f in findings} >= {"packages", "devices", "backends"}
    assert not [f for f in findings if "torchvision" in f.subject]
    assert json.loads(json.dumps([dataclasses.asdict(f) for f in findings]))[0]["group"] == "packages"


def test_findings_are_one_line_and_every_problem_has_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed_version", lambda name: None)
    findings = doctor.examine()
    assert doctor.worst(findings) == "problem"
    assert all("\n" not in f.detail for f in findings)
    assert all(f.fix for f in findings if f.status == "problem")
    assert {f.subject for f in findings if f.status == "problem"} >= {p.name for p in doctor.PACKAGES if not p.extra}


def test_importing_the_doctor_imports_nothing_heavy() -> None:
    code = "import sys, infoprune_export.doctor; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = set(run_python(code).split())
    assert "infoprune_export" in loaded
    assert not loaded & {"torch", "transformers", "onnx", "onnxruntime", "numpy", "rich", "tensorrt"}


def test_speaks_on_an_interpreter_with_nothing_installed(tmp_path: Path) -> None:
    package = tmp_path / "infoprune_export"
    package.mkdir()
    for name in ("__init__.py", "doctor.py"):
        shutil.copy(Path(doctor.__file__).parent / name, package)
    code = f"import sys; sys.path.append({str(tmp_path)!r})\nfrom infoprune_export import doctor\n"
    code += "findings = doctor.examine()\ndoctor.render(findings)\nprint(doctor.worst(findings))"
    lines = run_python(code, "-I", "-S").splitlines()
    assert "  pip install 'torch>=2.11'" in lines
    assert "  pip install 'rich>=13.7'" in lines
    assert lines[-1] == "problem"


# ── Packages ─────────────────────────────────────────────────────────────────


def test_table_says_what_pyproject_declares() -> None:
    path = Path(__file__).parents[1] / "pyproject.toml"
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
    monkeypatch.setattr(doctor, "_installed_version", without(name))
    finding = next(f for f in doctor.check_packages(NO_DRIVER) if f.subject == name)
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
    finding = diagnose("check_packages(Driver(0))", tmp_path)["jinja2"]
    assert finding.status == "problem"
    assert reason in finding.detail
    assert finding.fix == "pip install --force-reinstall --no-deps 'jinja2>=3.1' && pip install 'jinja2>=3.1'"


def test_damaged_metadata_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "click-8.5.0.dist-info").mkdir()
    finding = diagnose("check_packages(Driver(0))", tmp_path)["click"]
    assert finding.status == "problem"
    assert "metadata is damaged" in finding.detail


def test_absent_extra_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed_version", without("lmms-eval", "mypy"))
    found = {f.subject: f for f in doctor.check_packages(NO_DRIVER)}
    assert (found["lmms-eval"].status, found["lmms-eval"].fix) == ("info", "pip install 'infoprune-export[lmms]'")
    assert (found["mypy"].status, found["mypy"].fix) == ("info", "pip install 'infoprune-export[dev]'")


@pytest.mark.parametrize(("driver", "extra"), [(NO_DRIVER, "cpu"), (ONE_GPU, "gpu")])
def test_without_onnxruntime_the_one_that_fits_is_offered(
    driver: Driver, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_installed_version", without("onnxruntime", "onnxruntime-gpu"))
    runtimes = [f for f in doctor.check_packages(driver) if f.subject.startswith("onnxruntime")]
    assert sorted(f.status for f in runtimes) == ["info", "problem"]
    assert doctor.commands(runtimes) == [f"pip install 'infoprune-export[{extra}]'"]
    assert doctor.commands(runtimes, optional=True) == []


def test_the_second_onnxruntime_is_never_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"onnxruntime": None, "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(doctor, "_installed_version", lambda name: versions.get(name))
    found = {f.subject: f for f in doctor.check_packages(NO_DRIVER)}
    assert (found["onnxruntime"].status, found["onnxruntime"].fix) == ("info", None)
    assert found["onnxruntime-gpu"].status == "ok"


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.lists(st.integers(0, 99), min_size=1, max_size=4))
def test_versions_compare_as_pip_compares_releases(left: list[int], right: list[int]) -> None:
    a, b = (".".join(map(str, numbers)) for numbers in (left, right))
    assert (doctor._release(a) < doctor._release(b)) == (Version(a) < Version(b))


def test_vendor_builds_count_as_their_release() -> None:
    assert doctor._release("2.11.0a0+1a2b3c.nv25.1") == doctor._release("2.11")
    assert doctor._release("unknown") == ()


# ── Driver and devices ───────────────────────────────────────────────────────


def test_driver_is_asked_through_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        doctor, "_load_library", lambda name: asked.append(name) or fake_driver(devices=2, version=12060)
    )
    assert doctor.find_driver() == Driver(2, "12.6")
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
    monkeypatch.setattr(doctor, "_load_library", lambda name: library)
    driver = doctor.find_driver()
    assert driver.devices == 0
    assert reason in driver.reason


def test_library_that_cannot_be_loaded_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_load_library", lambda name: ctypes.CDLL("libsurely_absent.so.1"))
    assert "libsurely_absent.so.1" in doctor.find_driver().reason


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


# ── Backends ─────────────────────────────────────────────────────────────────

PROVIDERS = "def get_available_providers():\n    return ['CUDAExecutionProvider', 'CPUExecutionProvider']\n"


def test_onnxruntime_lists_its_real_providers() -> None:
    import onnxruntime

    found = {f.subject: f for f in doctor.check_backends(doctor.find_driver())}
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
    assert "10.16.1 as tensorrt-cu12" in diagnose("check_packages(Driver(0))", tmp_path)["tensorrt"].detail


def test_tensorrt_that_breaks_on_import_is_a_warning(tmp_path: Path) -> None:
    plant_package(tmp_path, "tensorrt", "raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    plant_distribution(tmp_path, "tensorrt", "11.4.0")
    finding = diagnose("check_backends(Driver(1, '13.0'))", tmp_path)["tensorrt"]
    assert finding.status == "warning"
    assert "libnvinfer.so.11" in finding.detail


# ── Conflicts ────────────────────────────────────────────────────────────────


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
    monkeypatch.setattr(doctor, "_JETSON_RELEASE", release)
    monkeypatch.setattr(doctor, "_installed_version", lambda name: {"tensorrt": "11.4.1"}.get(name))
    monkeypatch.setattr(doctor, "_provider_libraries", lambda provider: ["libnvinfer.so.10"])
    (finding,) = doctor.check_tensorrt_twice(ONE_GPU)
    assert finding.fix is None
    monkeypatch.setattr(doctor, "_installed_version", lambda name: None)
    (missing,) = [f for f in doctor.check_packages(ONE_GPU) if f.subject == "tensorrt"]
    assert missing.fix == "sudo apt-get install python3-libnvinfer"


def test_linked_libraries_are_read_from_a_real_library() -> None:
    import onnxruntime

    (library,) = Path(onnxruntime.__file__).parent.glob("capi/onnxruntime_pybind11_state*.so")
    assert "libc.so.6" in doctor._needed_libraries(library)


def test_damaged_libraries_have_no_links(tmp_path: Path) -> None:
    path = plant_provider(tmp_path, "tensorrt", "libnvinfer.so.10")
    whole = path.read_bytes()
    assert doctor._needed_libraries(path) == ["libnvinfer.so.10"]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert doctor._needed_libraries(path) == []
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        assert isinstance(doctor._needed_libraries(path), list)
    assert doctor._needed_libraries(tmp_path / "absent.so") == []


# ── Report ───────────────────────────────────────────────────────────────────


def test_worst_is_the_gravest_status() -> None:
    findings = [Finding("packages", "x", status, "") for status in ("ok", "warning", "info")]
    assert doctor.worst(findings) == "warning"
    assert doctor.worst([*findings, Finding("packages", "x", "problem", "")]) == "problem"
    assert doctor.worst([]) == "ok"


def test_report_prints_commands_that_can_be_pasted() -> None:
    long = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'infoprune-export[gpu]'"
    findings = [
        Finding("packages", "onnxruntime", "problem", "[red]shown as it is", long),
        Finding("conflicts", "again", "warning", "", long),
        Finding("packages", "lmms-eval", "info", "", "pip install 'infoprune-export[lmms]'"),
        Finding("packages", "mypy", "info", "", long),
    ]
    out = io.StringIO()
    doctor.render(findings, Console(file=out, width=60))
    lines = out.getvalue().splitlines()
    assert lines[-5:] == [
        "To mend:",
        f"  {long}",
        "Optional:",
        "  pip install 'infoprune-export[lmms]'",
        "1 problem, 1 warning",
    ]
    assert "[red]" in out.getvalue()
    assert [line for line in lines if "backends" in line and "none found" in line]


@pytest.mark.parametrize("status", ["ok", "warning", "problem"])
def test_module_exits_with_1_on_problems_only(status: str, tmp_path: Path) -> None:
    """As a program, on an interpreter with empty packages of the oldest supported versions; rich is one of them."""
    package = tmp_path / "infoprune_export"
    package.mkdir()
    for name in ("__init__.py", "doctor.py"):
        shutil.copy(Path(doctor.__file__).parent / name, package)
    for entry in doctor.PACKAGES:
        if entry.extra in ("", "cpu"):
            plant_distribution(tmp_path, entry.name, entry.minimum)
            top, _, below = entry.module.partition(".")
            if top:
                (plant_package(tmp_path, top, "") / f"{below or 'none'}.py").touch()
    providers = PROVIDERS if status == "warning" else PROVIDERS.replace("'CUDAExecutionProvider', ", "")
    plant_package(tmp_path, "onnxruntime", providers if status != "problem" else "")
    code = f"import runpy, sys; sys.path.append({str(tmp_path)!r})\n"
    code += "runpy.run_module('infoprune_export.doctor', run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == (status == "problem"), done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("1 problem" if status == "problem" else "0 problems")
