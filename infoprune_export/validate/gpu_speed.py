"""What pruning buys on a GPU: a published tower in fp16, dense against compressed, in ONNX Runtime and torch.compile.

Random weights, heads and neurons dropped evenly (`real_size.prune_evenly`): weights decide accuracy, not speed. Both
engines keep inputs and outputs on the device, so that copies are no part of the figures. Everything runs on a CPU too,
which says nothing about a GPU and lets the measurement itself be tested anywhere.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from infoprune_export.artifacts import library_versions
from infoprune_export.engine.onnxruntime import feed_of, open_session
from infoprune_export.errors import InfopruneError
from infoprune_export.export.onnx import MODEL, export_onnx
from infoprune_export.measure.flops import count_flops
from infoprune_export.measure.latency import interleaved
from infoprune_export.measure.machine import machine
from infoprune_export.measure.statistics import paired_ratio, percentiles
from infoprune_export.models import tower_of
from infoprune_export.models.tower import Form, Inputs, Planned, VisionTower
from infoprune_export.models.zoo import random_model
from infoprune_export.recipe import OnnxRuntimeTarget
from infoprune_export.tokens.encoder import FEATURES, VisionEncoder
from infoprune_export.validate.parity import compare
from infoprune_export.validate.real_size import prune_evenly

TOWER = "qwen2-vl-7b"
HEADS_REMOVED, NEURONS_KEPT, ROUND_TO = 0.5, 0.5, 64
LOADS: tuple[tuple[int, int], ...] = ((1, 16), (1, 40), (1, 72), (8, 40))
"""Images a call, and patches along each side of an image."""
EngineName = Literal["onnxruntime", "torch.compile"]
ENGINES: tuple[EngineName, ...] = ("onnxruntime", "torch.compile")
WARMUP = 5
_PROVIDERS = {"cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"), "cpu": ("CPUExecutionProvider",)}


def gpu_speed(
    rounds: int,
    *,
    name: str = TOWER,
    blocks: int | None = None,
    loads: Sequence[tuple[int, int]] = LOADS,
    device: str = "cuda",
    dtype: torch.dtype = torch.float16,
    engines: Sequence[EngineName] = ENGINES,
    on_load: Callable[[int], None] = lambda images: None,
) -> dict[str, Any]:
    """One row per engine and load; ``efficiency`` is the measured speed-up over the FLOP ratio.

    Dense and compressed take turns within one interleaved run per row. ``cosine`` compares the compressed tower's
    outputs with those of PyTorch without compilation, so that a fast wrong engine shows.

    Raises:
        InfopruneError: no such device, or an ONNX Runtime without its provider.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InfopruneError("device cuda: torch finds no CUDA device; run this on a machine with an NVIDIA GPU")
    target = OnnxRuntimeTarget(
        name=f"onnxruntime-{device}", description="as measured", backend="onnxruntime", providers=_PROVIDERS[device]
    )
    if "onnxruntime" in engines:
        _check_provider(target)
    towers = {side: _tower(name, blocks, device, dtype, side == "compressed") for side in ("dense", "compressed")}
    form = Form(several=True)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        sessions = _sessions(towers, Path(scratch), target, form) if "onnxruntime" in engines else {}
        for images, side in loads:
            inputs = _inputs(towers["dense"], images, side)
            planned = {which: _placed(tower.plan(inputs, form), device) for which, tower in towers.items()}
            encoders = {which: VisionEncoder(tower, None, True) for which, tower in towers.items()}
            flops = {which: count_flops(encoders[which], planned[which]) for which in towers}
            with torch.inference_mode():
                expected = encoders["compressed"](planned["compressed"]).float().cpu().numpy()
            for engine in engines:
                if engine == "onnxruntime":
                    running = {which: bound(sessions[which], planned[which], device) for which in towers}
                else:
                    running = {which: compiled(encoders[which], planned[which], device) for which in towers}
                calls = {which: one.call for which, one in running.items()}
                times = interleaved(calls, rounds=rounds, warmup=WARMUP)
                parity = compare(expected, running["compressed"].features(), step=engine, case="", tolerance=np.inf)
                rows.append(_row(engine, images, side, flops, times) | {"cosine": parity.cosine})
            on_load(images)
    return {
        "tower": name,
        "blocks": len(towers["dense"].blocks),
        "dtype": str(dtype).removeprefix("torch."),
        "heads_removed": HEADS_REMOVED,
        "neurons_kept": NEURONS_KEPT,
        "device": torch.cuda.get_device_name() if device == "cuda" else machine()["processor"],
        "rounds": rounds,
        "libraries": library_versions(),
        "rows": rows,
    }


