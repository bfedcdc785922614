"""Accuracy against latency of a recipe's vision encoder: heads alone, FFNs alone, both, and both after recovery.

Every point is a joint allocation for one speed-up, carried out, refitted, asked the validation questions and exported.
All of them, and the original, are then timed in one interleaved ONNX Runtime run. Tokens are not selected.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table

from infoprune_export.budget import cost
from infoprune_export.budget.joint import Allocation, allocate_jointly
from infoprune_export.data import dataset
from infoprune_export.data.dataset import Split
from infoprune_export.errors import InfopruneError
from infoprune_export.export.onnx import MODEL, export_onnx
from infoprune_export.ffn.job import FfnJob
from infoprune_export.ffn.obs import compress_obs, eliminate_neurons
from infoprune_export.heads.obs import eliminate_heads
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.heads.refit import refit_heads
from infoprune_export.measure.machine import machine
from infoprune_export.measure.statistics import NORMAL_95, paired_ratio, percentiles
from infoprune_export.models.calibration import TaskLoss, inputs_of
from infoprune_export.models.vlm import VLM, check_model, on_cpu, writable_copy
from infoprune_export.recipe import Recipe, load_target
from infoprune_export.recovery.distill import recover
from infoprune_export.rewrite.surgery import apply_heads
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.validate.accuracy import estimate, split_answers, split_scores
from infoprune_export.validate.bench import time_sessions
from infoprune_export.validate.bench_running import graph_of
from infoprune_export.validate.compare_structure import Track, drawn_split
from infoprune_export.validate.plots import AFTER, ALERT, BEFORE, blank, tidy, to_svg

Of = Literal["heads", "ffn", "both"]
PARTS: tuple[Of, ...] = ("heads", "ffn", "both")
RECOVERED = "both, recovered"
_COLOURS = {"heads": BEFORE, "ffn": "#7b4fa3", "both": AFTER, RECOVERED: ALERT}


@dataclass(frozen=True)
class _Point:
    of: Of
    asked: float
    allocation: Allocation
    model: VLM
    scores: NDArray[np.float64]
    recovered: NDArray[np.float64] | None


def front(recipe: Recipe, speed_ups: Sequence[float], parts: Sequence[Of], track: Track) -> dict[str, Any]:
    """Points by part and speed-up asked for; plain JSON types.

    ``rows`` have ``part``, ``asked``, ``heads`` and ``widths`` per block, ``predicted`` (by the table of measured
    parts), ``speed_up`` (`paired_ratio`), ``milliseconds`` (`percentiles`), ``accuracy`` and ``to_original``
    (`Estimate`, percent); or ``refused``, and then nothing else of it. With a recovery section each point of ``both``
    is there a second time, under ``both, recovered``: equal structure, so equal latency, other accuracy.

    Raises:
        InfopruneError: what the recipe's model or data lack; nothing that was asked for can be reached.
    """
    from infoprune_export.device import resolve_device
    from infoprune_export.pipeline import load_vlm

    check_model(recipe.model)
    dataset.check(recipe.data)
    with drawn_split(recipe) as split, tempfile.TemporaryDirectory() as folder:
        vlm = load_vlm(recipe.model, resolve_device(recipe.device))
        baseline = _answers(vlm, split, track, "original")
        points, refused = _points(vlm, split, recipe, speed_ups, parts, baseline, track, Path(folder))
        if not points:
            raise InfopruneError(f"no point of the front can be reached: {refused[0]['refused']}")
        original = _scores(split, baseline, baseline)
        times = _time(vlm, [point.model for point in points], recipe, split, Path(folder), track)
        rows = [
            row
            for number, point in enumerate(points)
            for row in _rows(point, split, original, times["original"], times[str(number)])
        ]
    return {
        "images": recipe.budget.images,
        "threads": recipe.bench.threads,
        "target": recipe.engine.target,
        "machine": machine(),
        "original": {
            "accuracy": estimate(split.validation, original).to_dict(),
            "milliseconds": percentiles(times["original"]),
        },
        "rows": [*rows, *refused],
    }


# ── Points ───────────────────────────────────────────────────────────────────


def _points(
    vlm: VLM,
    split: Split,
    recipe: Recipe,
    speed_ups: Sequence[float],
    parts: Sequence[Of],
    baseline: list[list[str]],
    track: Track,
    folder: Path,
) -> tuple[list[_Point], list[dict[str, Any]]]:
    samples, loss = split.calibration, TaskLoss(split.calibration_labelled, vlm.tower)
    meter = cost.milliseconds(load_target(recipe.engine.target), recipe.bench.threads, recipe.export.opset)
    local = on_cpu(vlm)
    images = inputs_of(local, samples[: recipe.budget.images])
    table = cost.measure(local.tower, images, meter, "ms", recipe.ffn.round_to)
    heads = eliminate_heads(writable_copy(vlm), samples, loss, recipe.seed)
    neurons = eliminate_neurons(writable_copy(vlm), samples, loss, recipe.seed)
    points: list[_Point] = []
    refused: list[dict[str, Any]] = []
    advance = track("points", len(parts) * len(speed_ups))
    for of in parts:
        for speed_up in speed_ups:
            try:
                allocation = allocate_jointly(heads, neurons, table, speed_up, recipe.ffn.round_to, of)
            except InfopruneError as error:
                refused.append({"part": of, "asked": speed_up, "refused": str(error)})
                advance(1)
                continue
            model = _carry_out(vlm, split, recipe, allocation, loss)
            scores = _scores(split, _answers(model, split, track, f"{of} {speed_up:g}"), baseline)
            recovered = None
            if of == "both" and recipe.recovery.method != "none":
                better = writable_copy(model)
                scratch = folder / f"recovery-{len(points)}"
                scratch.mkdir()
                recover(better, vlm.tower, samples, recipe.recovery, seed=recipe.seed, scratch=scratch)
                recovered = _scores(split, _answers(better, split, track, f"{of} {speed_up:g} recovered"), baseline)
            points.append(_Point(of, speed_up, allocation, model, scores, recovered))
            advance(1)
    return points, refused


def _carry_out(vlm: VLM, split: Split, recipe: Recipe, allocation: Allocation, loss: TaskLoss) -> VLM:
    """The pruned and refitted model."""
    model = writable_copy(vlm)
    plan = HeadPlan(tuple(vlm.tower.head_counts()), allocation.heads)
    ridge = recipe.refit.ridge if recipe.refit.enabled else None
    if ridge is None:
        apply_heads(model.tower, plan, {})
    else:
        refit_heads(vlm, model, plan, split.calibration, ridge)
    job = FfnJob(vlm, model, split.calibration, loss, recipe.ffn, ridge=ridge, seed=recipe.seed)
    compress_obs(job, allocation.widths)
    return model


def _answers(vlm: VLM, split: Split, track: Track, title: str) -> list[list[str]]:
    encode = VisionEncoder(vlm.tower, None).encode
    return split_answers(vlm, split, encode, on_batch=track(title, len(split.validation)))


def _scores(split: Split, answers: list[list[str]], baseline: list[list[str]]) -> NDArray[np.float64]:
    return split_scores(split, answers, baseline)


def _time(
    vlm: VLM, models: Sequence[VLM], recipe: Recipe, split: Split, folder: Path, track: Track
) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of the original and of every point, on the same images."""
    target = load_target(recipe.engine.target)
    inputs = inputs_of(vlm, split.calibration[: recipe.budget.images])
    inputs = {name: value.cpu() for name, value in inputs.items()}
    graphs = {}
    several = recipe.budget.images > 1
    for name, model in [("original", vlm), *((str(i), model) for i, model in enumerate(models))]:
        place = folder / name
        place.mkdir()
        tower = on_cpu(model).tower
        form = export_onnx(tower, None, place, opset=recipe.export.opset, several=several)
        graphs[name] = (graph_of(place / MODEL, target, recipe.bench.threads), tower.calls(inputs, form))
    rounds = recipe.bench.rounds + recipe.bench.warmup
    advance = track("bench rounds", rounds)
    with torch.inference_mode():
        return time_sessions(graphs, recipe.bench, lambda _: advance(1))


