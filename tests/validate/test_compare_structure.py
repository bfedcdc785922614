"""Head criteria and FFN methods side by side, on a few scenes."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from infoprune_export.artifacts import canonical_json
from infoprune_export.data.dataset import Split
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import load_recipe
from infoprune_export.validate.compare_structure import THRESHOLDS, compare, render

DEFAULTS = (("heads", "budgeted"), ("ffn", "obs"))
QUIET = lambda title, total: lambda count: None  # noqa: E731


@pytest.fixture(scope="module")
def rows(trained_vlm, scene_split):
    recipe = load_recipe("quickstart", ["heads.epochs=1", "seed=3"])
    few = Split(scene_split.calibration[:12], scene_split.validation[:6], labelled=True)
    return compare(trained_vlm, few, recipe, ["random", "paper"], [0.25, 0.5], ["random", "rrr"], [0.5], QUIET, seeds=2)


def test_rows_are_the_original_then_every_method_at_every_share(rows):
    asked = [(row["part"], row["method"], row["setting"]) for row in rows]
    assert asked == [
        ("none", "none", ""),
        *[("heads", name, f"{share} removed") for share in ("0.25", "0.5") for name in ("budgeted", "random")],
        *[("heads", "paper", f"z = {threshold:g}") for threshold in THRESHOLDS],
        *[("ffn", name, "0.5 kept") for name in ("obs", "random", "rrr")],
    ]


def test_what_is_left_is_counted_and_not_what_was_asked(rows):
    by_name = {(row["part"], row["method"], row["setting"]): row for row in rows}
    assert by_name["heads", "budgeted", "0.25 removed"]["left"] == 0.75
    assert by_name["heads", "random", "0.5 removed"]["left"] == 0.5
    assert by_name["ffn", "rrr", "0.5 kept"]["left"] == pytest.approx(0.25)  # a rank above D is none
    # 8 heads of 16: 4 d^2 of the attention's products in each of five blocks, beside 8 d^2 of the FFN.
    half = by_name["heads", "budgeted", "0.5 removed"]["flops"]
    assert 0.75 < half < by_name["heads", "budgeted", "0.25 removed"]["flops"] < 1.0
    # After one epoch no gate has come down from sigmoid(3).
    assert all(by_name["heads", "paper", f"z = {z:g}"]["left"] == 1.0 for z in THRESHOLDS)


def test_differences_are_paired_and_reference_has_none_to_itself(rows):
    original = rows[0]["accuracy"]["percent"]
    for row in rows[1:]:
        assert row["to_unpruned"]["percent"] == pytest.approx(row["accuracy"]["percent"] - original)
        if (row["part"], row["method"]) in DEFAULTS or row["method"] == "paper":
            continue
        reference = next(
            r
            for r in rows
            if (r["part"], r["method"], r["setting"]) == (row["part"], dict(DEFAULTS)[row["part"]], row["setting"])
        )
        gap = row["accuracy"]["percent"] - reference["accuracy"]["percent"]
        assert row["to_default"]["percent"] == pytest.approx(gap)
    assert all(row["to_default"] is None for row in rows if row["method"] in ("none", "paper"))
    assert all(row["to_default"] is None for row in rows if (row["part"], row["method"]) in DEFAULTS)
    kept = [row for row in rows if row["left"] == 1.0]
    assert all(row["to_unpruned"] is None or row["to_unpruned"]["percent"] == 0 for row in kept)


def test_rows_are_plain_json_and_the_table_shows_all_of_them(rows):
    assert json.loads(canonical_json(rows)) == rows
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(rows))
    text = console.export_text()
    for row in rows:
        assert row["setting"] in text
        assert row["method"] in text


def test_a_method_that_cannot_serve_is_a_row_with_the_reason(trained_vlm, scene_split):
    recipe = load_recipe("quickstart", ["ffn.round_to=64"])
    few = Split(scene_split.calibration[:2], scene_split.validation[:1], labelled=True)
    rows = compare(trained_vlm, few, recipe, [], [], ["activation"], [0.05], QUIET)
    assert rows[-1]["refused"].startswith("ffn.keep_macs = 0.05")
    assert "accuracy" not in rows[-1]


@pytest.mark.parametrize(
    ("heads", "removed", "ffn", "kept", "seeds", "said"),
    [
        (["magic"], [0.5], [], [], 1, "heads method 'magic': there are obs"),
        ([], [], ["magic"], [0.5], 1, "ffn method 'magic': there are obs"),
        (["obs"], [1.0], [], [], 1, "share 1 of removed heads"),
        ([], [], ["obs"], [0.0], 1, "share 0 of kept FFN"),
        (["obs"], [0.5], [], [], 0, "seeds = 0"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(trained_vlm, scene_split, heads, removed, ffn, kept, seeds, said):
    with pytest.raises(InfopruneError) as refused:
        compare(trained_vlm, scene_split, load_recipe("quickstart"), heads, removed, ffn, kept, QUIET, seeds=seeds)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
