"""Stages from the data to the rewritten model and its answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoprune_export.artifacts import canonical_json, sha256_file
from infoprune_export.pipeline import Run
from infoprune_export.recipe import Recipe
from infoprune_export.stages.budget import read_allocation
from infoprune_export.stages.common import (
    LAYER,
    PLAN,
    PLAN_WEIGHTS,
    check_decoder,
    open_checkpoint,
    read_decoder,
    read_json,
    read_language,
    read_plans,
    write_plan,
)
from infoprune_export.stages.recovery import compressed_tower

if TYPE_CHECKING:
    from torch import Tensor

    from infoprune_export.heads.train import Trained
    from infoprune_export.models.vlm import VLM, Decoding
    from infoprune_export.recipe import TokensSpec
    from infoprune_export.validate.accuracy import Encode


GATES = "gates.safetensors"


# ── Data and baseline ────────────────────────────────────────────────────────


def make_data(run: Run, folder: Path) -> None:
    """Draw scenes, fetch a data set, or record which of the user's files are used and what is in them."""
    from infoprune_export.data import dataset

    if run.recipe.data.made:
        dataset.make(folder, run.recipe.data, run.recipe.seed, run.track("rows fetched", _most_rows(run.recipe)))
    else:
        (folder / "files.json").write_text(canonical_json(_data_fingerprint(run.recipe)), encoding="utf-8")


def _data_fingerprint(recipe: Recipe) -> dict[str, Any]:
    from infoprune_export.data import dataset

    return {str(path): sha256_file(path) for path in dataset.own_files(recipe.data)}


def _most_rows(recipe: Recipe) -> int:
    """About how many rows are fetched; most data sets have more than one for an image."""
    return recipe.data.calibration_images + recipe.data.validation_questions


def data_slice(recipe: Recipe) -> dict[str, Any]:
    """What the data depends on: the recipe section, and the bytes of the user's own files."""
    section = recipe.data.to_slice()
    if files := _data_fingerprint(recipe):
        return {"data": section, "files": files, "seed": recipe.seed if recipe.data.drawn else None}
    return {"data": section, "seed": recipe.seed}


def make_baseline(run: Run, folder: Path) -> None:
    """The original model's answers."""
    from infoprune_export.validate.accuracy import split_answers

    vlm = run.original
    advance = run.track("original model answers", len(run.split.validation))
    answers = split_answers(vlm, run.split, _encoder_of(vlm, None), on_batch=advance)
    (folder / "answers.json").write_text(canonical_json(answers), encoding="utf-8")


_SATURATION_IMAGES = 64


def make_decoder(run: Run, folder: Path) -> None:
    """Settle the layer of Stage 2: the recipe's, or where the original's signals saturate on calibration images."""
    from infoprune_export.tokens.saturation import find_layer, measure_samples

    if run.recipe.decoder.method != "none":
        check_decoder(run.recipe.decoder, run.original)
    found: dict[str, Any] = {"layer": None, "signals": None}
    if run.recipe.decoder.finds_layer:
        samples = run.split.calibration[:_SATURATION_IMAGES]
        signals = measure_samples(
            run.original,
            samples,
            _encoder_of(run.original, run.recipe.tokens),
            labelled=run.split.calibration_labelled,
            on_batch=run.track("saturation signals", len(samples)),
        )
        found = {"layer": find_layer(signals), "signals": signals.to_dict()}
    (folder / LAYER).write_text(canonical_json(found), encoding="utf-8")


# ── Compression ──────────────────────────────────────────────────────────────


