"""Whole runs on two blocks of the second testbed model: images of any size, every precision, down to the verdict."""

import json

import pytest
from click.testing import CliRunner
from finished import two_blocks

from infoprune_export.cli import main

SMALL = [
    *("--set", "data.calibration_images=12"),
    *("--set", "data.validation_questions=28"),
    *("--set", "heads.epochs=1"),
    *("--set", "bench.rounds=3"),
    *("--set", "bench.batch_sizes=[2]"),
    *("--set", "validate.parity_batches=[1, 3]"),
    *("--set", "validate.max_accuracy_drop=100.0"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


def run(folder, *settings, command="validate"):
    arguments = [part for setting in settings for part in ("--set", setting)]
    model = f"model.name_or_path={two_blocks(folder.parent)}"
    command = [command, "quickstart-qwen", "--set", model, *SMALL, *arguments, "--output", str(folder)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return json.loads((folder / "validation" / "validation.json").read_text())


@pytest.mark.exhaustive
def test_a_run_on_images_of_mixed_sizes_ends_with_pass(folder):
    validation = run(folder, command="run")
    assert validation["verdict"] == "PASS"
    onnx = [p for p in validation["parity"] if p["step"] in ("onnx", "engine")]
    assert len(onnx) == 6, "batches of 1 and 3 images, and random ones, on both"
    assert max(p["relative_error"] for p in onnx) < 1e-5
    sizes = validation["size"]["visual_tokens"]
    assert sizes["compressed"] == -(-sizes["original"] // 2)
    assert (folder / "report" / "report.html").stat().st_size > 50_000


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("setting", "error", "cosine"),
    [("export.precision=fp16", 3e-2, 0.9995), ("export.quantization=int8", 0.5, 0.99)],
)
def test_lower_precisions_pass_within_their_own_limits(folder, setting, error, cosine):
    """What exporting changes is a step of its own, in front of what rounding does; and nothing is broken."""
    validation = run(folder, setting, command="attribute")
    engine = [p for p in validation["parity"] if p["step"] == "engine"]
    assert [row["step"] for row in validation["accuracy"]][-3:] == ["onnx", "precision", "engine"]
    exact = [p for p in validation["parity"] if p["step"] == "onnx"]
    assert max(p["relative_error"] for p in exact) < 1e-5
    assert all(p["kept_suboptimality"] <= 1e-2 for p in exact)
    attribution = json.loads((folder / "attribution" / "attribution.json").read_text())
    assert attribution["broken"] == []
    rows = {row["step"]: row for row in attribution["steps"]}
    assert rows["precision"]["parity"]["relative_error"] > 1e-5 > rows["onnx"]["parity"]["relative_error"]
    answered = {row["step"]: row["percent"] for row in validation["accuracy"]}
    assert [rows[step]["accuracy"] for step in ("onnx", "precision", "engine")] == [
        answered[step] for step in ("onnx", "precision", "engine")
    ]
    parts = {row["part"] for row in attribution["blocks"] if row["step"] == "precision"}
    assert {"embedding", "blocks.0.attention", "blocks.1.ffn", "selection", "merging"} <= parts
    assert max(p["relative_error"] for p in engine) <= error
    assert min(p["cosine"] for p in engine) >= cosine
    assert max(p["relative_error"] for p in engine) > 1e-5, "it is lower precision that ran"


@pytest.mark.exhaustive
def test_several_images_per_call_without_selection(folder):
    validation = run(folder, "tokens.method=none")
    assert validation["verdict"] == "PASS"
    assert validation["size"]["visual_tokens"]["compressed"] == validation["size"]["visual_tokens"]["original"]


@pytest.mark.exhaustive
def test_several_images_per_call_with_selection(folder):
    """Images of one call differ in size; their selections are judged, and used, one by one."""
    validation = run(folder, "export.images=several")
    assert validation["verdict"] == "PASS"
    onnx = [p for p in validation["parity"] if p["step"] in ("onnx", "engine")]
    assert max(p["relative_error"] for p in onnx) < 1e-5
    assert max(p["kept_suboptimality"] for p in onnx) <= 1e-2
    sizes = validation["size"]["visual_tokens"]
    assert sizes["compressed"] == -(-sizes["original"] // 2)
