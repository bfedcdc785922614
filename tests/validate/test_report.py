import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from report_inputs import attribution, page_of, peers, row
from report_inputs import page_inputs as made_up

from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.validate import plots
from infoprune_export.validate.report_page import heat, number

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def undrawn(monkeypatch):
    """Where only the words of a page matter; drawing takes most of its time."""
    monkeypatch.setattr(plots, "to_svg", lambda figure: '<svg width="9pt"></svg>')


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


def test_text_from_outside_is_escaped(page_inputs, undrawn):
    page = page_of(page_inputs)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_figures_of_the_run_are_on_the_page(page_inputs, undrawn):
    page = page_of(page_inputs)
    text = re.sub(r"<[^>]+>", " ", page)
    for expected in ("FAIL", "90.0 → 87.5%", "2.00x", "64 → 32", "not finite", "paper"):
        assert expected in text, expected


def test_figures_say_the_same_as_text_alternatives(page_inputs):
    page = page_of(page_inputs)
    text = words(page)
    for expected in ("2/4", "0/4", "linear, rank 9", "1.90x", "87.5"):
        assert expected in text, expected
    alternatives = re.findall(r'<svg role="img" aria-label="([^"]+)"', page)
    assert len(alternatives) == page.count("<svg") == 5
    assert alternatives[0] == (
        "VQA accuracy in %. original 90.0 ± 1.0; heads 89.0 ± 1.0; ffn 88.0 ± 1.0; tokens 87.5 ± 1.0; onnx 87.5 ± 1.0; "
        "engine 87.5 ± 1.0."
    )
    assert alternatives[1] == "Median ms per image. batch 4: original 0.95, compressed 0.5."
    assert alternatives[2] == "Heads kept. block 0: 2 of 4; block 1: 0 of 4."
    assert alternatives[3] == "What FFNs became. block 0: 2 neurons; block 1: linear, rank 9."


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


def test_a_joint_budget_is_shown_against_what_was_measured(page_inputs, undrawn):
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


def test_sixteen_variants_are_sixteen_rows(page_inputs, undrawn):
    page_inputs["variants"] = {f"v-{number}": page_inputs["variants"]["paper"] for number in range(16)}
    page_inputs["recipe"]["variants"] = {f"v-{number}": {"heads.threshold": number / 32} for number in range(16)}
    page = page_of(page_inputs)
    table = page[page.index('class="compare"') :]
    rows = table[table.index("<tbody>") : table.index("</tbody>")].split("<tr>")[1:]
    assert len(rows) == 17
    assert "heads.threshold 0.46875" in rows[-1]


def test_recovery_is_shown_apart_from_what_it_began_with(page_inputs, undrawn):
    without = re.sub(r"<[^>]+>", " ", page_of(page_inputs))
    assert "recovery" not in without.lower().split("recipe, versions and artefacts")[0]
    page_inputs["validation"]["accuracy"].insert(3, row("recovery", 88.8, 90.0))
    page_inputs["recovery"] = [{"distance": 0.2, "learning_rate": 0.1}, {"distance": 0.1, "learning_rate": 0.0}]
    page = page_of(page_inputs)
    assert "<h2>Recovery</h2>" in page
    assert '<th scope="row" title="meaning of recovery">recovery</th><td>88.80</td>' in page


