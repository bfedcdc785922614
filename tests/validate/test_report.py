import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.recipe import load_recipe
from infoprune_export.validate import plots
from infoprune_export.validate.report import render

SVG = "{http://www.w3.org/2000/svg}"


def estimate(percent):
    return {"percent": percent, "standard_error": 0.5, "questions": 100}


def row(step, percent, first):
    return {
        "step": step,
        "meaning": f"meaning of {step}",
        **estimate(percent),
        "to_original": estimate(percent - first),
        "to_previous": estimate(-0.1),
        "by_kind": {"color": 99.0, "text": 80.0},
    }


@pytest.fixture
def page_inputs():
    rows = [
        row(s, p, 90.0)
        for s, p in (("original", 90), ("heads", 89), ("ffn", 88), ("tokens", 87.5), ("onnx", 87.5), ("engine", 87.5))
    ]
    parity = {
        "step": "onnx",
        "case": "1 image",
        "relative_error": None,
        "cosine": 1.0,
        "norm_ratio": 1.0,
        "tolerance": 1e-4,
        "kept_suboptimality": 0.0,
        "replay_tolerance": 0.01,
        "passed": False,
    }
    return {
        "name": "quickstart",
        "description": "<script>alert(1)</script>",
        "recipe": load_recipe("quickstart").to_dict(),
        "validation": {
            "verdict": "FAIL",
            "metric": "VQA accuracy",
            "checks": [
                {
                    "what": "PyTorch = ONNX",
                    "passed": False,
                    "value": None,
                    "limit": 1e-4,
                    "detail": "worst",
                    "at_least": False,
                }
            ],
            "parity": [parity],
            "accuracy": rows,
            "size": {
                "flops_per_image": {"original": 2e8, "compressed": 1e8},
                "block_parameters": {"original": 10, "compressed": 5},
                "visual_tokens": {"original": 64, "compressed": 32},
                "heads_removed": 0.5,
                "ffn_macs_kept": 0.5,
            },
            "heads": {"total": [4, 4], "kept": [[0, 2], []]},
            "ffn": {
                "widths": [128, 128],
                "choices": [
                    {"kind": "mlp", "neurons": [1, 2], "rank": 0},
                    {"kind": "linear", "neurons": [], "rank": 9},
                ],
            },
            "kept_tokens": [],
        },
        "budget": {"allocation": None, "table": None},
        "bench": {
            "provider": "CPUExecutionProvider",
            "threads": 1,
            "rounds": 30,
            "machine": {"processor": "a processor", "cores": 2, "governor": "not reported"},
            "rows": [
                {
                    "batch_size": 4,
                    "milliseconds": {side: {"p50": 2.0, "p90": 2.5, "p99": 3.0} for side in ("original", "compressed")},
                    "flop_ratio": 2.0,
                    "speedup": {"median": 1.9, "low": 1.8, "high": 2.0},
                    "efficiency": 0.95,
                }
            ],
        },
        "variants": {
            "paper": {
                "heads_removed": 0.1,
                "ffn_macs_kept": 0.2,
                "tokens_kept": 0.5,
                "methods": {"heads": "paper", "ffn": "paper", "tokens": "infoprune"},
                "accuracy": rows[:4],
            }
        },
        "history": [{"task": 0.3, "sparsity": 30.0, "erank": -0.1, "distance": 0.05, "mean_gate": 0.9}] * 2,
        "recovery": [],
        "pictures": [plots.kept_tokens(np.zeros((112, 112, 3), np.uint8), [0, 5, 63], 8, 8)],
    }


def test_page_is_self_contained_and_well_formed(page_inputs):
    page = render(**page_inputs)

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
    page = render(**page_inputs)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_figures_of_the_run_are_on_the_page(page_inputs):
    page = render(**page_inputs)
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
    assert "one budget" not in render(**page_inputs)
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
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", render(**page_inputs)))
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
    page = render(**page_inputs)
    assert "token selection in it" not in page
    assert "1.5 times as cheap" in page
    assert "FLOPs as counted" in page


def test_sixteen_variants_are_sixteen_rows(page_inputs):
    page_inputs["variants"] = {f"v-{number}": page_inputs["variants"]["paper"] for number in range(16)}
    page_inputs["recipe"]["variants"] = {f"v-{number}": {"heads.threshold": number / 32} for number in range(16)}
    page = render(**page_inputs)
    table = page[page.index('class="compare"') :]
    rows = table[: table.index("</table>")].split("<tr>")[2:]
    assert len(rows) == 17
    assert "heads.threshold 0.46875" in rows[-1]


def test_recovery_is_shown_apart_from_what_it_began_with(page_inputs):
    without = re.sub(r"<[^>]+>", " ", render(**page_inputs))
    assert "recovery" not in without.lower().split("recipe and versions")[0]
    page_inputs["validation"]["accuracy"].insert(3, row("recovery", 88.8, 90.0))
    page_inputs["recovery"] = [{"distance": 0.2, "learning_rate": 0.1}, {"distance": 0.1, "learning_rate": 0.0}]
    page = render(**page_inputs)
    assert "<h2>Recovery</h2>" in page
    assert '<td title="meaning of recovery">recovery</td><td>88.80</td>' in page


def test_page_is_reproducible(page_inputs):
    assert render(**page_inputs) == render(**page_inputs)


def test_kept_tokens_dims_exactly_the_dropped_patches():
    import base64
    import io

    from PIL import Image

    uri = plots.kept_tokens(np.zeros((112, 112, 3), np.uint8), [0, 9], 8, 8)
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    centres = image[14::28, 14::28].mean(-1).ravel()
    assert [i for i in range(64) if centres[i] < 100] == [0, 9]
