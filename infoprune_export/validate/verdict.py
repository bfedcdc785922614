"""One table from the original to the engine, and one verdict against the recipe's tolerances.

A loss of accuracy or a numerical error belongs to the step behind which it first shows: heads, ffn, recovery, tokens,
onnx, engine. The verdict is PASS when every parity holds and the engine is accurate enough; nothing else is excused by
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infoprune_export.artifacts import sha256_json
from infoprune_export.data.dataset import Split
from infoprune_export.data.formats import format_of
from infoprune_export.engine.base import Engine
from infoprune_export.ffn.plan import FfnPlan
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.measure.flops import count_flops
from infoprune_export.models.calibration import inputs_of
from infoprune_export.models.tower import VisionTower
from infoprune_export.models.vlm import VLM, Decoding
from infoprune_export.recipe import Recipe
from infoprune_export.recovery.weights import apply_recovery
from infoprune_export.tokens.encoder import KEPT, VisionEncoder, encode, form_of
from infoprune_export.validate.accuracy import (
    Answers,
    by_kind,
    estimate,
    official_figures,
    split_answers,
    split_scores,
)
from infoprune_export.validate.parity import LIMITS, Parity, compare, encoder_parity, limits_of, masked, through

PICTURES = 6
STEPS = {
    "original": "the model as it came",
    "heads": "attention heads removed",
    "ffn": "FFNs compressed; the rewritten encoder",
    "recovery": "what is left of the encoder trained to give the original's visual tokens",
    "language": "heads and FFNs of the language model removed",
    "tokens": "visual tokens selected",
    "decoder": "visual tokens dropped inside the language model",
    "onnx": "exported graph in ONNX Runtime",
    "precision": "the graph in the type that was asked for",
    "engine": "engine for the target",
}


@dataclass(frozen=True)
class Subject:
    """A finished compression with everything it is compared to. Models are on the CPU, but for `answering`."""

    recipe: Recipe
    split: Split
    answering: VLM
    """Whose language model answers for every engine, on the run's device: the original, or the rewritten model where
    the language model was compressed too."""
    original: VLM
    pruned: VLM
    full_copy: VLM
    """A copy of the original that may be changed."""
    by_plans: VLM
    """The original rewritten by the plans for heads and FFNs alone; may be changed."""
    recovery: dict[str, torch.Tensor]
    """Trained parameters of the rewritten tower's blocks; none without recovery."""
    heads: HeadPlan
    ffn: FfnPlan
    weights: dict[str, torch.Tensor]
    engines: dict[str, Engine]
    """By step: onnx, the exported fp32 graph; precision, where another type was asked for; engine."""
    baseline: Answers
    answers: dict[str, Answers]
    decoder: Decoding | None
    """Stage 2, within which the engine's tokens are answered from too."""
    track: Callable[[str, int], Callable[[int], None]]


def validate(subject: Subject) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parity of every step, accuracy of every step, sizes, and the verdict; beside it the score of every question.

    Both are plain JSON types; the second is what another run's is compared with, see `question_scores`.
    """
    recipe, samples = subject.recipe, subject.split.validation
    parities = [*_rewrite_parity(subject), *_engine_parity(subject)]
    answers = dict(subject.answers)
    advance = subject.track("engine answers", len(subject.engines) * len(samples))
    form = form_of(subject.original.tower, recipe.tokens, recipe.export.several)
    for step, engine in subject.engines.items():
        see = partial(encode, subject.original.tower, form, recipe.tokens, through(engine))
        answers[step] = split_answers(subject.answering, subject.split, see, on_batch=advance, decoder=subject.decoder)
    accuracy = accuracy_table(subject.split, subject.baseline, answers)
    checks = [
        *_parity_checks(parities, recipe),
        _checkpoint_check(subject),
        _accuracy_check(accuracy, recipe, subject.split.labelled),
    ]
    result = {
        "verdict": "PASS" if all(check["passed"] for check in checks) else "FAIL",
        "checks": checks,
        "parity": [_finite(parity.to_dict()) for parity in parities],
        "metric": metric_name(subject.split),
        "accuracy": accuracy,
        "size": _sizes(subject),
        "heads": subject.heads.to_dict(),
        "ffn": subject.ffn.to_dict(),
        "kept_tokens": _sample_selections(subject),
    }
    return result, question_scores(subject.split, subject.baseline, answers)


# ── Numbers ──────────────────────────────────────────────────────────────────


def _rewrite_parity(subject: Subject) -> list[Parity]:
    """Masked full-size model against the rewritten one before recovery, on validation images and on random input."""
    recipe = subject.recipe
    parities = []
    with masked(subject.full_copy.tower, subject.heads, subject.ffn, subject.weights), torch.inference_mode():
        for case, inputs in _inputs(subject):
            expected = subject.full_copy.tower.features_of(inputs).numpy()
            actual = subject.by_plans.tower.features_of(inputs).numpy()
            parities.append(
                compare(expected, actual, step="rewrite", case=case, tolerance=recipe.validate_.rewrite_tolerance)
            )
    return parities


def _engine_parity(subject: Subject) -> list[Parity]:
    spec, tokens, export = subject.recipe.validate_, subject.recipe.tokens, subject.recipe.export
    parities = []
    for step, engine in subject.engines.items():
        # Beside a typed or INT8 graph the fp32 one is held to fp32's limits.
        exact = step == "onnx" and export.numerics != "fp32"
        tolerance, cosine = LIMITS["fp32"] if exact else limits_of(subject.recipe)
        parities += [
            encoder_parity(
                step,
                subject.pruned.tower,
                tokens,
                engine,
                inputs,
                case=case,
                tolerance=tolerance,
                min_cosine=cosine,
                replay_tolerance=spec.replay_tolerance if exact or export.numerics == "fp32" else None,
                several=export.several,
            )
            for case, inputs in _inputs(subject)
        ]
    return parities


def _inputs(subject: Subject) -> list[tuple[str, dict[str, torch.Tensor]]]:
    return parity_inputs(subject.recipe, subject.split, subject.original)


def parity_inputs(recipe: Recipe, split: Split, original: VLM) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Batches of several sizes, of validation images and of random input."""
    samples = split.validation
    cases = []
    for size in recipe.validate_.parity_batches:
        images = [samples[i % len(samples)] for i in range(size)]
        cases.append((f"{size} image{'s' if size > 1 else ''}", inputs_of(original, images)))
    generator = torch.Generator().manual_seed(recipe.seed)
    cases.append(("2 random", original.tower.example_inputs(2, generator)))
    return cases


