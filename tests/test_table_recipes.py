"""Recipes of the structural paper's tables: their rows are the paper's, and trainings are shared between them."""

from __future__ import annotations

from typing import Any

import pytest

from infoprune_export.recipe import Recipe, load_recipe, variant_of
from infoprune_export.stages import STAGES

TABLES = ("heads-loss", "heads-threshold", "ffn-epsilon", "structure-methods")


def rows(name: str) -> dict[str, Recipe]:
    """The run itself, under "", and its variants."""
    recipe = load_recipe(name)
    return {"": recipe, **{variant: variant_of(recipe, variant) for variant in recipe.variants}}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_runs_here_and_on_the_papers_model(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.model.name_or_path.startswith("testbed/")
    real = load_recipe(name, ["model.name_or_path=Qwen/Qwen2-VL-7B-Instruct", "heads.learning_rate=0.01"])
    assert real.variants == recipe.variants


@pytest.mark.parametrize("name", TABLES)
def test_a_table_looks_at_one_part_at_a_time_and_names_every_method(name):
    written = rows(name)
    for variant, recipe in written.items():
        assert (recipe.heads.method == "none") != (recipe.ffn.method == "none"), variant
        assert (recipe.tokens.method, recipe.decoder.method, recipe.budget.by) == ("none", "none", "none"), variant
        assert recipe.language.method == "none", variant
    different = {str({k: v for k, v in r.to_dict().items() if k not in ("name", "variants")}) for r in written.values()}
    assert len(different) == len(written), "two rows are the same run"


def test_losses_are_table_2_and_four_trainings_serve_sixteen_rows():
    terms = {"both": (0.01, 0.1), "ks-only": (0.0, 0.1), "erank-only": (0.01, 0.0), "task-only": (0.0, 0.0)}
    written = rows("heads-loss")
    assert len(written) == 16
    trainings: dict[str, set[str]] = {}
    for variant, recipe in written.items():
        objective, _, threshold = (variant or "both-z-0.5").partition("-z-")
        spec = recipe.heads.resolved()
        assert (spec.method, spec.penalty, spec.distance, spec.alpha) == ("paper", "l1", "ks", 0.01)
        assert (spec.beta, spec.gamma) == terms[objective]
        assert spec.threshold == float(threshold)
        trainings.setdefault(objective, set()).add(str(gates_slice(recipe)))
    assert {recipe.heads.threshold for recipe in written.values()} == {0.2, 0.3, 0.4, 0.5}
    assert [len(slices) for slices in trainings.values()] == [1, 1, 1, 1]
    assert len(set.union(*trainings.values())) == 4


def test_thresholds_are_table_3_of_one_training():
    written = rows("heads-threshold")
    assert [recipe.heads.threshold for recipe in written.values()] == [0.5, 0.4, 0.3, 0.2]
    assert {recipe.heads.method for recipe in written.values()} == {"paper"}
    assert load_recipe("heads-threshold").heads.learning_rate == 0.01, "the paper's"
    assert len({str(gates_slice(recipe)) for recipe in written.values()}) == 1


def test_epsilons_are_table_4_of_both_linear_maps():
    written = rows("ffn-epsilon")
    assert {(recipe.ffn.method, recipe.ffn.epsilon) for recipe in written.values()} == {
        (method, epsilon) for method in ("paper", "taylor") for epsilon in (0.05, 0.01, 0.005, 0.001)
    }
    for variant, recipe in written.items():
        assert variant in ("", f"{recipe.ffn.method}-{recipe.ffn.epsilon:g}")
        assert recipe.ffn.rank_by == "epsilon"


def test_methods_are_table_1_at_the_papers_rates():
    written = rows("structure-methods")
    heads = {r.heads.method: r for name, r in written.items() if r.heads.method != "none" and "refit" not in name}
    ffn = {r.ffn.method: r for name, r in written.items() if r.ffn.method != "none" and "refit" not in name}
    assert set(heads) == {"obs", "paper", "random", "yopo_style"}
    assert set(ffn) == {"obs", "paper", "random", "prunenet"}
    assert (heads["paper"].heads.threshold, ffn["paper"].ffn.epsilon) == (0.5, 0.001)
    assert {r.heads.remove for method, r in heads.items() if method != "paper"} == {0.69}
    assert {r.ffn.keep_macs for method, r in ffn.items() if method != "paper"} == {0.25}
    refitted = {name for name, recipe in written.items() if recipe.refit.enabled}
    # The paper's own are never refitted, whatever the section says.
    assert refitted == {"", "heads-paper", "heads-random-refit", "ffn-obs", "ffn-paper", "ffn-random-refit"}


def gates_slice(recipe: Recipe) -> Any:
    return STAGES["gates"].recipe_slice(recipe)
