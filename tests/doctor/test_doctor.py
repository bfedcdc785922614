"""The doctor on this machine as it is, on an interpreter with nothing but itself, and what it prints."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from planting import PROVIDERS, plant_distribution, plant_doctor, plant_package, run_python
from rich.console import Console

from infoprune_export import doctor
from infoprune_export.doctor import Finding, probes


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
    monkeypatch.setattr(probes, "installed_version", lambda name: None)
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
    plant_doctor(tmp_path)
    code = f"import sys; sys.path.append({str(tmp_path)!r})\nfrom infoprune_export import doctor\n"
    code += "findings = doctor.examine()\ndoctor.render(findings)\nprint(doctor.worst(findings))"
    lines = run_python(code, "-I", "-S").splitlines()
    assert "  pip install 'torch>=2.11'" in lines
    assert "  pip install 'rich>=13.7'" in lines
    assert lines[-1] == "problem"


@pytest.mark.parametrize("status", ["ok", "warning", "problem"])
def test_module_exits_with_1_on_problems_only(status: str, tmp_path: Path) -> None:
    """As a program, on an interpreter with empty packages of the oldest supported versions; rich is one of them."""
    plant_doctor(tmp_path)
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
