"""The way of a kit through the command line: a run's encoder becomes a kit, and the run keeps a record of it."""

import json
import shutil

import pytest
from click.testing import CliRunner
from finished import STAGE_2, finished, small
from sharing import top

from infoprune_export.artifacts import sha256_file
from infoprune_export.cli import main


@pytest.mark.slow
def test_a_run_becomes_a_kit_whose_manifest_the_run_remembers(tmp_path_factory, tmp_path):
    run, kit = shutil.copytree(finished(tmp_path_factory), tmp_path / "run"), tmp_path / "kit"
    settings = [*small(top(tmp_path_factory)), *STAGE_2, "engine.image_sizes=[[56,56],[112,84],[112,140]]"]
    pairs = [part for setting in settings for part in ("--set", setting)]
    command = ["kit", "quickstart-qwen", "--target", "jetson-orin-jp62", "--run", str(run), *pairs]
    done = CliRunner().invoke(main, [*command, "-o", str(kit)])
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert done.stdout == f"{kit}\n"
    assert "up to date" in done.stderr
    assert "exported" not in done.stderr, "the run's ONNX file is taken as it is"
    manifest = json.loads((kit / "manifest.json").read_text())
    assert {case["name"] for case in manifest["cases"]} >= {"min", "opt", "max"}
    assert sha256_file(run / "kits" / "jetson-orin-jp62.json") == sha256_file(kit / "manifest.json")
    assert CliRunner().invoke(main, [*command, "-o", str(kit)]).exit_code == 2, "it is there already"