def make_gates(run: Run, folder: Path) -> None:
    """Score the heads, by training gates or by a criterion; everything about them but the choice.

    ``gates.safetensors`` has ``scores`` [L, H], larger = keep, and of trained gates their values ``gates`` [L, H].
    """
    from safetensors.torch import save_file

    from infoprune_export.heads.criteria import Evidence, score_heads
    from infoprune_export.models.calibration import TaskLoss
    from infoprune_export.training.state import discard_state

    spec = run.recipe.heads
    history: list[dict[str, float]] = []
    if spec.trains_gates:
        trained = _train_gates(run, folder)
        history = trained.history
        discard_state(folder)
        save_file({"scores": trained.scores.contiguous(), "gates": trained.gates.contiguous()}, folder / GATES)
    elif spec.method != "none":
        loss = TaskLoss(run.split.calibration_labelled, run.original.tower, spec.questions_per_image)
        task = run.progress.add_task(f"  {spec.method.replace('_', ' ')} scores", total=1)
        scores = score_heads(
            Evidence(
                run.original,
                run.split.calibration,
                loss,
                spec,
                run.recipe.seed,
                advance=lambda share: run.progress.advance(task, share),
            )
        )
        run.progress.remove_task(task)
        save_file({"scores": scores.contiguous()}, folder / GATES)
    (folder / "history.json").write_text(canonical_json(history), encoding="utf-8")


def _train_gates(run: Run, folder: Path) -> Trained:
    """In this process or in several, with a progress line that shows the loss terms."""
    from infoprune_export.heads.launch import train_in_processes
    from infoprune_export.heads.train import Progress, check_training, train_gates
    from infoprune_export.models.vlm import writable_copy

    spec = run.recipe.heads
    check_training(spec, run.device)
    task = run.progress.add_task("  gate training", total=None)

    def show(progress: Progress) -> None:
        terms = "  ".join(f"{name} {value:.3g}" for name, value in progress.terms.items())
        run.progress.update(task, total=progress.steps, completed=progress.step, description=f"  gates: {terms}")

    try:
        if spec.processes > 1:
            recipe = run.recipe.to_dict()
            return train_in_processes(recipe, run.folder_of("data"), run.device, spec.processes, folder, show)
        return train_gates(
            writable_copy(run.original),
            run.original.tower,
            run.split.calibration,
            spec,
            labelled=run.split.calibration_labelled,
            seed=run.recipe.seed,
            scratch=folder,
            on_step=show,
        )
    finally:
        run.progress.remove_task(task)


def make_heads(run: Run, folder: Path) -> None:
    """Choose heads and refit what is left."""
    from safetensors.torch import load_file

    from infoprune_export.heads.plan import HeadPlan
    from infoprune_export.heads.prune import prune_heads

    recipe, settled = run.recipe, read_allocation(run)
    plan = HeadPlan.full(run.original.tower.head_counts())
    weights: dict[str, Tensor] = {}
    if recipe.heads.method != "none":
        _, plan, weights = prune_heads(
            run.original,
            load_file(run.folder_of("gates") / GATES),
            recipe.heads,
            run.split.calibration,
            recipe.refit.ridge if recipe.refit.enabled else None,
            settled.heads if settled is not None else None,
        )
    write_plan(folder, plan, weights)


def make_ffn(run: Run, folder: Path) -> None:
    """Choose and fit what replaces the FFNs, on top of the pruned heads."""
    from safetensors.torch import load_file

    from infoprune_export.ffn.job import FfnJob
    from infoprune_export.ffn.methods import compress_ffn
    from infoprune_export.ffn.plan import FfnPlan
    from infoprune_export.heads.plan import HeadPlan
    from infoprune_export.models.calibration import TaskLoss
    from infoprune_export.models.vlm import writable_copy
    from infoprune_export.rewrite.surgery import apply_heads

    spec = run.recipe.ffn
    weights: dict[str, Tensor] = {}
    blocks = run.original.tower.blocks
    if spec.method == "none":
        plan = FfnPlan.full([block.ffn_shape.size for block in blocks])
    else:
        heads = run.folder_of("heads")
        pruned = writable_copy(run.original)
        apply_heads(pruned.tower, HeadPlan.from_dict(read_json(heads / PLAN)), load_file(heads / PLAN_WEIGHTS))
        advance, settled = run.track("FFN blocks", 2 * len(blocks)), read_allocation(run)
        job = FfnJob(
            run.original,
            pruned,
            run.split.calibration,
            TaskLoss(run.split.calibration_labelled, run.original.tower),
            spec,
            ridge=run.recipe.refit.ridge if run.recipe.refit.enabled else None,
            seed=run.recipe.seed,
            on_block=lambda block: advance(1),
        )
        plan, weights = compress_ffn(job, settled.widths if settled is not None else None)
    write_plan(folder, plan, weights)