def _rows(
    point: _Point,
    split: Split,
    original: NDArray[np.float64],
    before: NDArray[np.float64],
    after: NDArray[np.float64],
) -> list[dict[str, Any]]:
    shared = {
        "asked": point.asked,
        "heads": [len(kept) for kept in point.allocation.heads],
        "widths": list(point.allocation.widths),
        "predicted": point.allocation.speed_up,
        "speed_up": paired_ratio(before, after),
        "milliseconds": percentiles(after),
        "refused": None,
    }
    made: list[tuple[str, NDArray[np.float64]]] = [(point.of, point.scores)]
    if point.recovered is not None:
        made.append((RECOVERED, point.recovered))
    return [
        {
            "part": name,
            **shared,
            "accuracy": estimate(split.validation, scores).to_dict(),
            "to_original": estimate(split.validation, scores - original).to_dict(),
        }
        for name, scores in made
    ]


# ── Table and picture ────────────────────────────────────────────────────────


def render(result: Mapping[str, Any]) -> Table:
    """The table of `front`'s rows."""
    table = Table("part", "asked", "speed-up (95%)", "predicted", "accuracy", "to original", "heads", "widths")
    for row in result["rows"]:
        if row["refused"]:
            table.add_row(row["part"], f"{row['asked']:g}x", f"[dim]{row['refused']}[/dim]")
            continue
        ratio, change = row["speed_up"], row["to_original"]
        table.add_row(
            row["part"],
            f"{row['asked']:g}x",
            f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
            f"{row['predicted']:.2f}",
            f"{row['accuracy']['percent']:.1f}",
            f"{change['percent']:+.1f} ± {change['standard_error']:.1f}",
            " ".join(map(str, row["heads"])),
            " ".join(map(str, row["widths"])),
        )
    return table


def draw(result: Mapping[str, Any]) -> str:
    """Accuracy against measured speed-up, a line per part with 95% intervals; SVG."""
    figure: Figure = blank(6.4, 3.6)
    axes = figure.add_subplot()
    for part, colour in _COLOURS.items():
        rows = sorted(
            (row for row in result["rows"] if row["part"] == part and not row["refused"]),
            key=lambda row: row["speed_up"]["median"],
        )
        if not rows:
            continue
        x = np.array([row["speed_up"]["median"] for row in rows])
        sides = np.array(
            [
                [row["speed_up"]["median"] - row["speed_up"]["low"] for row in rows],
                [row["speed_up"]["high"] - row["speed_up"]["median"] for row in rows],
            ]
        )
        y = [row["to_original"]["percent"] for row in rows]
        error = [NORMAL_95 * row["to_original"]["standard_error"] for row in rows]
        axes.errorbar(x, y, yerr=error, xerr=sides, color=colour, marker="o", ms=4, lw=1.4, capsize=2, label=part)
    axes.axhline(0, color="#999", lw=0.8, ls=":")
    axes.set(
        xlabel=f"speed-up in ONNX Runtime, {result['images']} image(s) a call", ylabel="accuracy, points to original"
    )
    axes.legend(frameon=False, loc="lower left")
    tidy(axes)
    return to_svg(figure)
