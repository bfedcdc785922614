"""A sweep as tables and as a picture: accuracy against speed-up, the front marked, 95% intervals on both axes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from matplotlib.lines import Line2D
from rich.table import Column, Table

from infoprune_export.console import ratio_text
from infoprune_export.measure.statistics import NORMAL_95
from infoprune_export.validate.plots import AFTER, ALERT, BEFORE, blank, tidy, to_svg
from infoprune_export.validate.study_results import Interaction, Mean, Study, StudyPoint

# ── Tables ───────────────────────────────────────────────────────────────────


def render(result: Study) -> list[Table]:
    """Points with what they reach, and interactions where there are any."""
    sizes = list(result["original"]["latency"])
    table = Table(
        "",
        Column("point", overflow="fold"),
        *(f"speed-up, batch {size}" for size in sizes),
        result["metric"],
        "to original",
        "",
    )
    original = result["original"]["accuracy"]
    table.add_row("", "original", *("1" for _ in sizes), f"{original['percent']:.1f}", "", "")
    for number, row in enumerate(result["points"], 1):
        if row["accuracy"] is None or row["to_original"] is None:
            table.add_row(str(number), row["point"], *("-" for _ in sizes), "-", "-", row["refused"])
            continue
        ends = "PASS" if row["verdict"] == "PASS" else f"FAIL: {', '.join(row['failed_checks'])}"
        table.add_row(
            str(number),
            row["point"],
            *(ratio_text(latency["speed_up"]) for latency in row["latency"]),
            f"{row['accuracy']['percent']:.1f}",
            _change(row["to_original"]),
            f"{ends}, on the front" if row["on_front"] else ends,
        )
    tables = [table]
    if result["interactions"]:
        tables.append(_interactions(result["interactions"]))
    return tables


def _interactions(found: list[Interaction]) -> Table:
    table = Table("first", "second", "at", "first alone", "second alone", "both", "interaction", "z")
    for row in found:
        changes = [f"{key.rpartition('.')[2]} {_text(a)} -> {_text(b)}" for key, a, b in _axes(row)]
        others = ", ".join(f"{key.rpartition('.')[2]} {_text(value)}" for key, value in row["at"].items())
        means = [_change(row["first"]), _change(row["second"]), _change(row["both"]), _change(row["interaction"])]
        error = row["interaction"]["standard_error"]
        z = f"{row['interaction']['percent'] / error:+.1f}" if error else "-"
        table.add_row(*changes, others, *means, z)
    return table


def _axes(row: Interaction) -> list[tuple[str, Any, Any]]:
    return list(zip(row["keys"], row["start"], row["end"], strict=True))


def _change(value: Mean) -> str:
    return f"{value['percent']:+.1f} ± {value['standard_error']:.1f}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ── Picture ──────────────────────────────────────────────────────────────────


def draw(result: Study) -> str:
    """Accuracy against speed-up at the first batch size, numbered as in the table; SVG.

    Bars are 95% intervals: of the median ratio, and 1.96 standard errors of the paired difference to the original.
    """
    rows = [(number, row) for number, row in enumerate(result["points"], 1) if row["to_original"] is not None]
    size = next(iter(result["original"]["latency"]))
    figure = blank(7.2, max(3.6, 0.9 + 0.19 * (len(rows) + 4)))
    axes, side = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, row in rows:
        _point(axes, number, row)
    _front(axes, [row for _, row in rows])
    axes.plot([1], [0], marker="D", ms=5, color=BEFORE, ls="none")
    axes.axhline(0, color=BEFORE, lw=0.8, ls=":")
    axes.margins(0.08)
    axes.set(xlabel=f"speed-up of the encoder, batch {size}", ylabel=f"{result['metric']}, points to original")
    tidy(axes)
    _key(side, rows)
    return to_svg(figure)


def _point(axes: Any, number: int, row: StudyPoint) -> None:
    ratio, change = row["latency"][0]["speed_up"], row["to_original"]
    assert change is not None
    x, y, passed = ratio["median"], change["percent"], row["verdict"] == "PASS"
    colour = AFTER if row["on_front"] else BEFORE
    sides = [[x - ratio["low"]], [ratio["high"] - x]]
    axes.errorbar(
        [x],
        [y],
        xerr=sides,
        yerr=[NORMAL_95 * change["standard_error"]],
        color=colour,
        marker="o" if passed else "X",
        mfc=colour if row["on_front"] else "white",
        mec=colour if passed else ALERT,
        ms=5 if passed else 6,
        lw=1,
        capsize=2,
        zorder=3,
    )
    axes.annotate(str(number), (x, y), textcoords="offset points", xytext=(5, 5), color="#222", zorder=4)


def _front(axes: Any, rows: list[StudyPoint]) -> None:
    """A staircase: what is the best accuracy at each speed-up or more."""
    corners = sorted(
        (row["latency"][0]["speed_up"]["median"], row["to_original"]["percent"])
        for row in rows
        if row["on_front"] and row["to_original"] is not None
    )
    if corners:
        axes.step(*zip(*corners, strict=True), where="pre", color=AFTER, lw=1.2, zorder=2)


def _key(side: Any, rows: list[tuple[int, StudyPoint]]) -> None:
    """Numbers and names, in the space of a second panel."""
    side.axis("off")
    looks: Mapping[str, Mapping[str, Any]] = {
        "original": {"marker": "D", "color": BEFORE},
        "on the front": {"marker": "o", "color": AFTER},
        "not on it": {"marker": "o", "mec": BEFORE, "mfc": "white"},
        "verdict FAIL": {"marker": "X", "mec": ALERT, "mfc": "white"},
    }
    if all(row["verdict"] == "PASS" for _, row in rows):
        looks = {name: look for name, look in looks.items() if name != "verdict FAIL"}
    handles: list[Any] = [Line2D([], [], ls="none", ms=5, label=name, **look) for name, look in looks.items()]
    handles += [Line2D([], [], ls="none", label=f"{number}  {_named(row)}") for number, row in rows]
    side.legend(handles=handles, frameon=False, loc="upper left", fontsize=8, handlelength=1, borderaxespad=0)


def _named(row: StudyPoint) -> str:
    text = ", ".join(f"{key.rpartition('.')[2]} {_text(value)}" for key, value in row["settings"].items())
    return text if len(text) <= 44 else f"{text[:43]}…"