# ── Accuracy ─────────────────────────────────────────────────────────────────


def metric_name(split: Split) -> str:
    """What the mean of the scores is."""
    return format_of(split.format).metric if split.labelled else "agreement with the original"


def step_scores(split: Split, baseline: Answers, answers: dict[str, Answers]) -> dict[str, NDArray[np.float64]]:
    """Score of every question behind every step, [questions] each, 0..1, in sample order."""
    known = {"original": baseline, **answers}
    return {step: split_scores(split, known[step], baseline) for step in STEPS if step in known}


def accuracy_table(split: Split, baseline: Answers, answers: dict[str, Answers]) -> list[dict[str, Any]]:
    """One row per step: mean, and paired differences to the original and to the step before, with standard errors.

    ``official`` has the benchmark's own figures, such as POPE's F1 or MME's totals; none where nothing is labelled.
    """
    samples, known = split.validation, {"original": baseline, **answers}
    scores_by_step = step_scores(split, baseline, answers)
    first = previous = scores_by_step["original"]
    rows = []
    for step, scores in scores_by_step.items():
        rows.append(
            {
                "step": step,
                "meaning": STEPS[step],
                **estimate(samples, scores).to_dict(),
                "to_original": estimate(samples, scores - first).to_dict(),
                "to_previous": estimate(samples, scores - previous).to_dict(),
                "by_kind": dict(by_kind(samples, scores)),
                "official": official_figures(split, known[step]),
            }
        )
        previous = scores
    return rows


def question_scores(split: Split, baseline: Answers, answers: dict[str, Answers]) -> dict[str, Any]:
    """What two runs are compared by, question by question.

    ``questions_sha256`` is over image names, questions and right answers, in order; ``clusters`` has the number of
    questions of each image; ``scores`` has the score of every question by step, 0..1.
    """
    samples = split.validation
    asked = [[s.image.name, [[q.text, list(q.answers)] for q in s.questions]] for s in samples]
    return {
        "questions_sha256": sha256_json(asked),
        "clusters": [len(sample.questions) for sample in samples],
        "scores": {step: s.tolist() for step, s in step_scores(split, baseline, answers).items()},
    }


def summarize_variant(
    recipe: Recipe,
    split: Split,
    plans: tuple[HeadPlan, Any, FfnPlan, Any],
    baseline: Answers,
    answers: dict[str, Answers],
) -> dict[str, Any]:
    """What the report shows of a variant: its settings, sizes and accuracies."""
    heads, _, ffn, _ = plans
    return {
        "heads_removed": heads.removed_fraction,
        "ffn_macs_kept": ffn.kept_fraction,
        "tokens_kept": float(recipe.tokens.keep_ratio) if recipe.tokens.method != "none" else 1.0,
        "methods": {"heads": recipe.heads.method, "ffn": recipe.ffn.method, "tokens": recipe.tokens.method},
        "accuracy": accuracy_table(split, baseline, answers),
    }


# ── Sizes and pictures ───────────────────────────────────────────────────────


