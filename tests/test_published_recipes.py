"""Recipes of the visual-token paper's settings: the mean number of tokens is the one in their name."""

from __future__ import annotations

from typing import Any

import pytest

from infoprune_export.recipe import Recipe, TokensSpec, assets, load_recipe, variant_of
from infoprune_export.tokens.decoder_methods import steps_of
from infoprune_export.tokens.select import keep_count
from infoprune_export.tokens.steps import tokens_per_layer
from tests.test_study_recipes import STUDIES
from tests.test_table_recipes import TABLES

PUBLISHED = {
    # depth of the language model, visual tokens of an image (one that all shares divide, for Qwen), mean over layers
    "llava-1.5-192": (32, 576, 192),
    "llava-1.5-128": (32, 576, 128),
    "llava-1.5-64": (32, 576, 64),
    "llava-next-22": (32, 2880, 640),
    "llava-next-11": (32, 2880, 320),
    "qwen2.5-vl-22": (28, 1296, 288),
    "qwen2.5-vl-11": (28, 1296, 144),
}


def mean_tokens(recipe: Recipe, depth: int, tokens: int) -> float:
    """Visual tokens that a layer of the language model sees on average."""
    first = keep_count(tokens, recipe.tokens.keep_ratio.numerator, recipe.tokens.keep_ratio.denominator)
    return sum(tokens_per_layer(steps_of(recipe.decoder, depth), depth, first)) / depth


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tokens_of_a_published_setting_are_those_in_its_name(name):
    recipe, (depth, tokens, mean) = load_recipe(name), PUBLISHED[name]
    number = int(name.rpartition("-")[2])
    assert number in (mean, int(100 * mean / tokens))
    assert mean_tokens(recipe, depth, tokens) == mean
    for variant in ("ours", "random-stage-2"):
        assert mean_tokens(variant_of(recipe, variant), depth, tokens) == mean
    assert recipe.model.image_packing == ("tiles" if "next" in name else "anyres")


def test_every_published_setting_is_known_to_this_test():
    published = {name for name in assets("recipes") if not name.startswith("quickstart")}
    assert published == {*PUBLISHED, *TABLES, *STUDIES}


@pytest.mark.parametrize(("variant", "mean"), [("r1-64", 64), ("r1-77", 64.5), ("r1-85", 64)])
def test_other_splits_over_both_stages_have_the_same_mean(variant, mean):
    assert mean_tokens(variant_of(load_recipe("llava-1.5-64"), variant), 32, 576) == mean


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_of_a_model_differ_in_their_budget_alone(name):
    def rest(name: str) -> dict[str, Any]:
        tree = load_recipe(name).to_dict()
        del tree["tokens"]["keep_ratio"], tree["name"], tree["description"], tree["variants"]
        return tree

    family = name.rpartition("-")[0]
    assert {str(rest(other)) for other in PUBLISHED if other.startswith(family)} == {str(rest(name))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_ours_is_what_this_package_does_by_default(name):
    recipe = load_recipe(name)
    assert variant_of(recipe, "ours").tokens == TokensSpec(keep_ratio=recipe.tokens.keep_ratio)
    assert recipe.tokens != TokensSpec(keep_ratio=recipe.tokens.keep_ratio)
