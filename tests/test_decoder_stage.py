"""Stage 2 in a run: its layer is found or given, its answers are a step of their own, and what cannot be is refused."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from finished import finished
from rich.progress import Progress

from infoprune_export.cli import main
from infoprune_export.data import dataset
from infoprune_export.errors import InfopruneError
from infoprune_export.models.vlm import VLM
from infoprune_export.pipeline import Run, execute, load_vlm
from infoprune_export.recipe import ModelSpec, Recipe, load_recipe
from infoprune_export.stages import STAGES, check_everything
from infoprune_export.tokens.decoder import decoding
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.tokens.saturation import find_layer, measure_samples
from infoprune_export.tokens.steps import Step
from infoprune_export.validate.accuracy import collect_answers

SMALL = (
    "data.calibration_images=6",
    "data.validation_questions=21",
    "heads.method=none",
    "ffn.method=none",
    "tokens.keep_ratio=1/4",
)
GIVEN = (*SMALL, "decoder.method=infoprune", "decoder.layer=0", "decoder.keep_ratio=1/16", "variants={}")


def bring(folder: Path, last: str, *settings: str) -> Run:
    run = Run(load_recipe("quickstart", settings), folder, Progress(disable=True))
    check_everything(run, exporting=last in ("onnx", "engine"))
    execute(run, STAGES, last)
    return run


def read(path: Path):
    return json.loads(path.read_text())


def layer_of(folder: Path):
    return read(folder / "decoder" / "layer.json")


@pytest.fixture(scope="module")
def given_layer(tmp_path_factory) -> Path:
    """A run of tiny-llava with K = 0, up to its answers."""
    folder = tmp_path_factory.mktemp("given") / "run"
    bring(folder, "accuracy", *GIVEN)
    return folder


@pytest.fixture(scope="module")
def found_layer(tmp_path_factory) -> Path:
    """A validated run of tiny-qwen2.5-vl whose K was found."""
    return finished(tmp_path_factory)


def parts(folder: Path) -> tuple[Recipe, VLM, dataset.Split]:
    """A run's recipe, its rewritten model and its data."""
    recipe = Recipe.model_validate(read(folder / "recipe.json"))
    vlm = load_vlm(ModelSpec(name_or_path=str(folder / "checkpoint")), "cpu")
    return recipe, vlm, dataset.read(recipe.data, folder / "data")


# ── The layer ────────────────────────────────────────────────────────────────


def test_the_layer_is_found_on_calibration_images_of_the_original_behind_selection(found_layer):
    recipe, _, split = parts(found_layer)
    original = load_vlm(recipe.model, "cpu")
    see = VisionEncoder(original.tower, recipe.tokens).encode
    signals = measure_samples(original, split.calibration, see, labelled=True)
    found = layer_of(found_layer)
    assert found["layer"] == find_layer(signals)
    assert found["signals"]["questions"] == len(signals.settled) == sum(len(s.questions) for s in split.calibration)
    for name in ("visual_to_text", "within_visual", "agreement", "probability"):
        assert len(found["signals"][name]) == 4, "one value per layer"
        assert found["signals"][name] == pytest.approx(signals.to_dict()[name], rel=1e-3, abs=1e-6)


def test_a_given_layer_is_used_and_nothing_is_measured(given_layer):
    assert layer_of(given_layer) == {"layer": None, "signals": None}


@pytest.mark.parametrize("method", ["none", "fastv", "pyramiddrop"])
def test_methods_with_layers_of_their_own_measure_nothing(tmp_path, method):
    bring(tmp_path / "run", "decoder", *SMALL, f"decoder.method={method}", "variants={}")
    assert layer_of(tmp_path / "run") == {"layer": None, "signals": None}


