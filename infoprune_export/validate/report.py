"""The HTML report: one file without references to anything outside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from infoprune_export import __version__
from infoprune_export.ffn.plan import FfnPlan
from infoprune_export.measure.statistics import NORMAL_95
from infoprune_export.validate import plots
from infoprune_export.validate.report_json import used_of
from infoprune_export.validate.report_page import Cell, figure, render_page, strip
from infoprune_export.validate.tables import budget_parts, compare_runs

if TYPE_CHECKING:
    from infoprune_export.data.samples import Sample
    from infoprune_export.models.vlm import VLM
    from infoprune_export.validate.report_schema import Parity, Report
    from infoprune_export.validate.report_schema_attribution import Attribution

REPORT = "report.html"


def render(
    report: Report,
    *,
    validation: Mapping[str, Any],
    budget: Mapping[str, Any],
    variants: Mapping[str, Any],
    history: Sequence[dict[str, float]],
    recovery: Sequence[Mapping[str, float]],
    pictures: Sequence[str],
) -> str:
    """The page as text: what ``report.json`` says, and figures of `verdict.validate`'s and `summarize_variant`'s.

    `budget` is the budget stage's allocation with its table, both None in a run without one; `pictures` are data URIs
    of the images in ``validation["kept_tokens"]``.
    """
    failed = [check for check in report.checks if not check.passed]
    uses = [used_of(check.model_dump()) for check in report.checks]
    checks = [(check, used if np.isfinite(used) else None) for check, used in zip(report.checks, uses, strict=True)]
    dearest = min(report.accuracy[1:], key=lambda row: row.to_previous.percent, default=None)
    official = dict.fromkeys(name for row in report.accuracy for name in row.official)
    seen = zip(pictures, validation["kept_tokens"], strict=True)
    return render_page(
        "report.html.j2",
        report=report,
        deciding=next(check for check in report.checks if check.what == report.decision.check),
        failed=failed,
        checks=checks,
        worst_step=dearest if dearest is not None and dearest.to_previous.percent < 0 else None,
        worst_parity=max(report.parity, key=_relative),
        official=list(official),
        attribution=report.attribution,
        strips=_strips(report.attribution),
        compare=compare_runs(validation, report.recipe, variants),
        budget=budget_parts(budget),
        recipe=report.recipe,
        figures=_figures(report, validation, history, recovery),
        pictures=[{"uri": uri, "name": of["image"], "kept": len(of["kept"])} for uri, of in seen],
        recipe_text=json.dumps(report.recipe, indent=2, ensure_ascii=False),
        version=__version__,
    )


def _relative(parity: Parity) -> float:
    """How much of its tolerance an error takes."""
    return np.inf if parity.relative_error is None else parity.relative_error / parity.tolerance


def _figures(
    report: Report,
    validation: Mapping[str, Any],
    history: Sequence[dict[str, float]],
    recovery: Sequence[Mapping[str, float]],
) -> dict[str, Markup]:
    """Drawn figures, each with its content in words; empty where there is nothing to draw."""
    heads, rows, plan = report.heads, report.accuracy, FfnPlan.from_dict(validation["ffn"])
    kept = "; ".join(
        f"block {block}: {len(stay)} of {total}"
        for block, (total, stay) in enumerate(zip(heads.total, heads.kept, strict=True))
    )
    became = "; ".join(f"block {block}: {plots.ffn_label(choice)}" for block, choice in enumerate(plan.choices))
    steps = "; ".join(f"{row.step} {row.percent:.1f} ± {NORMAL_95 * row.standard_error:.1f}" for row in rows)
    times = "; ".join(
        f"batch {row.batch_size}: original {row.milliseconds['original'].p50 / row.batch_size:.3g}, compressed "
        f"{row.milliseconds['compressed'].p50 / row.batch_size:.3g}"
        for row in report.bench.rows
    )
    bench_rows = [row.model_dump() for row in report.bench.rows]
    figures = {
        "heads": figure("heads", plots.head_map(heads.total, heads.kept), f"Heads kept. {kept}."),
        "ffn": figure("ffn", plots.ffn_bars(plan), f"What FFNs became. {became}."),
        "accuracy": figure(
            "accuracy", plots.accuracy_steps(validation["accuracy"], report.metric), f"{report.metric} in %. {steps}."
        ),
        "latency": figure("latency", plots.latency_bars(bench_rows), f"Median ms per image. {times}."),
        "gates": Markup(),
        "recovery": Markup(),
    }
    if history:
        first, last = history[0], history[-1]
        text = (
            f"Loss terms over {len(history)} epochs. Task: {first['task']:.3g} to {last['task']:.3g}; mean gate: "
            f"{first['mean_gate']:.3g} to {last['mean_gate']:.3g}; distance: {first['distance']:.3g} to "
            f"{last['distance']:.3g}."
        )
        figures["gates"] = figure("gates", plots.gate_history(history), text)
    if recovery:
        text = (
            f"Distance to the original's visual tokens over {len(recovery)} epochs: {recovery[0]['distance']:.3g} to "
            f"{recovery[-1]['distance']:.3g} of their variance."
        )
        figures["recovery"] = figure("recovery", plots.recovery_history(recovery), text)
    return figures


def _strips(attribution: Attribution | None) -> dict[str, Markup]:
    """Local errors of the blocks' parts, by step."""
    rows: dict[str, dict[str, dict[int, Cell]]] = {}
    for row in attribution.blocks if attribution is not None else ():
        if row.block is not None and row.judged:
            figures = row.value if row.added is None else row.added
            part = row.part.rpartition(".")[2]
            rows.setdefault(row.step, {}).setdefault(part, {})[row.block] = (figures.relative_error, row.tolerance)
    strips = {}
    for step, parts in rows.items():
        cells = [(part, block, *cell) for part, blocks in parts.items() for block, cell in blocks.items()]
        part, block, error, limit = max(cells, key=lambda cell: np.inf if cell[2] is None else cell[2] / cell[3])
        said = "not finite" if error is None else f"{error:.1e}"
        strips[step] = strip(
            parts, f"Errors of every block at the step {step}. Worst: block {block}, {part}, {said} of {limit:.1e}."
        )
    return strips


def pictures_of(vlm: VLM, samples: Sequence[Sample], validation: Mapping[str, Any]) -> list[str]:
    """Kept tokens over the first validation images, cropped and scaled as the processor does it; data URIs."""
    from infoprune_export.data.samples import open_image
    from infoprune_export.models.vlm import preprocess

    pictures = []
    processor: Any = vlm.processor.image_processor
    for sample, selection in zip(samples, validation["kept_tokens"], strict=False):
        (picture, rows, columns) = vlm.tower.pictures(preprocess(vlm, [open_image(sample.image)]))[0]
        pixels = picture.float().cpu().numpy()
        mean, std = (np.array(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
        seen = np.clip((pixels * std + mean) * 255, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        pictures.append(plots.kept_tokens(seen, selection["kept"], rows, columns))
    return pictures
