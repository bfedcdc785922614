"""What a recipe's ``data`` section names: one list of samples, split by image into calibration and validation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infoprune_export.data import scenes
from infoprune_export.data.vqa import Question, Sample, read_images, read_vqa, write_vqa
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import DataSpec

_QUESTIONS_PER_SCENE = 7


@dataclass(frozen=True)
class Split:
    """Disjoint in images. `labelled` says whether the questions have answers."""

    calibration: list[Sample]
    validation: list[Sample]
    labelled: bool


def draw_scenes(folder: Path, spec: DataSpec, seed: int) -> None:
    """Write enough procedural scenes for `spec` into `folder`, in VQAv2 format."""
    images = folder / "images"
    images.mkdir()
    entries: list[tuple[int, list[Question]]] = []
    questions = 0
    while len(entries) < spec.calibration_images or questions < spec.validation_questions:
        number = len(entries)
        scene, image = scenes.scene_at(seed, number, spec.scene_sizes)
        image.save(images / f"scene_{number:012d}.png")
        rng = np.random.default_rng([seed, number, 1])
        asked = [Question(q.text, (q.answer,) * 10, q.kind) for q in scenes.ask(scene, rng, _QUESTIONS_PER_SCENE)]
        entries.append((number, asked))
        if number >= spec.calibration_images:
            questions += len(asked)
    write_vqa(folder, entries)


def read(spec: DataSpec, drawn: Path | None = None) -> Split:
    """Read a recipe's data; `drawn` is the folder `draw_scenes` wrote, for a recipe without images.

    The first `calibration_images` images calibrate, at most half of what there is; questions of the rest validate.

    Raises:
        InfopruneError: unreadable files, or fewer than two images.
    """
    labelled = True
    if spec.images is None:
        if drawn is None:
            raise ValueError("a recipe without data.images reads the scenes that were drawn for it")
        samples = read_vqa(drawn / "images", drawn / "questions.json", drawn / "annotations.json")
    elif spec.questions is not None and spec.annotations is not None:
        samples = read_vqa(Path(spec.images), Path(spec.questions), Path(spec.annotations))
    else:
        samples = read_images(Path(spec.images), spec.prompts)
        labelled = False
    if len(samples) < 2:
        raise InfopruneError(
            f"data has {len(samples)} images: at least 2 are needed, one to calibrate and one to validate"
        )
    calibration = min(spec.calibration_images, len(samples) // 2)
    if spec.images is None:
        calibration = spec.calibration_images
    validation: list[Sample] = []
    room = spec.validation_questions
    for sample in samples[calibration:]:
        if room <= 0:
            break
        validation.append(Sample(sample.image, sample.questions[:room]))
        room -= len(sample.questions)
    return Split(samples[:calibration], validation, labelled)


def check(spec: DataSpec) -> None:
    """Refuse missing files before any work is done."""
    for name in ("questions", "annotations"):
        path = getattr(spec, name)
        if path is not None and not Path(path).is_file():
            raise InfopruneError(f"data.{name} = {path!r}: no such file")
    if spec.images is not None:
        read(spec)
