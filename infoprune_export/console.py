"""What commands print: results as tables, read from a run's files or handed over as they were measured."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from rich.progress import Progress


def wide_console() -> Console:
    """For tables; whoever reads a log has more than 80 columns."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    return console


def print_validation(folder: Path) -> None:
    """Accuracy of every step and the verdict's checks, from the folder of the validation stage."""
    result = json.loads((folder / "validation.json").read_text(encoding="utf-8"))
    table = Table("step", result["metric"], "± s.e.", "to original", "± s.e.", title=None)
    for row in result["accuracy"]:
        difference = row["to_original"]
        table.add_row(
            row["step"],
            f"{row['percent']:.1f}",
            f"{row['standard_error']:.1f}",
            f"{difference['percent']:+.1f}",
            f"{difference['standard_error']:.1f}",
        )
    console = Console()
    console.print(table)
    checks = Table("check", "value", "limit", "passed")
    for check in result["checks"]:
        value = "not finite" if check["value"] is None else f"{check['value']:.3g}"
        checks.add_row(check["what"], value, f"{check['limit']:.3g}", "yes" if check["passed"] else "NO")
    console.print(checks)


def print_bench(result: Mapping[str, Any]) -> None:
    """One row for every batch size, and what they were measured on."""
    table = Table("batch", "original ms", "compressed", "speed-up (95%)", "FLOPs", "efficiency")
    for row in result["rows"]:
        times, speedup = row["milliseconds"], row["speedup"]
        table.add_row(
            str(row["batch_size"]),
            f"{times['original']['p50']:.2f}",
            f"{times['compressed']['p50']:.2f}",
            f"{speedup['median']:.2f} ({speedup['low']:.2f}-{speedup['high']:.2f})",
            f"{row['flop_ratio']:.2f}",
            f"{row['efficiency']:.2f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{result['provider']}, {result['threads']} thread(s), {result['rounds']} rounds, "
        f"{result['machine']['processor']}"
    )


def print_selection(cost: Mapping[str, Any]) -> None:
    """What token selection costs, in a line."""
    click.echo(
        f"selection {cost['tokens']} -> {cost['kept']}: {cost['milliseconds']:.2f} ms, "
        f"{100 * cost['fraction']:.2f}% of the original encoder's latency (95% interval "
        f"{100 * cost['low']:.2f} .. {100 * cost['high']:.2f}%)"
    )


# ── Progress ─────────────────────────────────────────────────────────────────


def tracker(progress: Progress) -> Callable[[str, int], Callable[[int], None]]:
    """Adds a line to a progress display, from its title and total; what is returned advances it until it is gone."""

    def track(title: str, total: int) -> Callable[[int], None]:
        task = progress.add_task(title, total=total)

        def advance(amount: int) -> None:
            progress.advance(task, amount)
            if progress.tasks[progress.task_ids.index(task)].finished:
                progress.remove_task(task)

        return advance

    return track


# ── Other libraries ──────────────────────────────────────────────────────────


def quiet_libraries() -> None:
    """Their progress bars and advice would break ours; errors still reach the user as exceptions."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore")
    import torch.onnx  # noqa: F401  (sets its loggers' levels when it is imported, so ours come after)
    from transformers.utils import logging as hf_logging

    for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "torch.export", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
