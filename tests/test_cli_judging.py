"""bench and attribute on a finished run, from the command line to what they print and write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from finished import STAGE_2, finished, small
from pydantic import TypeAdapter
from sharing import top

from infoprune_export.cli import main
from infoprune_export.measure.results import BenchResult, SelfResult


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return shutil.copytree(finished(tmp_path_factory), tmp_path_factory.mktemp("judged") / "run")


@pytest.fixture(scope="module")
def command(run, tmp_path_factory):
    settings = [word for key in (*small(top(tmp_path_factory)), *STAGE_2) for word in ("--set", key)]

    def invoke(name: str, *options: str):
        arguments = [name, "quickstart-qwen", "-o", str(run), *settings, *options]
        return CliRunner().invoke(main, arguments, env={"COLUMNS": "200"})

    return invoke


def test_bench_prints_and_writes_what_its_stage_holds(command, run, tmp_path):
    result = command("bench", "--json", str(tmp_path / "bench.json"))
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert written == json.loads((run / "bench" / "bench.json").read_text(encoding="utf-8"))
    TypeAdapter(BenchResult).validate_python(written, strict=True)
    assert f"{written['rows'][0]['milliseconds']['original']['p50']:.2f}" in result.output


def test_bench_against_itself_makes_no_stage(command, run, tmp_path):
    before = sorted(path.name for path in run.iterdir())
    rounds = "bench={batch_sizes: [1, 3], rounds: 8, max_rounds: 8, warmup: 1}"
    result = command("bench", "--self", "--set", rounds, "--json", str(tmp_path / "self.json"))
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "self.json").read_text(encoding="utf-8"))
    TypeAdapter(SelfResult).validate_python(written, strict=True)
    assert [(row["batch_size"], row["rounds"]) for row in written["rows"]] == [(1, 8), (3, 8)]
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_file_of_the_users_is_judged_part_by_part(command, run, tmp_path):
    own = run / "onnx" / "compressed" / "model.onnx"
    assert command("attribute", "--onnx", str(own)).exit_code == 0
    model = onnx.load(own)
    node = next(node for node in model.graph.node if node.name == "blocks.1.ffn/Gemm_2")
    weight = next(value for value in model.graph.initializer if value.name in node.input)
    values = 1.5 * onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "edited.onnx")
    result = command("attribute", "--onnx", str(tmp_path / "edited.onnx"), "--json", str(tmp_path / "found.json"))
    assert result.exit_code == 1
    (broken,) = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["broken"]
    assert (broken["step"], broken["part"]) == ("onnx", "blocks.1.ffn")
    assert node.name in broken["nodes"]
    assert command("attribute").exit_code == 0  # the run's own stage is as it was


def test_a_file_of_another_encoder_is_a_mistake(command, run):
    result = command("attribute", "--onnx", str(run / "onnx" / "original" / "model.onnx"))
    assert result.exit_code == 2
    assert "model.onnx: output 'kept_indices' is not there" in result.stderr.splitlines()[-1]


def test_a_file_without_its_weights_is_a_mistake(command, run, tmp_path):
    shutil.copy(run / "onnx" / "compressed" / "model.onnx", tmp_path)
    result = command("attribute", "--onnx", str(tmp_path / "model.onnx"))
    assert result.exit_code == 2
    assert "keep its weights beside it" in result.stderr.splitlines()[-1]
