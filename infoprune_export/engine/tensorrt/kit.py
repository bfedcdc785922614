"""Engine build kits: a folder from which a device builds and proves its engine with TensorRT and NumPy alone.

Steps of `make_kit`:

1. The exported file is prepared for the target's parser and linted; an error refuses.
2. PyTorch computes golden outputs in fp32 for calls over the whole profile.
3. The scripts of ``engines/kit``, the plugin's source where the route needs it, serving files and README.txt are added.
4. ``manifest.json`` says what the device needs and has the sha256 of every file. It holds no time and no path, so the
   same inputs give the same bytes.

Only a report that the kit's own verify.py wrote on the device proves an engine; see `validate.kit_report`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infoprune_export.artifacts import MANIFEST, canonical_json, fingerprint, library_versions, staged
from infoprune_export.engine.serving import (
    Serving,
    TensorInfo,
    batches_of,
    normalisation_of,
    tensors_of,
    write_serving,
)
from infoprune_export.engine.tensorrt.golden import golden_cases, selection_settings
from infoprune_export.engine.tensorrt.kit_folder import LIBRARY, check_kit, copy_scripts
from infoprune_export.engine.tensorrt.kit_readme import readme
from infoprune_export.engine.tensorrt.lint import lint
from infoprune_export.engine.tensorrt.prepare import prepare
from infoprune_export.engine.tensorrt.profiles import Profile, profile_of
from infoprune_export.engine.tensorrt.source import Source, inspect
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe.targets import GIB
from infoprune_export.tokens.encoder import form_of
from infoprune_export.validate.parity import limits_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from infoprune_export.models.tower import VisionTower
    from infoprune_export.models.vlm import VLM
    from infoprune_export.recipe import Recipe, Route, TensorRtTarget

SCHEMA_VERSION = 1
TIMED = ("min", "opt", "max")
_PROFILES = 4
"""Profiles that a device may try one after another when its memory is not enough; the first is the one asked for."""

KEPT_LIMITS = {"fp16": 0.05, "bf16": 0.3, "int8": 0.5}
"""Worst replayed step of kept tokens; in fp32 it is `ValidateSpec.replay_tolerance`. PyTorch's own towers in fp16 and
bf16 come to 0.0001 and 0.14 on the testbed models and on small random ones of every family."""


@dataclass(frozen=True)
class KitSource:
    """What a kit is made from."""

    recipe: Recipe
    vlm: VLM
    """The compressed model, fp32, on the CPU."""
    model: Path
    """Its exported encoder."""
    target: TensorRtTarget


def make_kit(source: KitSource, folder: Path, *, force: bool = False) -> dict[str, Any]:
    """Write a kit folder, which appears when it is whole; returns its manifest.

    Raises:
        InfopruneError: the folder exists (unless `force`), the target does not run the precision, the file breaks a
            rule of the target's parser, or something cannot be written.
    """
    target = source.target
    check_kit(target, folder, force=force)
    facts = inspect(source.model)
    if facts.precision not in target.precisions:
        raise InfopruneError(
            f"{source.model}: precision {facts.precision}, target {target.name} runs {', '.join(target.precisions)}; "
            "change export.precision or export.quantization"
        )
    route = kit_route(target, facts.selects)
    spec, tower = source.recipe, source.vlm.tower
    form = form_of(tower, spec.tokens, spec.export.several)
    profile = profile_of(tower, form, spec.engine)
    with staged(folder) as kit:
        model = prepare(source.model, kit, route, opset=target.opset)
        _refuse_lint_errors(model, target, profile)
        cases = _write_cases(source, profile, kit / "golden")
        copy_scripts(route, kit)
        inputs, outputs = tensors_of(model)
        manifest = {
            **_for_device(source, facts, route, profile),
            "model": model.name,
            "inputs": [tensor.name for tensor in inputs],
            "outputs": [tensor.name for tensor in outputs],
            "cases": cases,
            "timed": [case["name"] for case in cases if case["name"] in TIMED],
        }
        serving = _serving(source, inputs, outputs, profile, plugin=route == "plugin")
        write_serving(kit / "serving", serving, "tensorrt_plan")
        (kit / "README.txt").write_text(readme(manifest), encoding="utf-8")
        manifest["files"] = fingerprint(kit)
        (kit / MANIFEST).write_text(canonical_json(manifest), encoding="utf-8")
    return manifest


def kit_route(target: TensorRtTarget, selects: bool) -> Route:
    """How token selection gets into an engine that a kit builds.

    Plugins compiled ahead of time are registered by this package, which a device does not have; the C++ plugin is the
    same kernel, and every TensorRT takes it.
    """
    route = target.token_select
    return "function" if not selects else "plugin" if route == "aot" else route


def _refuse_lint_errors(model: Path, target: TensorRtTarget, profile: Profile) -> None:
    errors = [finding for finding in lint(model, target, profile) if finding.severity == "error"]
    if errors:
        first, more = errors[0], f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise InfopruneError(
            f"target {target.name} cannot read this encoder: {first.node}: {first.problem}{more}; {first.fix}"
        )


# ── Parts ────────────────────────────────────────────────────────────────────


def _write_cases(source: KitSource, profile: Profile, folder: Path) -> list[dict[str, Any]]:
    """Golden calls as npz files, and what the manifest says about them."""
    folder.mkdir()
    recipe, cases = source.recipe, []
    every = golden_cases(
        source.vlm.tower, recipe.tokens, recipe.export.several, recipe.engine, profile, seed=recipe.seed
    )
    for case in every:
        arrays: dict[str, Any] = {name: case.arrays[name] for name in sorted(case.arrays)}
        np.savez(folder / f"{case.name}.npz", **arrays)
        cases.append({"name": case.name, "images": case.images, "file": f"{folder.name}/{case.name}.npz"})
    return cases


def _for_device(source: KitSource, facts: Source, route: Route, profile: Profile) -> dict[str, Any]:
    """What the scripts need to know besides files and cases."""
    recipe, target, tower = source.recipe, source.target, source.vlm.tower
    error, cosine = limits_of(recipe)
    selecting = form_of(tower, recipe.tokens, recipe.export.several).selecting
    profiles = [profile]
    while len(profiles) < _PROFILES and (smaller := profiles[-1].shrunk()) is not None:
        profiles.append(smaller)
    workspace = target.memory_gib / 4 if target.workspace_gib is None else target.workspace_gib
    return {
        "schema_version": SCHEMA_VERSION,
        "name": recipe.name,
        "precision": facts.precision,
        "target": target.model_dump(
            mode="json",
            include={
                "name",
                "software",
                "tensorrt",
                "cuda",
                "sm",
                "version_compatible",
                "hardware_compatible",
            },
        ),
        "known_bugs": [bug.model_dump(mode="json") for bug in target.known_bugs],
        "profiles": [one.to_dict() for one in profiles],
        "build": {
            "workspace_bytes": int(workspace * GIB),
            "optimization_level": target.optimization_level,
            "tf32": facts.precision != "fp32",
        },
        "token_select": {"route": route, "library": LIBRARY if route == "plugin" else None},
        "attention": expected_attention(tower, facts.precision),
        "tolerances": {
            "max_error": error,
            "min_cosine": cosine,
            "kept_suboptimality": KEPT_LIMITS.get(facts.precision, recipe.validate_.replay_tolerance),
        },
        "selection": selection_settings(tower, recipe.tokens, min(error, 1e-2)) if selecting else None,
        "versions": library_versions(),
    }


def expected_attention(tower: VisionTower, precision: str) -> dict[str, Any]:
    """How many blocks TensorRT should run with a fused attention kernel, and why so many.

    It fuses fp16 and bf16 attention of head widths 16 to 256 that are multiples of 8. INT8 exports keep attention in
    fp32.
    """
    widths = [block.head_dim for block in tower.blocks if block.num_heads]
    fused = [width for width in widths if 16 <= width <= 256 and width % 8 == 0]
    if precision not in ("fp16", "bf16"):
        why = "attention is fp32 here, which TensorRT does not fuse"
        fused = []
    elif len(fused) < len(widths):
        why = "heads narrower than 16, wider than 256 or no multiple of 8 are not fused"
    else:
        why = "every block with heads left"
    return {"expected_fused": len(fused), "layers": len(widths), "why": why}


def _serving(
    source: KitSource, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], profile: Profile, *, plugin: bool
) -> Serving:
    return Serving(
        source.recipe.name,
        inputs,
        outputs,
        batches_of(profile, inputs),
        plugin=plugin,
        normalisation=normalisation_of(source.vlm.processor),
    )
