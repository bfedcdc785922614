"""Digests and our subclasses against NVIDIA's own bindings; skipped where ``make tensorrt-bindings`` has not run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from contracts.fake_tensorrt import API, VERSIONS, FakeTensorRt

HERE = Path(__file__).parent
BINDINGS = Path(os.environ.get("INFOPRUNE_TENSORRT_WHEELS", HERE.parents[1] / "build" / "tensorrt"))

pytestmark = pytest.mark.tensorrt


@pytest.fixture
def run(tmp_path):
    """A script in a process of its own, and the JSON that it writes; TensorRT itself prints to stdout."""

    def run_script(script: str, version: str) -> Any:
        folder, output = BINDINGS / version, tmp_path / "output.json"
        if not (folder / "tensorrt_bindings").is_dir():
            pytest.skip(f"no bindings of TensorRT {version} in {BINDINGS}: make tensorrt-bindings")
        if shutil.which("gcc") is None:
            pytest.skip("no gcc to compile the stub libraries with")
        command = [sys.executable, HERE / script, folder, "-o", output]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(output.read_text(encoding="utf-8"))

    return run_script


@pytest.mark.parametrize("version", VERSIONS)
def test_the_digest_is_what_the_bindings_say(run, version):
    actual, stored = run("digest.py", version), json.loads((API / f"{version}.json").read_text())
    assert actual.keys() == stored.keys()
    for section, entries in stored.items():
        assert actual[section] == entries, section


@pytest.mark.parametrize("version", VERSIONS)
def test_logger_and_monitor_are_made_and_called(run, version):
    found = run("on_bindings.py", version)
    assert found["version"] == FakeTensorRt(version).__version__
    assert found["kinds"] == [True, True]
    assert found["errors"] == ["INTERNAL_ERROR: out of memory", "ERROR: out of memory"]
    assert found["warnings"] == ["WARNING: out of memory"]
    assert found["memory"] is True
    assert found["titles"] == ["  Building"]
    assert found["going_on"] == [True, False], "a cancelled build stops at its next step"
    assert found["tasks_left"] == 0
    assert found["strongly_typed"] == (1 if version.startswith("11.") else 2)
