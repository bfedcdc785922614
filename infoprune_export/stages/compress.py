"""Stages from the data to the rewritten model and its answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from infoprune_export.artifacts import canonical_json, fingerprint
from infoprune_export.pipeline import Run
from infoprune_export.recipe import Recipe
from infoprune_export.stages.common import (
    LAYER,
    PLAN,
    PLAN_WEIGHTS,
    check_decoder,
    open_checkpoint,
    read_decoder,
    read_json,
    read_plans,
    write_plan,
)

if TYPE_CHECKING:
    from torch import Tensor

    from infoprune_export.models.vlm import VLM
    from infoprune_export.recipe import TokensSpec
    from infoprune_export.validate.accuracy import Encode


# ── Data and baseline ────────────────────────────────────────────────────────


def make_data(run: Run, folder: Path) -> None:
    """Draw scenes, or record which of the user's files are used and what is in them."""
    from infoprune_export.data import dataset

    if run.recipe.data.images is None:
        dataset.draw_scenes(folder, run.recipe.data, run.recipe.seed)
    else:
        (folder / "files.json").write_text(canonical_json(_data_fingerprint(run.recipe)), encoding="utf-8")


def _data_fingerprint(recipe: Recipe) -> dict[str, Any]:
    from infoprune_export.data import dataset

    spec = recipe.data
    split = dataset.read(spec)
    files = {
        str(sample.image): fingerprint(sample.image)[sample.image.name]
        for sample in split.calibration + split.validation
    }
    for path in (spec.questions, spec.annotations):
        if path is not None:
            files[path] = fingerprint(Path(path))[Path(path).name]
    return files


def data_slice(recipe: Recipe) -> dict[str, Any]:
    """What the data depends on: the recipe section, and the bytes of the user's own files."""
    section = recipe.to_dict()["data"]
    if recipe.data.images is None:
        return {"data": section, "seed": recipe.seed}
    return {"data": section, "files": _data_fingerprint(recipe)}


def make_baseline(run: Run, folder: Path) -> None:
    """The original model's answers."""
    from infoprune_export.validate.accuracy import collect_answers

    vlm, samples = run.original, run.split.validation
    advance = run.track("original model answers", len(samples))
    answers = collect_answers(vlm, samples, _encoder_of(vlm, None), on_batch=advance)
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
            labelled=run.split.labelled,
            on_batch=run.track("saturation signals", len(samples)),
        )
        found = {"layer": find_layer(signals), "signals": signals.to_dict()}
    (folder / LAYER).write_text(canonical_json(found), encoding="utf-8")


# ── Compression ──────────────────────────────────────────────────────────────


def make_gates(run: Run, folder: Path) -> None:
    """Train the gates; everything about them but the choice of heads."""
    from safetensors.torch import save_file

    from infoprune_export.heads.train import discard_state, train_gates
    from infoprune_export.models.calibration import TaskLoss
    from infoprune_export.models.vlm import writable_copy

    spec = run.recipe.heads
    if spec.method == "none":
        (folder / "history.json").write_text(canonical_json([]), encoding="utf-8")
        return
    loss = TaskLoss(run.split.labelled, run.original.tower, spec.questions_per_image)
    advance = run.track("gate epochs", spec.epochs)
    zeta, history = train_gates(
        writable_copy(run.original),
        run.split.calibration,
        spec,
        loss,
        seed=run.recipe.seed,
        scratch=folder,
        on_epoch=lambda epoch, terms: advance(1),
    )
    discard_state(folder)
    save_file({"zeta": zeta}, folder / "gates.safetensors")
    (folder / "history.json").write_text(canonical_json(history), encoding="utf-8")


def make_heads(run: Run, folder: Path) -> None:
    """Choose heads and refit the output projections."""
    from safetensors.torch import load_file

    from infoprune_export.heads.plan import HeadPlan
    from infoprune_export.heads.refit import refit_heads
    from infoprune_export.heads.train import plan_heads
    from infoprune_export.models.vlm import writable_copy

    spec = run.recipe.heads
    weights: dict[str, Tensor] = {}
    if spec.method == "none":
        plan = HeadPlan.full(run.original.tower.head_counts())
    else:
        plan = plan_heads(load_file(run.folder_of("gates") / "gates.safetensors")["zeta"], spec)
        if spec.method == "budgeted" and run.recipe.refit.enabled:
            pruned = writable_copy(run.original)
            weights = refit_heads(run.original, pruned, plan, run.split.calibration, run.recipe.refit.ridge)
    write_plan(folder, plan, weights)