def make_language(run: Run, folder: Path) -> None:
    """Choose heads and neurons of the language model, behind the compressed encoder, and refit what is left."""
    from infoprune_export.language.compress import compress_language
    from infoprune_export.language.plan import LanguagePlan

    spec, refit = run.recipe.language, run.recipe.refit
    # Without it nothing is asked of the language model, whose layers need not be known.
    plan = LanguagePlan.full(())
    weights: dict[str, Tensor] = {}
    if spec.method != "none":
        plan, weights = compress_language(
            run.original,
            compressed_tower(run),
            run.split.calibration,
            spec,
            labelled=run.split.calibration_labelled,
            ridge=refit.ridge if refit.enabled else None,
            seed=run.recipe.seed,
            track=run.track,
        )
    write_plan(folder, plan, weights)


def make_checkpoint(run: Run, folder: Path) -> None:
    """Carry all plans out and save an ordinary checkpoint."""
    from infoprune_export.language.plan import apply_language
    from infoprune_export.models.language import language_layers
    from infoprune_export.rewrite import checkpoint

    vlm = compressed_tower(run)
    if run.recipe.language.method != "none":
        apply_language(language_layers(vlm.model), *read_language(run))
    checkpoint.save(vlm.model, vlm.processor, vlm.tower, folder)


# ── Accuracy in PyTorch ──────────────────────────────────────────────────────


def make_accuracy(run: Run, folder: Path) -> None:
    """Answers after each compression step, still in PyTorch; a step that does nothing answers as the one before it."""
    from infoprune_export.models.vlm import writable_copy
    from infoprune_export.rewrite.surgery import apply_heads

    recipe = run.recipe
    pruned = open_checkpoint(run, run.device)
    language, recovery = recipe.language.method != "none", recipe.recovery.method != "none"
    by_plans = compressed_tower(run, recovered=False) if language or recovery else pruned
    last = read_json(run.folder_of("baseline") / "answers.json")
    answers: dict[str, Any] = {}
    if recipe.heads.method != "none":
        heads, weights, _, _ = read_plans(run)
        only_heads = writable_copy(run.original)
        apply_heads(only_heads.tower, heads, weights)
        last = _ask(run, "heads", only_heads)
    answers["heads"] = last
    if recipe.ffn.method != "none":
        last = _ask(run, "ffn", by_plans)
    answers["ffn"] = last
    if recovery:
        last = answers["recovery"] = _ask(run, "recovery", compressed_tower(run) if language else pruned)
    if language:
        last = answers["language"] = _ask(run, "language", pruned)
    if recipe.tokens.method != "none":
        last = _ask(run, "tokens", pruned, recipe.tokens)
    answers["tokens"] = last
    if (decoder := read_decoder(run, pruned)) is not None:
        answers["decoder"] = _ask(run, "decoder", pruned, recipe.tokens, decoder)
    (folder / "answers.json").write_text(canonical_json(answers), encoding="utf-8")


def _ask(
    run: Run, step: str, vlm: VLM, tokens: TokensSpec | None = None, decoder: Decoding | None = None
) -> list[list[str]]:
    from infoprune_export.validate.accuracy import split_answers

    advance = run.track(f"answers behind {step}", len(run.split.validation))
    return split_answers(vlm, run.split, _encoder_of(vlm, tokens), on_batch=advance, decoder=decoder)


def _encoder_of(vlm: VLM, tokens: TokensSpec | None) -> Encode:
    """The VLM's own tower in PyTorch, with or without selection."""
    from infoprune_export.tokens.encoder import VisionEncoder

    return VisionEncoder(vlm.tower, tokens).encode
