"""Every page of this package in headless Chromium, at a desktop's width and a telephone's, in light and dark."""

from __future__ import annotations

import contextlib
from pathlib import Path

import chromium
import numpy as np
import pytest
from report_inputs import STEPS, attribution, bench, page_inputs, page_of, peers, rows_of, scores, write_run

from infoprune_export.analysis import analyse as analysing
from infoprune_export.analysis import figures, structure_figures
from infoprune_export.recipe import load_recipe
from infoprune_export.validate import plots
from infoprune_export.validate.report_compare import compare
from infoprune_export.validate.report_compare_page import render as render_comparison
from infoprune_export.validate.report_runs import read_run

pytestmark = pytest.mark.skipif(chromium.find() is None, reason="no chromium on PATH; apt-get install chromium")

WIDTHS = {"desktop": 1280, "telephone": 390}
LONG = "a-name-without-any-place-to-break-that-is-longer-than-a-telephone-is-wide-" * 2


# ── Pages ────────────────────────────────────────────────────────────────────


def failing_report(folder: Path) -> str:
    """With all that a report can have, and names of any length and kind."""
    inputs = page_inputs()
    inputs["name"] = LONG
    inputs["description"] = f"<img src=http://example.invalid/x.png> {LONG}"
    steps = [*STEPS[:3], ("recovery", 89), ("language", 88.2), STEPS[3], ("decoder", 87.0), *STEPS[4:]]
    inputs["validation"]["accuracy"] = rows_of(steps)
    for row in inputs["validation"]["accuracy"]:
        row["official"] = {"precision": 88.1, "recall": 87.0, "yes ratio": 51.2}
        row["by_kind"] = {f"kind {number}": 80.0 + number for number in range(9)}
    inputs["validation"]["kept_tokens"] = [{"image": '"><script>alert(1)</script>.png', "kept": [0]}] * 3
    inputs["pictures"] = [plots.kept_tokens(np.zeros((112, 112, 3), np.uint8), [0], 8, 8)] * 3
    heads = {"total": [16] * 24, "kept": [list(range(block % 16)) for block in range(24)]}
    inputs["validation"] |= {"heads": heads}
    inputs["validation"]["ffn"] = {
        "widths": [4096] * 24,
        "choices": [{"kind": "mlp", "neurons": list(range(64 * block)), "rank": 0} for block in range(24)],
    }
    inputs["bench"] = bench()
    inputs["bench"]["machine"]["gpus"] = [{"name": LONG}]
    row = inputs["bench"]["rows"][0]
    row |= {"peers": peers(), "memory": {"original": {"weights_bytes": 10**8, "call_bytes": 10**7}}}
    inputs["bench"]["rows"] = [row, {**row, "batch_size": 16}]
    inputs["attribution"] = attribution(blocks=24)
    inputs["attribution"]["broken"][0]["nodes"] *= 40
    inputs["recovery"] = [{"distance": 0.2}, {"distance": 0.1}]
    return page_of(inputs)


def passing_report(folder: Path) -> str:
    inputs = page_inputs()
    inputs["validation"] |= {"verdict": "PASS", "checks": inputs["validation"]["checks"][1:]}
    inputs["validation"]["parity"][0] |= {"relative_error": 1e-6, "passed": True}
    return page_of(inputs)


def comparison(folder: Path) -> str:
    inputs = page_inputs()
    inputs["recipe"] |= {"description": LONG, "seed": 5}
    inputs["bench"]["machine"]["processor"] = LONG
    inputs["validation"]["accuracy"] = rows_of([*STEPS[:3], ("recovery", 89), ("language", 88), *STEPS[3:]])
    a = write_run(folder / "one", page_inputs(), scores(STEPS, 1))
    return render_comparison(compare(read_run(a), read_run(write_run(folder / LONG, inputs, None))))


def analysis(folder: Path) -> str:
    """The page of `analyse` with its own figures, of made-up numbers."""
    rng = np.random.default_rng(0)
    curve = [0.5, 0.7, 1.0]

    def band() -> figures.Band:
        return figures.Band.of(np.sort(rng.random((3, 72)))[:, ::-1])

    both = [{order: band() for order in figures.ORDERS} for _ in range(2)]
    mean = {"mean": 0.31, "standard_error": 0.01}
    orders = {
        order: dict.fromkeys(("gain_of_kept", "gain_over_attention", "late_advantage", "late_advantage_kept"), mean)
        for order in figures.ORDERS
    }
    blocks = 24
    density = {name: rng.random(blocks).tolist() for name in ("W1", "W2", "W1W2")}
    ranks = {
        "by_epsilon": {e: list(range(9, 9 + blocks)) for e in ("0.05", "0.01")},
        "break_even": 32.0,
        "features": 64,
    }
    damage = {name: [{"removed": [1, 2, 4], "damage": [0.01, 0.1, 1.0]}] * blocks for name in ("heads", "neurons")}
    pictures = [plots.kept_tokens(np.zeros((112, 112, 3), np.uint8), [0], 8, 8)] * 3
    result = {
        "model": LONG,
        "images": 2,
        "questions": 3,
        "libraries": {"torch": "2.13.0"},
        "increments": {"epsilon": 1e-3, "kept_share": 0.5, "orders": orders},
        "layer": {"K": 1, "found": True},
        "flows": {"visual_to_text": curve, "within_visual": curve},
        "maturity": {"agreement": curve, "probability": curve, "percent_by_kind": {"text": curve}},
        "density": density,
        "ranks": ranks,
        "kept": {"images": []},
        "heads": {"lower_half_shared": 0.5},
        "damage": {"images": 8},
    }
    drawn = {
        "increments": figures.increment_curves(*both, 0.5),
        "flows": figures.layer_flows(np.array(curve), np.array(curve), 1),
        "maturity": figures.maturity(np.array(curve), np.array(curve), 1),
        "kept": figures.kept_grid(dict.fromkeys(figures.ORDERS, pictures)),
        "heads": structure_figures.head_maps(rng.random((blocks, 16)), rng.random((blocks, 16))),
        "density": structure_figures.density_lines(density),
        "ranks": structure_figures.rank_lines(ranks),
        "damage": structure_figures.damage_panels(damage),
    }
    return analysing.render(load_recipe("quickstart").name, result, drawn)


