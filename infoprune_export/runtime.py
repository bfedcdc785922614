"""A finished run as one object: its engine sees, the Hugging Face language model answers.

::

    from infoprune_export.runtime import open_run

    model = open_run("runs/quickstart")
    print(model.answer("photo.jpg", "How many objects are there?"))
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from PIL import Image

from infoprune_export.artifacts import MANIFEST, read_manifest, sha256_file, verify
from infoprune_export.data.samples import open_image
from infoprune_export.engine import open_engine
from infoprune_export.engine.base import Engine
from infoprune_export.errors import InfopruneError
from infoprune_export.models.vlm import VLM, Decoding, VisualTokens, answer, preprocess
from infoprune_export.recipe import ModelSpec, Recipe, load_target, read_recipe
from infoprune_export.stages.common import LAYER
from infoprune_export.tokens.decoder_methods import decoding_of
from infoprune_export.tokens.encoder import encode, form_of
from infoprune_export.validate.parity import through

if TYPE_CHECKING:
    from infoprune_export.models.tower import VisionTower

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

    def encode(self, images: Sequence[Picture]) -> VisualTokens:
        """What the language model sees of each image: kept visual tokens, fp32 [T, D_llm], and their positions.

        Raises:
            InfopruneError: there is no image, or one that cannot be read.
        """
        pictures = [
            image.convert("RGB") if isinstance(image, Image.Image) else open_image(Path(image)) for image in images
        ]
        if not pictures:
            raise InfopruneError("0 images to encode: give at least one")
        tower, tokens = self.vlm.tower, self.recipe.tokens
        form = form_of(tower, tokens, self.recipe.export.several)
        # The engine has a device and a precision of its own, whatever the language model's are.
        inputs = preprocess(self.vlm, pictures, "cpu", torch.float32)
        with torch.inference_mode():
            return encode(tower, form, tokens, through(self.engine), inputs)

    def answer(self, images: Picture | Sequence[Picture], question: str, max_new_tokens: int = 64) -> str:
        """Greedy answer to a question about one image, or about several together."""
        return self.answer_all([images], [question], max_new_tokens)[0]

    def answer_all(
        self, images: Sequence[Picture | Sequence[Picture]], questions: Sequence[str], max_new_tokens: int = 64
    ) -> list[str]:
        """One batch of questions, each with an image of its own or several.

        Raises:
            InfopruneError: a question without an image, more of one than of the other, an image that cannot be read.
        """
        rows = [[one] if isinstance(one, (str, Path, Image.Image)) else list(one) for one in images]
        if not questions or len(rows) != len(questions) or not all(rows):
            raise InfopruneError(
                f"{len(questions)} questions, {len(rows)} lists of images, the shortest of "
                f"{min(map(len, rows), default=0)}: give every question at least one image"
            )
        visual = self.encode([image for row in rows for image in row])
        return answer(self.vlm, visual, questions, max_new_tokens, self.decoder, [len(row) for row in rows])


def open_run(folder: str | Path, device: str = "auto", dtype: torch.dtype | None = None) -> CompressedVLM:
    """Open the folder of a run that `infoprune-export run` (or ``build``) finished.

    Every file is checked against its manifest. The language model is put on `device` (``auto``, ``cpu``, ``cuda``) in
    `dtype`, by default float32 on a CPU and float16 on a GPU; the engine runs where its target says.

    Raises:
        InfopruneError: the run is not finished, a later command made a part of it anew with other settings, a file is
            damaged, or the engine does not fit this machine.
    """
    from infoprune_export.device import resolve_device
    from infoprune_export.pipeline import load_vlm

    folder = Path(folder)
    recipe = read_recipe(folder / "recipe.json")
    _check_finished(folder, recipe)
    place = resolve_device(device)
    spec = ModelSpec(name_or_path=str((folder / "checkpoint").resolve()))
    vlm = load_vlm(spec, place, dtype or (torch.float32 if place == "cpu" else torch.float16))
    _release(vlm.tower)
    decoder = None
    if recipe.decoder.method != "none":
        found = json.loads((folder / "decoder" / LAYER).read_text(encoding="utf-8"))
        decoder = decoding_of(recipe.decoder, vlm.model, found["layer"], seed=recipe.seed)
    return CompressedVLM(vlm, open_engine(folder / "engine", load_target(recipe.engine.target)), recipe, decoder)


def _check_finished(folder: Path, recipe: Recipe) -> None:
    """Refuse a run that lacks a part, whose files changed, or whose parts are of different recipes."""
    fix = f"run infoprune-export build RECIPE -o {folder}"
    settings = recipe.to_dict()
    made: dict[str, str] = {}
    for stage in ("checkpoint", "onnx", "engine", *(["decoder"] if recipe.decoder.method != "none" else [])):
        manifest = read_manifest(folder / stage)
        if manifest is None:
            raise InfopruneError(f"{folder}: no finished {stage} here; {fix}")
        verify(folder / stage, manifest)
        # A command such as bench with --set makes some parts anew and leaves the rest.
        if _differs(manifest["recipe"], settings) or _differs(manifest["inputs"], made):
            raise InfopruneError(f"{folder / stage}: made before the run's settings were changed; {fix}")
        made[stage] = sha256_file(folder / stage / MANIFEST)


def _differs(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> bool:
    """Whether a manifest records something else than is there; what is only in one of them is not compared."""
    return any(recorded[name] != present[name] for name in recorded.keys() & present.keys())


def _release(tower: VisionTower) -> None:
    for block in tower.blocks:
        block.module.to("meta")
