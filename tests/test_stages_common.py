"""What several stages take from a recipe."""

from __future__ import annotations

import pytest

from infoprune_export.recipe import load_recipe
from infoprune_export.stages.common import portable_files


@pytest.mark.parametrize(
    ("settings", "files"),
    [
        ((), {"onnx": "compressed"}),
        (("export.precision=fp16",), {"onnx": "float", "precision": "compressed"}),
        (("export.quantization=int8",), {"onnx": "float", "precision": "compressed"}),
        # No CPU provider runs it, so the engine alone is judged.
        (("export.precision=bf16", "export.opset=22", "engine.target=h200"), {"onnx": "float"}),
    ],
)
def test_files_that_every_machine_can_run(settings, files):
    assert portable_files(load_recipe("quickstart", settings)) == files
