"""A finished run as one object: its engine sees, the Hugging Face language model answers.

::

    from infoprune_export.runtime import open_run

    model = open_run("runs/quickstart")
    print(model.answer("photo.jpg", "How many objects are there?"))
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from PIL import Image

from infoprune_export.artifacts import read_manifest, verify
from infoprune_export.data.vqa import open_image
from infoprune_export.engine import open_engine
from infoprune_export.engine.base import Engine
from infoprune_export.errors import InfopruneError
from infoprune_export.models.vlm import VLM, Decoding, VisualTokens, answer, preprocess
from infoprune_export.recipe import ModelSpec, Recipe, load_target, read_recipe
from infoprune_export.tokens.decoder_methods import decoding_of
from infoprune_export.tokens.encoder import encode, form_of
from infoprune_export.validate.parity import through

if TYPE_CHECKING:
    from infoprune_export.models.tower import VisionTower

FOUND = "layer.json"
"""What the decoder stage found, in its folder."""

Picture: TypeAlias = "str | Path | Image.Image"


@dataclass(frozen=True)
class CompressedVLM:
    """What `open_run` returns."""

    vlm: VLM
    """The compressed checkpoint. The weights of its vision blocks are dropped: the engine has them."""
    engine: Engine
    recipe: Recipe
    decoder: Decoding | None
    """Stage 2, if the recipe has one."""

    def encode(self, images: Picture | Sequence[Picture]) -> VisualTokens:
        """What the language model sees of each image: kept visual tokens [T, D_llm] and their positions."""
        pictures = [_opened(image) for image in _listed(images)]
        tower, tokens = self.vlm.tower, self.recipe.tokens
        form = form_of(tower, tokens, self.recipe.export.several)
        return encode(tower, form, tokens, through(self.engine), preprocess(self.vlm, pictures))

    def answer(
        self, images: Picture | Sequence[Picture], questions: str | Sequence[str], max_new_tokens: int = 64
    ) -> list[str]:
        """Greedy answers to one question per image; one image may have several questions, and one question all images.

        Raises:
            InfopruneError: an image cannot be read, or there are several of both but not as many.
        """
        images, asked = _listed(images), [questions] if isinstance(questions, str) else list(questions)
        if not images or not asked or (len(images) != len(asked) and 1 not in (len(images), len(asked))):
            raise InfopruneError(
                f"{len(images)} images and {len(asked)} questions: give as many questions as images, or one of either"
            )
        rows = max(len(images), len(asked))
        with torch.inference_mode():
            visual = self.encode(images)
        visual = visual.rows(range(rows) if len(images) == rows else [0] * rows)
        return answer(self.vlm, visual, asked if len(asked) == rows else asked * rows, max_new_tokens, self.decoder)


def open_run(folder: str | Path, device: str = "auto", dtype: torch.dtype | None = None) -> CompressedVLM:
    """Open the folder of a run that `infoprune-export run` (or ``build``) finished.

    Every file is checked against its manifest. The language model is put on `device` (``auto``, ``cpu``, ``cuda``) in
    `dtype`, by default float32 on a CPU and float16 on a GPU; the engine runs where its target says.

    Raises:
        InfopruneError: the run is not finished, a file is damaged, or the engine does not fit this machine.
    """
    from infoprune_export.device import resolve_device
    from infoprune_export.pipeline import load_vlm

    folder = Path(folder)
    for stage in ("checkpoint", "decoder", "engine"):
        manifest = read_manifest(folder / stage)
        if manifest is None:
            raise InfopruneError(f"{folder}: no finished {stage} here; run infoprune-export build RECIPE -o {folder}")
        verify(folder / stage, manifest)
    recipe = read_recipe(folder / "recipe.json")
    place = resolve_device(device)
    spec = ModelSpec(name_or_path=str((folder / "checkpoint").resolve()))
    vlm = load_vlm(spec, place, dtype or (torch.float32 if place == "cpu" else torch.float16))
    _release(vlm.tower)
    found = json.loads((folder / "decoder" / FOUND).read_text(encoding="utf-8"))
    decoder = decoding_of(recipe.decoder, vlm.model, found["layer"], seed=recipe.seed)
    return CompressedVLM(vlm, open_engine(folder / "engine", load_target(recipe.engine.target)), recipe, decoder)


def _release(tower: VisionTower) -> None:
    for block in tower.blocks:
        block.module.to("meta")


def _listed(images: Picture | Sequence[Picture]) -> list[Picture]:
    return [images] if isinstance(images, (str, Path, Image.Image)) else list(images)


def _opened(image: Picture) -> Image.Image:
    return image.convert("RGB") if isinstance(image, Image.Image) else open_image(Path(image))
