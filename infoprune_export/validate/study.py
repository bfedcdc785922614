"""A sweep: every point of a recipe's grid as a run of its own, timed together at the end, and what they say together.

1. Points are recipes (`recipe.points_of`), each an ordinary run in a folder of the sweep's, brought up to its
   validation here, in processes of this machine, or by Ray (`study_work`, `study_ray`).
2. Their exported graphs and the original's are timed in one interleaved run (`study_timing`).
3. Accuracy against latency, with the Pareto front; for two keys and more their interactions (`study_statistics`).

A point that a user's mistake ends is listed with its reason; the others go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from rich.progress import Progress

from infoprune_export.artifacts import canonical_json, check_writable, library_versions, make_folder, write_text
from infoprune_export.console import tracker
from infoprune_export.errors import InfopruneError
from infoprune_export.measure.latency import Timing
from infoprune_export.measure.machine import machine
from infoprune_export.measure.statistics import paired_ratio, percentiles
from infoprune_export.pipeline import Run, execute, load_vlm
from infoprune_export.recipe import Point, Recipe, points_of
from infoprune_export.stages import STAGES
from infoprune_export.stages.deliver import SCORES
from infoprune_export.validate.study_figure import draw
from infoprune_export.validate.study_ray import check_ray, in_ray
from infoprune_export.validate.study_results import Study, StudyPoint
from infoprune_export.validate.study_statistics import interactions, mean_of, on_front, scored
from infoprune_export.validate.study_timing import ORIGINAL, time_points
from infoprune_export.validate.study_work import LAST, Submit, follow, in_processes, in_turn, plan, whole

RESULT, PICTURE = "sweep.json", "sweep.svg"


def study(
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    *,
    workers: int | None = None,
    ray: str | None = None,
    bench: bool = False,
) -> Study:
    """Carry out a recipe's grid in `folder`, and leave ``sweep.json`` and ``sweep.svg`` there.

    With several `workers` points are made beside each other in processes, with `ray` by the cluster at that address
    (``local`` for one that is started here). With `bench` every point gets a bench stage of its own too, one after
    another when all else is done.

    Raises:
        InfopruneError: the recipe has no grid; no point could be made; see also `execute` and `study_ray`.
    """
    points = points_of(recipe)
    if not points:
        raise InfopruneError(f"{recipe.name} has no grid; give --grid KEY=VALUE,VALUE")
    if ray is not None:
        check_ray()
    make_folder(folder)
    check_writable(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InfopruneError(
            f"{folder}: another sweep is at work here; wait for it or choose another --output"
        ) from None
    try:
        folders = [folder / point.name for point in points]
        refused = _make(points, folders, progress, workers, ray)
        made = [place for place in range(len(points)) if place not in refused]
        if not made:
            raise InfopruneError(f"no point could be made; {points[0].name}: {refused[0]}")
        timings = time_points(
            load_vlm(recipe.model, "cpu").tower,
            {points[place].name: (points[place].recipe, folders[place] / "onnx") for place in made},
            recipe.bench,
            tracker(progress),
        )
        result = summarize(recipe, points, folders, refused, timings)
        write_text(folder / RESULT, canonical_json(result))
        write_text(folder / PICTURE, draw(result))
        if bench:
            for place in made:
                execute(Run(points[place].recipe, folders[place], progress), STAGES, "bench")
    finally:
        lock.release()
    return result


def _make(
    points: Sequence[Point], folders: Sequence[Path], progress: Progress, workers: int | None, ray: str | None
) -> dict[int, str]:
    """Bring all points to their validation; those that could not, with the reason."""
    jobs = plan(points)
    advance = tracker(progress)("points", len(points))
    with ExitStack() as stack:
        submit: Submit
        if ray is not None:
            submit, capacity = stack.enter_context(in_ray(points, folders, ray, workers))
        elif workers is not None and workers > 1:
            submit, capacity = stack.enter_context(in_processes(points, folders, workers)), workers
        else:
            submit, capacity = stack.enter_context(in_turn(points, folders, progress)), 1
            jobs = whole(points)
        return follow(jobs, submit, capacity, advance)


# ── Result ───────────────────────────────────────────────────────────────────


def summarize(
    recipe: Recipe,
    points: Sequence[Point],
    folders: Sequence[Path],
    refused: Mapping[int, str],
    timings: Mapping[int, Timing],
) -> Study:
    """What the runs' validations and the timings of all of them say together."""
    validations, scores = {}, {}
    for place in range(len(points)):
        if place not in refused:
            validations[place] = _read(folders[place] / LAST / "validation.json")
            scores[place] = _read(folders[place] / LAST / SCORES)
    rows = [_row(point, refused.get(place), validations.get(place), timings) for place, point in enumerate(points)]
    first = min(validations)
    original = scored(scores[first], "original")
    accuracy = mean_of(original.scores, original.clusters)
    _mark_front(rows, accuracy["percent"])
    reason = _incomparable(recipe, refused, [written["questions_sha256"] for written in scores.values()])
    return {
        "name": recipe.name,
        "grid": {key: list(values) for key, values in recipe.grid.items()},
        "metric": validations[first]["metric"],
        "original": {
            "accuracy": accuracy,
            "latency": {str(size): percentiles(timing.times[ORIGINAL]) for size, timing in timings.items()},
        },
        "points": rows,
        "interactions": []
        if reason is not None
        else interactions(recipe.grid, {_place(recipe, n): scored(written) for n, written in scores.items()}),
        "no_interactions": reason,
        "threads": recipe.bench.threads,
        "rounds": {str(size): timing.rounds for size, timing in timings.items()},
        "machine": machine(),
        "libraries": library_versions(),
    }


