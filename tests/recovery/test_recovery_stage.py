"""Recovery in a run: a stage and a step of its own, in the checkpoint, and nothing upstream depends on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from finished import execute_quickstart, finished, small
from rich.progress import Progress
from safetensors.torch import load_file
from sharing import top

from infoprune_export.cli import main
from infoprune_export.errors import InfopruneError
from infoprune_export.models.vlm import VLM
from infoprune_export.pipeline import Run, execute, load_vlm
from infoprune_export.recipe import ModelSpec, load_recipe
from infoprune_export.recovery import distill
from infoprune_export.recovery.weights import block_parameters
from infoprune_export.stages import STAGES
from infoprune_export.stages.deliver import _subject, make_validation
from infoprune_export.stages.recovery import compressed_tower
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.training.state import STATE
from infoprune_export.validate.accuracy import collect_answers
from infoprune_export.validate.verdict import _checkpoint_check

RECOVERY = ("recovery.method=distill", "recovery.epochs=2", "recovery.batch_size=4", "recovery.learning_rate=0.01")
WHAT = "tensors that differ, plans = checkpoint"


def read(path: Path):
    return json.loads(path.read_text())


def written(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("*/*")}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Run:
    """A run with recovery; what is upstream of it, and the engine, come from a run without."""
    other, folder = finished(tmp_path_factory), tmp_path_factory.mktemp("recovery") / "run"
    settings = (*small(top(tmp_path_factory)), *RECOVERY)
    run = execute_quickstart(folder, "accuracy", *settings, donor=other)
    run.finished |= {stage: other / stage for stage in ("onnx", "engine")}
    return run


@pytest.fixture(scope="module")
def validated(done, tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    make_validation(done, folder)
    return read(folder / "validation.json")


def answers_of(run: Run, vlm: VLM) -> list[list[str]]:
    return collect_answers(vlm, run.split.validation, VisionEncoder(vlm.tower, None).encode)


# ── Steps ────────────────────────────────────────────────────────────────────


def test_both_steps_are_measured_apart(done, validated):
    answers = read(done.folder / "accuracy" / "answers.json")
    pruned = load_vlm(ModelSpec(name_or_path=str(done.folder / "checkpoint")), "cpu")
    assert set(answers) == {"heads", "ffn", "recovery", "tokens"}
    assert answers["ffn"] == answers_of(done, compressed_tower(done, recovered=False))
    assert answers["recovery"] == answers_of(done, pruned)
    assert answers["ffn"] != answers["recovery"]
    assert [row["step"] for row in validated["accuracy"]] == [
        "original",
        "heads",
        "ffn",
        "recovery",
        "tokens",
        "onnx",
        "engine",
    ]


def test_the_history_is_written(done):
    assert [set(epoch) for epoch in read(done.folder / "recovery" / "history.json")] == [
        {"distance", "stream", "learning_rate"}
    ] * 2


def test_the_checkpoint_is_plans_and_recovery_bit_by_bit(done):
    pruned = load_vlm(ModelSpec(name_or_path=str(done.folder / "checkpoint")), "cpu")
    trained = load_file(done.folder / "recovery" / "weights.safetensors")
    loaded = block_parameters(pruned.tower)
    before = block_parameters(compressed_tower(done, recovered=False).tower)
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    assert not all(torch.equal(before[name], trained[name]) for name in trained)
    assert not (done.folder / "recovery" / STATE).exists()


def test_validation_judges_the_rewriting_apart_from_the_training(validated):
    checks = {check["what"]: check for check in validated["checks"]}
    assert checks["masked = rewritten"]["passed"]
    assert checks[WHAT] == {
        "what": WHAT,
        "passed": True,
        "value": 0.0,
        "limit": 0.0,
        "detail": checks[WHAT]["detail"],
        "at_least": False,
    }


def test_one_wrong_bit_in_the_checkpoint_fails(done):
    subject = _subject(done)
    weight = subject.pruned.tower.blocks[1].ffn_out.weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    check = _checkpoint_check(subject)
    assert (check["passed"], check["value"]) == (False, 1.0)
    assert check["detail"].startswith("first: 1.mlp.")


# ── Reuse ────────────────────────────────────────────────────────────────────


def test_another_recovery_leaves_upstream_alone(done, tmp_path, tmp_path_factory):
    folder = tmp_path / "run"
    shutil.copytree(done.folder, folder)
    before, first = written(folder), load_file(folder / "recovery" / "weights.safetensors")
    settings = (*small(top(tmp_path_factory)), *RECOVERY)
    execute_quickstart(folder, "checkpoint", *settings, "recovery.checkpoint_steps=1")
    assert written(folder) == before, "how often state is written changes nothing"
    execute_quickstart(folder, "checkpoint", *settings, "recovery.learning_rate=0.001")
    changed = {path.split("/")[0] for path, time in written(folder).items() if before.get(path) != time}
    assert changed == {"recovery", "language", "checkpoint"}
    assert not all(torch.equal(v, first[k]) for k, v in load_file(folder / "recovery" / "weights.safetensors").items())


def test_a_killed_stage_resumes_with_the_same_bytes(done, tmp_path, tmp_path_factory, monkeypatch):
    settings, steps = (*small(top(tmp_path_factory)), *RECOVERY), []
    folder, real = tmp_path / "run", distill.store

    def kill(*arguments: object) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "store", kill)
    with pytest.raises(KeyboardInterrupt):
        execute_quickstart(folder, "recovery", *settings, donor=done.folder.parent / "none")
    assert (folder / ".recovery.partial" / STATE).exists()
    monkeypatch.setattr(distill, "store", lambda *arguments: (steps.append(arguments[4]), real(*arguments)))
    execute_quickstart(folder, "recovery", *settings)
    assert steps == [4], "the first epoch is not done again"
    for name in ("weights.safetensors", "history.json"):
        assert (folder / "recovery" / name).read_bytes() == (done.folder / "recovery" / name).read_bytes()


def test_without_it_nothing_is_trained_and_there_is_no_step(tmp_path_factory):
    other = finished(tmp_path_factory)
    assert load_file(other / "recovery" / "weights.safetensors") == {}
    assert read(other / "recovery" / "history.json") == []
    assert "recovery" not in read(other / "accuracy" / "answers.json")
    checks = {check["what"]: check for check in read(other / "validation" / "validation.json")["checks"]}
    assert checks[WHAT]["passed"]


# ── Other stages and data ────────────────────────────────────────────────────


def test_the_language_model_is_compressed_behind_the_recovered_tower(done, tmp_path, tmp_path_factory, monkeypatch):
    from infoprune_export.language import compress

    seen, real = [], compress.compress_language

    def watch(original, vlm, *arguments, **named):
        seen.append({name: value.clone() for name, value in block_parameters(vlm.tower).items()})
        return real(original, vlm, *arguments, **named)

    monkeypatch.setattr(compress, "compress_language", watch)
    settings = (*small(top(tmp_path_factory)), *RECOVERY, "language.method=random")
    run = execute_quickstart(tmp_path / "run", "accuracy", *settings, donor=done.folder)
    trained = load_file(done.folder / "recovery" / "weights.safetensors")
    assert all(torch.equal(seen[0][name], trained[name]) for name in trained)
    answers, known = (read(folder / "accuracy" / "answers.json") for folder in (run.folder, done.folder))
    assert list(answers) == ["ffn", "heads", "language", "recovery", "tokens"]
    assert [answers[step] for step in ("heads", "ffn", "recovery")] == [
        known[step] for step in ("heads", "ffn", "recovery")
    ]
    assert answers["language"] != answers["recovery"]


def test_photographs_without_labels(done, tmp_path, tmp_path_factory):
    shutil.copytree(done.folder / "data" / "images", tmp_path / "photos")
    settings = (*small(top(tmp_path_factory)), *RECOVERY, f"data.images={tmp_path}/photos")
    run = execute_quickstart(tmp_path / "run", "recovery", *settings, "heads.method=magnitude")
    assert not run.split.labelled
    assert len(read(run.folder / "recovery" / "history.json")) == 2


# ── Refused ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["recovery.epochs=0"], "recovery.epochs = 0: input should be greater than or equal to 1"),
        (["recovery.learning_rate=0.0"], "recovery.learning_rate = 0.0: input should be greater than 0"),
        (["recovery.batch_size=0"], "recovery.batch_size = 0"),
        (["recovery.warmup=1.0"], "recovery.warmup = 1.0: input should be less than 1"),
        (["recovery.warmup=-0.1"], "recovery.warmup = -0.1"),
        (["recovery.checkpoint_steps=0"], "recovery.checkpoint_steps = 0"),
        (["recovery.method=labels"], "recovery.method = 'labels'"),
        (["recovery.epoch=3"], "did you mean 'epochs'?"),
        (["recovery.method=distill", "recovery.mixed_precision=fp16"], "needs a GPU, the device is cpu"),
        (["variants={half: {recovery.method: distill, recovery.mixed_precision: fp16}}"], "needs a GPU"),
        (["recovery.method=distill", "heads.method=none", "ffn.method=none"], "nothing to recover from"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, settings, named):
    words = [word for setting in ("device=cpu", "variants={}", *settings) for word in ("--set", setting)]
    result = CliRunner().invoke(main, ["rewrite", "quickstart", *words, "-o", str(tmp_path / "run")])
    assert result.exit_code == 2, (result.output, result.exception)
    assert named in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_budgets_that_take_nothing_are_refused_by_the_stage(tmp_path, tmp_path_factory):
    settings = (*small(top(tmp_path_factory)), *RECOVERY, "heads.method=magnitude", "heads.remove=0.0")
    run = Run(load_recipe("quickstart-qwen", settings), tmp_path / "run", Progress(disable=True))
    with pytest.raises(InfopruneError, match="nothing was taken from this tower"):
        execute(run, STAGES, "recovery")