PAGES = (failing_report, passing_report, comparison, analysis)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("pages"), {}
    for page in PAGES:
        found[page.__name__] = folder / f"{page.__name__}.html"
        found[page.__name__].write_text(page(folder), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with chromium.browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


# ── Measuring ────────────────────────────────────────────────────────────────

MEASURE = (Path(__file__).parent / "measure_page.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("name", [page.__name__ for page in PAGES])
def test_page_is_whole_legible_and_alone(name, width, dark, files, page):
    page.open(files[name], width, dark=dark, height=12_000)
    assert page.evaluate("innerWidth") == width
    assert page.requests == [files[name].resolve().as_uri()]
    assert page.complaints == []
    assert page.evaluate(MEASURE) == []


@pytest.mark.parametrize("name", [page.__name__ for page in PAGES])
def test_print_shows_what_the_screen_hides_behind_scrolling(name, files, page):
    page.open(files[name], 900)
    page.call("Emulation.setEmulatedMedia", media="print")
    try:
        scrolling = "[...document.querySelectorAll('.scroll, figure')].map(e => getComputedStyle(e).overflowX)"
        assert set(page.evaluate(scrolling)) == {"visible"}
        assert page.call("Page.printToPDF")["data"]
    finally:
        page.call("Emulation.setEmulatedMedia", media="")


def test_first_screen_answers(files, page):
    """Verdict, what decided, gains and losses, before anything is scrolled."""
    page.open(files["passing_report"], 1280, height=800)
    for selector in (".verdict", ".decision", ".balance"):
        assert page.evaluate(f"document.querySelector('{selector}').getBoundingClientRect().bottom") < 800, selector


# ── The measurement itself ───────────────────────────────────────────────────

GOOD = (
    "<!doctype html><html lang=en><title>t</title><body style='color:#111;background:#fff'>"
    "<table><caption>c</caption><tr><th scope=col>h</th></tr></table>{}"
)


@pytest.mark.parametrize(
    ("markup", "complaint"),
    [
        ("<div style='width:2000px'>x</div>", "the page scrolls sideways"),
        ("<img src='data:,'>", "no alt"),
        ("<svg role=img width=9 height=9></svg>", "no text alternative"),
        ("<p style='color:#aaa'>pale</p>", "contrast"),
        ("<div style='width:90px;white-space:nowrap'>far too long for its box</div>", "sticks out"),
        ("<section style='width:100px'><div style='width:150px;height:9px'></div></section>", "sticks out"),
        (
            "<svg role=img aria-label=x width=99 height=40><text y=20>one</text><text x=4 y=22>two</text></svg>",
            "overlaps",
        ),
        ("<svg role=img aria-label=x width=30 height=40><text y=20>longer than that</text></svg>", "sticks out"),
        ("<svg role=img aria-label=x width=90 height=40><text y=20 fill='#ccc'>pale</text></svg>", "contrast"),
        (
            "<svg role=img aria-label=x width=90 height=40><rect width=90 height=40 fill='#222'/><text y=20>x</svg>",
            "contrast",
        ),
        ("<table><tr><th>x</th></tr></table>", "no scope"),
        ("<table><tr><th scope=col>x</th></tr></table>", "no caption"),
        ("<p id=a>x</p><p id=a>y</p>", "twice"),
    ],
)
def test_the_measurement_sees(markup, complaint, page, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(GOOD.format(markup), encoding="utf-8")
    page.open(path, 390)
    found = page.evaluate(MEASURE)
    assert any(complaint in each for each in found), found
    path.write_text(GOOD.format(""), encoding="utf-8")
    page.open(path, 390)
    assert page.evaluate(MEASURE) == []


def test_the_browser_reports_requests_and_complaints(page, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<img alt=x src='other.png'><script>console.error('oh'); nowhere()</script>", encoding="utf-8")
    page.open(path, 390)
    assert any(address.endswith("other.png") for address in page.requests)
    assert any("oh" in text for text in page.complaints)
    assert len(page.complaints) >= 2
    with contextlib.suppress(RuntimeError):
        page.evaluate("nowhere()")
        pytest.fail("an exception in a script is one here, too")
