"""The ahead-of-time plugin: what TensorRT's own registry and Python layer make of it, without a GPU or a builder."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drive_plugin import LIBRARIES, STUB_SOURCE
from wheels import REPOSITORY, compiler, unpacked

from infoprune_export.doctor.probes import release
from infoprune_export.tokens import kernel
from infoprune_export.tokens.kernel import Settings

ATTRIBUTES = dataclasses.asdict(Settings(1, 9))
REQUESTS = {
    "llava": {"shape": [4, 576, 1024], "dtype": "float16", "attributes": ATTRIBUTES},
    "one image": {"shape": [1, 2880, 1024], "dtype": "float32", "attributes": {**ATTRIBUTES, "pool_factor": 8.0}},
    "qwen": {
        "shape": [2, 16384, 1280],
        "dtype": "bfloat16",
        "attributes": {"keep_numerator": 1, "keep_denominator": 3, "pool_factor": 1e9}
        | {"temperature": 1.0, "exponent": 1.0, "epsilon": 0.0},
    },
    "more kept than dimensions": {
        "shape": [3, 700, 64],
        "dtype": "float32",
        "attributes": {**ATTRIBUTES, "keep_numerator": 8, "pool_factor": 1.25},
    },
}
PTX_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


ALL = {**ATTRIBUTES, "keep_numerator": 9}
REFUSED = {
    "6000 dimensions and 6000 kept tokens need": {**REQUESTS["llava"], "shape": [1, 6000, 6000], "attributes": ALL},
    "pool_factor is 0.5, outside 1 to": {**REQUESTS["llava"], "attributes": {**ATTRIBUTES, "pool_factor": 0.5}},
    "features are DataType.INT32, the kernel takes fp32, fp16 or bf16": {**REQUESTS["llava"], "dtype": "int32"},
}


def drive(requests: list[dict[str, Any]], stubs: Path, *version: str) -> list[dict[str, Any]]:
    """Answers of the driver in a process of its own: a registry is not emptied, and a fault in it ends the process."""
    lean = unpacked("libnvinfer_lean.so.11", "tensorrt-lean-cu13-libs 11.4")
    bindings = unpacked("11.4*/tensorrt_bindings", "tensorrt-cu13-bindings 11.4")
    (stubs / "stubs.c").write_text(STUB_SOURCE)
    for name in LIBRARIES:
        command = [compiler("cc", "gcc", "clang"), "-shared", "-fPIC", f"-Wl,-soname,{name}", str(stubs / "stubs.c")]
        subprocess.run([*command, "-o", str(stubs / name)], check=True)
    command = [
        sys.executable,
        str(Path(__file__).with_name("drive_plugin.py")),
        *map(str, (bindings, lean, stubs)),
        *version,
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    text = json.dumps(requests)
    result = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    answers: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return answers


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    requests = {**REQUESTS, **REFUSED}
    return dict(zip(requests, drive(list(requests.values()), tmp_path_factory.mktemp("stubs")), strict=True))


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", REQUESTS)
def test_the_registry_gets_shapes_types_and_launch(answers: dict[str, dict[str, Any]], name: str):
    request, answer = REQUESTS[name], answers[name]
    batch, tokens, width = request["shape"]
    options = Settings(**request["attributes"])
    assert answer["version"].startswith("11.4")
    assert answer["types"] == ["DataType.INT32", "DataType.FLOAT"]
    work = kernel.work_size(tokens, width, options)
    assert answer["shapes"] == [[batch, kernel.keep_size(tokens, options)], [batch, work]]
    one = dict.fromkeys(("grid_y", "grid_z", "block_y", "block_z"), 1)
    shared = kernel.shared_bytes(tokens, width, options)
    assert answer["launch"] == {"grid_x": batch, "block_x": kernel.THREADS, "shared_mem": shared, **one}
    assert shared <= kernel.SHARED_BYTES
    assert answer["arguments"] == kernel.scalars(tokens, width, options)
    assert answer["kinds"] == ["PluginArgDataType.INT32"]


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", REQUESTS)
def test_the_registry_gets_the_kernel_of_the_features_type(answers: dict[str, dict[str, Any]], name: str):
    answer, kind = answers[name], REQUESTS[name]["dtype"]
    first = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}[kind]
    assert answer["combinations"] == [f"DataType.{dtype}" for dtype in (first, "FLOAT", "INT32", "INT32", "FLOAT")]
    assert answer["kernel"] == f"token_select_{PTX_NAMES[kind]}"
    assert answer["tactics"] == [1]
    assert answer["ptx"] == kernel.read_ptx()


@pytest.mark.tensorrt
@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_kernel_cannot_do_is_refused_in_the_build(answers: dict[str, dict[str, Any]], reason: str):
    assert answers[reason]["refused"].startswith(f"infoprune::TokenSelect: {reason}")


@pytest.mark.tensorrt
def test_attributes_that_tensorrt_10_cannot_read_are_refused(tmp_path: Path):
    (answer,) = drive([REQUESTS["llava"]], tmp_path, "10.16.1.11")
    reason = f"TensorRT 10.16.1.11 cannot read a plugin's attributes with NumPy {np.__version__}"
    assert answer.get("refused", "").startswith(reason) == (release(np.__version__) >= (2, 4))
