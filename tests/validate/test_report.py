import re
from html.parser import HTMLParser

import numpy as np
import pytest

from infoprune_export.recipe import load_recipe
from infoprune_export.validate import plots
from infoprune_export.validate.report import render


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
    for expected in ("FAIL", "90.0 → 87.5%", "2.00x", "64 → 32", "not finite", "2/4", "0/4", "rank, linear", "paper"):
        assert expected in text, expected


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
