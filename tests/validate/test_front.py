"""Accuracy against latency on the testbed: every part, what cannot be reached, and recovery on a line of its own."""

from __future__ import annotations

import io
import json

import pytest
from finished import small_llava
from rich.console import Console

from infoprune_export.artifacts import canonical_json
from infoprune_export.recipe import load_recipe
from infoprune_export.validate.front import RECOVERED, draw, front, render

QUIET = lambda title, total: lambda count: None  # noqa: E731
SMALL = (
    "data.calibration_images=8",
    "data.validation_questions=28",
    "ffn.round_to=32",
    "recovery.method=distill",
    "recovery.epochs=1",
    "bench.rounds=3",
    "bench.warmup=1",
)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    small_llava(model := tmp_path_factory.mktemp("model"))
    recipe = load_recipe("quickstart", (*SMALL, f"model.name_or_path={model}"))
    return front(recipe, [2.0], ["heads", "both"], QUIET)


def test_rows_are_points_that_can_be_reached_and_refusals_of_the_others(result):
    asked = [(row["part"], row["asked"], row["refused"] is None) for row in result["rows"]]
    assert asked == [("both", 2.0, True), (RECOVERED, 2.0, True), ("heads", 2.0, False)]
    assert "budget.of = 'heads'" in result["rows"][-1]["refused"]


def test_a_point_is_what_was_asked_for(result):
    row = result["rows"][0]
    assert row["predicted"] >= 2.0
    assert sum(row["heads"]) < 2 * 8
    assert sum(row["widths"]) < 2 * 128
    assert all(width % 32 == 0 for width in row["widths"])
    assert 0 < row["speed_up"]["low"] <= row["speed_up"]["median"] <= row["speed_up"]["high"]


def test_recovery_has_the_latency_of_what_it_recovers_and_its_own_answers(result):
    before, after = result["rows"][:2]
    assert after["speed_up"] == before["speed_up"]
    assert after["widths"] == before["widths"]
    assert after["accuracy"]["questions"] == before["accuracy"]["questions"] == 28


def test_it_is_plain_json_a_table_and_a_picture(result):
    assert json.loads(canonical_json(result)) == result
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(result))
    assert RECOVERED in console.export_text()
    picture = draw(result)
    assert picture.count("speed-up in ONNX Runtime, 1 image(s) a call") == 1
    assert RECOVERED in picture
