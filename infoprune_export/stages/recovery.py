"""The stage that lets the compressed tower recover, and the compressed tower itself, with recovery or without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoprune_export.artifacts import canonical_json
from infoprune_export.pipeline import Run
from infoprune_export.recipe import Recipe
from infoprune_export.stages.common import PLAN_WEIGHTS, read_plans

if TYPE_CHECKING:
    from torch import Tensor

    from infoprune_export.models.vlm import VLM

HISTORY = "history.json"


def recovery_slice(recipe: Recipe) -> dict[str, Any]:
    """What recovery depends on; nothing, where there is none."""
    if recipe.recovery.method == "none":
        return {"recovery": None}
    section = recipe.to_dict()["recovery"]
    # How often state is written changes nothing.
    del section["checkpoint_steps"]
    return {"recovery": section, "seed": recipe.seed}


def make_recovery(run: Run, folder: Path) -> None:
    """Train what is left of the tower; ``weights.safetensors`` has every trained parameter of its blocks."""
    from safetensors.torch import save_file

    from infoprune_export.recovery.distill import Progress, recover
    from infoprune_export.training.state import discard_state

    weights: dict[str, Tensor] = {}
    history: list[dict[str, float]] = []
    if run.recipe.recovery.method != "none":
        task = run.progress.add_task("  recovery", total=None)

        def show(progress: Progress) -> None:
            terms = "  ".join(f"{name} {value:.3g}" for name, value in progress.terms.items())
            run.progress.update(task, total=progress.steps, completed=progress.step, description=f"  recovery: {terms}")

        try:
            recovered = recover(
                compressed_tower(run, recovered=False),
                run.original.tower,
                run.split.calibration,
                run.recipe.recovery,
                seed=run.recipe.seed,
                scratch=folder,
                on_step=show,
            )
        finally:
            run.progress.remove_task(task)
        weights, history = recovered.weights, recovered.history
        discard_state(folder)
    save_file(weights, folder / PLAN_WEIGHTS)
    (folder / HISTORY).write_text(canonical_json(history), encoding="utf-8")


def read_recovery(run: Run) -> dict[str, Tensor]:
    """The trained parameters of the tower's blocks; none in a recipe without recovery."""
    from safetensors.torch import load_file

    return load_file(run.folder_of("recovery") / PLAN_WEIGHTS)


def compressed_tower(run: Run, *, recovered: bool = True, on_cpu: bool = False) -> VLM:
    """A copy of the original with the plans for heads and FFNs carried out, and recovered if the recipe asks for it.

    Without `recovered` it is what the plans alone make of it.
    """
    from infoprune_export.models.vlm import writable_copy
    from infoprune_export.recovery.weights import apply_recovery
    from infoprune_export.rewrite.surgery import apply_ffn, apply_heads

    vlm = writable_copy(run.original_on_cpu if on_cpu else run.original)
    heads, head_weights, ffn, ffn_weights = read_plans(run)
    apply_heads(vlm.tower, heads, head_weights)
    apply_ffn(vlm.tower, ffn, ffn_weights)
    if recovered:
        apply_recovery(vlm.tower, read_recovery(run))
    return vlm