def _check_provider(target: OnnxRuntimeTarget) -> None:
    from infoprune_export.engine import backend_of

    backend_of(target)


def _tower(name: str, blocks: int | None, device: str, dtype: torch.dtype, compressed: bool) -> VisionTower:
    tower = tower_of(random_model(name, blocks))
    if compressed:
        prune_evenly(tower, HEADS_REMOVED, NEURONS_KEPT, ROUND_TO)
    tower.model.to(device=device, dtype=dtype)
    return tower


def _inputs(tower: VisionTower, images: int, side: int) -> Inputs:
    from infoprune_export.models.qwen import QwenTower

    generator = torch.Generator().manual_seed(0)
    if isinstance(tower, QwenTower):
        return tower.grid_inputs([(1, side, side)] * images, generator)
    return tower.example_inputs(images, generator)


def _placed(planned: Planned, device: str) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in planned.items()}


def _row(
    engine: str, images: int, side: int, flops: Mapping[str, int], times: Mapping[str, NDArray[np.float64]]
) -> dict[str, Any]:
    speedup = paired_ratio(times["dense"], times["compressed"])
    ratio = flops["dense"] / flops["compressed"]
    return {
        "engine": engine,
        "images": images,
        "patches": side * side,
        "milliseconds": {which: percentiles(values) for which, values in times.items()},
        "speedup": speedup,
        "flop_ratio": ratio,
        "efficiency": speedup["median"] / ratio,
    }


# ── Engines ──────────────────────────────────────────────────────────────────


def _sessions(towers: Mapping[str, VisionTower], folder: Path, target: OnnxRuntimeTarget, form: Form) -> dict[str, Any]:
    sessions = {}
    for which, tower in towers.items():
        (folder / which).mkdir()
        place = next(tower.model.parameters()).device
        tower.model.cpu()
        export_onnx(tower, None, folder / which, opset=20, several=form.several)
        tower.model.to(place)
        sessions[which] = open_session(folder / which / MODEL, target)
    return sessions


@dataclass(frozen=True)
class Running:
    """An engine with its inputs in place."""

    call: Callable[[], object]
    """Computes the features and returns when the device has finished; copies nothing."""
    features: Callable[[], NDArray[Any]]
    """What the latest call left on the device, fp32."""


def bound(session: Any, planned: Planned, device: str) -> Running:
    """A session whose inputs and outputs stay on the device."""
    import onnxruntime

    binding = session.io_binding()
    for name, value in feed_of(session, planned).items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value, device, 0))
    binding.bind_output(FEATURES, device)

    def call() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return Running(call, lambda: binding.copy_outputs_to_cpu()[0].astype(np.float32))


def compiled(encoder: VisionEncoder, planned: dict[str, Tensor], device: str) -> Running:
    """The encoder as torch.compile makes it for these shapes."""
    fast = torch.compile(encoder, dynamic=False)
    latest: list[Tensor] = []

    def call() -> None:
        with torch.inference_mode():
            latest[:] = [fast(planned)]
        if device == "cuda":
            torch.cuda.synchronize()

    return Running(call, lambda: latest[0].float().cpu().numpy())


def render(result: Mapping[str, Any]) -> Table:
    """One row per engine and load."""
    title = f"{result['tower']}, {result['blocks']} blocks, {result['dtype']}, {result['device']}"
    table = Table(
        "engine", "images", "patches each", "dense ms", "compressed ms", "speed-up (95%)", "FLOPs", "efficiency",
        "cosine", title=title,
    )  # fmt: skip
    for row in result["rows"]:
        speedup, milliseconds = row["speedup"], row["milliseconds"]
        table.add_row(
            row["engine"],
            str(row["images"]),
            str(row["patches"]),
            f"{milliseconds['dense']['p50']:.2f}",
            f"{milliseconds['compressed']['p50']:.2f}",
            f"{speedup['median']:.2f} ({speedup['low']:.2f}-{speedup['high']:.2f})",
            f"{row['flop_ratio']:.2f}",
            f"{row['efficiency']:.2f}",
            f"{row['cosine']:.5f}",
        )
    return table
