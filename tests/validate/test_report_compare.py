"""Two runs side by side: what differs, differences worked out by hand, and every refusal."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from report_inputs import STEPS, bench, check, page_inputs, rows_of, scores, write_run

from infoprune_export.artifacts import MANIFEST, canonical_json, sha256_file
from infoprune_export.cli import main
from infoprune_export.errors import InfopruneError
from infoprune_export.validate import plots
from infoprune_export.validate import report_compare as comparing
from infoprune_export.validate.report_compare_page import headline, notes, render, tables
from infoprune_export.validate.report_compare_schema import Comparison, Within
from infoprune_export.validate.report_runs import read_run


@pytest.fixture
def undrawn(monkeypatch):
    """Where only the words of a page matter; drawing takes most of its time."""
    monkeypatch.setattr(plots, "to_svg", lambda figure: '<svg width="9pt"></svg>')


@pytest.fixture
def pair(tmp_path, undrawn):
    """Inputs, scores and data of two runs, to be changed, and what compares them."""
    sides = {name: {"inputs": page_inputs(), "given": scores(STEPS, 1)} for name in "ab"}

    def compare():
        folders = {name: write_run(tmp_path / name, **side) for name, side in sides.items()}
        return comparing.compare(*(read_run(folder) for folder in folders.values()))

    return sides, compare


# ── What differs ─────────────────────────────────────────────────────────────


def test_a_run_differs_from_its_copy_in_nothing(pair):
    _, compare = pair
    found = compare()
    assert found.recipe == found.libraries == found.machine == []
    assert found.same_model
    assert found.accuracy.paired
    assert all(row.difference.percent == row.difference.standard_error == 0 for row in found.accuracy.steps)
    assert all(row.ratio == 1 for row in found.sizes)
    assert found.latency.comparable
    assert found.latency.warnings == []
    assert found.latency.rows[0].faster.value == found.latency.rows[0].speedup_ratio.value == 1
    assert "no difference in accuracy is shown" in headline(found)[0]


def test_only_settings_that_differ_are_named(pair):
    sides, compare = pair
    recipe = sides["b"]["inputs"]["recipe"]
    recipe["heads"]["remove"] = 0.25
    recipe["variants"] = {"other": {"ffn.keep_macs": 0.3}}
    found = {row.key: (row.a, row.b) for row in compare().recipe}
    assert found.pop("heads.remove") == (0.5, 0.25)
    assert found.pop("variants.other.ffn.keep_macs") == (None, 0.3)
    assert all(key.startswith("variants.") and b is None for key, (_, b) in found.items())


def test_a_setting_that_is_null_on_one_side_and_missing_on_the_other_differs():
    (row,) = comparing.differences({"a": None, "same": 1}, {"same": 1})
    assert (row.key, row.a, row.b) == ("a", None, None)


def test_lists_and_empty_sections_are_leaves():
    assert comparing.flat({"a": {"b": [1, {"c": 2}], "d": {}}, "e": 0}) == {"a.b": [1, {"c": 2}], "a.d": {}, "e": 0}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("xyz", "xyz", "xyz"),
        ("xz", "xyz", "xyz"),
        ("xyz", "xz", "xyz"),
        ("", "xy", "xy"),
        ("xe", "xyde", "xyde"),
        ("x", "xyz", "xyz"),
        ("z", "xyz", "xyz"),
    ],
)
def test_steps_of_both_runs_keep_their_order(a, b, expected):
    assert comparing.merged(list(a), list(b)) == list(expected)


# ── Accuracy ─────────────────────────────────────────────────────────────────


def test_paired_differences_are_taken_question_by_question(pair):
    sides, compare = pair
    a, b = (sides[name]["given"] for name in "ab")
    for given in (a, b):
        given["clusters"] = [2, 1, 1]
    a["scores"] = {"original": [1, 1, 0, 1], "heads": [1, 0, 0, 1]}
    b["scores"] = {"original": [1, 1, 0, 1], "heads": [1, 1, 0, 0.5]}
    steps = {row.step: row for row in compare().accuracy.steps}
    # Changes 0, 1, 0, -.5: mean .125; sums over images of what departs from it: .75, -.125, -.625.
    change = steps["heads"].difference
    assert change.percent == pytest.approx(12.5)
    assert change.standard_error == pytest.approx(100 * np.sqrt(3 / 2 * (0.75**2 + 0.125**2 + 0.625**2)) / 4)
    assert change.high - change.percent == pytest.approx(1.96 * change.standard_error, rel=1e-4)
    assert change.percent - change.low == pytest.approx(1.96 * change.standard_error, rel=1e-4)
    assert steps["ffn"].difference is None, "no scores of it, so nothing to pair"


def test_pairing_is_sharper_than_two_samples(pair):
    sides, compare = pair
    steps = [*STEPS[:5], ("engine", 84.0)]
    sides["b"]["given"] = scores(steps, 1)
    sides["b"]["inputs"]["validation"]["accuracy"] = rows_of(steps)
    change = compare().accuracy.steps[-1].difference
    assert change.percent == pytest.approx(
        100 * np.diff([np.mean(s["given"]["scores"]["engine"]) for s in sides.values()])
    )
    assert 0 < change.standard_error < 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda side: side.update(data="other data"), "data is not the same"),
        (lambda side: side["given"].update(questions_sha256="b" * 64), "other questions"),
        (lambda side: side["given"].update(clusters=[100]), "other questions"),
        (lambda side: side.update(given=None), "B was validated by an earlier version"),
    ],
)
def test_what_cannot_be_paired_is_said_and_taken_as_two_samples(change, reason, pair):
    sides, compare = pair
    change(sides["b"])
    sides["b"]["inputs"]["validation"]["accuracy"][-1]["percent"] = 80.0
    found = compare()
    assert not found.accuracy.paired
    assert reason in found.accuracy.unpaired_because
    last = found.accuracy.steps[-1].difference
    assert last.percent == pytest.approx(80.0 - 87.5)
    assert last.standard_error == pytest.approx(np.hypot(0.5, 0.5))
    assert any(reason in note for note in notes(found))
    assert reason in render(found)


def test_two_metrics_have_no_difference(pair):
    sides, compare = pair
    sides["b"]["inputs"]["validation"]["metric"] = "agreement with the original"
    found = compare()
    assert "agreement with the original" in found.accuracy.unpaired_because
    assert all(row.difference is None for row in found.accuracy.steps)
    assert headline(found)[0] == "Their accuracies cannot be compared."
    render(found)
    tables(found)


def test_a_step_of_one_run_only_stands_where_it_belongs(pair):
    sides, compare = pair
    steps = [*STEPS[:3], ("recovery", 89.0), *STEPS[3:]]
    sides["b"]["inputs"]["validation"]["accuracy"] = rows_of(steps)
    sides["b"]["given"] = scores(steps, 1)
    found = compare()
    assert [row.step for row in found.accuracy.steps] == [step for step, _ in steps]
    row = found.accuracy.steps[3]
    assert row.a is None
    assert row.b.percent == 89.0
    assert row.difference is None
    assert "no such step" in render(found)


# ── Latency ──────────────────────────────────────────────────────────────────


def test_a_ratio_of_two_measurements_carries_both_intervals():
    found = comparing.ratio(Within(value=4, low=2, high=8), Within(value=2, low=2, high=2))
    assert (found.value, found.low, found.high) == pytest.approx((2, 1, 4))
    both = comparing.ratio(Within(value=4, low=2, high=8), Within(value=2, low=1, high=4))
    factor = 2 ** np.sqrt(2)
    assert (both.low, both.high) == pytest.approx((2 / factor, 2 * factor))
    skewed = comparing.ratio(Within(value=4, low=4, high=8), Within(value=2, low=1, high=2))
    assert (skewed.low, skewed.high) == pytest.approx((2, 2 * factor))
    assert comparing.ratio(Within(value=4, low=None, high=8), Within(value=2, low=1, high=4)).low is None


def test_speed_is_compared_in_both_measures(pair):
    sides, compare = pair
    times = bench(2.4)
    compressed = times["rows"][0]["milliseconds"]["compressed"]
    compressed["p50"] *= 2
    compressed["intervals"] = {}
    sides["b"]["inputs"]["bench"] = times
    sides["b"]["inputs"]["recipe"]["export"]["precision"] = "fp16"  # so its original is another graph
    (row,) = compare().latency.rows
    assert (row.compressed_a.value, row.compressed_b.value) == (2.0, 4.0)
    assert row.faster.value == 0.5
    assert row.faster.low is None
    assert row.speedup_ratio.value == pytest.approx(2.4 / 1.9)
    assert row.speedup_ratio.low < 2.4 / 1.9 < row.speedup_ratio.high


@pytest.mark.parametrize(
    ("times", "interval", "precision", "comparable"),
    [
        (1.3, (1.2, 1.4), "fp32", False),
        (1.3, None, "fp32", False),
        (1.3, (0.9, 1.9), "fp32", True),
        (1.02, (1.01, 1.03), "fp32", True),
        (1.3, (1.2, 1.4), "fp16", True),  # another graph, so its time says nothing of the machine
    ],
)
def test_milliseconds_are_not_compared_when_the_original_was_not_as_fast(times, interval, precision, comparable, pair):
    """As another job or a hotter machine makes it; speed-ups within each run still are."""
    sides, compare = pair
    before, after = (sides[name]["inputs"]["bench"]["rows"][0]["milliseconds"]["original"] for name in "ab")
    middle = before["p50"]
    before["intervals"] = {"p50": {"low": middle, "high": middle}}
    after["p50"] = times * middle
    after["intervals"] = {}
    if interval is not None:
        after["intervals"] = {"p50": {"low": interval[0] * middle, "high": interval[1] * middle}}
    sides["b"]["inputs"]["recipe"]["export"]["precision"] = precision
    latency = compare().latency
    assert latency.comparable is comparable
    assert (latency.rows[0].faster is None) is not comparable
    said = any("the original itself took 1.30 times as long in B" in line for line in latency.warnings)
    assert said is not comparable


def test_a_speed_up_that_few_rounds_give_has_no_bounds(pair):
    sides, compare = pair
    sides["b"]["inputs"]["bench"]["rows"][0]["speedup"]["confidence"] = 0.75
    (row,) = compare().latency.rows
    assert (row.speedup_b.low, row.speedup_b.high, row.speedup_ratio.low) == (None, None, None)
    assert row.speedup_a.low is not None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda bench: bench["machine"].update(processor="another"), "processor: A a processor, B another"),
        (lambda bench: bench["libraries"].update(onnxruntime="1.24.0"), "onnxruntime: A 1.23.0, B 1.24.0"),
        (lambda bench: bench.update(threads=2), "threads: A 1, B 2"),
        (lambda bench: bench.update(provider="CUDAExecutionProvider"), "provider"),
        (lambda bench: bench["machine"].update(gpus=[{"name": "H100"}]), "GPUs: A not recorded, B ['H100']"),
    ],
)
def test_milliseconds_of_other_machines_are_not_compared(change, named, pair):
    sides, compare = pair
    change(sides["b"]["inputs"]["bench"])
    found = compare()
    assert not found.latency.comparable
    assert found.latency.rows[0].faster is None
    assert found.latency.rows[0].speedup_ratio is not None
    assert any(named in note for note in notes(found)), notes(found)
    assert "not comparable" in render(found)
    assert "speed-up is" in headline(found)[-1]


def test_a_busy_machine_and_other_batches_are_said(pair):
    sides, compare = pair
    sides["a"]["inputs"]["bench"]["machine"]["load"] = 5.0
    sides["b"]["inputs"]["bench"]["rows"][0]["batch_size"] = 16
    found = compare()
    assert found.latency.comparable
    assert found.latency.rows == []
    assert found.latency.warnings == [
        "A was measured while 5.0 processes shared 2 cores",
        "batch sizes 4, 16: in one run only",
    ]
    assert "No batch size was measured in both runs" in render(found)
    assert len(headline(found)) == 1


# ── Sizes and parity ─────────────────────────────────────────────────────────


def test_sizes_and_worst_parities_stand_side_by_side(pair):
    sides, compare = pair
    validation = sides["b"]["inputs"]["validation"]
    validation["size"]["flops_per_image"] = {"original": 300_000_000, "compressed": 50_000_000}
    good = {**validation["parity"][0], "relative_error": 1e-6, "passed": True}
    validation["parity"] = [good, {**good, "relative_error": 3e-6, "cosine": 0.9999, "norm_ratio": 0.98}]
    validation["parity"].append({**good, "step": "engine"})
    found = compare()
    sizes = {row.what: row for row in found.sizes}
    assert sizes["FLOPs per image"].ratio == 0.5
    assert sizes["FLOPs per image, original"].ratio == 1.5
    assert "visual tokens, original" not in sizes
    onnx, engine = found.parity
    assert onnx.a.relative_error is None
    assert not onnx.a.passed
    assert (onnx.b.relative_error, onnx.b.cosine, onnx.b.norm_ratio) == (3e-6, 0.9999, 0.98)
    assert engine.a is None
    render(found)


# ── The command ──────────────────────────────────────────────────────────────


@pytest.fixture
def runs(tmp_path):
    """Two finished runs' folders."""
    a = write_run(tmp_path / "one", page_inputs(), scores(STEPS, 1))
    inputs = page_inputs()
    inputs["validation"] |= {"verdict": "PASS", "checks": [check("accuracy lost, points", 2.5, 4.0, passed=True)]}
    return a, write_run(tmp_path / "two", inputs, scores(STEPS, 2))


