"""What `first_token` compares: the two ends of a finished run, or a whole model of deployment size, random weights."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from infoprune_export.data import testbed
from infoprune_export.engine.onnxruntime import OnnxRuntimeEngine, open_session
from infoprune_export.export.onnx import MODEL, export_onnx
from infoprune_export.models import tower_of
from infoprune_export.models.tower import VisionTower
from infoprune_export.models.vlm import VLM, Decoding, VisualTokens
from infoprune_export.models.zoo import random_model
from infoprune_export.recipe import DecoderSpec, Recipe, TokensSpec, load_target
from infoprune_export.stages.common import check_exported
from infoprune_export.tokens.decoder_methods import decoding_of
from infoprune_export.tokens.encoder import encode, form_of
from infoprune_export.tokens.watch import text_model
from infoprune_export.validate.first_token import UNPRUNED, Contest, Side
from infoprune_export.validate.parity import through
from infoprune_export.validate.real_size import prune_evenly

_QUESTION = "Is there a circle in the image?"
_WHOLE = "llava-0.5b"


def contest_of_run(folder: Path) -> Contest:
    """The model that a finished run began with and what it became, before the same language model, on random images.

    Raises:
        InfopruneError: see `runtime.open_run`.
    """
    from infoprune_export.pipeline import load_vlm
    from infoprune_export.runtime import open_run

    compressed = open_run(folder)
    recipe = compressed.recipe
    vlm = load_vlm(recipe.model, compressed.vlm.device.type, compressed.vlm.model.dtype)
    several = form_of(vlm.tower, recipe.tokens, recipe.export.several).several
    return _contest(vlm, folder / "onnx", recipe, recipe.tokens, several, compressed.decoder)


def contest_of_real_size(recipe: Recipe, exported: Path) -> Contest:
    """`zoo`'s llava-0.5b (CLIP-L/336 before a Llama of 24 layers) and what the recipe's budgets make of it.

    `exported` is what `export_real_size` wrote. A recipe without a decoder section gets the paper's Stage 2: a third of
    the tokens stays behind the middle layer.
    """
    model = random_model(_WHOLE)
    vlm = VLM(model, testbed.build_processor(), tower_of(model))
    return _contest(vlm, exported, recipe, _selection(recipe), True, _second_stage(recipe, model))


def export_real_size(recipe: Recipe, folder: Path) -> None:
    """Write both encoders that `contest_of_real_size` compares.

    Raises:
        InfopruneError: the selection cannot be exported, or the decoder section does not fit this model.
    """
    check_exported(recipe.tokens)
    for side, tokens in (("original", None), ("compressed", _selection(recipe))):
        model = random_model(_WHOLE)
        tower = tower_of(model)
        _second_stage(recipe, model)
        if tokens is not None:
            removed = 0.0 if recipe.heads.method == "none" else recipe.heads.remove
            kept = 1.0 if recipe.ffn.method == "none" else recipe.ffn.keep_macs
            prune_evenly(tower, removed, kept, recipe.ffn.round_to)
        (folder / side).mkdir()
        export_onnx(tower, tokens, folder / side, opset=recipe.export.opset)


def _selection(recipe: Recipe) -> TokensSpec:
    return recipe.tokens if recipe.tokens.method != "none" else TokensSpec()


def _second_stage(recipe: Recipe, model: nn.Module) -> Decoding | None:
    middle = len(text_model(model).layers) // 2 - 1
    spec = recipe.decoder
    if spec.method == "none":
        spec = DecoderSpec(method="infoprune", layer=middle, keep_ratio=Fraction(1, 3))
    return decoding_of(spec, model, middle if spec.finds_layer else None, seed=recipe.seed)


def _contest(
    vlm: VLM, exported: Path, recipe: Recipe, tokens: TokensSpec, several: bool, decoder: Decoding | None
) -> Contest:
    target, threads = load_target(recipe.engine.target), recipe.bench.threads

    def see(side: str, selection: TokensSpec | None) -> Callable[[dict[str, Tensor]], VisualTokens]:
        engine = OnnxRuntimeEngine(open_session(exported / side / MODEL, target, threads), {})
        return partial(encode, vlm.tower, form_of(vlm.tower, selection, several), selection, through(engine))

    sides = {UNPRUNED: Side(see("original", None)), "compressed": Side(see("compressed", tokens))}
    if decoder is not None:
        sides["compressed, Stage 2"] = Side(sides["compressed"].see, decoder)
    return Contest(vlm, sides, partial(_noise, vlm.tower), _QUESTION)


def _noise(tower: VisionTower, images: int) -> dict[str, Tensor]:
    return tower.example_inputs(images, torch.Generator().manual_seed(0))
