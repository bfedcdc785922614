"""How much faster the compressed encoder is, and how much of that the FLOPs promised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infoprune_export.artifacts import library_versions
from infoprune_export.engine.onnxruntime import open_session
from infoprune_export.export.onnx import MODEL, VisionEncoder
from infoprune_export.models.tower import VisionTower
from infoprune_export.recipe import BenchSpec, Target, TokensSpec
from infoprune_export.validate.flops import count_flops
from infoprune_export.validate.latency import interleaved, machine, paired_ratio, percentiles


def time_sessions(
    sessions: Mapping[str, Any], inputs: Mapping[str, torch.Tensor], spec: BenchSpec, on_round: Callable[[int], None]
) -> dict[str, NDArray[np.float64]]:
    """Interleaved milliseconds of ONNX Runtime sessions on the same CPU inputs; see `latency.interleaved`."""
    feed = {name: value.numpy() for name, value in inputs.items()}
    calls = {name: partial(session.run, None, feed) for name, session in sessions.items()}
    return interleaved(calls, rounds=spec.rounds, warmup=spec.warmup, on_round=on_round)


def bench_onnx(
    onnx_folder: Path,
    compressed: VisionTower,
    original: VisionTower,
    tokens: TokensSpec,
    target: Target,
    spec: BenchSpec,
    *,
    on_round: Callable[[int], None] = lambda index: None,
) -> dict[str, Any]:
    """Time ``original`` and ``compressed`` of an export folder against each other in one interleaved run.

    `efficiency` is the measured speed-up over the FLOP ratio, both of whole graphs: encoder, selection, projector.
    """
    sessions = {
        side: open_session(onnx_folder / side / MODEL, target, threads=spec.threads)
        for side in ("original", "compressed")
    }
    rows = []
    for batch_size in spec.batch_sizes:
        inputs = original.example_inputs(batch_size, torch.Generator().manual_seed(0))
        times = time_sessions(sessions, inputs, spec, on_round)
        flops = {
            "original": count_flops(VisionEncoder(original, None), inputs),
            "compressed": count_flops(VisionEncoder(compressed, tokens), inputs),
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
