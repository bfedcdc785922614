"""The analyses of a recipe, from the model to the page, on both testbeds and on images without labels."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from infoprune_export.analysis.analyse import EPSILON, WHAT, analyse, render
from infoprune_export.data import dataset
from infoprune_export.data.samples import Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.models.calibration import inputs_of
from infoprune_export.models.tower import Form
from infoprune_export.models.vlm import VLM
from infoprune_export.pipeline import load_vlm
from infoprune_export.recipe import Recipe, load_recipe
from infoprune_export.tokens.encoder import KEPT, VisionEncoder
from infoprune_export.tokens.saturation import Signals, find_layer, measure_samples
from infoprune_export.validate.report import pictures_of

SVG = "{http://www.w3.org/2000/svg}"
SMALL = ("data.calibration_images=2", "data.validation_questions=21", "device=cpu")


def small(name: str, *overrides: str) -> Recipe:
    """A shipped recipe on three images."""
    return load_recipe(name, [*SMALL, *overrides])


def quiet(title: str, total: int) -> Any:
    return lambda amount: None


@dataclass(frozen=True)
class Analysed:
    """All analyses of a testbed recipe, and what they were made of."""

    recipe: Recipe
    folder: Path
    result: dict[str, Any]
    vlm: VLM
    samples: list[Sample]


@pytest.fixture(scope="module", params=["quickstart", "quickstart-qwen"])
def analysed(request, tmp_path_factory) -> Analysed:
    recipe = small(request.param)
    folder, scenes = tmp_path_factory.mktemp("analysis") / "new" / "folder", tmp_path_factory.mktemp("scenes")
    dataset.draw_scenes(scenes, recipe.data, recipe.seed)
    samples = dataset.read(recipe.data, scenes).validation
    return Analysed(recipe, folder, analyse(recipe, folder, WHAT, 3, quiet), load_vlm(recipe.model, "cpu"), samples)


# ── What is written ──────────────────────────────────────────────────────────


def test_folder_holds_the_numbers_the_figures_and_the_page(analysed):
    folder, result = analysed.folder, analysed.result
    drawn = {f"{name}.svg" for name in WHAT}
    assert {path.name for path in folder.iterdir()} == {"analysis.json", "index.html", *drawn}
    assert json.loads((folder / "analysis.json").read_text()) == result
    assert (result["images"], result["questions"]) == (3, 21)
    for name in drawn:
        assert ET.fromstring((folder / name).read_text()).tag.endswith("svg")
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]


def test_page_shows_every_figure_and_needs_nothing_else(analysed):
    page = (analysed.folder / "index.html").read_text()

    class Checker(HTMLParser):
        figures = 0

        def handle_starttag(self, tag, attrs):
            self.figures += tag == "svg"
            for name, value in attrs:
                if name in ("src", "href", "xlink:href"):
                    assert value.startswith(("data:", "#")), (tag, name, value)

    checker = Checker()
    checker.feed(page)
    assert checker.figures == len(WHAT)
    for expected in (analysed.recipe.model.name_or_path, "3 validation images, 21 questions", "Algorithm 1", "S_vv"):
        assert expected in page, expected


# ── Stage 1 ──────────────────────────────────────────────────────────────────


def test_kept_tokens_are_those_the_encoder_keeps(analysed):
    encoder = VisionEncoder(analysed.vlm.tower, analysed.recipe.tokens, several=False)
    for sample, shown in zip(analysed.samples, analysed.result["kept"]["images"], strict=True):
        with torch.inference_mode():
            (planned,) = analysed.vlm.tower.calls(inputs_of(analysed.vlm, [sample]), encoder.form)
            expected = encoder.run(planned)[KEPT][0].tolist()
        assert shown["image"] == sample.image.name
        assert shown["kept"]["infoprune"] == expected
        assert {len(kept) for kept in shown["kept"].values()} == {len(expected)} == {(shown["tokens"] + 1) // 2}


def test_pictures_show_what_each_order_keeps(analysed):
    def pixels(uri: str) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))

    shown = analysed.result["kept"]["images"]
    expected = [
        uri
        for order in ("attention", "infoprune", "random")
        for uri in pictures_of(
            analysed.vlm, analysed.samples, {"kept_tokens": [{"kept": image["kept"][order]} for image in shown]}
        )
    ]
    root = ET.fromstring((analysed.folder / "kept.svg").read_text())
    drawn = [image.get("{http://www.w3.org/1999/xlink}href", "") for image in root.iter(f"{SVG}image")]
    for actual, uri in zip(drawn, expected, strict=True):
        assert (pixels(actual) == pixels(uri)).all()


def test_gain_of_kept_tokens_is_the_log_volume_of_their_features(analysed):
    tower = analysed.vlm.tower
    gains: dict[str, list[float]] = {order: [] for order in ("attention", "infoprune", "random")}
    for sample, shown in zip(analysed.samples, analysed.result["kept"]["images"], strict=True):
        with torch.inference_mode():
            planned = tower.plan(inputs_of(analysed.vlm, [sample]), Form(several=False, selecting=True))
            stream, context = tower.embed(planned)
            tokens = tower.visual_tokens(tower.run_blocks(stream, context), planned)[0]
        x = F.normalize(tokens.double(), dim=-1).numpy()
        for order, kept in shown["kept"].items():
            c = x[kept].T @ x[kept] / len(kept) + EPSILON * np.eye(x.shape[1])
            gains[order].append(np.linalg.slogdet(c).logabsdet - x.shape[1] * np.log(EPSILON))
    for order, values in gains.items():
        row = analysed.result["increments"]["orders"][order]
        for name, per_image in (
            ("gain_of_kept", values),
            ("gain_over_attention", values - np.array(gains["attention"])),
        ):
            assert row[name]["mean"] == pytest.approx(np.mean(per_image), abs=1e-4)
            assert row[name]["standard_error"] == pytest.approx(np.std(per_image, ddof=1) / np.sqrt(3), abs=1e-4)


def test_curves_have_one_point_per_token_and_start_at_known_values(analysed):
    increments = analysed.result["increments"]
    assert increments["epsilon"] == EPSILON
    for row in increments["orders"].values():
        for name, first in (("mfi", 1.0), ("mgi", np.log(1 + 1 / EPSILON))):  # unit features
            assert len(row[name]["mean"]) == len(row[name]["deviation"]) == max(increments["tokens"])
            assert row[name]["mean"][0] == pytest.approx(first, rel=1e-4)
            assert row[name]["deviation"][0] == pytest.approx(0, abs=1e-4)
        assert 0 <= row["late_advantage"]["mean"] <= 1
    kept = {order: row["late_advantage_kept"]["mean"] for order, row in increments["orders"].items()}
    assert kept["infoprune"] < min(kept["attention"], kept["random"])


def test_orders_and_budget_follow_the_recipe(tmp_path):
    given = [
        analyse(small("quickstart", *overrides), tmp_path / "a", ["increments", "kept"], 2, quiet)
        for overrides in ((), ("tokens.prior=cls",), ("tokens.keep_ratio=1/4",), ("seed=1", "tokens.normalize=false"))
    ]
    kept = [result["kept"]["images"][0]["kept"] for result in given]
    assert kept[0]["attention"] != kept[1]["attention"]
    assert kept[0]["random"] == kept[1]["random"] != kept[3]["random"]
    assert kept[0]["random"] != given[0]["kept"]["images"][1]["kept"]["random"]
    assert [len(row["infoprune"]) for row in kept] == [32, 32, 16, 32]
    assert [result["increments"]["kept_share"] for result in given] == [0.5, 0.5, 0.25, 0.5]
    # Features of different lengths start apart.
    assert given[3]["increments"]["orders"]["random"]["mfi"]["deviation"][0] > 1e-3


# ── Stage 2 ──────────────────────────────────────────────────────────────────


def signals_of(vlm: VLM, samples: list[Sample], labelled: bool) -> Signals:
    return measure_samples(vlm, samples, VisionEncoder(vlm.tower, None).encode, labelled=labelled)


def test_flows_and_maturity_are_the_signals_of_the_unpruned_model(analysed):
    signals, result = signals_of(analysed.vlm, analysed.samples, labelled=True), analysed.result
    close = {"rel": 1e-4, "abs": 1e-6}
    assert result["flows"]["visual_to_text"] == pytest.approx(signals.flow.tolist(), **close)
    relative = [row / text.max() for row, text in zip(signals.within_visual, signals.visual_to_text, strict=True)]
    assert result["flows"]["within_visual"] == pytest.approx(np.mean(relative, axis=0).tolist(), **close)
    assert result["maturity"]["agreement"] == pytest.approx(signals.agreement.tolist(), **close)
    assert result["maturity"]["probability"] == pytest.approx(signals.probability.mean(axis=0).tolist(), **close)
    assert result["layer"] == {"K": find_layer(signals), "found": True}
    kinds = [question.kind for sample in analysed.samples for question in sample.questions]
    for kind, percent in result["maturity"]["percent_by_kind"].items():
        rows = [settled for settled, other in zip(signals.settled, kinds, strict=True) if other == kind]
        assert percent == pytest.approx((100 * np.mean(rows, axis=0)).tolist())
    assert set(result["maturity"]["percent_by_kind"]) == set(kinds)


def test_layer_of_the_recipe_is_marked(tmp_path):
    result = analyse(small("quickstart", "decoder.layer=2"), tmp_path / "out", ["maturity"], 1, quiet)
    assert result["layer"] == {"K": 2, "found": False}
    assert "K = 2" in (tmp_path / "out" / "maturity.svg").read_text()
    assert "K = 2, as the recipe sets it" in (tmp_path / "out" / "index.html").read_text()


# ── Whose images, and how many ───────────────────────────────────────────────


@pytest.fixture
def photographs(tmp_path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, size in enumerate([(50, 90), (112, 112), (200, 61), (80, 80)]):
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("name", ["quickstart", pytest.param("quickstart-qwen", marks=pytest.mark.exhaustive)])
def test_images_without_labels_are_analysed(name, photographs, tmp_path):
    recipe = small(name, f"data.images={photographs}", 'data.prompts=["What color is the circle?", "Is it red?"]')
    result = analyse(recipe, tmp_path / "out", WHAT, 64, quiet)
    assert (result["images"], result["questions"]) == (2, 4)  # the other half calibrates
    assert [image["image"] for image in result["kept"]["images"]] == ["2.png", "3.png"]
    own = signals_of(load_vlm(recipe.model, "cpu"), dataset.read(recipe.data).validation, labelled=False)
    assert result["flows"]["visual_to_text"] == pytest.approx(own.flow.tolist(), rel=1e-3, abs=1e-5)
    assert result["maturity"]["percent_by_kind"] == {}
    assert "by kind" not in (tmp_path / "out" / "index.html").read_text()


def test_one_image_has_no_standard_error(tmp_path):
    result = analyse(small("quickstart"), tmp_path / "out", ["increments"], 1, quiet)
    row = result["increments"]["orders"]["infoprune"]
    assert row["gain_of_kept"]["standard_error"] is None
    assert set(row["mfi"]["deviation"]) == {0.0}
    assert "± is the standard error" in (page := (tmp_path / "out" / "index.html").read_text())
    assert page.count("±") == 1


def test_progress_counts_every_image(tmp_path):
    seen: dict[str, list[int]] = {}

    def track(title: str, total: int) -> Any:
        seen[title] = [total, 0]

        def advance(amount: int) -> None:
            seen[title][1] += amount

        return advance

    analyse(small("quickstart"), tmp_path / "out", WHAT, 2, track)
    assert len(seen) >= 2
    assert all(total == done for total, done in seen.values())


def test_only_what_is_asked_for_is_there(tmp_path):
    result = analyse(small("quickstart"), tmp_path / "out", ["kept"], 2, quiet)
    assert not {"increments", "flows", "maturity"} & set(result)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"analysis.json", "index.html", "kept.svg"}
    assert "Algorithm 1" in (tmp_path / "out" / "index.html").read_text()


def test_an_earlier_analysis_is_replaced_and_repeats_itself(tmp_path):
    folder = tmp_path / "out"
    analyse(small("quickstart"), folder, ["kept"], 1, quiet)
    first = analyse(small("quickstart"), folder, ["increments"], 1, quiet)
    assert not (folder / "kept.svg").exists()
    page = (folder / "index.html").read_text()
    assert analyse(small("quickstart"), folder, ["increments"], 1, quiet) == first
    assert (folder / "index.html").read_text() == page


def test_text_from_outside_is_escaped(analysed):
    page = render("name", {**analysed.result, "model": "<script>alert(1)</script>"}, dict.fromkeys(WHAT, "<svg></svg>"))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


# ── Bad input ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("overrides", "what", "images", "named"),
    [
        ((), ["increments", "flow"], 4, "'flow'.*increments, flows, maturity, kept"),
        ((), [], 4, "increments, flows, maturity, kept"),
        ((), ["kept"], 0, "--images 0: at least 1"),
        (("tokens.method=none",), ["kept"], 4, "tokens.method = 'none'.*--what"),
        (("tokens.method=divprune",), ["flows", "increments"], 4, "tokens.method = 'divprune'"),
        (("model.name_or_path=testbed/nowhere",), ["kept"], 4, "no testbed model"),
        (("data.images=/nowhere/at/all",), ["kept"], 4, "no image folder"),
        (("decoder.layer=3",), ["flows"], 4, "decoder layer 3.*0 to 2"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(overrides, what, images, named, tmp_path):
    with pytest.raises(InfopruneError, match=named) as caught:
        analyse(small("quickstart", *overrides), tmp_path / "out", what, images, quiet)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_prior_that_the_tower_lacks_is_refused(tmp_path):
    with pytest.raises(InfopruneError, match="tokens.prior = 'cls'"):
        analyse(small("quickstart-qwen", "tokens.prior=cls"), tmp_path / "out", ["increments"], 1, quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_or_file_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InfopruneError, match="holds something else"):
            analyse(small("quickstart"), place, ["kept"], 1, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_used_and_the_working_directory_may_be_named(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    analyse(small("quickstart"), Path(), ["kept"], 1, quiet)
    assert (tmp_path / "here" / "index.html").is_file()


def test_a_failure_leaves_the_earlier_analysis_as_it_was(photographs, tmp_path):
    folder = tmp_path / "out"
    recipe = small("quickstart", f"data.images={photographs}")
    analyse(recipe, folder, ["kept"], 2, quiet)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (photographs / "3.png").write_bytes(b"no image")
    with pytest.raises(InfopruneError, match=r"3\.png"):
        analyse(recipe, folder, ["kept"], 2, quiet)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photographs"]
