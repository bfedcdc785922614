"""Tables of the report against runs and budgets small enough to do by hand."""

from __future__ import annotations

from typing import Any

import pytest

from infoprune_export.validate.tables import budget_parts, compare_runs

RECIPE = {
    "heads": {"method": "paper"},
    "ffn": {"method": "none"},
    "tokens": {"method": "none"},
    "variants": {"low": {"heads.threshold": 0.2, "heads.beta": 0.0}, "high": {"heads.threshold": 0.4}},
}


def accuracy(**percent: float) -> list[dict[str, Any]]:
    """Rows of a run whose original has 90%."""
    return [
        {"step": step, "percent": value, "to_original": {"percent": value - 90.0, "standard_error": 0.25}}
        for step, value in percent.items()
    ]


def variant(heads: float, steps: list[dict[str, Any]], ffn: float = 1.0, tokens: float = 1.0) -> dict[str, Any]:
    return {"heads_removed": heads, "ffn_macs_kept": ffn, "tokens_kept": tokens, "accuracy": steps}


def run(heads: float, steps: list[dict[str, Any]], ffn: float = 1.0) -> dict[str, Any]:
    size = {"heads_removed": heads, "ffn_macs_kept": ffn, "visual_tokens": {"original": 64, "compressed": 64}}
    return {"size": size, "accuracy": steps}


# ── Variants ─────────────────────────────────────────────────────────────────


def test_only_what_differs_between_runs_has_a_column():
    table = compare_runs(
        run(0.69, accuracy(original=90, heads=81, ffn=81, tokens=81, onnx=80, engine=70)),
        RECIPE,
        {
            "high": variant(0.5, accuracy(original=90, heads=85.06, ffn=85.06, tokens=85.06)),
            "low": variant(0.03, accuracy(original=90, heads=90, ffn=90, tokens=90)),
        },
    )
    assert table.columns == ["heads removed", "heads", "lost"]
    assert table.same == ["FFN MACs kept 100%", "tokens kept 100%", "original 90.0"]
    assert table.rows == [
        ("this run", "heads paper, ffn none, tokens none", ["69%", "81.0", "9.0 ± 0.2"]),
        ("low", "heads.threshold 0.2, heads.beta 0.0", ["3%", "90.0", "0.0 ± 0.2"]),
        ("high", "heads.threshold 0.4", ["50%", "85.1", "4.9 ± 0.2"]),
    ]


def test_a_step_of_one_run_alone_has_a_column_and_the_last_step_is_what_is_lost():
    table = compare_runs(
        run(0.5, accuracy(original=90, heads=88, ffn=80, tokens=79)),
        RECIPE,
        {
            "low": variant(0.5, accuracy(original=90, heads=88, ffn=80, recovery=86, tokens=85, decoder=83), ffn=0.25),
            "high": variant(0.5, accuracy(original=90, heads=88, ffn=81, tokens=80), tokens=0.5),
        },
    )
    assert table.columns == [
        *("FFN MACs kept", "tokens kept", "heads", "+ FFN", "+ recovery", "+ tokens", "+ decoder", "lost")
    ]
    assert table.same == ["heads removed 50%", "original 90.0"]
    assert [row[2] for row in table.rows] == [
        ["100%", "100%", "88.0", "80.0", "", "79.0", "", "11.0 ± 0.2"],
        ["25%", "100%", "88.0", "80.0", "86.0", "85.0", "83.0", "7.0 ± 0.2"],
        ["100%", "50%", "88.0", "81.0", "", "80.0", "", "10.0 ± 0.2"],
    ]


def test_a_step_that_comes_back_to_an_earlier_accuracy_keeps_its_column():
    steps = accuracy(original=90, heads=88, ffn=80, recovery=88, tokens=88)
    table = compare_runs(run(0.5, steps), RECIPE, {"low": variant(0.5, steps)})
    assert table.columns == ["heads", "+ FFN", "+ recovery", "lost"]


def test_originals_that_differ_have_a_column():
    steps = accuracy(original=91, heads=80, ffn=80, tokens=80)
    table = compare_runs(
        run(0.5, accuracy(original=90, heads=80, ffn=80, tokens=80)), RECIPE, {"low": variant(0.5, steps)}
    )
    assert table.columns == ["original", "heads", "lost"]
    assert [row[2][0] for row in table.rows] == ["90.0", "91.0"]


def test_a_run_without_variants_is_one_row_with_every_column():
    table = compare_runs(run(0.5, accuracy(original=90, heads=88, ffn=80, tokens=80)), {**RECIPE, "variants": {}}, {})
    assert len(table.rows) == 1
    assert table.same == []
    assert "original" in table.columns


# ── Budget ───────────────────────────────────────────────────────────────────

# Two blocks: attention 1 ms a head over 1 ms, FFNs of 8 neurons at 4 ms, and 2 ms of rest: 5 + 3 + 4 + 4 + 2 = 18.
TABLE = {
    "unit": "ms",
    "attention": [[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0]],
    "ffn": [[[0, 8], [0.0, 4.0]], [[0, 4, 8], [0.0, 3.0, 4.0]]],
    "rest": 2.0,
}


def test_a_budget_is_shown_part_by_part():
    allocation = {"heads": [[0, 3], []], "widths": [2, 6], "speed_up": 18 / 10.5}
    shown = budget_parts({"allocation": allocation, "table": TABLE})
    assert shown is not None
    assert shown["unit"] == "ms"
    assert shown["predicted"] == 18 / 10.5
    assert [part[0] for part in shown["parts"]] == ["attention", "FFNs", "embedding, projector", "whole encoder"]
    assert [part[1:] for part in shown["parts"]] == [(8.0, 4.0), (8.0, 1.0 + 3.5), (2.0, 2.0), (18.0, 10.5)]
    before, after = shown["parts"][-1][1:]
    assert before / after == pytest.approx(shown["predicted"])


def test_a_run_without_a_budget_has_none_to_show():
    assert budget_parts({"allocation": None, "table": None}) is None
