import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from report_inputs import page_inputs as made_up
from report_inputs import page_of, row

from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.validate import plots

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def page_inputs():
    return made_up()


def test_page_is_self_contained_and_well_formed(page_inputs):
    page = page_of(page_inputs)

    class Checker(HTMLParser):
        void = {"meta", "img", "br", "link", "input", "path", "use", "rect", "line"}  # noqa: RUF012
        stack: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            for name, value in attrs:
                if name in ("src", "href", "xlink:href"):
                    assert value.startswith(("data:", "#")), (tag, name, value)
            if tag not in self.void:
                self.stack.append(tag)

        def handle_endtag(self, tag):
            if tag not in self.void:
                assert self.stack.pop() == tag

    checker = Checker()
    checker.feed(page)
    assert checker.stack == []
    assert "url(http" not in page


def test_text_from_outside_is_escaped(page_inputs):
    page = page_of(page_inputs)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_figures_of_the_run_are_on_the_page(page_inputs):
    page = page_of(page_inputs)
    text = re.sub(r"<[^>]+>", " ", page)
    for expected in ("FAIL", "90.0 → 87.5%", "2.00x", "64 → 32", "not finite", "2/4", "0/4", "linear, rank 9", "paper"):
        assert expected in text, expected


def test_every_kind_of_ffn_is_drawn_with_its_share_and_its_name():
    choices = (
        FfnChoice("mlp", tuple(range(32))),
        FfnChoice("mlp"),
        FfnChoice("linear", rank=24),
        FfnChoice("factored", tuple(range(64)), ranks=(10, 6)),
        FfnChoice("bypass", tuple(range(16)), rank=4),
    )
    root = ET.fromstring(plots.ffn_bars(FfnPlan((64,) * 5, choices, features=16)))
    # Of 2 * 16 * 64 = 2048: 2 * 16 * 32, none, 2 * 16 * 24, (10 + 6) * (16 + 64), and 16 * (2 * 16 + 2 * 4).
    shares = [0.5, 0.0, 0.375, 0.625, 0.3125]
    bars = [path for path in root.iter(f"{SVG}path") if path.get("clip-path") and "fill:" in path.get("style", "")]
    backgrounds, kept = bars[:5], bars[5:]
    assert len(kept) == 5
    for background, bar, share in zip(backgrounds, kept, shares, strict=True):
        assert width(bar) / width(background) == pytest.approx(share, abs=1e-4)
    styles = [bar.get("style", "") for bar in kept]
    assert len(set(styles)) == 4, "one colour per kind"
    assert styles[0] == styles[1]
    text = " | ".join("".join(node.itertext()).strip() for node in root.iter(f"{SVG}text"))
    for label in (
        "32 neurons",
        "constant",
        "linear, rank 24",
        "64 neurons, ranks 10/6",
        "16 neurons + bypass of rank 4",
    ):
        assert label in text, label


def width(path: ET.Element) -> float:
    """Of a drawn rectangle, in pixels."""
    across = [float(x) for x in re.findall(r"[ML] (-?[\d.]+) -?[\d.]+", path.get("d", ""))]
    return max(across) - min(across)


def test_factors_dearer_than_their_ffn_are_drawn_beyond_it():
    plan = FfnPlan((8,), (FfnChoice("linear", rank=12),), features=16)
    root = ET.fromstring(plots.ffn_bars(plan))
    bars = [path for path in root.iter(f"{SVG}path") if path.get("clip-path") and "fill:" in path.get("style", "")]
    assert width(bars[1]) / width(bars[0]) == pytest.approx(1.5, abs=1e-3)


def test_a_joint_budget_is_shown_against_what_was_measured(page_inputs):
    assert "one budget" not in page_of(page_inputs)
    page_inputs["recipe"]["budget"] = {"by": "latency", "speed_up": 1.5}
    page_inputs["budget"] = {
        "allocation": {"heads": [[0, 2], []], "widths": [2, 0], "speed_up": 1.6},
        "table": {
            "unit": "ms",
            "attention": [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]],
            "ffn": [[[0, 128], [0, 3]]] * 2,
            "rest": 0.5,
        },
    }
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page_of(page_inputs)))
    for expected in (
        "From one budget with the FFNs",
        "1.5 times as fast",
        "attention 10 4 40%",
        "whole encoder 16.5",
        "batch 4 1.60 1.90 (1.80–2.00) 1.19 2.00",
        "has token selection in it",
    ):
        assert expected in text, expected
    page_inputs["recipe"]["tokens"]["method"] = "none"
    page_inputs["recipe"]["budget"]["by"] = "flops"
    page = page_of(page_inputs)
    assert "token selection in it" not in page
    assert "1.5 times as cheap" in page
    assert "FLOPs as counted" in page


def test_sixteen_variants_are_sixteen_rows(page_inputs):
    page_inputs["variants"] = {f"v-{number}": page_inputs["variants"]["paper"] for number in range(16)}
    page_inputs["recipe"]["variants"] = {f"v-{number}": {"heads.threshold": number / 32} for number in range(16)}
    page = page_of(page_inputs)
    table = page[page.index('class="compare"') :]
    rows = table[table.index("<tbody>") : table.index("</tbody>")].split("<tr>")[1:]
    assert len(rows) == 17
    assert "heads.threshold 0.46875" in rows[-1]


def test_recovery_is_shown_apart_from_what_it_began_with(page_inputs):
    without = re.sub(r"<[^>]+>", " ", page_of(page_inputs))
    assert "recovery" not in without.lower().split("recipe, versions and artefacts")[0]
    page_inputs["validation"]["accuracy"].insert(3, row("recovery", 88.8, 90.0))
    page_inputs["recovery"] = [{"distance": 0.2, "learning_rate": 0.1}, {"distance": 0.1, "learning_rate": 0.0}]
    page = page_of(page_inputs)
    assert "<h2>Recovery</h2>" in page
    assert '<th scope="row" title="meaning of recovery">recovery</th><td>88.80</td>' in page


def test_page_is_reproducible(page_inputs):
    assert page_of(page_inputs) == page_of(page_inputs)


def test_kept_tokens_dims_exactly_the_dropped_patches():
    import base64
    import io

    from PIL import Image

    uri = plots.kept_tokens(np.zeros((112, 112, 3), np.uint8), [0, 9], 8, 8)
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    centres = image[14::28, 14::28].mean(-1).ravel()
    assert [i for i in range(64) if centres[i] < 100] == [0, 9]
