"""The report's pictures, as SVG or PNG text that goes straight into the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.measure.statistics import NORMAL_95

# The same input gives the same bytes, and text stays text.
mpl.rcParams.update({"svg.hashsalt": "infoprune-export", "svg.fonttype": "none", "font.size": 9})

WIDTH = 4.5
"""Inches of most figures: beside another on a desktop, and legible still on a telephone."""
BEFORE, AFTER, GONE, ALERT = "#8a94a6", "#1668b8", "#e3e7ee", "#b3261e"
_FFN_COLOURS: Mapping[str, str] = {"mlp": AFTER, "bypass": "#1b8a7a", "factored": "#7a4fb5", "linear": ALERT}


def head_map(total: Sequence[int], kept: Sequence[Sequence[int]]) -> str:
    """Blocks from bottom to top, heads from left to right; filled squares stay, hollow ones are gone."""
    figure = blank(0.32 * max(total) + 1.6, 0.32 * len(total) + 0.9)
    axes = figure.add_subplot()
    for block, (count, heads) in enumerate(zip(total, kept, strict=True)):
        for head in range(count):
            looks: dict[str, Any] = (
                {"color": AFTER, "lw": 0} if head in heads else {"fc": "none", "ec": BEFORE, "lw": 0.7}
            )
            axes.add_patch(Rectangle((head + 0.1, block + 0.1), 0.8, 0.8, **looks))
        axes.text(count + 0.3, block + 0.5, f"{len(heads)}/{count}", va="center", color="#444")
    axes.set(xlim=(0, max(total) + 1.6), ylim=(0, len(total)), xlabel="head", ylabel="block")
    axes.set_xticks(np.arange(max(total)) + 0.5, [str(h) for h in range(max(total))])
    axes.set_yticks(np.arange(len(total)) + 0.5, [str(b) for b in range(len(total))])
    tidy(axes)
    return to_svg(figure)


def ffn_bars(plan: FfnPlan) -> str:
    """What is left of every FFN's multiply-accumulates, and as what; blocks from bottom to top."""
    rows = np.arange(len(plan.widths))
    kept = [
        100 * plan.macs(choice) / plan.macs(FfnChoice("mlp", tuple(range(width))))
        for width, choice in zip(plan.widths, plan.choices, strict=True)
    ]
    figure = blank(WIDTH, 0.32 * len(rows) + 0.9)
    axes = figure.add_subplot()
    axes.barh(rows, 100.0, color=GONE, height=0.8)
    axes.barh(rows, kept, color=[_FFN_COLOURS[choice.kind] for choice in plan.choices], height=0.8)
    # Factors of high rank can cost more than what they replace.
    end = max(100.0, *kept)
    for row, choice in enumerate(plan.choices):
        axes.text(1.02 * end, int(row), ffn_label(choice), va="center", color="#444")
    axes.set(xlim=(0, 1.75 * end), ylabel="block", xlabel="multiply-accumulates kept, %")
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_yticks(rows, [str(row) for row in rows])
    tidy(axes)
    return to_svg(figure)


def ffn_label(choice: FfnChoice) -> str:
    """What an FFN became, in a few words."""
    neurons = f"{choice.size} neurons"
    if choice.kind == "linear":
        return f"linear, rank {choice.rank}"
    if choice.kind == "factored":
        return f"{neurons}, ranks {'/'.join(map(str, choice.ranks))}"
    if choice.kind == "bypass":
        return f"{neurons} + bypass of rank {choice.rank}"
    return neurons if choice.neurons else "constant"