def _row(
    point: Point, refused: str | None, validation: Mapping[str, Any] | None, timings: Mapping[int, Timing]
) -> StudyPoint:
    row: StudyPoint = {
        "point": point.name,
        "settings": dict(point.settings),
        "refused": refused,
        "verdict": None,
        "failed_checks": [],
        "accuracy": None,
        "to_original": None,
        "size": None,
        "latency": [],
        "on_front": False,
    }
    if validation is None:
        return row
    last = validation["accuracy"][-1]
    row["verdict"] = validation["verdict"]
    row["failed_checks"] = [check["what"] for check in validation["checks"] if not check["passed"]]
    row["accuracy"] = {
        "percent": last["percent"],
        "standard_error": last["standard_error"],
        "questions": last["questions"],
    }
    row["to_original"] = last["to_original"]
    row["size"] = validation["size"]
    for size, timing in timings.items():
        times = timing.times[point.name]
        row["latency"].append(
            {
                "batch_size": size,
                "milliseconds": percentiles(times),
                "speed_up": paired_ratio(timing.times[ORIGINAL], times),
            }
        )
    return row


def _mark_front(rows: Sequence[StudyPoint], original: float) -> None:
    """By speed-up at the first batch size and accuracy; the original is a point of its own, the last here."""
    made = [row for row in rows if row["accuracy"] is not None]
    costs = [1 / row["latency"][0]["speed_up"]["median"] for row in made]
    values = [row["accuracy"]["percent"] for row in made if row["accuracy"] is not None]
    for row, marked in zip(made, on_front([*costs, 1.0], [*values, original]), strict=False):
        row["on_front"] = marked


def _incomparable(recipe: Recipe, refused: Mapping[int, str], questions: Sequence[str]) -> str | None:
    if sum(len(values) > 1 for values in recipe.grid.values()) < 2:
        return "the grid has no two keys with two values each"
    if refused:
        return f"{len(refused)} points could not be made"
    if len(set(questions)) > 1:
        return "the points were not asked the same questions"
    return None


def _place(recipe: Recipe, number: int) -> tuple[int, ...]:
    """Where a point's values are in the grid's lists; points are in the order of their product."""
    return tuple(map(int, np.unravel_index(number, [len(values) for values in recipe.grid.values()])))


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
