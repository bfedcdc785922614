"""Functions of the task, by the names that its YAML calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from infoprune_export.data.metrics.vqa import vqa_accuracy
from infoprune_export.data.samples import open_image


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    return [open_image(Path(doc["image"]))]


def doc_to_text(doc: Mapping[str, Any]) -> str:
    return str(doc["question"])


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """VQA accuracy of one answer, 0..1."""
    return {"vqa_accuracy": vqa_accuracy(results[0], doc["answers"])}