def accuracy_steps(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """Accuracy after each step with 95% intervals, against the original's level."""
    figure = blank(WIDTH, 2.7)
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    values = [row["percent"] for row in rows]
    errors = [NORMAL_95 * row["standard_error"] for row in rows]
    axes.axhline(values[0], color=BEFORE, lw=1, ls="--")
    axes.errorbar(places, values, yerr=errors, fmt="o-", color=AFTER, capsize=3, ms=5)
    for place, value in zip(places, values, strict=True):
        axes.annotate(f"{value:.1f}", (float(place), value), textcoords="offset points", xytext=(6, 7), color="#222")
    low, high = (
        min(v - e for v, e in zip(values, errors, strict=True)),
        max(v + e for v, e in zip(values, errors, strict=True)),
    )
    axes.set(ylabel=f"{metric}, %", ylim=(low - 1, min(high + 2, 101.5)), xlim=(-0.3, len(rows) - 0.4))
    axes.set_xticks(places, [row["step"] for row in rows])
    if len(rows) > 6:
        axes.tick_params(axis="x", rotation=35)
    tidy(axes)
    return to_svg(figure)


def accuracy_pair(steps: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy of two runs, ``a`` and ``b`` of every step, with 95% intervals; either may lack a step."""
    figure = blank(WIDTH, 3)
    axes = figure.add_subplot()
    for side, colour, look, shift in (("a", BEFORE, "s--", -0.06), ("b", AFTER, "o-", 0.06)):
        found = [(place, step[side]) for place, step in enumerate(steps) if step[side] is not None]
        axes.errorbar(
            [place + shift for place, _ in found],
            [row["percent"] for _, row in found],
            yerr=[NORMAL_95 * row["standard_error"] for _, row in found],
            fmt=look,
            color=colour,
            capsize=3,
            ms=5,
            label=side.upper(),
        )
    axes.set(ylabel="%", xlim=(-0.4, len(steps) - 0.6))
    axes.set_xticks(np.arange(len(steps)), [step["step"] for step in steps])
    if len(steps) > 6:
        axes.tick_params(axis="x", rotation=35)
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    tidy(axes)
    return to_svg(figure)


def latency_bars(rows: Sequence[dict[str, Any]]) -> str:
    """Median latency per image before and after, for every batch size, with the 90th percentile as whisker."""
    figure = blank(WIDTH, 2.7)
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    for offset, side, colour, hatch in ((-0.2, "original", BEFORE, "///"), (0.2, "compressed", AFTER, "")):
        per_image = [row["milliseconds"][side]["p50"] / row["batch_size"] for row in rows]
        upper = [
            row["milliseconds"][side]["p90"] / row["batch_size"] - value
            for row, value in zip(rows, per_image, strict=True)
        ]
        looks: dict[str, Any] = {"fc": colour, "ec": GONE, "lw": 0, "hatch": hatch}
        axes.bar(places + offset, per_image, 0.38, label=side, yerr=[np.zeros(len(rows)), upper], capsize=3, **looks)
    tops = [
        max(row["milliseconds"][side]["p90"] for side in ("original", "compressed")) / row["batch_size"] for row in rows
    ]
    for place, row, top in zip(places, rows, tops, strict=True):
        axes.text(int(place), top, f"{row['speedup']['median']:.2f}x", ha="center", va="bottom", color="#222")
    axes.set(ylabel="ms per image", ylim=(0, max(tops) * 1.3))
    axes.set_xticks(places, [f"batch {row['batch_size']}" for row in rows])
    axes.legend(frameon=False, ncols=2, loc="upper right")
    tidy(axes)
    return to_svg(figure)


def gate_history(history: Sequence[dict[str, float]]) -> str:
    """Loss terms over epochs."""
    figure = blank(WIDTH, 2.4)
    axes = figure.add_subplot()
    epochs = np.arange(1, len(history) + 1)
    for term, colour, line in (("task", AFTER, "o-"), ("mean_gate", "#c75000", "s--"), ("distance", "#1b8a7a", "^:")):
        axes.plot(epochs, [epoch[term] for epoch in history], line, color=colour, ms=3, label=term.replace("_", " "))
    axes.set(xlabel="epoch", ylim=(0, None))
    axes.legend(frameon=False, ncols=3)
    tidy(axes)
    return to_svg(figure)


def recovery_history(history: Sequence[Mapping[str, float]]) -> str:
    """Distance to the original's visual tokens over epochs, relative to their variance."""
    figure = blank(WIDTH, 2.4)
    axes = figure.add_subplot()
    axes.plot(np.arange(1, len(history) + 1), [epoch["distance"] for epoch in history], "o-", ms=3, color=AFTER)
    axes.set(xlabel="epoch", ylabel="distance / variance", ylim=(0, None))
    tidy(axes)
    return to_svg(figure)


def kept_tokens(pixels: NDArray[np.uint8], kept: Sequence[int], rows: int, columns: int) -> str:
    """An image as the tower sees it, [H, W, 3], with dropped tokens of its grid dimmed; a PNG data URI."""
    scale = max(1, 224 // pixels.shape[0])
    image = Image.fromarray(pixels).resize((pixels.shape[1] * scale, pixels.shape[0] * scale), Image.Resampling.NEAREST)
    shade = Image.new("RGBA", image.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(shade)
    width, height = image.size[0] / columns, image.size[1] / rows
    for token in range(rows * columns):
        row, column = divmod(token, columns)
        box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
        if token not in kept:
            draw.rectangle(box, fill=(255, 255, 255, 205))
        else:
            draw.rectangle(box, outline=(22, 104, 184, 150))
    buffer = io.BytesIO()
    Image.alpha_composite(image.convert("RGBA"), shade).convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def blank(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Any) -> None:
    """Without the frame's top and right, and without tick marks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element for a page, the same bytes every time."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
