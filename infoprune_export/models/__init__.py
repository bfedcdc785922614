"""Hugging Face vision-language models behind one view; one adapter per family."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from infoprune_export.errors import InfopruneError

if TYPE_CHECKING:
    from infoprune_export.models.tower import VisionTower

# Hugging Face model_type -> adapter, imported when a model of that type is opened.
FAMILIES = {
    "llava": "infoprune_export.models.clip:LlavaTower",
    "llava_next": "infoprune_export.models.llava_next:LlavaNextTower",
    "qwen2_vl": "infoprune_export.models.qwen:QwenTower",
    "qwen2_5_vl": "infoprune_export.models.qwen:QwenTower",
    "qwen3_vl": "infoprune_export.models.qwen:QwenTower",
}


def check_family(model_type: str) -> None:
    """Raise `InfopruneError` unless there is an adapter for this ``config.model_type``."""
    if model_type not in FAMILIES:
        raise InfopruneError(
            f"model_type {model_type!r} is no vision-language model with an adapter; supported: {', '.join(FAMILIES)}"
        )


def tower_of(model: Any) -> VisionTower:
    """The vision tower of a loaded Hugging Face model.

    Raises:
        InfopruneError: the family, or this configuration of it, has no adapter.
    """
    check_family(model.config.model_type)
    module, _, name = FAMILIES[model.config.model_type].partition(":")
    tower: VisionTower = getattr(import_module(module), name)(model)
    return tower
