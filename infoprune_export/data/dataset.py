"""What a recipe's ``data`` section names: one list of samples, split by image into calibration and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from infoprune_export.data import hub, scenes
from infoprune_export.data.formats import format_of
from infoprune_export.data.formats.vqav2 import read_vqa, write_vqa
from infoprune_export.data.samples import Question, Sample, file_of, read_images
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import DataSpec

_QUESTIONS_PER_SCENE = 7
_STRONG_NOISE = 40.0
"""Standard deviation, of 255."""


@dataclass(frozen=True)
class Split:
    """Disjoint in images."""

    calibration: list[Sample]
    validation: list[Sample]
    labelled: bool
    """Whether the questions that validate have answers."""
    elsewhere: bool = False
    """Whether calibration is on images of another kind, which have no answers."""
    format: str = "vqav2"
    """Name of the benchmark whose metric counts, if the questions have answers."""
    max_new_tokens: int = 8
    workers: int = 0
    """Processes that read and prepare images."""

    @property
    def calibration_labelled(self) -> bool:
        """Whether the questions that calibrate have answers."""
        return self.labelled and not self.elsewhere


# ── Making ───────────────────────────────────────────────────────────────────


def make(folder: Path, spec: DataSpec, seed: int, on_row: Callable[[int], None] = lambda rows: None) -> None:
    """Write what `read` reads for a `spec` that brings its own images: draw scenes, or fetch a data set."""
    if spec.drawn:
        draw_scenes(folder, spec, seed)
    elif spec.hub is not None:
        hub.fetch(folder, spec, on_row)


def draw_scenes(folder: Path, spec: DataSpec, seed: int) -> None:
    """Write enough procedural scenes for `spec` into `folder`, in VQAv2 format."""
    images = folder / "images"
    images.mkdir()
    entries: list[tuple[int, list[Question]]] = []
    questions = 0
    while len(entries) < spec.calibration_images or questions < spec.validation_questions:
        number = len(entries)
        style = spec.calibration_style if number < spec.calibration_images else "same"
        scene, image = scenes.scene_at(seed, number, spec.scene_sizes, plain=style == "plain")
        _restyled(image, style, np.random.default_rng([seed, number, 3])).save(images / f"scene_{number:012d}.png")
        rng = np.random.default_rng([seed, number, 1])
        asked = [Question(q.text, (q.answer,) * 10, q.kind) for q in scenes.ask(scene, rng, _QUESTIONS_PER_SCENE)]
        entries.append((number, asked))
        if number >= spec.calibration_images:
            questions += len(asked)
    write_vqa(folder, entries)


def _restyled(
    image: Image.Image, style: Literal["same", "plain", "grayscale", "noise"], rng: np.random.Generator
) -> Image.Image:
    if style == "grayscale":
        return image.convert("L").convert("RGB")
    if style == "noise":
        pixels = np.asarray(image, np.float32)
        noisy = pixels + rng.normal(0, _STRONG_NOISE, pixels.shape)
        return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    return image


# ── Reading ──────────────────────────────────────────────────────────────────


def read(spec: DataSpec, made: Path | None = None) -> Split:
    """Read a recipe's data; `made` is the folder that `make` wrote, for a recipe that brings its own images.

    The first `calibration_images` images calibrate, at most half of what there is; questions of the rest validate.
    Benchmarks are often sorted by subject, so their images come in the order of a hash of their first question; VQAv2's
    in that of their ids. With `calibration_from`, all of the benchmark validates.

    Raises:
        InfopruneError: unreadable files, or fewer than two images.
    """
    samples = _samples(spec, made)
    elsewhere = spec.calibration_from is not None
    if spec.calibration_from is not None:
        calibration = read_images(Path(spec.calibration_from), spec.prompts)[: spec.calibration_images]
        validating = samples[spec.calibration_images :] if spec.drawn else samples
        _check_apart(calibration, validating, spec.calibration_from)
    else:
        if len(samples) < 2:
            raise InfopruneError(
                f"data has {len(samples)} images: at least 2 are needed, one to calibrate and one to validate"
            )
        first = _calibrating(spec, len(samples))
        calibration, validating = samples[:first], samples[first:]
    benchmark = spec.benchmark
    return Split(
        calibration,
        _first_questions(validating, spec.validation_questions),
        labelled=benchmark is not None,
        elsewhere=elsewhere,
        format=benchmark or "vqav2",
        max_new_tokens=_max_new_tokens(spec),
        workers=spec.workers,
    )


def _calibrating(spec: DataSpec, images: int) -> int:
    """At most half of the user's images; of what was drawn or fetched, all that were asked for, if others are left."""
    enough = images > spec.calibration_images if spec.hub is not None else spec.drawn
    return spec.calibration_images if enough else min(spec.calibration_images, images // 2)


def _samples(spec: DataSpec, made: Path | None) -> list[Sample]:
    if spec.made and made is None:
        raise ValueError("a recipe without images of the user's reads those that were made for it")
    if spec.drawn and made is not None:
        return read_vqa(made / "images", made / "questions.json", made / "annotations.json")
    if spec.hub is not None and made is not None:
        return hub.read_fetched(made)
    if spec.benchmark is None:
        return read_images(Path(spec.images or ""), spec.prompts)
    samples = format_of(spec.benchmark).read(spec)
    return samples if spec.benchmark == "vqav2" else sorted(samples, key=_shuffled)


def _shuffled(sample: Sample) -> bytes:
    """A key to sort by that has nothing to do with the subject, and stays when other samples come or go."""
    first = sample.questions[0]
    return hashlib.sha256(f"{first.id}\n{first.text}".encode()).digest()


def _first_questions(samples: list[Sample], room: int) -> list[Sample]:
    """As many of the first questions as fit, no group of them in part."""
    chosen: list[Sample] = []
    left = room
    for sample in samples:
        questions = sample.questions[: _whole_groups(sample.questions, left)]
        if questions:
            chosen.append(Sample(sample.image, questions))
        left -= len(sample.questions)
        if left <= 0:
            break
    if not chosen and samples:
        group = next(q.group for sample in samples for q in sample.questions)
        raise InfopruneError(
            f"data.validation_questions = {room} is less than the questions of item {group}, which count together; "
            "ask more"
        )
    return chosen


def _whole_groups(questions: tuple[Question, ...], room: int) -> int:
    cut = min(room, len(questions))
    while 0 < cut < len(questions) and questions[cut].group and questions[cut].group == questions[cut - 1].group:
        cut -= 1
    return cut


def _check_apart(calibration: list[Sample], validation: list[Sample], folder: str) -> None:
    if not calibration:
        raise InfopruneError(f"data.calibration_from = {folder!r}: no image in it")
    if not validation:
        raise InfopruneError("data has 0 images: at least 1 is needed to validate")
    validating = {file_of(sample.image).resolve() for sample in validation}
    for sample in calibration:
        if file_of(sample.image).resolve() in validating:
            raise InfopruneError(
                f"data.calibration_from = {folder!r}: {sample.image} validates too; name a folder of other images"
            )


def _max_new_tokens(spec: DataSpec) -> int:
    if spec.max_new_tokens is not None:
        return spec.max_new_tokens
    return 8 if spec.format is None else format_of(spec.format).max_new_tokens


# ── The user's files ─────────────────────────────────────────────────────────


def check(spec: DataSpec) -> None:
    """Refuse missing files, and a missing library, before any work is done."""
    for name in ("questions", "annotations"):
        path = getattr(spec, name)
        if path is not None and not Path(path).exists():
            raise InfopruneError(f"data.{name} = {path!r}: no such file")
    if spec.hub is not None:
        hub.check(spec)
    elif not spec.drawn:
        read(spec)
    if spec.made and spec.calibration_from is not None:
        read_images(Path(spec.calibration_from), spec.prompts)


def own_files(spec: DataSpec) -> list[Path]:
    """Files of the user's that the data is read from, each once."""
    named = [Path(path) for path in (spec.questions, spec.annotations) if path is not None]
    files = [file for path in named for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if spec.format is not None and spec.images is not None and (texts := format_of(spec.format).texts):
        files += sorted(Path(spec.images).rglob(texts))
    if not spec.made:
        split = read(spec)
        files += [file_of(sample.image) for sample in split.calibration + split.validation]
    elif spec.calibration_from is not None:
        chosen = read_images(Path(spec.calibration_from), spec.prompts)[: spec.calibration_images]
        files += [file_of(sample.image) for sample in chosen]
    if spec.hub is not None and Path(spec.hub).is_dir():
        files += sorted(Path(spec.hub).rglob("*.parquet"))
    return list(dict.fromkeys(files))
