"""What the encoder puts out behind every step of a compression, against the original and against the step before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infoprune_export.engine.base import Engine
from infoprune_export.models.tower import VisionTower
from infoprune_export.recipe import Recipe, TokensSpec
from infoprune_export.tokens.encoder import KEPT, VisionEncoder, encode, form_of
from infoprune_export.validate.attribution_schema import StepRow, WorstFigures
from infoprune_export.validate.blocks import figures, worst_of
from infoprune_export.validate.parity import LIMITS, Parity, encoder_parity, limits_of, through

Cases = Sequence[tuple[str, Mapping[str, Tensor]]]
"""Batches: a name, and a processor's outputs."""
Step = Callable[[Mapping[str, Tensor]], "list[Seen]"]


@dataclass(frozen=True)
class Seen:
    """One image behind a step."""

    features: Tensor
    """fp32 [T, D_llm]."""
    kept: Tensor
    """int64 [T], ascending: which of the image's visual tokens these are."""


def in_torch(tower: VisionTower, tokens: TokensSpec | None, several: bool | None) -> Step:
    encoder = VisionEncoder(tower, tokens, several).eval()
    return lambda inputs: _seen(tower, encoder.form, tokens, encoder.run, inputs)


def in_engine(engine: Engine, tower: VisionTower, tokens: TokensSpec, several: bool | None) -> Step:
    form = form_of(tower, tokens, several)
    return lambda inputs: _seen(tower, form, tokens, through(engine), inputs)


def _seen(
    tower: VisionTower, form: Any, tokens: TokensSpec | None, run: Any, inputs: Mapping[str, Tensor]
) -> list[Seen]:
    kept: list[Tensor] = []

    def recording(planned: dict[str, Tensor]) -> Mapping[str, Tensor]:
        outputs: Mapping[str, Tensor] = run(planned)
        if KEPT in outputs:
            kept.extend(row[row >= 0] for row in outputs[KEPT])
        return outputs

    with torch.inference_mode():
        features = encode(tower, form, tokens, recording, inputs).features
    places = kept or [torch.arange(len(feature)) for feature in features]
    return [Seen(feature.float(), place) for feature, place in zip(features, places, strict=True)]


def step_rows(
    recipe: Recipe,
    steps: Mapping[str, Step],
    engines: Mapping[str, Engine],
    reference: VisionTower,
    cases: Cases,
    meanings: Mapping[str, str],
    accuracy: Sequence[Mapping[str, Any]],
) -> list[StepRow]:
    """One row per step, in order; the first is the original.

    Args:
        recipe: gives tokens, form and limits.
        steps: from a processor's outputs to what the language model would see.
        engines: those of the steps that run outside PyTorch; they are held to `reference` too.
        reference: the compressed tower in fp32.
        cases: batches that every step sees.
        meanings: of the steps, in words.
        accuracy: validation's table.
    """
    rows: list[StepRow] = []
    answered = {row["step"]: row for row in accuracy}
    behind = {step: [(case, run(inputs)) for case, inputs in cases] for step, run in steps.items()}
    first = previous = next(iter(behind))
    for step, seen in behind.items():
        parities = _parities(recipe, step, engines, reference, cases)
        known = answered.get(step)
        start = step == first
        rows.append(
            StepRow(
                step=step,
                meaning=meanings[step],
                to_original=None if start else _compared(behind[first], seen),
                to_previous=None if start else _compared(behind[previous], seen),
                tokens_kept=_count(seen) / _count(behind[first]),
                kept_in_common=None if _count(seen) == _count(behind[first]) else _common(behind[previous], seen),
                exact=step in engines,
                parity=_figures(parities),
                kept_suboptimality=max(
                    (p.kept_suboptimality for p in parities if p.kept_suboptimality is not None), default=None
                ),
                tolerance=parities[0].tolerance if parities else None,
                min_cosine=parities[0].min_cosine if parities else None,
                passed=all(parity.passed for parity in parities),
                accuracy=None if known is None else known["percent"],
                accuracy_to_previous=None if known is None or start else known["to_previous"]["percent"],
            )
        )
        previous = step
    return rows


def _parities(
    recipe: Recipe, step: str, engines: Mapping[str, Engine], reference: VisionTower, cases: Cases
) -> list[Parity]:
    if step not in engines:
        return []
    typed = step != "onnx" and recipe.export.numerics != "fp32"
    tolerance, cosine = limits_of(recipe) if typed or recipe.export.numerics == "fp32" else LIMITS["fp32"]
    return [
        encoder_parity(
            step,
            reference,
            recipe.tokens,
            engines[step],
            inputs,
            case=case,
            tolerance=tolerance,
            min_cosine=cosine,
            replay_tolerance=None if typed else recipe.validate_.replay_tolerance,
            several=recipe.export.several,
        )
        for case, inputs in cases
    ]


def _figures(parities: Sequence[Parity]) -> WorstFigures | None:
    if not parities:
        return None

    def finite(parity: Parity) -> WorstFigures:
        if not math.isfinite(parity.relative_error):
            return WorstFigures(cosine=None, norm_ratio=None, relative_error=None, case=parity.case)
        return WorstFigures(
            cosine=parity.cosine,
            norm_ratio=parity.norm_ratio,
            relative_error=parity.relative_error,
            case=parity.case,
        )

    return worst_of([finite(parity) for parity in parities])


def _compared(reference: list[tuple[str, list[Seen]]], candidate: list[tuple[str, list[Seen]]]) -> WorstFigures:
    """At the tokens that both have."""
    found = []
    for (case, mine), (_, theirs) in zip(reference, candidate, strict=True):
        pairs = [_shared(a, b) for a, b in zip(mine, theirs, strict=True)]
        found.append(figures(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]), case))
    return worst_of(found)


def _shared(a: Seen, b: Seen) -> tuple[Tensor, Tensor]:
    return a.features[torch.isin(a.kept, b.kept)], b.features[torch.isin(b.kept, a.kept)]


def _count(seen: list[tuple[str, list[Seen]]]) -> int:
    return sum(len(image.kept) for _, images in seen for image in images)


def _common(previous: list[tuple[str, list[Seen]]], seen: list[tuple[str, list[Seen]]]) -> float:
    pairs = [(a, b) for (_, x), (_, y) in zip(previous, seen, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(int(torch.isin(b.kept, a.kept).sum()) for a, b in pairs) / max(1, sum(len(b.kept) for _, b in pairs))
