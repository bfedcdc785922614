"""What a bench times: two exported encoders, the towers they were made of, and the images both are given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from infoprune_export.engine.base import Compatibility, Engine
from infoprune_export.export.onnx import MODEL
from infoprune_export.measure.results import Parity
from infoprune_export.models import tower_of
from infoprune_export.models.tower import VisionTower
from infoprune_export.pipeline import load_vlm
from infoprune_export.recipe import BenchSpec, ModelSpec, Recipe, Target, TokensSpec, load_target
from infoprune_export.tokens.encoder import FEATURES, VisionEncoder, form_of
from infoprune_export.validate import parity
from infoprune_export.validate.bench_running import Arrays, Graph, Running, device_of, graph_of
from infoprune_export.validate.sweep_cases import model_features

Side = Literal["original", "compressed"]
SIDES: tuple[Side, ...] = ("original", "compressed")


@dataclass(frozen=True)
class Load:
    """The same random images for everyone."""

    batch_size: int
    inputs: dict[str, Tensor]
    """As the processor returns them."""
    calls: Mapping[str, list[dict[str, Tensor]]]
    """By side: planned tensors, fp32 on the CPU, of as many calls as its graph needs."""


@dataclass(frozen=True)
class BenchCase:
    onnx: Path
    """Folder with an export of each side."""
    towers: Mapping[Side, VisionTower]
    """In fp32, on the CPU."""
    tokens: TokensSpec
    several: bool | None
    """What both sides were exported with."""
    target: Target
    spec: BenchSpec
    dtype: torch.dtype
    """What both sides were exported in, and what peers run in."""
    limits: Mapping[Side, tuple[float, float]]
    """Tolerance and least cosine of each exported graph against PyTorch."""
    peer_limits: tuple[float, float]
    """The same for what peers make of the towers."""
    replay_tolerance: float | None

    @property
    def device(self) -> str:
        return device_of(self.target)

    def tokens_of(self, side: Side) -> TokensSpec | None:
        return self.tokens if side == "compressed" else None

    def encoder(self, side: Side) -> VisionEncoder:
        """A side in PyTorch, fp32."""
        return VisionEncoder(self.towers[side], self.tokens_of(side), self.several)

    def placed(self, side: Side) -> VisionTower:
        """A copy of a side's tower where and in what the target computes; the language model has no weights there."""
        model = self.towers[side].model
        nothing = nn.Parameter(torch.empty(0), requires_grad=False)
        copied = copy.deepcopy(model, memo={id(weight): nothing for weight in _language_weights(model)})
        return tower_of(copied.to(device=self.device, dtype=self.dtype))

    def vision_bytes(self, side: Side) -> int:
        """Of the weights that `placed` has."""
        model = self.towers[side].model
        elsewhere = {id(weight) for weight in _language_weights(model)}
        return sum(p.numel() for p in model.parameters() if id(p) not in elsewhere) * self.dtype.itemsize

    def typed(self, planned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Floats in the type that peers run in."""
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in planned.items()}

    def load(self, batch_size: int) -> Load:
        inputs = self.towers["original"].example_inputs(batch_size, torch.Generator().manual_seed(0))
        calls: dict[str, list[dict[str, Tensor]]] = {
            side: self.towers[side].calls(inputs, self.encoder(side).form) for side in SIDES
        }
        return Load(batch_size, inputs, calls)

    def open(self, side: Side) -> Any:
        """A side's exported graph as a session on the target.

        Raises:
            InfopruneError: the target's provider did not start.
        """
        return self.graph(side).open()

    def graph(self, side: Side) -> Graph:
        """A side's exported graph."""
        return graph_of(self.onnx / side / MODEL, self.target, self.spec.threads)


def _language_weights(model: Any) -> list[nn.Parameter]:
    """Of the language model and its head."""
    head = model.get_output_embeddings()
    return [*model.get_decoder().parameters(), *([] if head is None else head.parameters())]


def case_of_run(recipe: Recipe, onnx: Path, checkpoint: Path, original: VisionTower | None = None) -> BenchCase:
    """The two ends of a run: its ``onnx`` and ``checkpoint`` folders and, if it is loaded already, the first tower."""
    if original is None:
        original = load_vlm(recipe.model, "cpu").tower
    compressed = load_vlm(ModelSpec(name_or_path=str(checkpoint.resolve())), "cpu").tower
    several = form_of(original, recipe.tokens, recipe.export.several).several
    return case_of(recipe, onnx, {"original": original, "compressed": compressed}, recipe.tokens, several)


def case_of(
    recipe: Recipe,
    onnx: Path,
    towers: Mapping[Side, VisionTower],
    tokens: TokensSpec,
    several: bool | None,
    target: Target | None = None,
) -> BenchCase:
    """A case by a recipe's target, bench section and tolerances."""
    plain = parity.LIMITS[recipe.export.precision]
    return BenchCase(
        onnx,
        towers,
        tokens,
        several,
        target or load_target(recipe.engine.target),
        recipe.bench,
        recipe.export.dtype,
        {"original": plain, "compressed": parity.limits_of(recipe)},
        plain,
        recipe.validate_.replay_tolerance if recipe.export.numerics == "fp32" else None,
    )


# ── Parity ───────────────────────────────────────────────────────────────────


def reference_features(case: BenchCase, load: Load) -> NDArray[np.float32]:
    """What Hugging Face's own original makes of the images, fp32, the tokens of all of them in one array [N, D]."""
    return np.asarray(model_features(case.towers["original"].model, load.inputs), np.float32)


def check(
    case: BenchCase,
    side: Side,
    load: Load,
    running: Running,
    limits: tuple[float, float],
    reference: Callable[[], NDArray[np.float32]],
) -> Parity:
    """What a side's latest call returned, against PyTorch in fp32.

    The original is held to Hugging Face's own (`reference`), the compressed to its tower in PyTorch, with kept tokens
    judged as in `parity.encoder_parity`.
    """
    tolerance, cosine = limits
    if side == "original":
        actual = [one[FEATURES].reshape(-1, one[FEATURES].shape[-1]) for one in running.outputs()]
        found = parity.compare(
            reference(), np.concatenate(actual), step="bench", case=side, tolerance=tolerance, min_cosine=cosine
        )
    else:
        found = parity.encoder_parity(
            "bench",
            case.towers[side],
            case.tokens,
            _Latest(running.outputs()),
            load.inputs,
            case=side,
            tolerance=tolerance,
            min_cosine=cosine,
            replay_tolerance=case.replay_tolerance,
            several=case.several,
        )
    return {
        "relative_error": found.relative_error if np.isfinite(found.relative_error) else None,
        "cosine": found.cosine,
        "norm_ratio": found.norm_ratio,
        "tolerance": tolerance,
        "min_cosine": cosine,
        "passed": found.passed,
    }


class _Latest(Engine):
    """Outputs that are there already, call by call."""

    def __init__(self, outputs: list[Arrays]) -> None:
        self._outputs = iter(outputs)

    def run(self, **inputs: NDArray[Any]) -> Arrays:
        return next(self._outputs)

    def input_types(self) -> dict[str, np.dtype[Any]]:
        return {}

    def describe(self) -> Compatibility:
        return {}
