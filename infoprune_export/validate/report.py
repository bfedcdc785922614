"""The HTML report: one file without references to anything outside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup

from infoprune_export import __version__
from infoprune_export.artifacts import library_versions
from infoprune_export.ffn.plan import FfnPlan
from infoprune_export.validate import plots
from infoprune_export.validate.tables import budget_parts, compare_runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from infoprune_export.data.vqa import Sample
    from infoprune_export.models.vlm import VLM

REPORT = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html.j2")


def render(
    *,
    name: str,
    description: str,
    recipe: dict[str, Any],
    validation: dict[str, Any],
    budget: dict[str, Any],
    bench: dict[str, Any],
    variants: dict[str, Any],
    history: list[dict[str, float]],
    recovery: list[dict[str, float]],
    pictures: list[str],
) -> str:
    """The page as text; see `verdict.validate`, `bench.bench_onnx` and `verdict.summarize_variant` for the inputs.

    `budget` is the budget stage's allocation with its table, both None in a run without one.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    figures = {
        "heads": plots.head_map(validation["heads"]["total"], validation["heads"]["kept"]),
        "ffn": plots.ffn_bars(FfnPlan.from_dict(validation["ffn"])),
        "accuracy": plots.accuracy_steps(validation["accuracy"], validation["metric"]),
        "latency": plots.latency_bars(bench["rows"]),
        "gates": plots.gate_history(history) if history else "",
        "recovery": plots.recovery_history(recovery) if recovery else "",
    }
    rows = validation["accuracy"]
    return template.render(
        name=name,
        description=description,
        validation=validation,
        bench=bench,
        first=rows[0],
        last=rows[-1],
        merged=recipe["tokens"]["merge"],
        compare=compare_runs(validation, recipe, variants),
        budget=budget_parts(budget),
        recipe=recipe,
        figures={key: Markup(svg) for key, svg in figures.items()},
        pictures=pictures,
        recipe_text=json.dumps(recipe, indent=2, ensure_ascii=False),
        version=__version__,
        libraries=library_versions(),
    )


def pictures_of(vlm: VLM, samples: Sequence[Sample], validation: dict[str, Any]) -> list[str]:
    """Kept tokens over the first validation images, cropped and scaled as the processor does it; data URIs."""
    from infoprune_export.data.vqa import open_image
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
