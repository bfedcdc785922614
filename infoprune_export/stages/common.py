"""What several stages share: checks before a run, plans, the rewritten model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoprune_export.artifacts import canonical_json
from infoprune_export.pipeline import Run, load_vlm
from infoprune_export.recipe import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from infoprune_export.ffn.plan import FfnPlan
    from infoprune_export.heads.plan import HeadPlan
    from infoprune_export.models.vlm import VLM

PLAN, PLAN_WEIGHTS = "plan.json", "weights.safetensors"


# ── Shared by stages ─────────────────────────────────────────────────────────


def check_everything(run: Run) -> None:
    """Refuse, before anything is written, what would fail later: model, data, target, backend, device.

    A run that starts from nothing also loads the model, which it needs anyway, and puts the user's images through its
    processor, so that a missing tensor or a damaged image leaves no folder behind.

    Raises:
        InfopruneError: the first thing that is wrong.
    """
    from infoprune_export.data import dataset
    from infoprune_export.engine import backend_of
    from infoprune_export.models.vlm import check_model
    from infoprune_export.tokens.encoder import check_selection, form_of

    check_model(run.recipe.model)
    dataset.check(run.recipe.data)
    backend_of(run.target)
    _ = run.device
    if any(run.folder.glob("*/manifest.json")):
        return
    vlm = run.original
    check_selection(vlm.tower, run.recipe.tokens)
    form_of(vlm.tower, run.recipe.tokens, run.recipe.export.several)
    if run.recipe.data.images is not None:
        from infoprune_export.models.calibration import inputs_of

        split = dataset.read(run.recipe.data)
        samples = [*split.calibration, *split.validation]
        advance = run.track("images checked", len(samples))
        for sample in samples:
            inputs_of(vlm, [sample])
            advance(1)


def read_plans(run: Run) -> tuple[HeadPlan, dict[str, Tensor], FfnPlan, dict[str, Tensor]]:
    """Both plans with their weights."""
    from safetensors.torch import load_file

    from infoprune_export.ffn.plan import FfnPlan
    from infoprune_export.heads.plan import HeadPlan

    heads, ffn = run.folder_of("heads"), run.folder_of("ffn")
    return (
        HeadPlan.from_dict(json.loads((heads / PLAN).read_text(encoding="utf-8"))),
        load_file(heads / PLAN_WEIGHTS),
        FfnPlan.from_dict(json.loads((ffn / PLAN).read_text(encoding="utf-8"))),
        load_file(ffn / PLAN_WEIGHTS),
    )


def open_checkpoint(run: Run, device: str = "cpu") -> VLM:
    """The rewritten model, loaded as any user would load it."""
    return load_vlm(ModelSpec(name_or_path=str(run.folder_of("checkpoint").resolve())), device)


def read_json(path: Path) -> Any:
    """A JSON artefact that was verified when its stage was reused."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_plan(folder: Path, plan: HeadPlan | FfnPlan, weights: Mapping[str, Tensor]) -> None:
    """A plan and the weights that come with it, under `surgery`'s names."""
    from safetensors.torch import save_file

    (folder / PLAN).write_text(canonical_json(plan.to_dict()), encoding="utf-8")
    save_file({name: value.contiguous().cpu() for name, value in weights.items()}, folder / PLAN_WEIGHTS)
