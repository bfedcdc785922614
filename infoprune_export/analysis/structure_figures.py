"""Figures of the structural analyses, as SVG text; drawn in the style of `validate.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from infoprune_export.analysis.information import Floats
from infoprune_export.validate.plots import AFTER, BEFORE, blank, tidy, to_svg

_ORANGE, _GREY, _MARK = "#c75000", "#5b6675", "#444"
_DECADES = 6
"""Of a damage that are told apart, below the largest."""


# ── Heads ────────────────────────────────────────────────────────────────────


def head_maps(importance: Sequence[Sequence[float]], damage: Sequence[Sequence[float]]) -> str:
    """Two maps of all heads, blocks from bottom to top: importance in 0..1, and damage on a log scale."""
    blocks, heads = np.shape(importance)
    figure = blank(0.64 * heads + 4.2, 0.28 * blocks + 1.1)
    panels = figure.subplots(1, 2)
    costs = np.asarray(damage, np.float64)
    low, high = _log_range(costs)
    for axes, values, scale, label in (
        (panels[0], np.asarray(importance), Normalize(0, 1), "importance, by negative entropy"),
        (panels[1], costs.clip(low), LogNorm(low, high), "damage of removal"),
    ):
        mesh = axes.pcolormesh(values, norm=scale, cmap="viridis", edgecolors="w", lw=0.6)
        bar = figure.colorbar(mesh, ax=axes, label=label, pad=0.02)
        bar.outline.set_visible(False)
        axes.set(xlabel="head", ylabel="block")
        _centred(axes.xaxis, heads)
        _centred(axes.yaxis, blocks)
        tidy(axes)
        axes.spines[:].set_visible(False)
    return to_svg(figure)


def _log_range(values: Floats) -> tuple[float, float]:
    """The smallest value within `_DECADES` of the largest, and the largest; a decade where they are all the same."""
    top = float(values.max()) or 1.0
    above = values[values > top * 10.0**-_DECADES]
    return (float(above.min()) if len(above) and above.min() < top else top / 10, top)


def _centred(axis: Any, count: int) -> None:
    """Number cells in their middles, at most 16 of them."""
    shown = np.arange(0, count, -(-count // 16))
    axis.set_ticks(shown + 0.5, [str(number) for number in shown])


# ── Feed-forward networks ────────────────────────────────────────────────────


def density_lines(shares: Mapping[str, Sequence[float]]) -> str:
    """Row density of W1, W2 and their product over the blocks, in percent."""
    figure, axes = _blocks("rows that are not sparse, %", len(shares["W1"]))
    styles = {"W1": (AFTER, "o-", "W1"), "W2": (_ORANGE, "s--", "W2"), "W1W2": (_GREY, "^:", "W1 W2")}
    for name, (colour, line, label) in styles.items():
        axes.plot(100 * np.asarray(shares[name]), line, color=colour, label=label, clip_on=False)
    axes.set_ylim(0, 104)
    _legend(axes)
    return to_svg(figure)


def rank_lines(ranks: Mapping[str, Any]) -> str:
    """Retained ranks over the blocks, one line per epsilon, with the rank that is worth it no more."""
    by_epsilon = ranks["by_epsilon"]
    figure, axes = _blocks("retained rank", len(next(iter(by_epsilon.values()))))
    shades = colormaps["viridis"](np.linspace(0, 0.85, len(by_epsilon)))
    for (epsilon, kept), shade, marker in zip(by_epsilon.items(), shades, "os^vDP*X", strict=False):
        axes.plot(kept, f"{marker}-", color=shade, label=f"ε = {epsilon}", clip_on=False)
    axes.axhline(ranks["break_even"], color=_MARK, lw=1, ls="--", label=f"break-even, D/2 = {ranks['break_even']:g}")
    axes.axhline(ranks["features"], color=BEFORE, lw=1, ls=":", label=f"all, D = {ranks['features']}")
    axes.set_ylim(0, 1.05 * ranks["features"])
    _legend(axes)
    return to_svg(figure)


# ── Damage ───────────────────────────────────────────────────────────────────


def damage_panels(curves: Mapping[str, Sequence[Mapping[str, Sequence[float]]]]) -> str:
    """Summed cost of what is removed first, by share removed, of heads and of neurons; a line per block.

    Both panels have one log scale, so that blocks, heads and neurons can be held against each other.
    """
    blocks = len(curves["heads"])
    figure = blank(9.4, 3.8)
    panels = figure.subplots(1, 2, sharey=True)
    low, high = _log_range(np.concatenate([row["damage"] for rows in curves.values() for row in rows]))
    shades = colormaps["viridis"].resampled(blocks)
    for axes, (what, rows) in zip(panels, curves.items(), strict=True):
        for block, row in enumerate(rows):
            share = 100 * np.asarray(row["removed"]) / row["removed"][-1]
            marker = "o" if what == "heads" else ""
            axes.plot(share, row["damage"], color=shades(block), lw=1.6, marker=marker, ms=3)
        axes.set(xlabel=f"{what} removed, % of the block's", xlim=(0, 101), yscale="log")
        tidy(axes)
        axes.tick_params(which="minor", length=0)
    panels[0].set(ylabel="summed damage", ylim=(low, 2 * high))
    bar = figure.colorbar(ScalarMappable(Normalize(-0.5, blocks - 0.5), shades), ax=panels, label="block", pad=0.01)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(integer=True)
    bar.update_ticks()
    return to_svg(figure)


# ── Shared ───────────────────────────────────────────────────────────────────


def _blocks(label: str, count: int) -> tuple[Figure, Any]:
    """Axes over the encoder's blocks."""
    figure = blank(7.4, 3.2)
    axes = figure.add_subplot()
    axes.set(xlabel="block", ylabel=label, xlim=(-0.2, count - 0.8))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)
    return figure, axes


def _legend(axes: Any) -> None:
    """Beside the curves, which may go anywhere."""
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