def invoke(*arguments):
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def test_the_command_prints_tables_and_writes_a_page_and_json(runs, tmp_path, undrawn):
    page, file = tmp_path / "compare.html", tmp_path / "compare.json"
    done = invoke(*runs, "-o", page, "--json", file)
    assert done.exit_code == 0, done.output
    for expected in ("A: one", "B: two", "FAIL", "PASS", "engine", "B - A", "speed-up"):
        assert expected in done.stdout, expected
    found = Comparison.model_validate_json(file.read_text(encoding="utf-8"))
    assert found == comparing.compare(*map(read_run, runs))
    assert page.read_text(encoding="utf-8") == render(found)


def test_terminal_and_refusals_need_no_torch(runs):
    script = (
        "import sys; from infoprune_export.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, [m for m in ('torch', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "compare", *map(str, runs)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"


def test_hostile_names_stay_text(tmp_path, undrawn):
    inputs = page_inputs()
    evil = "<img src=x onerror=alert(1)>[bold]"
    inputs["recipe"]["description"] = evil
    inputs["validation"]["checks"][0]["what"] = evil
    for row in inputs["validation"]["accuracy"]:
        row["step"] = f"{evil}{row['step']}"
    inputs["bench"]["machine"]["processor"] = evil
    a = write_run(tmp_path / "one", page_inputs(), scores(STEPS, 1))
    b = write_run(tmp_path / "<b>two[red]", inputs, None)
    done = invoke(a, b, "-o", tmp_path / "compare.html")
    assert done.exit_code == 0, done.output
    assert "[red]" in done.stdout
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "<img" not in page
    assert "<b>" not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") > 5


def _rewrite(path, change):
    tree = json.loads(path.read_text(encoding="utf-8"))
    change(tree)
    path.write_text(canonical_json(tree), encoding="utf-8")


def _damage(folder):
    (folder / "report" / "report.json").write_bytes(b"{}")


def _old_report(folder):
    _rewrite(folder / "report" / MANIFEST, lambda tree: tree["outputs"].pop("report.json"))


def _other_validation(folder):
    _rewrite(folder / "validation" / MANIFEST, lambda tree: tree.update(key="another"))


def _forge(folder, stage, name, change):
    """A changed file that the stage's manifest vouches for, and the report for the manifest."""

    def vouch(stage, name):
        digest = sha256_file(folder / stage / name)
        _rewrite(folder / stage / MANIFEST, lambda tree: tree["outputs"].update({name: digest}))

    _rewrite(folder / stage / name, change)
    vouch(stage, name)
    if stage != "report":
        digest = sha256_file(folder / stage / MANIFEST)
        _rewrite(
            folder / "report" / "report.json", lambda tree: tree["artefacts"][stage].update(manifest_sha256=digest)
        )
        vouch("report", "report.json")


REFUSALS = [
    (lambda folder: shutil.rmtree(folder), "no such folder"),
    (lambda folder: (folder / "recipe.json").unlink(), "not a run's folder"),
    (lambda folder: shutil.rmtree(folder / "report"), "unfinished, it has no report"),
    (lambda folder: shutil.rmtree(folder / "validation"), "the stage is missing"),
    (lambda folder: (folder / "report" / MANIFEST).write_text("{", encoding="utf-8"), "corrupt manifest"),
    (_damage, "artefact is corrupt"),
    (lambda folder: (folder / "validation" / "scores.json").unlink(), "artefact is missing"),
    (_old_report, "earlier version"),
    (_other_validation, "not what the report was written of"),
    (lambda folder: _forge(folder, "report", "report.json", lambda tree: tree.update(schema_version=7)), "reads 1"),
    (lambda folder: _forge(folder, "validation", "scores.json", lambda tree: tree.pop("clusters")), "clusters"),
    (
        lambda folder: _forge(folder, "validation", "scores.json", lambda tree: tree["clusters"].append(1)),
        "not one for every question",
    ),
]


@pytest.mark.parametrize(("change", "named"), REFUSALS, ids=[named for _, named in REFUSALS])
def test_refusals_are_one_line_and_nothing_is_written(change, named, runs, tmp_path):
    change(runs[1])
    page, file = tmp_path / "page.html", tmp_path / "c.json"
    done = invoke(*runs, "-o", page, "--json", file)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    message = done.stderr.removesuffix("\n")
    assert message.startswith(f"error: {runs[1]}"), message
    assert named in message
    assert message.splitlines() == [message]
    assert not page.exists()
    assert not file.exists()
    with pytest.raises(InfopruneError):
        read_run(runs[1])


def test_a_page_that_cannot_be_written_is_refused_first(runs, tmp_path):
    done = invoke(*runs, "-o", tmp_path / "nowhere" / "page.html")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: --output: .*nowhere: no such folder\n", done.stderr)
