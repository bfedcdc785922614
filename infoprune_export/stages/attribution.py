"""The stage that says where an error was made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoprune_export.artifacts import canonical_json
from infoprune_export.errors import InfopruneError
from infoprune_export.pipeline import Run
from infoprune_export.recipe import OnnxRuntimeTarget, engine_target
from infoprune_export.stages.common import open_checkpoint, portable_files, read_json, read_plans
from infoprune_export.stages.recovery import compressed_tower

if TYPE_CHECKING:
    from infoprune_export.engine.base import Engine
    from infoprune_export.validate.attribution import Subject

ATTRIBUTION = "attribution.json"


def make_attribution(run: Run, folder: Path) -> None:
    """Steps, parts, and what broke."""
    from infoprune_export.validate.attribution import attribute

    (folder / ATTRIBUTION).write_text(canonical_json(attribute(subject_of(run))), encoding="utf-8")


def attribute_file(run: Run, file: Path, *, blocks: bool = True) -> dict[str, Any]:
    """The same for a user's file of the run's encoder in place of the exported one.

    Raises:
        InfopruneError: the file is no encoder of the same parts, or cannot be run.
    """
    from infoprune_export.engine.onnxruntime import open_portable
    from infoprune_export.validate.attribution import attribute, check_foreign
    from infoprune_export.validate.sweep_peer import one_line

    subject = subject_of(run)
    check_foreign(file, subject.precision or subject.onnx)
    try:
        engine = open_portable(file)
    except Exception as error:  # (ONNX Runtime has a class for each of its codes)
        raise InfopruneError(
            f"{file}: ONNX Runtime cannot open it ({one_line(error)}); mend the graph, and keep its weights beside it"
        ) from None
    step = "onnx" if subject.precision is None else "precision"
    exported = {name: own for name, own in subject.engines.items() if name == "onnx"}
    theirs = replace(
        subject,
        onnx=file if subject.precision is None else subject.onnx,
        precision=None if subject.precision is None else file,
        engines={**exported, step: engine},
        engine_file=None,
    )
    return dict(attribute(theirs, blocks=blocks))


def subject_of(run: Run) -> Subject:
    """Everything attribution compares, loaded."""
    from infoprune_export.engine import open_engine
    from infoprune_export.engine.onnxruntime import ENGINE, open_portable
    from infoprune_export.export.onnx import MODEL
    from infoprune_export.models.vlm import writable_copy
    from infoprune_export.rewrite.surgery import apply_heads
    from infoprune_export.validate.attribution import Subject
    from infoprune_export.validate.verdict import parity_inputs

    recipe = run.recipe
    heads, head_weights, ffn, ffn_weights = read_plans(run)
    only_heads = None
    if recipe.heads.method != "none":
        only_heads = writable_copy(run.original_on_cpu)
        apply_heads(only_heads.tower, heads, head_weights)
    by_plans = compressed_tower(run, recovered=False, on_cpu=True)
    files = {step: run.folder_of("onnx") / name / MODEL for step, name in portable_files(recipe).items()}
    engines: dict[str, Engine] = {step: open_portable(file) for step, file in files.items()}
    engines["engine"] = open_engine(run.folder_of("engine"), run.target)
    target = engine_target(recipe.engine)
    runtime = isinstance(target, OnnxRuntimeTarget)
    return Subject(
        recipe=recipe,
        original=run.original_on_cpu,
        only_heads=only_heads,
        by_plans=by_plans,
        recovered=by_plans if recipe.recovery.method == "none" else compressed_tower(run, on_cpu=True),
        pruned=open_checkpoint(run),
        full_copy=writable_copy(run.original_on_cpu),
        heads=heads,
        ffn=ffn,
        weights={**head_weights, **ffn_weights},
        onnx=files["onnx"],
        precision=files.get("precision"),
        engines=engines,
        engine_file=run.folder_of("engine") / ENGINE if runtime else None,
        providers=target.providers if isinstance(target, OnnxRuntimeTarget) else (),
        cases=parity_inputs(recipe, run.split, run.original_on_cpu),
        accuracy=read_json(run.folder_of("validation") / "validation.json")["accuracy"],
    )
