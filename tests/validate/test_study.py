"""A sweep of small real runs: in processes and then here, what is refused, what fails, and what is written down."""

from __future__ import annotations

import io
import json
import shutil
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from filelock import FileLock
from finished import STAGE_2, finished, small
from rich.console import Console
from rich.progress import Progress
from sharing import top

from infoprune_export.cli import main
from infoprune_export.errors import InfopruneError
from infoprune_export.measure.latency import Timing
from infoprune_export.recipe import Recipe, load_recipe, points_of
from infoprune_export.validate import study_work
from infoprune_export.validate.study import PICTURE, RESULT, study, summarize
from infoprune_export.validate.study_figure import draw, render
from infoprune_export.validate.study_results import Study

# The finished run is the first point. The second asks what no float can give; what selects as spatial does, no graph.
GRID = ("validate.onnx_tolerance=null,1.0e-12", "tokens.method=infoprune,random")
NAMES = [f"onnx_tolerance-{limit}_method-{method}" for limit in ("null", "1e-12") for method in ("infoprune", "random")]


@dataclass(frozen=True)
class Swept:
    recipe: Recipe
    folder: Path
    result: Study


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Swept:
    run = finished(tmp_path_factory)
    folder = tmp_path_factory.mktemp("sweep")
    shutil.copytree(run, folder / NAMES[0])
    recipe = load_recipe("quickstart-qwen", [*small(top(tmp_path_factory)), *STAGE_2, "variants={}"], GRID)
    return Swept(recipe, folder, study(recipe, folder, Progress(disable=True), workers=2))


def shown(result: Study) -> str:
    console = Console(width=250, record=True, file=io.StringIO())
    for table in render(result):
        console.print(table)
    return console.export_text()


def test_every_point_is_a_run_with_its_own_verdict(swept):
    first, refused, failing, _ = swept.result["points"]
    assert [point["point"] for point in swept.result["points"]] == NAMES
    validations = [
        json.loads((swept.folder / name / "validation" / "validation.json").read_text()) for name in NAMES[::2]
    ]
    for point, validation in zip((first, failing), validations, strict=True):
        assert point["verdict"] == validation["verdict"]
        assert point["accuracy"]["percent"] == validation["accuracy"][-1]["percent"]
        assert point["to_original"] == validation["accuracy"][-1]["to_original"]
        assert point["refused"] is None
    assert first["verdict"] == "PASS"
    assert (failing["verdict"], failing["failed_checks"]) == ("FAIL", ["PyTorch = ONNX", "PyTorch = engine"])
    assert "tokens.method = 'random' is there to compare with and cannot be exported" in refused["refused"]
    assert (refused["accuracy"], refused["latency"], refused["on_front"]) == (None, [], False)
    assert not (swept.folder / refused["point"]).exists()


def test_what_points_share_is_one_file(swept):
    one, other = (swept.folder / name for name in NAMES[::2])
    for stage in ("data", "gates", "checkpoint", "onnx", "engine"):
        assert (one / stage / "manifest.json").samefile(other / stage / "manifest.json"), stage
    assert not (one / "validation" / "manifest.json").samefile(other / "validation" / "manifest.json")


def test_all_points_were_timed_with_the_original_in_the_same_rounds(swept):
    latency = [point["latency"] for point in swept.result["points"][::2]]
    assert [[row["batch_size"] for row in rows] for rows in latency] == [[1], [1]]
    rounds = swept.result["rounds"]["1"]
    assert rounds >= 3
    assert list(swept.result["original"]["latency"]) == ["1"]
    assert all(row["speed_up"]["low"] <= row["speed_up"]["median"] <= row["speed_up"]["high"] for [row] in latency)


def test_it_is_written_beside_the_runs_and_read_back_the_same(swept):
    assert json.loads((swept.folder / RESULT).read_text()) == json.loads(json.dumps(swept.result))
    assert ET.fromstring((swept.folder / PICTURE).read_text()).tag.endswith("svg")
    assert swept.result["no_interactions"] == "2 points could not be made"
    assert swept.result["interactions"] == []
    text = shown(swept.result)
    assert "FAIL: PyTorch = ONNX, PyTorch = engine" in text
    assert "cannot be exported" in text


def test_the_command_resumes_makes_nothing_again_and_ends_with_1(swept, tmp_path, tmp_path_factory):
    before = {path: path.stat().st_mtime_ns for path in swept.folder.glob("*/*/manifest.json")}
    settings = [word for pair in ("variants={}", *small(top(tmp_path_factory)), *STAGE_2) for word in ("--set", pair)]
    model = f"model.name_or_path={swept.recipe.model.name_or_path}"
    axes = [word for axis in GRID for word in ("--grid", axis)]
    files = ["--plot", str(tmp_path / "front.svg"), "--json", str(tmp_path / "sweep.json")]
    command = ["sweep", "quickstart-qwen", *settings, "--set", model, *axes, "-o", str(swept.folder), *files]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1, done.output
    assert "verdicts: 1 of 4 points PASS" in done.output
    assert {path: path.stat().st_mtime_ns for path in swept.folder.glob("*/*/manifest.json")} == before
    assert (tmp_path / "front.svg").read_text() == (swept.folder / PICTURE).read_text()
    assert json.loads((tmp_path / "sweep.json").read_text())["points"][0]["verdict"] == "PASS"


