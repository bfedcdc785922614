"""The table of token selectors: what is in its rows, and that they are paired."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
from rich.console import Console

from infoprune_export.data import dataset
from infoprune_export.errors import InfopruneError
from infoprune_export.models.calibration import inputs_of
from infoprune_export.models.vlm import load
from infoprune_export.recipe import DataSpec, DecoderSpec, ModelSpec, Recipe, TokensSpec
from infoprune_export.tokens.baselines import spatial
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.tokens.saturation import find_layer, measure_samples
from infoprune_export.validate.accuracy import collect_answers, estimate, task_scores
from infoprune_export.validate.compare_tokens import ALL, compare, compare_tokens, render, share

HALF = Fraction(1, 2)


def recipe(**sections) -> Recipe:
    return Recipe(name="t", model=ModelSpec(name_or_path="testbed/tiny-llava"), **sections)


def silent(title: str, total: int):
    return lambda images: None


def never(*arguments):
    raise AssertionError("work was begun")


@pytest.fixture(scope="module")
def few(scene_split):
    """Six images and their questions."""
    return replace(scene_split, validation=scene_split.validation[:6])


def scores_of(vlm, split, tokens: TokensSpec) -> np.ndarray:
    return task_scores(
        split.validation, collect_answers(vlm, split.validation, VisionEncoder(vlm.tower, tokens).encode)
    )


def test_rows_are_paired_with_the_unpruned_model_and_with_infoprune(trained_vlm, few):
    begun: list[tuple[str, int]] = []
    done: list[int] = []

    def track(title: str, total: int):
        begun.append((title, total))
        return done.append

    rows = compare(trained_vlm, few, recipe(), ["stride", "none", "infoprune", "downsample"], [HALF], track)
    assert json.loads(json.dumps(rows)) == rows
    assert [(row["method"], row["keep"]) for row in rows] == [
        ("none", "1"),
        ("infoprune", "1/2"),
        ("stride", "1/2"),
        ("downsample", "1/2"),
    ]
    assert begun == [("none", 6), ("infoprune 1/2", 6), ("stride 1/2", 6), ("downsample 1/2", 6)]
    assert sum(done) == 4 * 6
    whole = scores_of(trained_vlm, few, TokensSpec(method="none"))
    reference = scores_of(trained_vlm, few, TokensSpec(keep_ratio=HALF))
    for row in rows:
        tokens = TokensSpec(method=row["method"], keep_ratio=HALF)
        scores = scores_of(trained_vlm, few, tokens)
        assert row["accuracy"] == estimate(few.validation, scores).to_dict()
        assert row["to_unpruned"] == estimate(few.validation, scores - whole).to_dict()
        expected = estimate(few.validation, scores - reference).to_dict() if row["method"] != "none" else None
        assert row["to_infoprune"] == expected
    assert [row["tokens_peak"] for row in rows] == [row["tokens_mean"] for row in rows] == [64, 32, 32, 30]
    assert [row["selection_ms"] is None for row in rows] == [True, False, False, True]
    assert all(row["selection_ms"] > 0 for row in rows[1:3])
    assert [row["refused"] for row in rows] == [None] * 4


def test_each_share_has_its_own_reference(trained_vlm, few):
    shares = [HALF, Fraction(1, 9)]
    rows = compare(trained_vlm, few, recipe(), ["stride"], shares, silent)
    accuracy = {(row["method"], row["keep"]): row["accuracy"]["percent"] for row in rows}
    for row in rows[1:]:
        lead = row["accuracy"]["percent"] - accuracy["infoprune", row["keep"]]
        assert row["to_infoprune"]["percent"] == pytest.approx(lead)
    assert accuracy["infoprune", "1/2"] != accuracy["infoprune", "1/9"]


def test_what_is_drawn_at_random_is_averaged_over_seeds(trained_vlm, few, monkeypatch):
    tokens = TokensSpec(method="random", keep_ratio=Fraction(1, 9))
    original, scores = spatial.random, []
    for seed in range(3):
        monkeypatch.setattr(spatial, "random", lambda candidates, spec, seed=seed: original(candidates, spec, seed))
        scores.append(scores_of(trained_vlm, few, tokens))
    monkeypatch.setattr(spatial, "random", original)
    row = compare(trained_vlm, few, recipe(), ["random"], [tokens.keep_ratio], silent, seeds=3)[-1]
    assert len({str(s) for s in scores}) == 3
    assert row["accuracy"] == estimate(few.validation, np.mean(scores, axis=0)).to_dict()


def test_without_known_answers_agreement_is_counted(trained_vlm, few):
    blind = replace(few, labelled=False)
    rows = compare(trained_vlm, blind, recipe(), ["stride"], [Fraction(1, 9)], silent)
    assert rows[0]["accuracy"]["percent"] == 100
    assert 0 < rows[-1]["accuracy"]["percent"] < 100


def test_a_method_that_cannot_serve_a_share_says_so_in_its_row(trained_vlm, few):
    rows = compare(trained_vlm, few, recipe(), ["decoder:sparsevlm"], [Fraction(1, 9)], silent)
    assert rows[-1].keys() == {"method", "keep", "refused"}
    assert rows[-1]["refused"].startswith("decoder.keep_ratio = 1/9 with sparsevlm")
    assert rows[-2]["method"] == "infoprune"
    shown = printed(rows)
    assert "refused" in shown
    assert "decoder:sparsevlm 1/9: decoder.keep_ratio" in shown


def printed(rows) -> str:
    console = Console(width=120, file=io.StringIO(), highlight=False)
    console.print(render(rows))
    return console.file.getvalue()


def test_the_table_shows_every_figure():
    def percent(value: float, error: float) -> dict:
        return {"percent": value, "standard_error": error, "questions": 9}

    row = {"method": "none", "keep": "1", "accuracy": percent(90.04, 1.26), "to_unpruned": percent(0, 0)}
    row |= {"to_infoprune": None, "tokens_peak": 64.0, "tokens_mean": 64.0, "selection_ms": None}
    row |= {"refused": None, "matched": True}
    other = {"method": "pool", "keep": "1/2", "accuracy": percent(80, 2), "to_unpruned": percent(-10.04, 1.5)}
    other |= {"to_infoprune": percent(0.06, 0.14), "tokens_peak": 31.6, "tokens_mean": 20.25, "selection_ms": 0.123}
    lines = printed([row, {**other, "refused": None, "matched": False}]).splitlines()
    cells = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in lines if "│" in line]
    assert cells == [
        ["none", "1", "90.0 ± 1.3", "+0.0 ± 0.0", "", "64.0", "64.0", ""],
        ["pool", "1/2", "80.0 ± 2.0", "-10.0 ± 1.5", "+0.1 ± 0.1", "20.2 *", "31.6", "0.12"],
    ]
    assert "* cannot come down to the mean" in lines[-1]
    assert ["├" in line for line in lines[-5:-1]] == [False, True, False, False]  # a rule between two shares


@pytest.mark.parametrize(("text", "value"), [("1/2", HALF), ("64/576", Fraction(1, 9)), ("0.25", Fraction(1, 4))])
def test_share_reads_what_a_recipe_reads(text: str, value: Fraction):
    assert share(text) == value


@pytest.mark.parametrize("text", ["0", "1.5", "half", "1/0", "-1/2", ""])
def test_share_refuses_what_a_recipe_refuses(text: str):
    with pytest.raises(InfopruneError, match=r"^--keep: .*(outside|not a number)"):
        share(text)


def test_all_methods_are_those_of_a_recipe():
    tokens, decoder = (get_args(section.model_fields["method"].annotation) for section in (TokensSpec, DecoderSpec))
    assert sorted(ALL) == sorted(
        ["two-stage", *(n for n in tokens if n != "none"), *(f"decoder:{n}" for n in decoder if n != "none")]
    )


def test_methods_are_matched_by_the_mean_over_layers_where_they_can_be(trained_vlm, few):
    """Four layers: FastV's own, 0, sees everything, as do the recipe's 0 and 1."""
    layered = recipe(decoder=DecoderSpec(layer=1, keep_ratio="1/3"))
    methods = ["decoder:infoprune", "decoder:random", "decoder:fastv", "two-stage"]
    keep = Fraction(3, 4)
    rows = compare(trained_vlm, few, layered, methods, [keep, Fraction(1, 9)], silent, seeds=2)
    found = {(row["method"], row["keep"]): (row["tokens_peak"], row["tokens_mean"], row["matched"]) for row in rows}
    for method in methods[:2]:
        assert found[method, "3/4"] == (64, 48, True)
    assert found["decoder:fastv", "3/4"] == (64, (64 + 3 * 43) / 4, True)  # two thirds of 64, rounded up
    # 64 tokens in two layers and a third of them, rounded up, in the others; more than all is not to be had.
    assert found["two-stage", "3/4"] == (64, (64 + 22) / 2, True)
    assert found["decoder:infoprune", "1/9"] == (64, (64 + 8) / 2, False)
    assert found["decoder:fastv", "1/9"] == (64, (64 + 3 * 8) / 4, False)
    # 11 tokens, then 4: ceil of a sixth and of a third of these.
    assert found["two-stage", "1/9"] == (11, (11 + 4) / 2, True)


def test_a_layer_that_the_recipe_leaves_open_is_found_on_calibration_images(trained_vlm, few):
    signals = measure_samples(
        trained_vlm, few.calibration[:4], VisionEncoder(trained_vlm.tower, None).encode, labelled=True
    )
    begun = []

    def track(title: str, total: int):
        begun.append((title, total))
        return lambda images: None

    short = replace(few, calibration=few.calibration[:4])
    row = compare(trained_vlm, short, recipe(), ["decoder:infoprune"], [HALF], track)[-1]
    assert begun[0] == ("saturation signals", 4)
    seen = find_layer(signals) + 1
    assert row["tokens_mean"] == (seen * 64 + (4 - seen) * 32) / 4


@pytest.mark.parametrize(
    ("methods", "keep", "seeds", "message"),
    [
        (["fastvlm"], HALF, 3, r"'fastvlm': there are infoprune, random"),
        (["decoder:fastvlm"], HALF, 3, r"'decoder:fastvlm': there are infoprune, random.*decoder:fastv,"),
        (["decoder:none"], HALF, 3, r"'decoder:none': there are"),
        (["stride"], Fraction(3, 2), 3, r"3/2 is outside \(0, 1\]"),
        (["stride"], Fraction(0), 3, r"0 is outside \(0, 1\]"),
        (["random"], HALF, 0, r"seeds = 0: at least 1"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(trained_vlm, few, methods, keep, seeds, message):
    with pytest.raises(InfopruneError, match=message):
        compare(trained_vlm, few, recipe(), methods, [HALF, keep], never, seeds=seeds)


def test_a_recipes_own_model_and_scenes_are_compared(tmp_path):
    """Seven questions about each of two images, three about the third, and images of two sizes among them."""
    data = DataSpec(calibration_images=1, validation_questions=17, scene_sizes="mixed")
    mixed = Recipe(name="t", seed=7, model=ModelSpec(name_or_path="testbed/tiny-qwen2.5-vl"), data=data)
    rows = compare_tokens(mixed, ["pool"], [HALF], silent)
    assert [row["accuracy"]["questions"] for row in rows] == [17] * 3
    dataset.draw_scenes(tmp_path, data, seed=7)
    vlm, samples = load(mixed.model), dataset.read(data, tmp_path).validation
    sizes = [layout.ids.shape[1] for layout in vlm.tower.layouts(inputs_of(vlm, samples))]
    assert len(set(sizes)) > 1
    for row, tokens in ((rows[0], sizes), (rows[2], [math.ceil(size / 2) for size in sizes])):
        asked = [count for sample, count in zip(samples, tokens, strict=True) for _ in sample.questions]
        assert row["tokens_mean"] == pytest.approx(sum(asked) / 17)
        assert row["tokens_mean"] != pytest.approx(sum(tokens) / 3)


def test_what_the_recipe_gets_wrong_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(dataset, "draw_scenes", never)
    numbered = recipe(tokens=TokensSpec(positions="contiguous"))
    qwen = numbered.model_copy(update={"model": ModelSpec(name_or_path="testbed/tiny-qwen2.5-vl")})
    with pytest.raises(InfopruneError, match="'contiguous': this model numbers visual tokens by row and column"):
        compare_tokens(qwen, ["pool"], [HALF], never)
    with pytest.raises(InfopruneError, match="no testbed model"):
        compare_tokens(Recipe(name="t", model=ModelSpec(name_or_path="testbed/none")), ["pool"], [HALF], never)
