"""Exported files of tiny models that several test files look at; none may change them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from sharing import shared
from torch import Tensor

from infoprune_export.export.onnx import MODEL, export_onnx
from infoprune_export.export.quantize import quantize_int8
from infoprune_export.models import tower_of
from infoprune_export.models.tower import VisionTower, image_noise
from infoprune_export.models.zoo import random_model
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.encoder import form_of

SELECT = TokensSpec(keep_ratio="2/9")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
# Family, whether it selects, precision, and several images a call; every family, precision and operator is in one.
CASES = [
    ("llava", True, "fp32", True),
    ("llava", True, "int8", True),
    ("llava-next", False, "fp16", True),
    ("qwen2-vl", False, "fp32", True),
    ("qwen2.5-vl", True, "fp16", True),
]


@cache
def tower(family: str, precision: str) -> VisionTower:
    return tower_of(random_model(family, 3).to(DTYPES[precision]))


@cache
def calls_of(family: str, selecting: bool, several: bool) -> list[dict[str, Tensor]]:
    """Planned tensors of several numbers and sizes of images."""
    made, generator = tower(family, "fp32"), torch.Generator().manual_seed(7)
    form = form_of(made, SELECT if selecting else None, several)
    if family.startswith("qwen"):
        # A graph for one image takes no video.
        mixed = [(1, 14, 6), (2 if several else 1, 4, 4), (1, 2, 2)]
        batches = [made.grid_inputs(grids, generator) for grids in ([(1, 4, 10)], mixed)]
    elif family == "llava-next":
        batches = [made.example_inputs(images, generator) for images in (1, 3)]
    else:
        batches = [{"pixel_values": image_noise(images, 56, 56, generator)} for images in ((1, 4) if several else (1,))]
    return [planned for inputs in batches for planned in made.calls(inputs, form)]


def feed_of(planned: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in planned.items()}


def exported(factory: pytest.TempPathFactory, family: str, selecting: bool, precision: str, several: bool) -> Path:
    """The file, made when a test of the session first asks for it."""

    def make(folder: Path) -> None:
        if precision == "int8":
            source = exported(factory, family, selecting, "fp32", several)
            feeds = [feed_of(planned) for planned in calls_of(family, selecting, several)]
            quantize_int8(source.parent, folder, feeds, scheme="tensorrt", max_noise=1.0)
        else:
            tokens = SELECT if selecting else None
            export_onnx(tower(family, precision), tokens, folder, opset=20, several=several)

    name = "-".join((family, "select" if selecting else "all", precision, str(several)))
    return shared(factory, name, make) / MODEL