def _sizes(subject: Subject) -> dict[str, Any]:
    """Counts on the original and the compressed encoder, selection included."""
    inputs = inputs_of(subject.original, subject.split.validation[:1])
    tokens = subject.recipe.tokens
    sides = {
        "original": (VisionEncoder(subject.original.tower, None, several=False), subject.original),
        "compressed": (VisionEncoder(subject.pruned.tower, tokens, several=False), subject.pruned),
    }
    with torch.inference_mode():
        seen = {side: encoder.encode(inputs).features[0] for side, (encoder, _) in sides.items()}
    return {
        "flops_per_image": {
            side: count_flops(encoder, vlm.tower.plan(inputs, encoder.form)) for side, (encoder, vlm) in sides.items()
        },
        "block_parameters": {
            side: sum(p.numel() for block in vlm.tower.blocks for p in block.module.parameters())
            for side, (_, vlm) in sides.items()
        },
        "visual_tokens": {side: len(features) for side, features in seen.items()},
        "heads_removed": subject.heads.removed_fraction,
        "ffn_macs_kept": subject.ffn.kept_fraction,
    }


def _sample_selections(subject: Subject) -> list[dict[str, Any]]:
    """Kept tokens of the first validation images, for the report's pictures."""
    if subject.recipe.tokens.method == "none":
        return []
    samples = subject.split.validation[:PICTURES]
    tower, inputs = subject.original.tower, inputs_of(subject.original, samples)
    form = form_of(tower, subject.recipe.tokens, subject.recipe.export.several)
    run = through(subject.engines["engine"])
    kept = [row[row >= 0] for planned in tower.calls(inputs, form) for row in run(planned)[KEPT]]
    return [{"image": sample.image.name, "kept": row.tolist()} for sample, row in zip(samples, kept, strict=True)]


# ── Checks ───────────────────────────────────────────────────────────────────


_PARITIES = {
    "rewrite": "masked = rewritten",
    "onnx": "PyTorch = ONNX",
    "precision": "PyTorch = typed ONNX",
    "engine": "PyTorch = engine",
}


def _parity_checks(parities: Sequence[Parity], recipe: Recipe) -> list[dict[str, Any]]:
    checks = []
    for step, what in _PARITIES.items():
        mine = [parity for parity in parities if parity.step == step]
        if not mine:
            continue
        worst = max(mine, key=lambda parity: parity.relative_error)
        within = all(p.relative_error <= p.tolerance for p in mine)
        checks.append(_check(what, within, worst.relative_error, worst.tolerance, f"worst: {worst.case}"))
        if worst.min_cosine:
            lowest = min(mine, key=lambda parity: parity.cosine)
            enough = lowest.cosine >= lowest.min_cosine
            check = _check(f"cosine, {what}", enough, lowest.cosine, lowest.min_cosine, f"worst: {lowest.case}")
            checks.append({**check, "at_least": True})
        if worst.kept_suboptimality is not None:
            value = max(p.kept_suboptimality or 0.0 for p in mine)
            limit = recipe.validate_.replay_tolerance
            checks.append(
                _check(f"kept tokens, {what}", value <= limit, value, limit, "worst step under replay in float64")
            )
    return checks


def _checkpoint_check(subject: Subject) -> dict[str, Any]:
    """The checkpoint's blocks, bit by bit, against the plans and recovery they were made of."""
    apply_recovery(subject.by_plans.tower, subject.recovery)
    made, loaded = (_block_tensors(vlm.tower) for vlm in (subject.by_plans, subject.pruned))
    names = sorted(made.keys() | loaded.keys())
    wrong = [n for n in names if n not in made or n not in loaded or not torch.equal(made[n], loaded[n])]
    detail = f"first: {wrong[0]}" if wrong else f"{len(names)} tensors of the vision blocks"
    return _check("tensors that differ, plans = checkpoint", not wrong, len(wrong), 0, detail)


def _block_tensors(tower: VisionTower) -> dict[str, torch.Tensor]:
    blocks = enumerate(tower.blocks)
    return {f"{i}.{name}": value for i, block in blocks for name, value in block.module.state_dict().items()}


def _accuracy_check(rows: Sequence[dict[str, Any]], recipe: Recipe, labelled: bool) -> dict[str, Any]:
    last = rows[-1]
    if labelled:
        drop, error = -last["to_original"]["percent"], last["to_original"]["standard_error"]
        limit = recipe.validate_.max_accuracy_drop
        return _check("accuracy lost, points", drop <= limit, drop, limit, f"standard error {error:.2f}")
    value, limit = last["percent"] / 100, recipe.validate_.min_agreement
    return {
        **_check("answers equal to the original's", value >= limit, value, limit, f"{last['questions']} questions"),
        "at_least": True,
    }


def _check(what: str, passed: bool, value: float, limit: float, detail: str) -> dict[str, Any]:
    return _finite(
        {
            "what": what,
            "passed": bool(passed),
            "value": float(value),
            "limit": float(limit),
            "detail": detail,
            "at_least": False,
        }
    )


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity; an infinite error is written as null and is always a failure."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
