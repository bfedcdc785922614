"""report.json says what the run's results say, in the published form, and nothing else is taken for one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import get_type_hints

import pytest
from click.testing import CliRunner
from report_inputs import attribution, check, output_parity, page_inputs, peers, percentiles, ratio, report_of

from infoprune_export.artifacts import MANIFEST, canonical_json, sha256_file, staged, write_manifest
from infoprune_export.cli import main
from infoprune_export.errors import InfopruneError
from infoprune_export.validate import report_compare_schema, report_json, report_schema

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def inputs():
    return page_inputs()


def tree_of(inputs):
    return json.loads(report_json.dumps(report_of(inputs)))


# ── What is in it ────────────────────────────────────────────────────────────


def test_every_figure_of_the_run_is_there(inputs):
    inputs["bench"]["rows"][0] |= {"peers": peers(), "memory": {"original": {"weights_bytes": 7, "call_bytes": 5}}}
    inputs["validation"]["accuracy"][-1]["official"] = {"F1": 0.875}
    inputs["attribution"] = attribution()
    tree = tree_of(inputs)
    assert tree["attribution"] == inputs["attribution"]
    for key in ("checks", "parity", "accuracy", "verdict", "metric", "heads", "size"):
        expected = inputs["validation"][key]
        if key == "accuracy":
            expected = [{"official": {}} | row for row in expected]
        assert tree[key] == expected, key
    assert tree["bench"] == inputs["bench"]
    assert tree["recipe"] == inputs["recipe"]
    assert tree["variants"]["paper"]["accuracy"][3]["percent"] == 87.5
    assert tree["ffn"] == [
        {"kind": "mlp", "width": 128, "neurons": 2, "rank": 0, "ranks": []},
        {"kind": "linear", "width": 128, "neurons": 0, "rank": 9, "ranks": []},
    ]


def test_results_of_an_earlier_version_are_enough(inputs):
    """Without intervals, peers, memory, what is known of the machine."""
    bench = inputs["bench"]
    row = bench["rows"][0]
    for key in ("peers", "memory", "parity", "rounds", "stopped"):
        del row[key]
    for times in row["milliseconds"].values():
        del times["intervals"]
    row["speedup"] = {"median": 1.9, "low": 1.8, "high": 2.0}
    bench["machine"] = {"processor": "a processor", "cores": 2, "governor": "not reported"}
    del bench["max_interval"]
    assert tree_of(inputs)["bench"]["rows"][0]["peers"] == []


def test_what_only_a_stage_needs_stays_out(inputs):
    inputs["validation"]["checks"][0]["internal"] = 1
    assert "internal" not in tree_of(inputs)["checks"][0]


def test_artefacts_are_named_by_their_hashes(tmp_path):
    for stage in ("data", "onnx"):
        with staged(tmp_path / stage) as staging:
            (staging / "file").write_text(stage, encoding="utf-8")
            write_manifest(staging, stage=stage, key="key", inputs={}, recipe={})
    found = report_json.describe({stage: tmp_path / stage for stage in ("data", "onnx")})
    assert found["data"].manifest_sha256 == sha256_file(tmp_path / "data" / MANIFEST)
    assert found["data"].files == {}
    assert found["onnx"].files == {"file": sha256_file(tmp_path / "onnx" / "file")}


# ── What decided ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("checks", "decisive", "used"),
    [
        # Nearest to its limit of those that passed; a cosine's limit is its distance from 1.
        ([check("a", 2, 4, passed=True), check("b", 0.9992, 0.999, passed=True, at_least=True)], "b", 0.8),
        ([check("a", 2, 4, passed=True), check("b", 0.9998, 0.999, passed=True, at_least=True)], "a", 0.5),
        # A failure decides, however little it exceeds; of two the worse one.
        ([check("a", 3.9, 4, passed=True), check("b", 5, 4, passed=False)], "b", 1.25),
        ([check("a", 40, 4, passed=False), check("b", 5, 4, passed=False)], "a", 10),
        ([check("a", 40, 4, passed=False), check("b", None, 4, passed=False)], "b", None),
        # Nothing is allowed.
        ([check("a", 0, 0, passed=True), check("b", 1, 4, passed=True)], "b", 0.25),
        ([check("a", 3, 0, passed=False), check("b", 5, 4, passed=False)], "a", None),
        ([check("a", 1, 1, passed=True, at_least=True)], "a", 0),
        # Better than the original.
        ([check("a", -2, 4, passed=True)], "a", 0),
    ],
)
def test_the_check_that_decides(checks, decisive, used):
    decision = report_json.decide(checks)
    assert decision.check == decisive
    assert decision.used == (None if used is None else pytest.approx(used))
    assert decision.passed == next(found["passed"] for found in checks if found["what"] == decisive)


def test_a_limit_that_allows_nothing_is_exceeded_without_bound():
    assert math.isinf(report_json.used_of(check("a", 1, 0, passed=False)))


# ── Reading ──────────────────────────────────────────────────────────────────


def test_a_report_reads_back_as_it_was_written(inputs, tmp_path):
    report = report_of(inputs)
    report_json.write(tmp_path / "report.json", report)
    assert report_json.read(tmp_path / "report.json") == report
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == report_json.dumps(report)


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(tree):
        for key in path:
            tree = tree[key]
        tree[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set("schema_version", 2), "schema_version 2, this version reads 1"),
        (_set("schema_version", "1"), "schema_version"),
        (_set("extra", 1), "extra"),
        (_set("verdict", "MAYBE"), "verdict"),
        (_set("bench", "rows", 0, "batch_size", -1), "bench.rows.0.batch_size"),
        (_set("accuracy", 0, "percent", "90"), "accuracy.0.percent"),
        (_set("checks", 0, "value", True), "checks.0.value"),
        (lambda tree: tree.pop("parity"), "parity"),
    ],
)
def test_another_form_is_refused_with_its_place(change, named, inputs, tmp_path):
    tree = tree_of(inputs)
    change(tree)
    path = tmp_path / "report.json"
    path.write_text(canonical_json(tree), encoding="utf-8")
    with pytest.raises(InfopruneError, match=named) as refused:
        report_json.read(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"null", b'{"a": NaN}', b"\xff", b"[" * 100_000, b'{"a": 1}'])
def test_no_report_at_all_is_one_line(text, tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(text)
    with pytest.raises(InfopruneError) as refused:
        report_json.read(path)
    assert "\n" not in str(refused.value)


# ── Published form ───────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "schema", "command"),
    [
        ("report.schema.json", report_schema.json_schema, "report"),
        ("compare.schema.json", report_compare_schema.json_schema, "compare"),
    ],
)
def test_the_published_schema_is_current(name, schema, command):
    published = json.loads((DOCS / name).read_text(encoding="utf-8"))
    assert published == schema(), f"infoprune-export {command} --schema > docs/{name}"
    printed = CliRunner().invoke(main, [command, "--schema"])
    assert printed.exit_code == 0
    assert json.loads(printed.stdout) == published


def test_every_part_of_the_schema_is_closed_and_every_reference_leads_somewhere():
    for schema in (report_schema.json_schema(), report_compare_schema.json_schema()):
        parts = [schema, *schema["$defs"].values()]
        assert len(parts) > 10
        assert all(part["additionalProperties"] is False for part in parts)
        text = json.dumps(schema)
        for name in schema["$defs"]:
            assert f"#/$defs/{name}" in text


def test_the_made_up_parts_are_those_of_the_benchmark():
    """`report_inputs` follows the shapes that measurements are written in."""
    from infoprune_export.measure import results

    assert set(percentiles(1.0)) == set(results.Percentiles.__annotations__)
    assert set(ratio(1.0)) == set(results.Ratio.__annotations__)
    assert set(output_parity(passed=True)) == set(results.Parity.__annotations__)
    assert all(set(peer) == set(results.PeerRow.__annotations__) for peer in peers())
    made_up = page_inputs()["bench"]
    assert set(made_up) == set(results.BenchResult.__annotations__)
    assert set(made_up["rows"][0]) == set(results.BenchRow.__annotations__)
    assert set(made_up["machine"]) == set(results.Machine.__annotations__)


@pytest.mark.parametrize("name", ["WorstFigures", "StepRow", "PartRow", "Overflow", "Broken", "Attribution"])
def test_attributions_are_published_as_they_are_written(name):
    from infoprune_export.validate import attribution_schema, report_schema_attribution

    written = get_type_hints(getattr(attribution_schema, name))
    assert set(getattr(report_schema_attribution, name).model_fields) == set(written)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("Percentiles", "Percentiles"),
        ("Ratio", "Ratio"),
        ("OutputParity", "Parity"),
        ("Peer", "PeerRow"),
        ("BenchRow", "BenchRow"),
        ("Bench", "BenchResult"),
        ("Machine", "Machine"),
        ("Memory", "Memory"),
    ],
)
def test_nothing_that_is_measured_is_missing_from_the_published_form(ours, theirs):
    from infoprune_export.measure import results

    published = getattr(report_schema, ours).model_fields
    assert set(published) >= set(getattr(results, theirs).__annotations__)
