"""Recipes and targets: what to do, with which budgets, for which machine.

A recipe is a YAML file checked against `Recipe`. Unknown keys, wrong types and values out of range are refused with
the dotted name of the key. Defaults come from the papers unless the field says otherwise: "A" is the structural paper
(heads, feed-forward networks), "B" the visual-token paper.
"""

from infoprune_export.recipe.delivery import BenchSpec, EngineSpec, ExportSpec, Target, ValidateSpec
from infoprune_export.recipe.reading import assets, find_asset, load_recipe, load_target, read_recipe, variant_of
from infoprune_export.recipe.structure import BudgetSpec, FfnSpec, HeadsSpec, LanguageSpec, RecoverySpec, RefitSpec
from infoprune_export.recipe.visual_tokens import DecoderSpec, TokensSpec
from infoprune_export.recipe.whole import DataSpec, ModelSpec, Recipe

__all__ = [
    "BenchSpec",
    "BudgetSpec",
    "DataSpec",
    "DecoderSpec",
    "EngineSpec",
    "ExportSpec",
    "FfnSpec",
    "HeadsSpec",
    "LanguageSpec",
    "ModelSpec",
    "Recipe",
    "RecoverySpec",
    "RefitSpec",
    "Target",
    "TokensSpec",
    "ValidateSpec",
    "assets",
    "find_asset",
    "load_recipe",
    "load_target",
    "read_recipe",
    "variant_of",
]
