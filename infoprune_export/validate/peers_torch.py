"""PyTorch itself: Hugging Face's model as it is called today, our towers, and both compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infoprune_export.tokens.encoder import FEATURES, VisionEncoder
from infoprune_export.validate.bench_case import SIDES, BenchCase, Load, Side
from infoprune_export.validate.bench_running import Running, module_running
from infoprune_export.validate.peers import Peer, Start

Function = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def _never_missing(case: BenchCase) -> str | None:
    return None


def _eager(case: BenchCase, side: Side) -> Start:
    """The original by its own ``get_image_features``, all images in one call; the compressed as `VisionEncoder`."""
    tower = case.placed(side)
    if side == "original":
        own = own_features(tower.model)
        return lambda load: module_running(own, [case.typed(load.inputs)], case.device)
    encoder = VisionEncoder(tower, case.tokens, case.several)
    return lambda load: module_running(encoder.run, [case.typed(one) for one in load.calls[side]], case.device)


def own_features(model: Any) -> Function:
    """A Hugging Face model's own image features, those of all images in one array [N, D]."""

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = model.get_image_features(**inputs)
        parts = [outputs.pooler_output, *(getattr(outputs, "deepstack_features", None) or ())]
        return {FEATURES: torch.cat([torch.cat(list(part)) for part in parts], dim=-1)}

    return run


def _compile(case: BenchCase, side: Side) -> Start:
    """`VisionEncoder`, which traces without graph breaks, for the shapes of each batch size; planned beforehand."""
    encoder = VisionEncoder(case.placed(side), case.tokens_of(side), case.several)

    def start(load: Load) -> Running:
        if side == SIDES[0]:
            # Else a third batch size would exceed the number of compilations that one function is allowed. The other
            # side comes behind and must not lose this one's.
            torch.compiler.reset()
        fast: Any = torch.compile(encoder, dynamic=False)

        def run(planned: dict[str, Tensor]) -> dict[str, Tensor]:
            outputs = fast(planned)
            values = outputs if isinstance(outputs, tuple) else (outputs,)
            return dict(zip(encoder.output_names, values, strict=True))

        return module_running(run, [case.typed(one) for one in load.calls[side]], case.device)

    return start


def vision_weights(case: BenchCase, side: Side) -> int:
    """Bytes of a side's weights; see `Peer.weights`."""
    return case.vision_bytes(side)


EAGER = Peer("torch", SIDES, _never_missing, _eager, vision_weights)
COMPILE = Peer("torch", SIDES, _never_missing, _compile, vision_weights)
