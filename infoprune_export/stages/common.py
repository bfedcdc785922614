"""What several stages share: checks before a run, plans, the rewritten model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoprune_export.artifacts import canonical_json
from infoprune_export.errors import InfopruneError
from infoprune_export.pipeline import Run, load_vlm
from infoprune_export.recipe import DecoderSpec, ModelSpec, Recipe, TokensSpec, variant_of

if TYPE_CHECKING:
    from torch import Tensor

    from infoprune_export.ffn.plan import FfnPlan
    from infoprune_export.heads.plan import HeadPlan
    from infoprune_export.language.plan import LanguagePlan
    from infoprune_export.models.vlm import VLM, Decoding

PLAN, PLAN_WEIGHTS = "plan.json", "weights.safetensors"
LAYER = "layer.json"


# ── Shared by stages ─────────────────────────────────────────────────────────


def portable_files(recipe: Recipe) -> dict[str, str]:
    """Folders of stage ``onnx`` by the step they are judged at; ONNX Runtime's CPU provider cannot run bf16."""
    if recipe.export.numerics == "fp32":
        return {"onnx": "compressed"}
    return {"onnx": "float"} if recipe.export.numerics == "bf16" else {"onnx": "float", "precision": "compressed"}


def check_everything(run: Run, *, exporting: bool = True, building: bool = True, timing: bool = False) -> None:
    """Refuse, before anything is written, what would fail later: model, data, target, backend, device.

    With ``exporting`` also a selection method that no graph can hold, with ``building`` an engine that this machine
    cannot build, with ``timing`` a target that latency cannot be measured for.

    A run that starts from nothing also loads the model, which it needs anyway, and puts the user's images through its
    processor, so that a missing tensor or a damaged image leaves no folder behind.

    Raises:
        InfopruneError: the first thing that is wrong.
    """
    from infoprune_export.data import dataset
    from infoprune_export.heads.train import check_training
    from infoprune_export.language.compress import check_language
    from infoprune_export.models.precision import check_keep_fp32
    from infoprune_export.models.vlm import check_model
    from infoprune_export.recovery.distill import check_recovery
    from infoprune_export.tokens.encoder import check_selection, form_of

    check_model(run.recipe.model)
    dataset.check(run.recipe.data)
    if exporting:
        check_exported(run.recipe.tokens)
    check_target(run.recipe, building=building, timing=timing)
    _ = run.device
    if any(run.folder.glob("*/manifest.json")):
        return
    vlm = run.original
    for recipe in (run.recipe, *(variant_of(run.recipe, name) for name in run.recipe.variants)):
        check_recovery(recipe.recovery, run.device)
        if recipe.heads.trains_gates:
            check_training(recipe.heads, run.device)
        if recipe.model == run.recipe.model:
            check_selection(vlm.tower, recipe.tokens)
            check_decoder(recipe.decoder, vlm)
            check_language(recipe.language, vlm.model)
    check_keep_fp32(run.recipe.export.keep_fp32, len(vlm.tower.blocks))
    form_of(vlm.tower, run.recipe.tokens, run.recipe.export.several)
    if not run.recipe.data.made:
        from infoprune_export.models.calibration import inputs_of

        split = dataset.read(run.recipe.data)
        samples = [*split.calibration, *split.validation]
        advance = run.track("images checked", len(samples))
        for sample in samples:
            inputs_of(vlm, [sample])
            advance(1)


def check_target(recipe: Recipe, *, building: bool, timing: bool) -> None:
    """Refuse a target that this machine has no backend for; one for TensorRT only where an engine is built here."""
    from infoprune_export.engine import backend_of
    from infoprune_export.engine.onnxruntime import runtime_target
    from infoprune_export.recipe import TensorRtTarget, engine_target

    target = engine_target(recipe.engine)
    if building or not isinstance(target, TensorRtTarget):
        backend_of(target).check_recipe(recipe, target)
    if timing:
        runtime_target(target)


def check_exported(spec: TokensSpec) -> None:
    """Refuse a tokens section whose method no graph can hold."""
    from infoprune_export.tokens.encoder import selecting
    from infoprune_export.tokens.selector import METHODS

    if selecting(spec) and not METHODS[spec.method].exported:
        exported = ", ".join(name for name, known in METHODS.items() if known.exported)
        raise InfopruneError(
            f"tokens.method = {spec.method!r} is there to compare with and cannot be exported; use {exported}, or try "
            "it as a variant or with infoprune-export compare-tokens"
        )


def check_decoder(spec: DecoderSpec, vlm: VLM) -> None:
    """Refuse a decoder section that this language model cannot take."""
    from infoprune_export.tokens.decoder_methods import steps_of
    from infoprune_export.tokens.watch import text_model

    steps_of(spec, len(text_model(vlm.model).layers), 0 if spec.layer == "auto" else None)


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


def read_language(run: Run) -> tuple[LanguagePlan, dict[str, Tensor]]:
    """The language model's plan with its weights."""
    from safetensors.torch import load_file

    from infoprune_export.language.plan import LanguagePlan

    folder = run.folder_of("language")
    return LanguagePlan.from_dict(read_json(folder / PLAN)), load_file(folder / PLAN_WEIGHTS)


def open_checkpoint(run: Run, device: str = "cpu") -> VLM:
    """The rewritten model, loaded as any user would load it."""
    return load_vlm(ModelSpec(name_or_path=str(run.folder_of("checkpoint").resolve())), device)


def read_decoder(run: Run, vlm: VLM) -> Decoding | None:
    """Stage 2 for a model, as the decoder stage settled it; None if the recipe has none."""
    from infoprune_export.tokens.decoder_methods import decoding_of

    layer = read_json(run.folder_of("decoder") / LAYER)["layer"]
    return decoding_of(run.recipe.decoder, vlm.model, layer, seed=run.recipe.seed)


def read_json(path: Path) -> Any:
    """A JSON artefact that was verified when its stage was reused."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_plan(folder: Path, plan: HeadPlan | FfnPlan | LanguagePlan, weights: Mapping[str, Tensor]) -> None:
    """A plan and the weights that come with it, under `surgery`'s names."""
    from safetensors.torch import save_file

    (folder / PLAN).write_text(canonical_json(plan.to_dict()), encoding="utf-8")
    save_file({name: value.contiguous().cpu() for name, value in weights.items()}, folder / PLAN_WEIGHTS)
