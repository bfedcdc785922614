"""Asking about every format's files, by workers and by several processes: the same answers for any number of them."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path

import pytest
from rich.progress import Progress

from infoprune_export.data import dataset
from infoprune_export.data.samples import Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.pipeline import Run
from infoprune_export.recipe import DataSpec, Recipe
from infoprune_export.stages import STAGES
from infoprune_export.stages.compress import make_baseline
from infoprune_export.tokens.encoder import VisionEncoder
from infoprune_export.validate import accuracy
from infoprune_export.validate.accuracy import collect_answers, official_figures, split_answers, split_scores
from infoprune_export.validate.verdict import accuracy_table, metric_name

# ── Formats ──────────────────────────────────────────────────────────────────

ASK = "is there a circle?"
"""The testbed knows no other words than its scenes' questions."""


@pytest.fixture(scope="module")
def scenes(scene_split) -> list[Path]:
    return [sample.image for sample in scene_split.validation[:4]]


def dump(path: Path, tree: object) -> str:
    path.write_text(json.dumps(tree), encoding="utf-8")
    return str(path)


def as_textvqa(folder: Path, scenes: list[Path]) -> DataSpec:
    for n, path in enumerate(scenes):
        (folder / f"image{n}.jpg").write_bytes(path.read_bytes())
    rows = [
        {"question_id": n, "image_id": f"image{n}", "question": ASK, "answers": ["yes"] * 10}
        for n in range(len(scenes))
    ]
    return DataSpec(format="textvqa", images=str(folder), questions=dump(folder / "v.json", {"data": rows}))


def as_gqa(folder: Path, scenes: list[Path]) -> DataSpec:
    spec = as_textvqa(folder, scenes)
    entry = {"question": ASK, "answer": "yes", "isBalanced": True, "types": {"structural": "verify"}}
    tree = {str(n): {**entry, "imageId": f"image{n}"} for n in range(len(scenes))}
    return DataSpec(format="gqa", images=spec.images, questions=dump(folder / "t.json", tree))


