"""Packages, distributions and native libraries planted for real, and the doctor run where they win."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

from infoprune_export import doctor
from infoprune_export.doctor import Driver, Finding

NO_DRIVER = Driver(0, reason="no NVIDIA driver (planted)")
ONE_GPU = Driver(1, cuda="13.0")
PROVIDERS = "def get_available_providers():\n    return ['CUDAExecutionProvider', 'CPUExecutionProvider']\n"
PACKAGE = Path(doctor.__file__).parents[1]


def run_python(code: str, *options: str, path: Path | None = None) -> str:
    """Output of a fresh interpreter, where what was planted in `path` wins over what is installed."""
    roots = [str(path)] if path else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*roots, str(PACKAGE.parent)])}
    done = subprocess.run([sys.executable, *options, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def diagnose(call: str, path: Path) -> dict[str, Finding]:
    """Findings by subject of one check, with planted packages."""
    code = "import dataclasses, json; from infoprune_export.doctor.checks import *; "
    code += f"print(json.dumps([dataclasses.asdict(f) for f in {call}]))"
    findings = [Finding(**entry) for entry in json.loads(run_python(code, path=path))]
    return {finding.subject: finding for finding in findings}


def diagnose_package(name: str, path: Path) -> Finding:
    """What the doctor says of one package; to check the whole table imports all of it, which takes seconds."""
    return diagnose(f"[check_package(p, Driver(0)) for p in PACKAGES if p.name == {name!r}]", path)[name]


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


def plant_doctor(site: Path) -> None:
    """The doctor alone, as it lies in the package."""
    package = site / "infoprune_export"
    package.mkdir()
    for name in ("__init__.py", "_registration.py"):
        shutil.copy(PACKAGE / name, package)
    shutil.copytree(PACKAGE / "doctor", package / "doctor", ignore=shutil.ignore_patterns("__pycache__"))
