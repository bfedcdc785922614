"""Recipes and targets: what to do, with which budgets, for which machine.

A recipe is a YAML file checked against `Recipe`. Unknown keys, wrong types and values out of range are refused with
the dotted name of the key. Defaults come from the papers unless the field says otherwise: "A" is the structural paper
(heads, feed-forward networks), "B" the visual-token paper.
"""

from infoprune_export.recipe.data import DataSpec, FormatName
from infoprune_export.recipe.delivery import BenchSpec, EngineSpec, ExportSpec, ValidateSpec
from infoprune_export.recipe.reading import (
    Point,
    assets,
    engine_target,
    find_asset,
    load_recipe,
    load_target,
    points_of,
    read_recipe,
    variant_of,
)
from infoprune_export.recipe.structure import BudgetSpec, FfnSpec, HeadsSpec, LanguageSpec, RecoverySpec, RefitSpec
from infoprune_export.recipe.targets import KnownBug, OnnxRuntimeTarget, Route, Target, TensorRtTarget, read_target
from infoprune_export.recipe.visual_tokens import DecoderSpec, TokensSpec
from infoprune_export.recipe.whole import ModelSpec, Recipe

__all__ = [
    "BenchSpec",
    "BudgetSpec",
    "DataSpec",
    "DecoderSpec",
    "EngineSpec",
    "ExportSpec",
    "FfnSpec",
    "FormatName",
    "HeadsSpec",
    "KnownBug",
    "LanguageSpec",
    "ModelSpec",
    "OnnxRuntimeTarget",
    "Point",
    "Recipe",
    "RecoverySpec",
    "RefitSpec",
    "Route",
    "Target",
    "TensorRtTarget",
    "TokensSpec",
    "ValidateSpec",
    "assets",
    "engine_target",
    "find_asset",
    "load_recipe",
    "load_target",
    "points_of",
    "read_recipe",
    "read_target",
    "variant_of",
]
