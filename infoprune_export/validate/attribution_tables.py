"""``attribution.json`` as a terminal shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

SHOWN_NODES = 6


def render(console: Console, found: Mapping[str, Any], *, blocks: bool = True) -> None:
    """Both tables, then what broke."""
    steps = Table("step", "to the step before", "cosine", "norm", "to the original", "parity", "limit", "accuracy %")
    for row in found["steps"]:
        before, first, parity = row["to_previous"], row["to_original"], row["parity"]
        steps.add_row(
            row["step"],
            *_three(before),
            _error(first),
            _error(parity) + ("" if row["passed"] else " BROKEN"),
            "" if row["tolerance"] is None else f"{row['tolerance']:.0e}",
            "" if row["accuracy"] is None else f"{row['accuracy']:.1f}",
        )
    console.print(steps)
    if blocks and found["blocks"]:
        parts = Table("step", "part", "largest error", "cosine", "norm", "limit", "worst on", "")
        for row in found["blocks"]:
            figures = row["added"] or row["value"]
            state = "" if row["passed"] else "BROKEN"
            parts.add_row(
                row["step"],
                row["part"],
                *_three(figures),
                f"{row['tolerance']:.0e}",
                figures["case"],
                state if row["judged"] else "not judged",
            )
        console.print(parts)
    if not found["broken"]:
        console.print("broken: nothing")
    for part in found["broken"]:
        console.print(f"broken: {part['step']}: {part['part']}: {part['reason']}", markup=False)
        if names := part["nodes"]:
            more = f" and {len(names) - SHOWN_NODES} more" if len(names) > SHOWN_NODES else ""
            console.print(f"  nodes: {', '.join(names[:SHOWN_NODES])}{more}", markup=False)
        for node in part["overflow"]:
            largest = "not finite" if node["largest"] is None else f"{node['largest']:.3g}"
            console.print(f"  {node['node']}: {largest} in fp32", markup=False)
        if part["fix"]:
            console.print(f"  to mend it: {part['fix']}", markup=False)


def _three(figures: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if figures is None:
        return "", "", ""
    if figures["relative_error"] is None:
        return "not finite", "", ""
    return _error(figures), f"{figures['cosine']:.6f}", f"{figures['norm_ratio']:.4f}"


def _error(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return ""
    return "not finite" if figures["relative_error"] is None else f"{figures['relative_error']:.1e}"
