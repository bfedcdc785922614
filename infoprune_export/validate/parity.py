"""Numerical parity of two implementations of the same thing: stated first, then checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from infoprune_export.engine.base import Engine
from infoprune_export.export.onnx import VisionEncoder
from infoprune_export.ffn.plan import FfnPlan
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.models.tower import VisionTower
from infoprune_export.recipe import TokensSpec
from infoprune_export.rewrite.surgery import ATTENTION_OUT, FFN_IN, FFN_OUT
from infoprune_export.tokens.reference import replay


@dataclass(frozen=True)
class Parity:
    """One comparison. All three figures belong together: cosine is blind to scale, the largest error to its spread."""

    step: str
    case: str
    relative_error: float
    """Largest absolute difference over the largest absolute reference value."""
    cosine: float
    norm_ratio: float
    tolerance: float
    kept_suboptimality: float | None = None
    """Worst step of the kept indices under the replay rule; None without selection."""
    replay_tolerance: float | None = None

    @property
    def passed(self) -> bool:
        kept = self.kept_suboptimality is None or self.kept_suboptimality <= (self.replay_tolerance or 0)
        return bool(self.relative_error <= self.tolerance and kept)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def compare(reference: NDArray[Any], candidate: NDArray[Any], **labels: Any) -> Parity:
    """Compare two arrays of one shape; anything not finite in the candidate makes the error infinite."""
    if reference.shape != candidate.shape or not np.isfinite(candidate).all():
        return Parity(relative_error=np.inf, cosine=0.0, norm_ratio=0.0, **labels)
    a, b = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    return Parity(
        relative_error=float(np.abs(a - b).max() / max(np.abs(a).max(), np.finfo(np.float64).tiny)),
        cosine=float(a @ b / max(norms[0] * norms[1], np.finfo(np.float64).tiny)),
        norm_ratio=norms[1] / max(norms[0], np.finfo(np.float64).tiny),
        **labels,
    )


# ── Masked model ─────────────────────────────────────────────────────────────


@contextlib.contextmanager
def masked(
    tower: VisionTower,
    heads: HeadPlan,
    ffn: FfnPlan,
    weights: Mapping[str, Tensor],
) -> Iterator[None]:
    """A full-size tower made to compute what the plans ask for by masking, not by removal.

    Dropped heads and neurons are zeroed where they enter their projection; refitted weights go into the kept columns. A
    linear FFN becomes the dense product of its factors. The tower is changed for good (give it a copy); only the masks
    end with the block.
    """
    handles = []
    for i, block in enumerate(tower.blocks):
        width = block.head_dim
        channels = torch.tensor([h * width + c for h in heads.kept[i] for c in range(width)], dtype=torch.long)
        handles.append(_mask(block.attention_out, channels))
        _place(block.attention_out, channels, weights, f"{i}.{ATTENTION_OUT}")
        choice = ffn.choices[i]
        if choice.kind == "mlp":
            neurons = torch.tensor(choice.neurons, dtype=torch.long)
            handles.append(_mask(block.ffn_out, neurons))
            _place(block.ffn_out, neurons, weights, f"{i}.{FFN_OUT}")
        else:
            up, down = weights[f"{i}.{FFN_IN}.weight"], weights[f"{i}.{FFN_OUT}.weight"]
            block.make_ffn_linear(len(down))
            with torch.no_grad():
                block.ffn_in.weight.copy_(down @ up)
            block.set_ffn_out(torch.eye(len(down)), weights[f"{i}.{FFN_OUT}.bias"])
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mask(projection: nn.Linear, kept: Tensor) -> Any:
    mask = torch.zeros(projection.in_features).index_fill(0, kept, 1.0)
    return projection.register_forward_pre_hook(lambda _, arguments: (arguments[0] * mask.to(arguments[0]),))


@torch.no_grad()
def _place(projection: nn.Linear, kept: Tensor, weights: Mapping[str, Tensor], name: str) -> None:
    if f"{name}.weight" in weights:
        projection.weight[:, kept] = weights[f"{name}.weight"]
        projection.bias.copy_(weights[f"{name}.bias"])


# ── PyTorch against an engine ────────────────────────────────────────────────


def encoder_parity(
    step: str,
    tower: VisionTower,
    tokens: TokensSpec,
    engine: Engine,
    inputs: Mapping[str, Tensor],
    *,
    case: str,
    tolerance: float,
    replay_tolerance: float,
) -> Parity:
    """Compare an engine with PyTorch on one batch of CPU inputs.

    With selection, kept indices are judged by replay, and features on the images where both kept the same tokens
    (elsewhere the outputs belong to different tokens). When not one image agrees, features count as unequal.
    """
    batch = len(inputs["pixel_values"])
    labels: dict[str, Any] = {"step": step, "case": case, "tolerance": tolerance}
    outputs = engine.run(**{name: value.numpy() for name, value in inputs.items()})
    encoder = VisionEncoder(tower, tokens)
    with torch.inference_mode():
        expected = encoder(inputs["pixel_values"])
        if not isinstance(expected, tuple):
            return compare(expected.numpy(), outputs["image_features"], **labels)
        features, kept = (value.numpy() for value in expected)
        before_last, stream = tower.run_blocks(tower.embed(inputs))
        visible = tower.visual_tokens(stream)
        prior = tower.attention_prior(before_last, tokens.prior).numpy()
        candidates = (F.normalize(visible, dim=-1) if tokens.normalize else visible).numpy()
    theirs = outputs["kept_indices"]
    worst = max(
        replay(candidates[i], prior[i], theirs[i], tokens.pool_factor, tokens.temperature, tokens.exponent)
        for i in range(batch)
    )
    same = (theirs == kept).all(1)
    labels |= {"kept_suboptimality": worst, "replay_tolerance": replay_tolerance}
    if not same.any():
        return Parity(relative_error=np.inf, cosine=0.0, norm_ratio=0.0, **labels)
    return compare(features[same], outputs["image_features"][same], **labels)
