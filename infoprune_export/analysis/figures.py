"""Figures of the visual-token analyses, as SVG text; drawn in the style of `validate.plots`.

Curves differ in colours that stay apart in the common forms of colour blindness, and in line style, for print in grey.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from infoprune_export.analysis.information import Floats, Order
from infoprune_export.validate.plots import AFTER, blank, tidy, to_svg

ORDERS: Mapping[Order, str] = {"attention": "attention (Top-k)", "infoprune": "Algorithm 1", "random": "random"}
"""What the orders are called in figures."""
_STYLES: Mapping[Order, tuple[str, str]] = {
    "attention": ("#c75000", "--"),
    "infoprune": (AFTER, "-"),
    "random": ("#5b6675", ":"),
}
_MARK = "#444"


@dataclass(frozen=True)
class Band:
    """Mean and standard deviation of a curve over images, [points] each."""

    mean: Floats
    deviation: Floats

    @classmethod
    def of(cls, curves: Sequence[Floats]) -> Band:
        """Of equally long curves; a single one deviates by 0."""
        return cls(np.mean(curves, axis=0), np.std(curves, axis=0))

    def to_dict(self) -> dict[str, list[float]]:
        return {"mean": self.mean.tolist(), "deviation": self.deviation.tolist()}


# ── Increments ───────────────────────────────────────────────────────────────


def increment_curves(mfi: Mapping[Order, Band], mgi: Mapping[Order, Band], kept: float) -> str:
    """Both indicators over the share of an image's tokens chosen so far; `kept` is the share the recipe keeps.

    MFI is in root mean square token lengths, MGI in nats.
    """
    figure = blank(9.4, 3.6)
    panels = figure.subplots(1, 2)
    for axes, bands, label in zip(panels, (mfi, mgi), ("MFI, rms token lengths", "MGI, nats"), strict=True):
        for order, band in bands.items():
            colour, line = _STYLES[order]
            share = 100 * np.arange(1, len(band.mean) + 1) / len(band.mean)
            low, high = band.mean - band.deviation, band.mean + band.deviation
            axes.fill_between(share, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(share, band.mean, line, color=colour, label=ORDERS[order], lw=1.6)
        axes.set(xlabel="tokens chosen, % of the image's", ylabel=label, xlim=(0, 100))
        axes.axvline(100 * kept, color=_MARK, lw=0.8)
        axes.annotate(
            "kept",
            (100 * kept, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            color=_MARK,
        )
        tidy(axes)
    panels[0].legend(frameon=False, loc="upper right")
    return to_svg(figure)


# ── Layers ───────────────────────────────────────────────────────────────────


def layer_flows(to_text: Floats, among_visual: Floats, layer: int) -> str:
    """S_vt and S_vv of every decoder layer (equation 5), with the layer K behind which tokens may be dropped."""
    figure, axes = _layers("flow / the question's largest S_vt", len(to_text), layer)
    axes.plot(to_text, "o-", color=AFTER, label="visual to text (S_vt)", clip_on=False)
    axes.plot(among_visual, "s--", color=_STYLES["attention"][0], label="among visual tokens (S_vv)", clip_on=False)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper right")
    return to_svg(figure)


def maturity(settled: Floats, probability: Floats, layer: int) -> str:
    """Per decoder layer: share of questions whose top-1 token is the final one already, and the final one's chance."""
    figure, axes = _layers("share, probability", len(settled), layer)
    axes.plot(settled, "o-", color=AFTER, label="top-1 token is the final one, share of questions")
    axes.plot(probability, "s--", color=_STYLES["attention"][0], label="probability of the final one, mean")
    axes.set_ylim(0, 1.04)
    axes.legend(frameon=False, loc="lower right")
    return to_svg(figure)


def _layers(label: str, count: int, layer: int) -> tuple[Figure, Any]:
    """Axes over decoder layers, with K marked."""
    figure = blank(6.4, 3.2)
    axes = figure.add_subplot()
    axes.set(xlabel="decoder layer", ylabel=label, xlim=(-0.2, count - 0.8))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axvline(layer, color=_MARK, lw=0.8)
    axes.annotate(
        f"K = {layer}",
        (layer, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        va="top",
        color=_MARK,
    )
    tidy(axes)
    return figure, axes


# ── Kept tokens ──────────────────────────────────────────────────────────────


def kept_grid(pictures: Mapping[Order, Sequence[str]]) -> str:
    """Pictures of `validate.plots.kept_tokens`, one row per order and one column per image."""
    rows = {order: [_decoded(uri) for uri in uris] for order, uris in pictures.items()}
    first = next(iter(rows.values()))
    aspects = [image.width / image.height for image in first]
    figure = blank(1.3 * sum(aspects) + 1.0, 1.38 * len(rows))
    panels = figure.subplots(len(rows), len(first), squeeze=False, width_ratios=aspects)
    for line, (order, images) in zip(panels, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(np.asarray(image), interpolation="none")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(ORDERS[order], color=_STYLES[order][0])
    return to_svg(figure)


def _decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
