"""Recipes of the robustness studies: what they leave alone, how many points they have, and who makes what."""

from __future__ import annotations

import pytest

from infoprune_export.recipe import load_recipe, points_of
from infoprune_export.validate.study_work import plan

STUDIES = ("ffn-domain-shift", "pruning-int8")


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_here_and_on_a_real_model(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.model.name_or_path.startswith("testbed/")
    assert (recipe.tokens.method, recipe.decoder.method, recipe.budget.by) == ("none", "none", "none")
    assert len(points_of(recipe)) == 8
    real = load_recipe(name, ["model.name_or_path=llava-hf/llava-1.5-7b-hf"])
    assert real.grid == recipe.grid


def test_domains_differ_in_what_calibrates_alone():
    points = points_of(load_recipe("ffn-domain-shift"))
    assert {(p.recipe.ffn.keep_macs, p.recipe.data.calibration_style) for p in points} == {
        (keep, style) for keep in (0.5, 0.25) for style in ("same", "plain", "grayscale", "noise")
    }
    assert len({(p.recipe.seed, p.recipe.data.validation_questions) for p in points}) == 1


def test_folders_of_images_take_the_place_of_styles(tmp_path):
    recipe = load_recipe("ffn-domain-shift", ["grid={}"], [f"data.calibration_from={tmp_path}", "ffn.keep_macs=0.5"])
    assert [dict(point.settings) for point in points_of(recipe)] == [
        {"data.calibration_from": str(tmp_path), "ffn.keep_macs": 0.5}
    ]


def test_int8_is_made_of_the_checkpoint_of_its_float_point():
    """Four checkpoints, eight graphs: a quantized point waits for the float one and makes only its own graph."""
    points = points_of(load_recipe("pruning-int8"))
    jobs = plan(points)
    quantized = [job for job in jobs if points[job.point].recipe.export.quantization == "int8"]
    assert len(quantized) == 4
    for job in quantized:
        leaders = [points[jobs[need].point].recipe for need in job.needs if "accuracy" in jobs[need].stages]
        mine = points[job.point].recipe
        assert [(r.heads.remove, r.ffn.keep_macs) for r in leaders] == [(mine.heads.remove, mine.ffn.keep_macs)]
