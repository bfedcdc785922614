"""A recipe's grid: its points, their names, and what is refused in one line before any work is done."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import load_recipe, points_of


def test_points_are_all_combinations_in_the_order_of_the_values():
    recipe = load_recipe("quickstart", grid=["heads.remove=0.25,0.5", "tokens.keep_ratio=1/9,'2/9',1.0"])
    points = points_of(recipe)
    assert [tuple(point.settings.values()) for point in points] == [
        (remove, keep) for remove in (0.25, 0.5) for keep in ("1/9", "2/9", 1.0)
    ]
    assert [point.name for point in points][:2] == ["remove-0.25_keep_ratio-1_9", "remove-0.25_keep_ratio-2_9"]
    for point in points:
        assert (point.recipe.name, point.recipe.grid) == (f"quickstart-{point.name}", {})
        assert point.recipe.variants == {}
        assert point.recipe.heads.remove == point.settings["heads.remove"]
        assert point.recipe.ffn == recipe.ffn


def test_options_replace_values_of_the_same_key_and_add_others(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nmodel: {name_or_path: testbed/tiny-llava}\ngrid: {heads.remove: [0.1, 0.2], seed: [0, 1]}\n"
    )
    assert len(points_of(load_recipe(file))) == 4
    recipe = load_recipe(file, grid=["heads.remove=0.7", "ffn.keep_macs=0.5,0.25"])
    assert recipe.grid == {"heads.remove": (0.7,), "seed": (0, 1), "ffn.keep_macs": (0.5, 0.25)}
    assert points_of(load_recipe(file, ["grid={}"])) == []


def test_a_grid_changes_no_stage_of_the_recipe_itself():
    from infoprune_export.stages import STAGES

    plain, swept = load_recipe("quickstart"), load_recipe("quickstart", grid=["heads.remove=0.25,0.5"])
    for stage in STAGES.values():
        assert stage.recipe_slice(plain) == stage.recipe_slice(swept), stage.name


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (["heads.remov=0.1"], "point 'remov-0.1' of quickstart: unknown key 'heads.remov'; did you mean 'remove'"),
        (["heads.remove=0.1,2"], "point 'remove-2' of quickstart: heads.remove = 2"),
        (["heads.remove=0.1,half"], "point 'remove-half' of quickstart: heads.remove = 'half'"),
        (["budget.by=latency", "heads.method=obs,paper"], "point 'by-latency_method-paper' of quickstart"),
        (["seed.x=1"], "point 'x-1' of quickstart: seed.x: 'seed' is a value"),
        (["heads.remove=0.5,0.5"], "grid: heads.remove has 0.5 twice"),
        (["model.name_or_path=a,b"], "grid: 'model.name_or_path' is the same at every point"),
        (["variants.harder=1"], "grid: 'variants.harder' is the same at every point"),
        (["name=a"], "grid: 'name' is the same"),
        (["heads.remove"], "--grid 'heads.remove': expected KEY=VALUE,VALUE"),
        (["heads.remove="], "--grid 'heads.remove=': expected KEY=VALUE,VALUE"),
        (["heads.remove=[,"], "the values are not valid YAML"),
        (["heads.remove=2020-01-01"], "--grid heads.remove: not a tree of plain values"),
        ([f"seed={','.join(map(str, range(32)))}", f"heads.epochs={','.join(map(str, range(1, 33)))}"], "1024 points"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line_with_the_points_name(grid, words):
    with pytest.raises(InfopruneError, match=re.escape(words)) as refused:
        load_recipe("quickstart", grid=grid)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("section", ["grid: 3", "grid: {heads.remove: 0.5}", "grid: {heads.remove: []}", "grid: [a]"])
def test_a_section_of_another_shape_is_refused(tmp_path, section):
    file = tmp_path / "mine.yaml"
    file.write_text(f"name: mine\nmodel: {{name_or_path: testbed/tiny-llava}}\n{section}\n")
    with pytest.raises(InfopruneError, match=r"mine\.yaml: grid"):
        load_recipe(file)
    with pytest.raises(InfopruneError):
        load_recipe(file, grid=["ffn.keep_macs=0.5"] if "[a]" in section or "3" in section else [])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=140), min_size=1, max_size=6, unique=True))
def test_every_point_has_a_name_a_folder_can_have_and_no_other_point_has(texts):
    axes = {"export.opset": (20,), "engine.target": tuple(texts)}
    recipe = load_recipe("quickstart").model_copy(update={"grid": axes})
    names = [point.name for point in points_of(recipe)]
    assert len({name.lower() for name in names}) == len(texts)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,110}", name) for name in names)
