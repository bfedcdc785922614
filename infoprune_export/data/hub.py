"""Benchmarks from Hugging Face's hub through ``datasets``: rows are streamed, and what is used is kept in a folder.

The releases of ``lmms-lab`` have one row per question with its image in it. Only the rows that a recipe needs are
fetched; their images are written as they are, so that every later step reads files. Never used unless ``data.hub`` is
named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from infoprune_export.data.formats import format_of
from infoprune_export.data.samples import Question, Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import DataSpec

_SAMPLES = "samples.json"
_SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp", b"BM": ".bmp"}


def check(spec: DataSpec) -> None:
    """Refuse what cannot be fetched.

    Raises:
        InfopruneError: ``datasets`` is not installed.
    """
    if find_spec("datasets") is None:
        raise InfopruneError(
            f"data.hub = {spec.hub!r} needs the package datasets, which is not installed; pip install "
            '"infoprune-export[hub]", or name local files'
        )


def fetch(folder: Path, spec: DataSpec, on_row: Callable[[int], None] = lambda rows: None) -> None:
    """Write images and ``samples.json`` of as many rows as `spec` needs; `on_row` is called with 1 for each.

    Raises:
        InfopruneError: no such data set, no network, a row is not in the benchmark's form.
    """
    check(spec)
    source = format_of(_format(spec)).hub
    split = spec.split or source.split
    try:
        # A second configuration is small: an image for many questions.
        shared = {str(row["id"]): row["image"] for row in _rows(spec, source.images, split)} if source.images else {}
        rows = _rows(spec, source.config, split)
        pairs = _pairs(rows, shared, source.convert, spec)
        samples = _enough(pairs, spec, folder, on_row, scattered=source.scattered)
    except InfopruneError:
        raise
    except Exception as error:  # of a library that raises a dozen kinds, for a name, a network, a file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InfopruneError(f"data.hub = {spec.hub!r}, split {split!r}: cannot be read: {reason[:300]}") from error
    if not samples:
        raise InfopruneError(f"data.hub = {spec.hub!r}: split {split!r} has no row; name another with data.split")
    (folder / _SAMPLES).write_text(json.dumps(samples, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read_fetched(folder: Path) -> list[Sample]:
    """What `fetch` wrote."""
    tree = json.loads((folder / _SAMPLES).read_text(encoding="utf-8"))
    return [
        Sample(folder / "images" / entry["image"], tuple(_question(about) for about in entry["questions"]))
        for entry in tree
    ]


def _question(entry: dict[str, Any]) -> Question:
    return Question(**{**entry, "answers": tuple(entry["answers"]), "choices": tuple(entry["choices"])})


def _format(spec: DataSpec) -> str:
    if spec.format is None:
        raise ValueError("a recipe with data.hub names its format")
    return spec.format


def _rows(spec: DataSpec, config: str | None, split: str) -> Iterable[dict[str, Any]]:
    datasets: Any = import_module("datasets")
    named = config.format(split=split) if config else None
    if Path(spec.hub or "").is_dir():
        # A download keeps a configuration's files in a folder of its name, if it has any.
        place = Path(spec.hub or "")
        files = sorted((place / named if named and (place / named).is_dir() else place).rglob(f"*{split}*.parquet"))
        if not files:
            raise InfopruneError(f"data.hub = {spec.hub!r}: no *{split}*.parquet in this folder; name data.split")
        rows = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train", streaming=True)
    else:
        rows = datasets.load_dataset(spec.hub, named, split=split, revision=spec.revision, streaming=True)
    if rows.features is not None and "image" in rows.features:
        rows = rows.cast_column("image", datasets.Image(decode=False))
    found: Iterable[dict[str, Any]] = rows
    return found


def _pairs(
    rows: Iterable[Mapping[str, Any]],
    shared: Mapping[str, Any],
    convert: Callable[[Mapping[str, Any], DataSpec], tuple[str, Question]],
    spec: DataSpec,
) -> Iterator[tuple[str, bytes, Question]]:
    """Image key, image and question of every row; rows without an image are left out (ScienceQA has such)."""
    for number, row in enumerate(rows):
        where = f"data.hub = {spec.hub!r}: row {number}"
        try:
            key, question = convert(row, spec)
            image = shared[key] if shared else row["image"]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise InfopruneError(
                f"{where} is not in the form of {spec.format} ({type(error).__name__}: {str(error)[:80]}); name the "
                "format it is in"
            ) from None
        if image is None:
            continue
        content = image.get("bytes") if isinstance(image, Mapping) else None
        if not content:
            raise InfopruneError(f"{where} has no image in it; use a release with embedded images")
        yield key or hashlib.sha256(content).hexdigest(), content, question


def _enough(
    pairs: Iterator[tuple[str, bytes, Question]],
    spec: DataSpec,
    folder: Path,
    on_row: Callable[[int], None],
    *,
    scattered: bool,
) -> list[dict[str, Any]]:
    """Rows until there are images to calibrate on and questions about others; one entry per image.

    Every group that was begun becomes whole: by its next rows, or, where groups are `scattered`, by whatever of them
    the rest of the split still has.
    """
    images = folder / "images"
    images.mkdir()
    entries: dict[str, dict[str, Any]] = {}
    calibrating = 0 if spec.calibration_from is not None else spec.calibration_images
    validating = 0
    begun: set[str] = set()
    last = ""
    for key, content, question in pairs:
        if validating >= spec.validation_questions:
            if scattered and question.group not in begun:
                continue
            if not scattered and not (question.group and question.group == last):
                break
        if key not in entries:
            name = f"{len(entries):08d}{_SUFFIXES.get(content[:2], '.img')}"
            (images / name).write_bytes(content)
            entries[key] = {"image": name, "questions": [], "validates": len(entries) >= calibrating}
        entries[key]["questions"].append(asdict(question))
        validating += entries[key]["validates"]
        last = question.group
        begun.add(last)
        on_row(1)
    return [{"image": entry["image"], "questions": entry["questions"]} for entry in entries.values()]