def make_ffn(run: Run, folder: Path) -> None:
    """Choose and fit what replaces the FFNs, on top of the pruned heads."""
    from safetensors.torch import load_file

    from infoprune_export.ffn.obs import compress_obs
    from infoprune_export.ffn.plan import FfnPlan
    from infoprune_export.ffn.svd import compress_paper
    from infoprune_export.heads.plan import HeadPlan
    from infoprune_export.models.calibration import TaskLoss
    from infoprune_export.models.vlm import writable_copy
    from infoprune_export.rewrite.surgery import apply_heads

    spec = run.recipe.ffn
    weights: dict[str, Tensor] = {}
    blocks = run.original.tower.blocks
    if spec.method == "none":
        plan = FfnPlan.full([block.ffn_shape.size for block in blocks])
    elif spec.method == "paper":
        plan, weights = compress_paper(run.original.tower, spec.epsilon)
    else:
        heads = run.folder_of("heads")
        pruned = writable_copy(run.original)
        apply_heads(pruned.tower, HeadPlan.from_dict(read_json(heads / PLAN)), load_file(heads / PLAN_WEIGHTS))
        advance = run.track("FFN blocks", 2 * len(blocks))
        plan, weights = compress_obs(
            run.original,
            pruned,
            run.split.calibration,
            TaskLoss(run.split.labelled, run.original.tower),
            spec,
            ridge=run.recipe.refit.ridge if run.recipe.refit.enabled else None,
            seed=run.recipe.seed,
            on_block=lambda block: advance(1),
        )
    write_plan(folder, plan, weights)


def make_checkpoint(run: Run, folder: Path) -> None:
    """Carry both plans out and save an ordinary checkpoint."""
    from infoprune_export.models.vlm import writable_copy
    from infoprune_export.rewrite import checkpoint
    from infoprune_export.rewrite.surgery import apply_ffn, apply_heads

    vlm = writable_copy(run.original)
    heads, head_weights, ffn, ffn_weights = read_plans(run)
    apply_heads(vlm.tower, heads, head_weights)
    apply_ffn(vlm.tower, ffn, ffn_weights)
    checkpoint.save(vlm.model, vlm.processor, vlm.tower, folder)


# ── Accuracy in PyTorch ──────────────────────────────────────────────────────


def make_accuracy(run: Run, folder: Path) -> None:
    """Answers after each compression step, still in PyTorch."""
    from infoprune_export.models.vlm import writable_copy
    from infoprune_export.rewrite.surgery import apply_heads
    from infoprune_export.validate.accuracy import collect_answers

    samples = run.split.validation
    heads, head_weights, _, _ = read_plans(run)
    only_heads = writable_copy(run.original)
    apply_heads(only_heads.tower, heads, head_weights)
    pruned = open_checkpoint(run, run.device)
    steps = 3 + (run.recipe.decoder.method != "none")
    advance = run.track("compressed model answers", steps * len(samples))
    answers = {
        "heads": collect_answers(only_heads, samples, _encoder_of(only_heads, None), on_batch=advance),
        "ffn": collect_answers(pruned, samples, _encoder_of(pruned, None), on_batch=advance),
        "tokens": collect_answers(pruned, samples, _encoder_of(pruned, run.recipe.tokens), on_batch=advance),
    }
    if (decoder := read_decoder(run, pruned)) is not None:
        see = _encoder_of(pruned, run.recipe.tokens)
        answers["decoder"] = collect_answers(pruned, samples, see, on_batch=advance, decoder=decoder)
    (folder / "answers.json").write_text(canonical_json(answers), encoding="utf-8")


def _encoder_of(vlm: VLM, tokens: TokensSpec | None) -> Encode:
    """The VLM's own tower in PyTorch, with or without selection."""
    from infoprune_export.tokens.encoder import VisionEncoder

    return VisionEncoder(vlm.tower, tokens).encode
