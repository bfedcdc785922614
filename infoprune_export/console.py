"""What commands print: results as tables, read from a run's files or handed over as they were measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table


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