def test_without_annotations_the_models_own_answers_stand_for_them(tmp_path, given_layer):
    """Photographs of one's own: every prompt of every calibration image is a question."""
    shutil.copytree(given_layer / "data" / "images", tmp_path / "photos")
    settings = (f"data.images={tmp_path}/photos", "data.prompts=['Is there a ring?', 'What color is the ring?']")
    bring(tmp_path / "run", "decoder", *SMALL, "decoder.method=infoprune", *settings, "variants={}")
    found = layer_of(tmp_path / "run")
    assert found["layer"] in range(3)
    assert found["signals"]["questions"] == 2 * (len(list((tmp_path / "photos").iterdir())) // 2)


# ── The answers ──────────────────────────────────────────────────────────────


def test_stage_2_is_a_step_of_its_own(given_layer):
    recipe, vlm, split = parts(given_layer)
    answers = read(given_layer / "accuracy" / "answers.json")
    assert set(answers) == {"heads", "ffn", "tokens", "decoder"}
    see = VisionEncoder(vlm.tower, recipe.tokens).encode
    inside = decoding([Step(0, Fraction(1, 16))])
    assert answers["tokens"] == collect_answers(vlm, split.validation, see)
    assert answers["decoder"] == collect_answers(vlm, split.validation, see, decoder=inside)
    assert answers["decoder"] != answers["tokens"]


def test_without_stage_2_there_is_no_such_step(tmp_path, given_layer):
    shutil.copytree(given_layer, tmp_path / "run")
    bring(tmp_path / "run", "accuracy", *SMALL, "variants={}")
    assert set(read(tmp_path / "run" / "accuracy" / "answers.json")) == {"heads", "ffn", "tokens"}


def test_the_engine_answers_within_stage_2(found_layer):
    recipe, vlm, split = parts(found_layer)
    rows = {row["step"]: row for row in read(found_layer / "validation" / "validation.json")["accuracy"]}
    assert list(rows) == ["original", "heads", "ffn", "tokens", "decoder", "onnx", "engine"]
    answers = read(found_layer / "accuracy" / "answers.json")
    assert answers["decoder"] != answers["tokens"]
    for step in ("onnx", "engine"):
        assert rows[step]["to_previous"] == {"percent": 0.0, "standard_error": 0.0, "questions": 28}
        assert rows[step]["by_kind"] == rows["decoder"]["by_kind"] != rows["tokens"]["by_kind"]


def test_what_is_drawn_is_drawn_with_the_recipes_seed(tmp_path, given_layer):
    shutil.copytree(given_layer, tmp_path / "run")
    recipe, vlm, split = parts(given_layer)
    bring(tmp_path / "run", "accuracy", *GIVEN, "decoder.method=random")
    see = VisionEncoder(vlm.tower, recipe.tokens).encode
    expected = [
        collect_answers(
            vlm,
            split.validation,
            see,
            decoder=decoding([Step(0, Fraction(1, 16), queries=None)], torch.Generator().manual_seed(seed)),
        )
        for seed in (recipe.seed, recipe.seed + 1)
    ]
    assert read(tmp_path / "run" / "accuracy" / "answers.json")["decoder"] == expected[0] != expected[1]


# ── Refused ──────────────────────────────────────────────────────────────────


def refuse(folder: Path, *arguments: str, verb: str = "run", recipe: str = "quickstart") -> str:
    """Exit code 2, one line, and no folder."""
    words = [word for setting in (*SMALL, *arguments) for word in ("--set", setting)]
    result = CliRunner().invoke(main, [verb, recipe, *words, "-o", str(folder)])
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert not folder.exists()
    return result.stderr


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["decoder.method=infoprune", "decoder.layer=3"], ("layer 3", "4 in all", "use 0 to 2")),
        (["decoder.method=random", "decoder.layer=9"], ("layer 9", "use 0 to 2")),
        (["decoder.method=fastv", "decoder.layer=3"], ("layer 3", "use 0 to 2")),
        (["decoder.method=pyramiddrop", "decoder.layer=1"], ("decoder.layer = 1", "use auto")),
        (["decoder.method=sparsevlm", "decoder.keep_ratio=1/100"], ("decoder.keep_ratio = 1/100", "larger ratio")),
        (["variants={deep: {decoder.method: infoprune, decoder.layer: 3}}"], ("layer 3", "use 0 to 2")),
        (["tokens.method=stride"], ("tokens.method = 'stride'", "use infoprune", "variant")),
        (["tokens.method=downsample"], ("tokens.method = 'downsample'", "use infoprune")),
    ],
)
def test_what_this_model_cannot_take_is_refused_before_anything_is_written(tmp_path, settings, named):
    message = refuse(tmp_path / "run", *settings)
    for part in named:
        assert part in message


def test_a_variant_that_does_not_fit_the_model_is_refused_at_once(tmp_path):
    qwen = ("variants={rows: {tokens.prior: cls}}", "data.scene_sizes=mixed")
    assert "[CLS]" in refuse(tmp_path / "run", *qwen, recipe="quickstart-qwen")


@pytest.mark.parametrize("verb", ["export", "build", "validate", "bench", "first-token"])
def test_every_command_that_exports_refuses_a_method_that_cannot_be(tmp_path, verb):
    assert "cannot be exported" in refuse(tmp_path / "run", "tokens.method=random", verb=verb)


def test_a_run_that_was_there_is_not_begun_with_a_layer_that_is_not(tmp_path, given_layer):
    """Nothing but the decoder stage is asked, and that before any training."""
    shutil.copytree(given_layer, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/*")}
    with pytest.raises(InfopruneError, match="use 0 to 2"):
        bring(tmp_path / "run", "accuracy", *GIVEN, "decoder.layer=3")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*/*")} == before


# ── Allowed ──────────────────────────────────────────────────────────────────


def test_what_cannot_be_exported_may_be_tried_as_a_variant(tmp_path, given_layer):
    variants = "variants={rows: {tokens.method: stride}, front: {tokens.method: downsample, decoder.method: none}}"
    shutil.copytree(given_layer, tmp_path / "run")
    run = bring(tmp_path / "run", "variants", *GIVEN[:-1], variants)
    check_everything(run, exporting=True)
    results = read(tmp_path / "run" / "variants" / "variants.json")
    steps = {name: [row["step"] for row in result["accuracy"]] for name, result in results.items()}
    assert steps == {
        "rows": ["original", "heads", "ffn", "tokens", "decoder"],
        "front": ["original", "heads", "ffn", "tokens"],
    }
    assert {result["methods"]["tokens"] for result in results.values()} == {"stride", "downsample"}


def test_commands_that_do_not_export_take_every_method(tmp_path, given_layer):
    shutil.copytree(given_layer, tmp_path / "run")
    words = [word for setting in (*GIVEN, "tokens.method=stride") for word in ("--set", setting)]
    result = CliRunner().invoke(main, ["rewrite", "quickstart", *words, "-o", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
