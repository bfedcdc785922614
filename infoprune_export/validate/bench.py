"""How much faster the compressed encoder is, and how much of that the FLOPs promised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infoprune_export.artifacts import library_versions
from infoprune_export.engine.onnxruntime import feed_of, open_session
from infoprune_export.export.onnx import MODEL
from infoprune_export.measure.flops import count_flops
from infoprune_export.measure.latency import interleaved
from infoprune_export.measure.machine import machine
from infoprune_export.measure.statistics import paired_ratio, percentiles
from infoprune_export.models.tower import Planned, VisionTower
from infoprune_export.recipe import BenchSpec, Target, TokensSpec
from infoprune_export.tokens.encoder import VisionEncoder


def time_sessions(
    sessions: Mapping[str, tuple[Any, Sequence[Planned]]], spec: BenchSpec, on_round: Callable[[int], None]
) -> dict[str, NDArray[np.float64]]:
    """Interleaved milliseconds of ONNX Runtime sessions, each over its own calls; see `latency.interleaved`."""

    def run_all(session: Any, feeds: Sequence[Mapping[str, Any]]) -> None:
        for feed in feeds:
            session.run(None, feed)

    calls = {
        name: partial(run_all, session, [feed_of(session, planned) for planned in calls])
        for name, (session, calls) in sessions.items()
    }
    return interleaved(calls, rounds=spec.rounds, warmup=spec.warmup, on_round=on_round)


def bench_onnx(
    onnx_folder: Path,
    compressed: VisionTower,
    original: VisionTower,
    tokens: TokensSpec,
    target: Target,
    spec: BenchSpec,
    *,
    several: bool | None = None,
    on_round: Callable[[int], None] = lambda index: None,
) -> dict[str, Any]:
    """Time ``original`` and ``compressed`` of an export folder against each other in one interleaved run.

    `efficiency` is the measured speed-up over the FLOP ratio, both of whole graphs: encoder, selection, projector.
    Both sides see the same images in as many calls as their graphs need; `several` is what both were exported with.
    """
    encoders = {
        "original": (VisionEncoder(original, None, several), original),
        "compressed": (VisionEncoder(compressed, tokens, several), compressed),
    }
    sessions = {
        side: open_session(onnx_folder / side / MODEL, target, threads=spec.threads)
        for side in ("original", "compressed")
    }
    rows = []
    for batch_size in spec.batch_sizes:
        inputs = original.example_inputs(batch_size, torch.Generator().manual_seed(0))
        calls = {side: tower.calls(inputs, encoder.form) for side, (encoder, tower) in encoders.items()}
        times = time_sessions({side: (sessions[side], calls[side]) for side in sessions}, spec, on_round)
        flops = {
            side: sum(count_flops(encoder, planned) for planned in calls[side])
            for side, (encoder, _) in encoders.items()
        }
        speedup = paired_ratio(times["original"], times["compressed"])
        flop_ratio = flops["original"] / flops["compressed"]
        rows.append(
            {
                "batch_size": batch_size,
                "milliseconds": {side: percentiles(values) for side, values in times.items()},
                "flops": flops,
                "flop_ratio": flop_ratio,
                "speedup": speedup,
                "efficiency": speedup["median"] / flop_ratio,
            }
        )
    return {
        "target": target.name,
        "provider": sessions["original"].get_providers()[0],
        "threads": spec.threads,
        "rounds": spec.rounds,
        "warmup": spec.warmup,
        "machine": machine(),
        "libraries": library_versions(),
        "rows": rows,
    }
