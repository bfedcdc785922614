"""The command that proves exports right on every resolution: exit codes, one-line errors, the JSON file."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from infoprune_export.cli import main
from infoprune_export.validate import sweep as module
from infoprune_export.validate.sweep import Case, Sweep, Tally


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["parity", *map(str, arguments)])


def assert_one_line(result: Result, *named: str) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    for word in named:
        assert word in result.stderr


@pytest.fixture
def swept(monkeypatch):
    """Takes the sweep's place; returns what it was called with. `outcome` is that of its one case."""
    calls = []

    def fake(families, **options):
        calls.append((families, options))
        tally = Tally("llava", "ours")
        tally.add(Case("whole", "batch 1", dict), fake.outcome, 0.5, "")
        return Sweep([tally], {"llava": 1.0})

    fake.outcome, fake.calls = "right", calls
    monkeypatch.setattr(module, "sweep", fake)
    return fake


@pytest.mark.parametrize(("outcome", "code"), [("right", 0), ("wrong", 1), ("refused", 1), ("no export", 1)])
def test_the_exit_code_says_whether_everything_is_right(swept, outcome, code, tmp_path):
    swept.outcome = outcome
    result = invoke("--json", tmp_path / "numbers.json")
    assert result.exit_code == code, (result.output, result.exception)
    assert f"1 {outcome}" in result.stdout
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["right"] == (code == 0)
    assert numbers["rows"][0]["counts"] == {"whole": {outcome: 1}}
    assert numbers["tolerance"] == 1e-4


def test_families_peer_and_thinning_reach_the_sweep(swept):
    assert invoke("llava", "qwen2-vl", "--peer", "transformers", "--every", "9").exit_code == 0
    ((families, options),) = swept.calls
    assert families == ("llava", "qwen2-vl")
    assert (options["peer"], options["every"]) == ("transformers", 9)


def test_an_unknown_family_is_one_line():
    assert_one_line(invoke("toaster"), "'toaster'", "qwen2.5-vl")


def test_an_unknown_peer_is_refused_by_click():
    result = invoke("--peer", "toaster")
    assert result.exit_code == 2
    assert "'toaster'" in result.stderr


def test_a_file_that_cannot_be_written_is_one_line_before_anything_runs(swept, tmp_path):
    assert_one_line(invoke("--json", tmp_path / "nowhere" / "numbers.json"), "--json", "nowhere", "no such folder")
    assert swept.calls == []


def test_a_family_is_swept(tmp_path):
    file = tmp_path / "numbers.json"
    result = invoke("llava", "--every", "4", "--json", file)
    assert result.exit_code == 0, (result.output, result.exception)
    rows = json.loads(file.read_text())["rows"]
    assert [row["contender"] for row in rows] == ["ours, several images", "ours, pruned"]
    assert all(row["right"] and row["cases"] for row in rows)
    assert result.stderr == ""
