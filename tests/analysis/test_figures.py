"""Figures: what is drawn stands where the numbers say, in the colour of its label."""

from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from infoprune_export.analysis import figures
from infoprune_export.analysis.figures import Band
from infoprune_export.validate import plots

SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"
BLUE, ORANGE, GREY, LINE = plots.AFTER, "#c75000", "#5b6675", "#444444"


def parse(svg: str) -> ET.Element:
    assert svg.startswith("<svg")
    return ET.fromstring(svg)


def texts(root: ET.Element) -> str:
    return " | ".join("".join(node.itertext()).strip() for node in root.iter(f"{SVG}text"))


def curves(root: ET.Element, colour: str, points: int) -> list[np.ndarray]:
    """Lines of this colour and number of points, in drawing order, as pixel coordinates [points, 2]."""
    found = []
    for path in root.iter(f"{SVG}path"):
        if f"stroke: {colour}" in path.get("style", "") and "fill: none" in path.get("style", ""):
            numbers = re.findall(r"-?\d+\.?\d*", path.get("d", ""))
            if len(numbers) == 2 * points:
                found.append(np.array(numbers, float).reshape(points, 2))
    return found


def assert_affine(pixels: np.ndarray, values: np.ndarray) -> None:
    """One axis maps values on pixels: straight, and not flat."""
    slope, offset = np.polyfit(values, pixels, 1)
    assert abs(slope) > 1
    np.testing.assert_allclose(slope * values + offset, pixels, atol=0.02)


# ── Increments ───────────────────────────────────────────────────────────────


@pytest.fixture
def bands() -> dict[str, dict[str, Band]]:
    rng = np.random.default_rng(0)
    orders = ("attention", "infoprune", "random")
    return {name: {order: Band(rng.uniform(1, 5, 7), rng.uniform(0.1, 1, 7)) for order in orders} for name in "fg"}


def test_increment_curves_are_drawn_to_scale_in_both_panels(bands):
    root = parse(figures.increment_curves(bands["f"], bands["g"], 0.25))
    for panel, name in enumerate("fg"):
        drawn = {
            order: curves(root, colour, 7)[panel]
            for order, colour in (("attention", ORANGE), ("infoprune", BLUE), ("random", GREY))
        }
        assert_affine(
            np.concatenate([drawn[order][:, 1] for order in drawn]),
            np.concatenate([bands[name][order].mean for order in drawn]),
        )
        for pixels in drawn.values():
            assert_affine(pixels[:, 0], np.arange(1, 8) / 7)


def test_increment_curves_mark_the_kept_share_and_name_axes_and_orders(bands):
    root = parse(figures.increment_curves(bands["f"], bands["g"], 3 / 7))
    marks = curves(root, LINE, 2)
    assert len(marks) == 2
    for mark, curve in zip(marks, curves(root, BLUE, 7), strict=False):
        np.testing.assert_allclose(mark[:, 0], curve[2, 0], atol=0.02)
    shown = texts(root)
    for expected in ("MFI, rms token lengths", "MGI, nats", "% of the image", "Top-k", "Algorithm 1", "random", "kept"):
        assert expected in shown, expected


def test_increment_bands_are_one_standard_deviation(bands):
    root = parse(figures.increment_curves(bands["f"], bands["g"], 0.5))
    paths = {f"#{path.get('id')}": path.get("d", "") for path in root.iter(f"{SVG}path")}
    filled = [use for use in root.iter(f"{SVG}use") if "fill-opacity" in use.get("style", "")]
    assert len(filled) == 6
    for use, (name, order) in zip(filled, [(name, order) for name in "fg" for order in figures.ORDERS], strict=True):
        colour = {"attention": ORANGE, "infoprune": BLUE, "random": GREY}[order]
        assert f"fill: {colour};" in use.get("style", "")
        edge = np.array(re.findall(r"-?\d+\.?\d*", paths[use.get(HREF, "")]), float).reshape(-1, 2)[:, 1]
        band, curve = bands[name][order], curves(root, colour, 7)["fg".index(name)]
        slope, offset = np.polyfit(band.mean, curve[:, 1], 1)
        for value in np.concatenate([band.mean - band.deviation, band.mean + band.deviation]):
            assert np.abs(edge + float(use.get("y", 0)) - slope * value - offset).min() < 0.02


def test_band_is_mean_and_standard_deviation_over_images():
    band = Band.of([np.array([1.0, 2.0]), np.array([3.0, 2.0])])
    assert band.mean.tolist() == [2, 2]
    assert band.deviation.tolist() == [1, 0]
    assert Band.of([np.array([4.0])]).deviation.tolist() == [0]


def test_increment_curves_of_one_token_are_drawn():
    band = {order: Band(np.array([1.0]), np.array([0.0])) for order in figures.ORDERS}
    assert "Algorithm 1" in texts(parse(figures.increment_curves(band, band, 1.0)))


# ── Layers ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("draw", [figures.layer_flows, figures.maturity])
def test_layer_curves_are_drawn_to_scale_with_the_layer_marked(draw):
    first, second = np.array([0.1, 0.9, 0.4, 0.3, 0.2]), np.array([0.7, 0.5, 0.6, 0.0, 0.8])
    root = parse(draw(first, second, 3))
    (blue,), (orange,) = curves(root, BLUE, 5), curves(root, ORANGE, 5)
    assert_affine(np.concatenate([blue[:, 1], orange[:, 1]]), np.concatenate([first, second]))
    assert_affine(blue[:, 0], np.arange(5))
    (mark,) = curves(root, LINE, 2)
    np.testing.assert_allclose(mark[:, 0], blue[3, 0], atol=0.02)
    assert "K = 3" in texts(root)
    assert "decoder layer" in texts(root)


def test_legends_name_what_the_colours_are():
    assert re.search(r"to text.*among visual", texts(parse(figures.layer_flows(np.ones(3), np.ones(3), 0))))
    assert re.search(r"final.*probability", texts(parse(figures.maturity(np.ones(3), np.ones(3), 0))))


# ── Kept tokens ──────────────────────────────────────────────────────────────


def test_kept_grid_places_every_picture_in_the_row_of_its_order():
    rng = np.random.default_rng(0)
    pictures = {
        order: [
            plots.kept_tokens(rng.integers(0, 255, (28, width, 3), np.uint8), [0, 1], 2, width // 14)
            for width in (28, 56)
        ]
        for order in figures.ORDERS
    }
    root = parse(figures.kept_grid(pictures))
    drawn = list(root.iter(f"{SVG}image"))
    for image, uri in zip(drawn, [uri for uris in pictures.values() for uri in uris], strict=True):
        assert (pixels(image.get(HREF, "")) == pixels(uri)).all()
    corners = np.array([re.findall(r"[\d.]+", image.get("transform", ""))[4:] for image in drawn], float)
    columns, rows = corners.reshape(3, 2, 2).transpose(2, 0, 1)
    assert (np.diff(columns, axis=1) > 50).all()
    assert (np.diff(rows, axis=0) > 50).all()
    assert (rows[:, 0] == rows[:, 1]).all()
    assert texts(root).strip(" |").split(" | ") == list(figures.ORDERS.values())


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


# ── All ──────────────────────────────────────────────────────────────────────


def test_figures_are_reproducible(bands):
    assert figures.increment_curves(bands["f"], bands["g"], 0.5) == figures.increment_curves(
        bands["f"], bands["g"], 0.5
    )
    assert figures.layer_flows(np.ones(3), np.ones(3), 1) == figures.layer_flows(np.ones(3), np.ones(3), 1)