def as_pope(folder: Path, scenes: list[Path]) -> DataSpec:
    lines = [
        {"question_id": n, "image": path.name, "text": ASK, "label": "yes" if n % 2 else "no"}
        for n, path in enumerate(scenes)
    ]
    (folder / "coco_pope_random.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataSpec(format="pope", images=str(scenes[0].parent), questions=str(folder))


def as_mme(folder: Path, scenes: list[Path]) -> DataSpec:
    (folder / "existence").mkdir()
    for path in scenes:
        (folder / "existence" / path.name).write_bytes(path.read_bytes())
        text = f"{ASK} Please answer yes or no.\tYes\nis there a star? Please answer yes or no.\tNo\n"
        (folder / "existence" / f"{path.stem}.txt").write_text(text)
    return DataSpec(format="mme", images=str(folder))


def as_mmbench(folder: Path, scenes: list[Path]) -> DataSpec:
    columns = ["index", "question", "hint", "A", "B", "answer", "category", "image"]
    rows = []
    for n, path in enumerate(scenes):
        image = base64.b64encode(path.read_bytes()).decode()
        rows.append([n, ASK, "", "yes", "no", "A", "existence", image])
        rows.append([n + 1_000_000, ASK, "", "no", "yes", "B", "existence", n])
    with (folder / "dev.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([columns, *rows])
    return DataSpec(format="mmbench", questions=str(folder / "dev.tsv"))


def as_scienceqa(folder: Path, scenes: list[Path]) -> DataSpec:
    tree = {}
    for n, path in enumerate(scenes):
        (folder / "images" / "test" / str(n)).mkdir(parents=True)
        (folder / "images" / "test" / str(n) / "image.png").write_bytes(path.read_bytes())
        tree[str(n)] = {"question": ASK, "choices": ["yes", "no"], "answer": 0, "image": "image.png"}
    return DataSpec(
        format="scienceqa",
        images=str(folder / "images"),
        questions=dump(folder / "problems.json", tree),
        annotations=dump(folder / "pid_splits.json", {"test": list(tree)}),
    )


def as_vizwiz(folder: Path, scenes: list[Path]) -> DataSpec:
    rows = [{"image": path.name, "question": ASK, "answers": [{"answer": "yes"}] * 10} for path in scenes]
    return DataSpec(format="vizwiz", images=str(scenes[0].parent), questions=dump(folder / "val.json", rows))


FIGURES = {
    as_textvqa: "accuracy",
    as_gqa: "binary",
    as_pope: "mean/f1",
    as_mme: "perception",
    as_mmbench: "category/existence",
    as_scienceqa: "accuracy",
    as_vizwiz: "said_unanswerable",
}


@pytest.mark.parametrize("write", FIGURES, ids=lambda write: write.__name__[3:])
def test_the_trained_model_answers_every_format(trained_vlm, scenes, tmp_path, write):
    spec = write(tmp_path, scenes).model_copy(update={"calibration_images": 1, "instruction": "", "max_new_tokens": 2})
    split = dataset.read(spec)
    assert len(split.validation) == 3
    answers = split_answers(trained_vlm, split, VisionEncoder(trained_vlm.tower, None).encode)
    scores = split_scores(split, answers, answers)
    assert len(scores) == sum(len(sample.questions) for sample in split.validation)
    (row,) = accuracy_table(split, answers, {})
    assert row["official"] == official_figures(split, answers)
    assert FIGURES[write] in row["official"]
    assert row["percent"] == pytest.approx(100 * scores.mean())
    assert metric_name(split) != "agreement with the original"
    json.dumps(row, allow_nan=False)


def test_images_without_questions_have_no_official_figures(scenes, trained_vlm):
    split = dataset.read(DataSpec(images=str(scenes[0].parent), calibration_images=1, validation_questions=2))
    answers = [["x"], ["y"]]
    (row,) = accuracy_table(split, answers, {})
    assert (row["official"], row["percent"], metric_name(split)) == ({}, 100.0, "agreement with the original")


# ── Workers ──────────────────────────────────────────────────────────────────


def test_answers_do_not_depend_on_workers(trained_vlm, scene_split):
    samples, encode = scene_split.validation[:5], VisionEncoder(trained_vlm.tower, None).encode
    inline = collect_answers(trained_vlm, samples, encode, batch_size=2)
    assert collect_answers(trained_vlm, samples, encode, batch_size=2, workers=2) == inline
    assert len({text for texts in inline for text in texts}) > 2


def test_a_damaged_image_in_a_worker_is_one_line(trained_vlm, scene_split, tmp_path):
    (tmp_path / "cut.png").write_bytes(scene_split.validation[0].image.read_bytes()[:300])
    samples = [scene_split.validation[0], Sample(tmp_path / "cut.png", scene_split.validation[0].questions)]
    with pytest.raises(InfopruneError) as caught:
        collect_answers(trained_vlm, samples, VisionEncoder(trained_vlm.tower, None).encode, batch_size=1, workers=1)
    assert str(caught.value).startswith(f"{tmp_path / 'cut.png'}: damaged image")
    assert "\n" not in str(caught.value)


def test_answers_are_as_long_as_asked_for(trained_vlm, scene_split):
    encode, sample = VisionEncoder(trained_vlm.tower, None).encode, scene_split.validation[:1]
    assert collect_answers(trained_vlm, sample, encode, max_new_tokens=1) != [[""] * len(sample[0].questions)]
    bare = [Sample(sample[0].image, ())]
    assert collect_answers(trained_vlm, bare, encode) == [[]]


# ── Processes ────────────────────────────────────────────────────────────────


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A few more than 16 images, and so two batches, one for each of two processes."""
    spec = {"calibration_images": 1, "validation_questions": 17 * 7}
    recipe = Recipe.model_validate(
        {"name": "two", "model": {"name_or_path": "testbed/tiny-llava"}, "data": spec, "validate": {"processes": 2}}
    )
    for name in ("data", "alone", "shared"):
        (tmp_path / name).mkdir()
    dataset.make(tmp_path / "data", recipe.data, 0)
    return Run(recipe, tmp_path, Progress(disable=True), finished={"data": tmp_path / "data"})


@pytest.mark.slow
def test_two_processes_answer_as_one(run, tmp_path):
    told: list[tuple[str, int, int]] = []
    run.track = lambda title, total: lambda count: told.append((title, total, count))  # type: ignore[method-assign]
    STAGES["baseline"].make(run, tmp_path / "shared")
    assert sum(count for _, _, count in told) >= len(run.split.validation) > 16
    assert {title for title, _, _ in told} == {"original model answers"}
    make_baseline(run, tmp_path / "alone")
    alone, shared = (json.loads((tmp_path / name / "answers.json").read_text()) for name in ("alone", "shared"))
    assert shared == alone
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["answers.json"]


def test_batches_of_three_processes_come_back_in_the_order_they_were_dealt(monkeypatch):
    dealt = [[[["a"]], [["d"]], [["g"]]], [[["b"]], [["e"]]], [[["c"]], [["f"]]]]
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: dealt if mine == [dealt[1]] else [])
    assert accuracy._gathered(dealt[1], 3) == [[["a"]], [["b"]], [["c"]], [["d"]], [["e"]], [["f"]], [["g"]]]


def test_neither_workers_nor_processes_are_part_of_a_stages_key(run):
    tree = run.recipe.to_dict()
    more = Recipe.model_validate(
        {**tree, "data": {**tree["data"], "workers": 3}, "validate": {**tree["validate"], "processes": 5}}
    )
    for name in ("data", "baseline", "accuracy", "validation"):
        assert STAGES[name].recipe_slice(more) == STAGES[name].recipe_slice(run.recipe)
