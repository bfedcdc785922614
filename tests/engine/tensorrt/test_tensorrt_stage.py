"""TensorRT targets in a run: refused before anything is written, or built, opened and tried on the golden inputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from contracts.fake_tensorrt import VERSIONS
from contracts.machines import install, libcuda, target_of, tiny_model
from rich.progress import Progress
from safetensors.numpy import save_file

from infoprune_export.cli import main
from infoprune_export.doctor import probes
from infoprune_export.engine import open_engine
from infoprune_export.errors import InfopruneError
from infoprune_export.pipeline import Run
from infoprune_export.recipe import engine_target, load_recipe
from infoprune_export.recipe.targets import GIB
from infoprune_export.stages import STAGES
from infoprune_export.stages.common import check_target
from infoprune_export.stages.deliver import int8_scheme

NEW = VERSIONS[-1]


@pytest.fixture
def target_file(tmp_path):
    """The newest target, with TokenSelect as standard operators."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(json.loads(target_of(NEW).model_dump_json())))
    return str(path)


@pytest.fixture
def no_driver(monkeypatch):
    library = libcuda(sm=90, cuda="13.0", memory=GIB, init=100)
    monkeypatch.setattr(probes, "load_library", lambda name: library)


# ── Exported for TensorRT ────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "scheme"),
    [
        ([], "cpu"),
        (["engine.target=h200"], "tensorrt"),
        (["engine.target=h200", "export.int8_scheme=cpu"], "cpu"),
        (["export.int8_scheme=tensorrt"], "tensorrt"),
    ],
)
def test_int8_is_what_the_target_takes_and_another_scheme_is_another_export(settings, scheme):
    recipe = load_recipe("quickstart", ["export.quantization=int8", *settings])
    assert int8_scheme(recipe) == scheme
    assert STAGES["onnx"].recipe_slice(recipe)["int8_scheme"] == scheme


def test_another_target_does_not_make_an_fp32_export_anew():
    slices = [STAGES["onnx"].recipe_slice(load_recipe("quickstart", [f"engine.target={t}"])) for t in ("h200", "l40s")]
    assert slices[0] == slices[1] == STAGES["onnx"].recipe_slice(load_recipe("quickstart"))


# ── Refused early ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", ["build", "validate", "run"])
def test_a_machine_that_cannot_build_says_so_in_a_line_and_writes_nothing(command, no_driver, tmp_path):
    options = ["--set", "engine.target=jetson-orin-jp62", "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(main, [command, "quickstart", *options])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: target jetson-orin-jp62: ")
    assert "infoprune-export kit RECIPE --target jetson-orin-jp62" in line
    assert not (tmp_path / "run").exists()


def test_an_export_needs_no_machine_of_the_target(no_driver):
    recipe = load_recipe("quickstart", ["engine.target=jetson-orin-jp62"])
    check_target(recipe, building=False, timing=False)
    with pytest.raises(InfopruneError, match="kit RECIPE"):
        check_target(recipe, building=True, timing=False)


def test_what_the_recipe_exports_must_suit_the_target(monkeypatch, target_file):
    install(monkeypatch, NEW)
    mine = [f"engine.target={target_file}"]
    check_target(load_recipe("quickstart", mine), building=True, timing=False)
    with pytest.raises(InfopruneError, match="this runs in ONNX Runtime"):
        check_target(load_recipe("quickstart", mine), building=True, timing=True)
    changed = target_of(NEW, precisions=("fp16",)).model_dump(mode="json")
    Path(target_file).write_text(yaml.safe_dump(changed))
    with pytest.raises(InfopruneError, match="give fp32, target h200 runs fp16"):
        check_target(load_recipe("quickstart", mine), building=True, timing=False)


def test_a_missing_plugin_is_found_before_the_run(monkeypatch):
    install(monkeypatch, VERSIONS[0])
    with pytest.raises(InfopruneError, match="no plugin_library is named"):
        check_target(load_recipe("quickstart", ["engine.target=jetson-orin-jp62"]), building=True, timing=False)
    nothing_selected = ["engine.target=jetson-orin-jp62", "tokens.method=none"]
    check_target(load_recipe("quickstart", nothing_selected), building=True, timing=False)


# ── What makes an engine anew ────────────────────────────────────────────────


def key(*settings):
    return STAGES["engine"].recipe_slice(load_recipe("quickstart", settings))


def test_shapes_and_the_plugin_are_part_of_the_engine_s_key(tmp_path):
    jetson = "engine.target=jetson-orin-jp62"
    assert key(jetson) != key(jetson, "engine.images=[1, 2, 3]")
    library = tmp_path / "plugin.so"
    library.write_bytes(b"1")
    named = f"engine.plugin_library={library}"
    first = key(jetson, named)
    library.write_bytes(b"2")
    assert key(jetson, named) != first
    assert key() == key("engine.images=[1, 2, 3]"), "ONNX Runtime builds for every shape"


# ── Built in a run ───────────────────────────────────────────────────────────


@pytest.fixture
def run(monkeypatch, random_vlm, target_file, tmp_path):
    """A run whose export is there: one matrix product in the place of an encoder."""
    recipe = load_recipe("quickstart", [f"engine.target={target_file}", "tokens.method=none"])
    run = Run(recipe, tmp_path / "run", Progress(disable=True))
    run.__dict__["original_on_cpu"] = random_vlm
    onnx = tmp_path / "run" / "onnx"
    onnx.mkdir(parents=True)
    tiny_model(onnx / "compressed", side=112)
    save_file({"pixel_values": np.zeros((2, 3, 112, 112), np.float32)}, onnx / "golden.safetensors")
    run.finished["onnx"] = onnx
    install(monkeypatch, NEW)
    return run


def test_the_stage_builds_for_the_recipe_s_shapes_and_tries_the_engine(run, capsys):
    folder = run.folder / "engine"
    folder.mkdir()
    STAGES["engine"].make(run, folder)
    assert "not run on the golden inputs" not in capsys.readouterr().out
    record = json.loads((folder / "engine.json").read_text())
    assert [corner[0] for corner in record["profile"]["pixel_values"].values()] == [16, 1, 4]
    engine = open_engine(folder, engine_target(run.recipe.engine))
    assert engine.describe()["precision"] == "fp32"

    # An engine for fewer images is not tried on the two golden ones.
    one = run.recipe.model_copy(update={"engine": run.recipe.engine.model_copy(update={"images": (1, 1, 1)})})
    run.recipe = one
    STAGES["engine"].make(run, folder)
    assert "not run on the golden inputs: pixel_values is [2, 3, 112, 112]" in capsys.readouterr().out
