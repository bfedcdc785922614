"""What attribute prints, and how it ends; what it prints is made in test_attribution."""

import json

import pytest
from click.testing import CliRunner
from report_inputs import attribution

from infoprune_export.cli import attribution_commands, main


@pytest.fixture
def attribute(tmp_path, monkeypatch):
    """The command on a finished stage with this content."""

    def run(found, *options):
        (tmp_path / "attribution.json").write_text(json.dumps(found), encoding="utf-8")
        monkeypatch.setattr(attribution_commands, "bring_up_to", lambda *_, **__: tmp_path)
        return CliRunner().invoke(main, ["attribute", "quickstart", *options], env={"COLUMNS": "200"})

    return run


def test_what_broke_is_named_with_its_nodes_and_the_fix_and_ends_with_1(attribute, tmp_path):
    found = attribution()
    result = attribute(found, "--json", str(tmp_path / "copy.json"))
    assert result.exit_code == 1
    (part,) = found["broken"]
    for shown in (f"broken: {part['step']}: {part['part']}: {part['reason']}", part["fix"], part["nodes"][0]):
        assert "".join(shown.split()) in "".join(result.output.split())
    assert json.loads((tmp_path / "copy.json").read_text(encoding="utf-8")) == found


def test_a_clean_run_ends_with_0(attribute):
    result = attribute({**attribution(), "broken": []})
    assert result.exit_code == 0
    assert "broken: nothing" in result.output


def test_parts_are_left_out_when_only_steps_are_asked_for(attribute):
    part = attribution()["blocks"][0]["part"]
    clean = {**attribution(), "broken": []}
    assert part in attribute(clean).output
    assert part not in attribute(clean, "--no-blocks").output


def test_a_file_that_is_not_there_is_a_mistake(attribute, tmp_path):
    assert attribute(attribution(), "--onnx", str(tmp_path / "none.onnx")).exit_code == 2
