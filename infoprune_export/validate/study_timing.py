"""All points of a sweep in one interleaved run: points that were made beside each other disturbed each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from infoprune_export.export.onnx import MODEL
from infoprune_export.measure.latency import Limits, Timing, until_narrow, wall_clock
from infoprune_export.models.tower import Form, VisionTower
from infoprune_export.recipe import BenchSpec, Recipe, load_target
from infoprune_export.tokens.encoder import VisionEncoder, form_of
from infoprune_export.validate.bench import Track
from infoprune_export.validate.bench_running import Graph, Sessions, clock_of, graph_of

ORIGINAL = "original"
"""No point is called so: names of points have a value in them."""


def time_points(
    tower: VisionTower, runs: Mapping[str, tuple[Recipe, Path]], spec: BenchSpec, track: Track
) -> dict[int, Timing]:
    """Milliseconds of the original and of every point, by batch size; the original is the first point's export of it.

    `tower` is the original's, `runs` has the recipe and the ``onnx`` folder of every point. Every graph gets the same
    random images, in as many calls as it needs. Rounds go on as those of ``bench`` do: until the ratio of the original
    to every point is known to ``bench.max_interval``.

    Raises:
        InfopruneError: a target's provider did not start.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(spec.threads)
    try:
        graphs, forms = _graphs(tower, runs, spec)
        sessions = Sessions(graphs)
        devices = {graph.device for graph in graphs.values()}
        clock = clock_of(devices.pop()) if len(devices) == 1 else wall_clock
        limits = Limits(spec.rounds, spec.most_rounds, spec.max_seconds, spec.max_interval, spec.warmup)
        timings = {}
        for size in spec.batch_sizes:
            inputs = tower.example_inputs(size, torch.Generator().manual_seed(0))
            opener = sessions.opener({name: tower.calls(inputs, form) for name, form in forms.items()})
            advance = track(f"all points timed, batch {size}", limits.max_rounds + limits.warmup)
            timing = until_narrow(list(graphs), ORIGINAL, opener, limits, on_round=_one(advance), clock=clock)
            advance(limits.max_rounds - timing.rounds)
            timings[size] = timing
        return timings
    finally:
        torch.set_num_threads(threads)


def _one(advance: Callable[[int], None]) -> Callable[[int], None]:
    return lambda _: advance(1)


def _graphs(
    tower: VisionTower, runs: Mapping[str, tuple[Recipe, Path]], spec: BenchSpec
) -> tuple[dict[str, Graph], dict[str, Form]]:
    first, folder = next(iter(runs.values()))
    wanted = {ORIGINAL: (first, folder / "original")}
    wanted |= {name: (recipe, onnx / "compressed") for name, (recipe, onnx) in runs.items()}
    graphs, forms = {}, {}
    for name, (recipe, place) in wanted.items():
        several = form_of(tower, recipe.tokens, recipe.export.several).several
        graphs[name] = graph_of(place / MODEL, load_target(recipe.engine.target), spec.threads)
        forms[name] = VisionEncoder(tower, None if name == ORIGINAL else recipe.tokens, several).form
    return graphs, forms