# ── Refusals ─────────────────────────────────────────────────────────────────


def test_a_bench_that_fails_comes_after_everything_is_written(swept, monkeypatch):
    from infoprune_export.validate import study as module

    seen = []

    def fail(run, stages, last):
        seen.append(((swept.folder / RESULT).is_file(), last))
        raise InfopruneError("no memory")

    monkeypatch.setattr(module, "execute", fail)
    (swept.folder / RESULT).unlink()
    with pytest.raises(InfopruneError, match="no memory"):
        study(swept.recipe, swept.folder, Progress(disable=True), bench=True)
    assert seen == [(True, "bench")]


def test_a_second_sweep_in_the_same_folder_is_refused(swept):
    with FileLock(swept.folder / ".lock"), pytest.raises(InfopruneError, match="another sweep is at work here"):
        study(swept.recipe, swept.folder, Progress(disable=True))


def test_a_recipe_without_a_grid_and_one_without_a_point_that_can_be_made(swept, tmp_path):
    with pytest.raises(InfopruneError, match="quickstart has no grid"):
        study(load_recipe("quickstart"), tmp_path / "none", Progress(disable=True))
    recipe = swept.recipe.model_copy(update={"grid": {"tokens.method": ("random",)}})
    with pytest.raises(InfopruneError, match="no point could be made; method-random: tokens.method = 'random'"):
        study(recipe, tmp_path / "some", Progress(disable=True))


def test_without_ray_the_extra_is_named_before_anything_is_written(swept, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InfopruneError, match=r"pip install 'infoprune-export\[ray\]'"):
        study(swept.recipe, tmp_path / "sweep", Progress(disable=True), ray="local")
    assert not (tmp_path / "sweep").exists()


def test_a_killed_process_is_said_to_have_been_killed(swept, tmp_path):
    points = points_of(swept.recipe)
    killed = pytest.raises(InfopruneError, match="one of 1 processes was killed")
    with killed, study_work.in_processes(points, [tmp_path] * 4, 1):
        raise study_work.BrokenProcessPool


@pytest.mark.parametrize("file", ["--plot", "--json"])
def test_a_file_in_no_folder_is_refused_before_work(tmp_path, file):
    command = [
        "sweep",
        "quickstart",
        "--grid",
        "heads.remove=0.5",
        file,
        str(tmp_path / "no" / "x"),
        "-o",
        str(tmp_path / "o"),
    ]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert f"{file}: {tmp_path / 'no'}: no such folder" in done.output
    assert not (tmp_path / "o").exists()


# ── Interactions and the picture ─────────────────────────────────────────────


@pytest.fixture
def factorial(swept, tmp_path):
    """Four validated points and their timings, with scores and times that were chosen."""
    recipe = swept.recipe.model_copy(update={"grid": {"ffn.keep_macs": (1.0, 0.5), "heads.remove": (0.0, 0.25)}})
    points, times = points_of(recipe), {"original": np.full(20, 10.0)}
    lost = (0.0, 0.25, 0.5, 1.0)  # neither, heads, FFN, both: 0.25 more than the sum
    for number, point in enumerate(points):
        shutil.copytree(swept.folder / NAMES[0] / "validation", tmp_path / point.name / "validation")
        file = tmp_path / point.name / "validation" / "scores.json"
        written = json.loads(file.read_text())
        written["scores"]["engine"] = [1.0 - lost[number]] * len(written["scores"]["engine"])
        file.write_text(json.dumps(written))
        times[point.name] = np.full(20, 10.0 / (number + 1))
    return recipe, points, [tmp_path / point.name for point in points], {1: Timing(times, "rounds")}


def test_a_grid_of_two_keys_has_its_interaction(factorial):
    recipe, points, folders, timings = factorial
    [found] = summarize(recipe, points, folders, {}, timings)["interactions"]
    assert (found["keys"], found["start"], found["end"]) == (["ffn.keep_macs", "heads.remove"], [1.0, 0.0], [0.5, 0.25])
    percents = {name: found[name]["percent"] for name in ("first", "second", "both", "interaction")}
    assert percents == pytest.approx({"first": -50, "second": -25, "both": -100, "interaction": -25})


def test_points_that_were_asked_other_questions_have_none(factorial):
    recipe, points, folders, timings = factorial
    file = folders[2] / "validation" / "scores.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "questions_sha256": "other"}))
    result = summarize(recipe, points, folders, {}, timings)
    assert (result["interactions"], result["no_interactions"]) == ([], "the points were not asked the same questions")


def test_equally_accurate_points_leave_the_front_to_the_fastest_and_the_picture_says_so(factorial):
    recipe, points, folders, timings = factorial
    result = summarize(recipe, points, folders, {}, timings)
    assert [point["latency"][0]["speed_up"]["median"] for point in result["points"]] == pytest.approx([1, 2, 3, 4])
    assert [point["on_front"] for point in result["points"]] == [False, False, False, True]
    texts = "".join(ET.fromstring(draw(result)).itertext())
    for word in (
        "on the front",
        "not on it",
        "original",
        "4  keep_macs 0.5, remove 0.25",
        "speed-up of the encoder, batch 1",
    ):
        assert word in texts
    assert "verdict FAIL" not in texts
    assert "keep_macs 1.0 -> 0.5" in shown(result)
