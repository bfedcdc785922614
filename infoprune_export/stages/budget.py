"""The stage that settles heads and widths together, where a recipe gives one budget for both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoprune_export.artifacts import canonical_json
from infoprune_export.pipeline import Run
from infoprune_export.recipe import Recipe
from infoprune_export.stages.common import read_json

if TYPE_CHECKING:
    from infoprune_export.budget.joint import Allocation

ALLOCATION = "allocation.json"


def budget_slice(recipe: Recipe) -> dict[str, Any]:
    """What the allocation depends on."""
    if recipe.budget.by == "none":
        return {"budget": None}
    chosen: dict[str, Any] = {
        "budget": recipe.to_dict()["budget"],
        "round_to": recipe.ffn.round_to,
        "seed": recipe.seed,
    }
    if recipe.budget.by == "latency":
        from infoprune_export.recipe import load_target

        target = load_target(recipe.engine.target).model_dump(mode="json")
        chosen |= {"target": target, "threads": recipe.bench.threads, "opset": recipe.export.opset}
    return chosen


def make_budget(run: Run, folder: Path) -> None:
    """Measure what parts cost, find what removing them would damage, and choose."""
    found: dict[str, Any] = {"allocation": None, "table": None}
    if run.recipe.budget.by != "none":
        found = _allocate(run)
    (folder / ALLOCATION).write_text(canonical_json(found), encoding="utf-8")


def _allocate(run: Run) -> dict[str, Any]:
    from dataclasses import asdict

    from infoprune_export.budget import cost
    from infoprune_export.budget.joint import allocate_jointly
    from infoprune_export.ffn.obs import eliminate_neurons
    from infoprune_export.heads.obs import eliminate_heads
    from infoprune_export.models.calibration import TaskLoss, inputs_of
    from infoprune_export.models.vlm import writable_copy

    recipe, budget, original = run.recipe, run.recipe.budget, run.original_on_cpu
    meter: cost.Meter = cost.flops
    unit = "FLOP"
    if recipe.budget.by == "latency":
        meter, unit = cost.milliseconds(run.target, recipe.bench.threads, recipe.export.opset), "ms"
    inputs = inputs_of(original, run.split.calibration[: recipe.budget.images])
    table = cost.measure(original.tower, inputs, meter, unit, recipe.ffn.round_to)
    samples, loss = run.split.calibration, TaskLoss(run.split.calibration_labelled, run.original.tower)
    advance = run.track("damage of removal", 2)
    heads = eliminate_heads(writable_copy(run.original), samples, loss, recipe.seed)
    advance(1)
    neurons = eliminate_neurons(writable_copy(run.original), samples, loss, recipe.seed)
    advance(1)
    allocation = allocate_jointly(heads, neurons, table, budget.speed_up, recipe.ffn.round_to, budget.of)
    return {"allocation": allocation.to_dict(), "table": asdict(table)}


def read_allocation(run: Run) -> Allocation | None:
    """What the budget settled; None in a recipe without one."""
    from infoprune_export.budget.joint import Allocation

    found = read_json(run.folder_of("budget") / ALLOCATION)["allocation"]
    if found is None:
        return None
    return Allocation(tuple(map(tuple, found["heads"])), tuple(found["widths"]), found["speed_up"])