def words(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_what_broke_comes_with_its_nodes_and_the_way_to_mend_it(page_inputs, undrawn):
    assert "What broke" not in page_of(page_inputs)
    page_inputs["attribution"] = attribution()
    page = page_of(page_inputs)
    text = words(page)
    for expected in (
        "Step precision: blocks.1.ffn",
        "values beyond 65504",
        "--set export.keep_fp32=[blocks.1.ffn]",
        "blocks.1.ffn/MatMul val_7 1.31e+05",
        "blocks.1.ffn/MatMul, blocks.1.ffn/MatMul_1",
        "precision fp16 keeps eleven bits",
        "onnx 1.0e-06 0.990000 1.0100 3.0e-01 0.990000 1.0100 1.0e-06 0.990000 1.0100 3e-02 50% 88.0 (-1.0) yes",
        "heads 1.0e-01 0.990000 1.0100 3.0e-01 0.990000 1.0100 50% 88.0 (-1.0) meant to change",
        "embedding precision 1.0e-03",
    ):
        assert expected in text, expected
    # Before the checks, and before what changed step by step.
    assert page.index("What broke") < page.index("<h2>Checks") < page.index("Where outputs change")


def test_errors_of_blocks_are_a_strip_with_numbers(page_inputs, undrawn):
    page_inputs["attribution"] = attribution()
    page = page_of(page_inputs)
    strip = page[page.index('<figure class="strip"') :]
    root = ET.fromstring(strip[strip.index("<svg") : strip.index("</svg>") + 6])
    assert "Worst: block 1, ffn, not finite of 3.0e-02" in root.get("aria-label", "")
    cells = [(cell.get("class"), cell.get("x"), cell.get("y")) for cell in root.iter("rect")]
    texts = [text.text for text in root.iter("text") if (text.get("class") or "").startswith("t")]
    # Of 3e-2: a hundredth is 3e-4, a tenth 3e-3, a half 1.5e-2.
    assert [kind for kind, _, _ in cells] == ["h0", "h1", "h2", "h1", "h4", "h1"]
    assert texts == ["1e-04", "1e-03", "1e-02", "2e-03", "inf !", "2e-03"]
    assert len({(x, y) for _, x, y in cells}) == 6


@pytest.mark.parametrize(
    ("error", "level"), [(0.0, 0), (0.01, 0), (0.011, 1), (0.11, 2), (0.51, 3), (1.0, 3), (1.01, 4), (None, 4)]
)
def test_heat_follows_the_limit(error, level):
    assert heat(error, 1.0) == level
    assert heat(None if error is None else 5 * error, 5.0) == level


def test_first_words_say_what_decided(page_inputs, undrawn):
    text = words(page_of(page_inputs))
    assert "1 of 2 checks fails. What decided is PyTorch = ONNX : not finite, where at most 0.0001 is demanded." in text
    validation = page_inputs["validation"]
    validation |= {"verdict": "PASS", "checks": validation["checks"][1:]}
    text = words(page_of(page_inputs))
    expected = (
        "All 1 checks hold. Nearest to its limit is accuracy lost, points : 2.5, at most 4, so 62% of what is allowed."
    )
    assert expected in text


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "not finite"), (0.999999, "0.999999"), (1, "1"), (1e-4, "0.0001"), (2.5, "2.5"), (0.8, "0.8")],
)
def test_figures_near_one_keep_their_digits(value, said):
    assert number(value) == said


def test_peers_and_memory_are_there_if_they_were_measured(page_inputs, undrawn):
    text = words(page_of(page_inputs))
    assert "Against others" not in text
    assert "Memory" not in text
    row = page_inputs["bench"]["rows"][0]
    row |= {"peers": peers(), "memory": {"original": {"weights_bytes": 3 << 20, "call_bytes": 1 << 19}}}
    text = words(page_of(page_inputs))
    for expected in (
        "4 torch-eager 2.13.0 original 3.00 (2.90 to 3.10) 0.70 (0.60–0.80) 1.0e-06 right",
        "4 fast-and-wrong 2.13.0 original 3.00 (2.90 to 3.10) 0.70 (0.60–0.80) 3.0e-01 WRONG",
        "4 openvino original not timed: not installed; pip install openvino",
        "4 original 3.0 0.5",
        "4 original 3.80 (3.70 to 3.90) 4.30 (4.10 to 4.70) 4.80 (– to –) 4 compressed",
        "4 compressed 2.00 (1.90 to 2.10) 2.50 (2.30 to 2.90) 3.00 (– to –)",
    ):
        assert expected in text, expected


def test_official_figures_are_there_if_the_benchmark_has_any(page_inputs, undrawn):
    assert "Official figures" not in page_of(page_inputs)
    rows = page_inputs["validation"]["accuracy"]
    rows[0]["official"], rows[-1]["official"] = {"F1": 88.25}, {"F1": 87.75, "precision": 91.5}
    text = words(page_of(page_inputs))
    assert "step F1 precision original 88.25 heads ffn tokens onnx engine 87.75 91.50" in text


def test_hostile_names_stay_text(page_inputs, undrawn):
    evil = '"><img src=x onerror=alert(1)><script>alert(2)</script>'
    page_inputs["name"] = page_inputs["description"] = evil
    page_inputs["recipe"]["model"]["name_or_path"] = evil
    page_inputs["attribution"] = attribution()
    page_inputs["attribution"]["broken"][0] |= {"reason": evil, "nodes": [evil], "part": evil, "fix": evil}
    page_inputs["attribution"]["blocks"][1]["part"] = f"blocks.0.{evil.replace('.', '')}"
    validation = page_inputs["validation"]
    validation["metric"] = evil
    validation["kept_tokens"][0]["image"] = evil
    validation["checks"][0] |= {"what": evil, "detail": evil}
    for each in validation["accuracy"]:
        each |= {"meaning": evil, "by_kind": {evil: 1.0}, "official": {evil: 1.0}}
    page_inputs["bench"]["machine"]["processor"] = page_inputs["bench"]["provider"] = evil
    page_inputs["bench"]["rows"][0]["peers"] = [{**peers()[-1], "peer": evil, "reason": evil}]
    page_inputs["variants"] = {"v": {**page_inputs["variants"]["paper"], "accuracy": validation["accuracy"][:2]}}
    page_inputs["recipe"]["variants"] = {"v": {evil: evil}}
    page = page_of(page_inputs)
    tags = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            assert not any(name.startswith("on") for name, _ in attrs), attrs

    Parser().feed(page)
    assert "script" not in tags
    assert tags.count("img") == 1, "the picture of kept tokens"


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
