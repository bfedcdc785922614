"""What exporting a real-size tower costs: wall time, peak memory, file size. Random weights cost as much as others."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.table import Table

GIB = 2**30


def export_cost(name: str, dtype: str = "float32", opset: int = 20) -> dict[str, Any]:
    """Export one of ``zoo.REAL`` at its full depth in a process of its own, without token selection.

    ``seconds`` is `export_onnx` from the loaded model to the checked file. ``peak_bytes`` is the largest resident size
    the process ever had, libraries and the model itself included; ``limit_bytes`` 1.5 x the tower's weights + 1 GiB.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, name, dtype, opset).result()


def _measure(name: str, dtype: str, opset: int) -> dict[str, Any]:
    import torch

    from infoprune_export.export.onnx import export_onnx
    from infoprune_export.models import tower_of
    from infoprune_export.models.zoo import random_model

    model = random_model(name, dtype=getattr(torch, dtype))
    tower = tower_of(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        export_onnx(tower, None, Path(folder), opset=opset)
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "tower": name,
        "dtype": dtype,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": weights,
        "file_bytes": size,
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "limit_bytes": int(1.5 * weights + GIB),
    }


def render(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row per export."""
    table = Table("tower", "dtype", "parameters", "seconds", "peak GiB", "limit GiB", "file GiB")
    for row in rows:
        table.add_row(
            row["tower"],
            row["dtype"],
            f"{row['parameters'] / 1e6:.0f} M",
            f"{row['seconds']:.1f}",
            f"{row['peak_bytes'] / GIB:.2f}",
            f"{row['limit_bytes'] / GIB:.2f}",
            f"{row['file_bytes'] / GIB:.2f}",
        )
    return table
