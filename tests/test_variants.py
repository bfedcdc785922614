"""Variants of a run: what equals a stage of the run, or of a variant before, is done once."""

from __future__ import annotations

import json

from finished import execute_quickstart, small

VARIANTS = """variants={
    first: {heads.method: random, heads.remove: 0.25},
    second: {heads.method: random, heads.remove: 0.5},
    third: {heads.method: magnitude, heads.remove: 0.5},
}"""


def test_variants_share_scores_with_the_variant_that_made_them(tmp_path):
    settings = [*small(tmp_path), "heads.method=magnitude", "tokens.method=none"]
    run = execute_quickstart(tmp_path / "run", "variants", *settings, VARIANTS)
    stages = {name: run.folder / "variants-runs" / name for name in ("first", "second", "third")}

    def same(stage: str, one: str, other: str) -> bool:
        folders = {"run": run.folder, **stages}
        return (folders[one] / stage / "manifest.json").samefile(folders[other] / stage / "manifest.json")

    assert same("gates", "first", "second")
    assert same("gates", "run", "third")
    assert not same("gates", "run", "first")
    assert not same("heads", "first", "second")
    assert all(same("baseline", "run", name) for name in stages)
    results = json.loads((run.folder / "variants" / "variants.json").read_text())
    assert {name: result["heads_removed"] for name, result in results.items()} == {
        "first": 0.25,
        "second": 0.5,
        "third": 0.5,
    }
