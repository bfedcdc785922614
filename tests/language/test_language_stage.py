"""Language pruning in a run: a stage and a step of its own, and engines that are answered by the pruned model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from finished import execute_quickstart, finished, small
from rich.progress import Progress
from sharing import top

from infoprune_export.cli import main
from infoprune_export.language.plan import LanguagePlan
from infoprune_export.models.language import is_pruned, language_layers
from infoprune_export.models.vlm import writable_copy
from infoprune_export.pipeline import Run, execute, load_vlm
from infoprune_export.recipe import ModelSpec, load_recipe
from infoprune_export.rewrite.surgery import apply_ffn, apply_heads
from infoprune_export.stages import STAGES
from infoprune_export.stages.common import read_plans
from infoprune_export.stages.deliver import make_validation
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.validate.accuracy import collect_answers

SMALL = (
    "data.calibration_images=6",
    "data.validation_questions=21",
    "heads.method=none",
    "ffn.method=none",
    "tokens.keep_ratio=1/4",
    "variants={}",
)
PRUNED = ("language.method=random", "language.remove_heads=0.5", "language.keep_macs=0.5")


def bring(folder: Path, last: str, *settings: str) -> Run:
    run = Run(load_recipe("quickstart", (*SMALL, *settings)), folder, Progress(disable=True))
    execute(run, STAGES, last)
    return run


def read(path: Path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return bring(tmp_path_factory.mktemp("language") / "run", "accuracy", *PRUNED)


def test_the_plan_is_carried_out_in_the_checkpoint(run):
    plan = LanguagePlan.from_dict(read(run.folder / "language" / "plan.json"))
    assert [(size.heads, size.neurons) for size in plan.kept] == [(2, 192)] * 4
    vlm = load_vlm(ModelSpec(name_or_path=str(run.folder / "checkpoint")), "cpu")
    assert [(x.num_heads, x.num_neurons) for x in language_layers(vlm.model)] == [(2, 192)] * 4
    assert not is_pruned(run.original.model)


def test_its_accuracy_is_a_step_of_its_own(run):
    """Behind the encoder's, which the original language model answers, and before the tokens'."""
    answers = read(run.folder / "accuracy" / "answers.json")
    pruned = load_vlm(ModelSpec(name_or_path=str(run.folder / "checkpoint")), "cpu")
    tower = writable_copy(run.original)
    heads, head_weights, ffn, ffn_weights = read_plans(run)
    apply_heads(tower.tower, heads, head_weights)
    apply_ffn(tower.tower, ffn, ffn_weights)

    def expected(vlm, tokens=None):
        return collect_answers(vlm, run.split.validation, VisionEncoder(vlm.tower, tokens).encode)

    assert set(answers) == {"heads", "ffn", "language", "tokens"}
    assert answers["ffn"] == expected(tower)
    assert answers["language"] == expected(pruned) != answers["ffn"]
    assert answers["tokens"] == expected(pruned, run.recipe.tokens)


def test_without_it_nothing_is_measured_and_there_is_no_step(tmp_path):
    done = bring(tmp_path / "run", "accuracy")
    assert read(done.folder / "language" / "plan.json") == {"heads": [], "neurons": [], "total": []}
    assert set(read(done.folder / "accuracy" / "answers.json")) == {"heads", "ffn", "tokens"}
    assert "language" not in read(done.folder / "checkpoint" / "config.json")["quantization_config"]


def test_engines_are_answered_by_the_pruned_language_model(tmp_path, tmp_path_factory):
    """Of a finished run with the same encoder, so that nothing is exported anew."""
    settings = (*small(top(tmp_path_factory)), "language.method=random", "language.keep_macs=0.25")
    other = finished(tmp_path_factory)
    done = execute_quickstart(tmp_path / "run", "accuracy", *settings, donor=other)
    done.finished |= {stage: other / stage for stage in ("onnx", "engine")}
    make_validation(done, tmp_path)
    rows = {row["step"]: row for row in read(tmp_path / "validation.json")["accuracy"]}
    assert list(rows) == ["original", "heads", "ffn", "language", "tokens", "onnx", "engine"]
    for step in ("onnx", "engine"):
        assert rows[step]["by_kind"] == rows["tokens"]["by_kind"]
    assert rows["language"]["by_kind"] != rows["ffn"]["by_kind"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["language.method=obs", "language.remove_heads=0.9"], "language.remove_heads = 0.9 leaves 4 units"),
        (["language.method=random", "language.keep_macs=0.1"], "language.keep_macs = 0.1 leaves 153 neurons"),
        (["language.remove_heads=1.0"], "language.remove_heads = 1.0: input should be less than 1"),
        (["language.keep_macs=0.0"], "language.keep_macs = 0.0: input should be greater than 0"),
        (["language.method=paper"], "language.method = 'paper'"),
        (["variants={narrow: {language.method: obs, language.keep_macs: 0.01}}"], "leaves 15 neurons"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, settings, named):
    words = [word for setting in (*SMALL[:-1], *settings) for word in ("--set", setting)]
    result = CliRunner().invoke(main, ["rewrite", "quickstart", *words, "-o", str(tmp_path / "run")])
    assert result.exit_code == 2, (result.output, result.exception)
    assert named in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
