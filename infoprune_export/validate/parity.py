"""Numerical parity of two implementations of the same thing: stated first, then checked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from infoprune_export.engine.base import Engine
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.models.tower import Block, VisionTower
from infoprune_export.recipe import Recipe, TokensSpec
from infoprune_export.rewrite.surgery import ATTENTION_OUT, FFN_BYPASS, FFN_IN, FFN_OUT
from infoprune_export.tokens.encoder import FEATURES, KEPT, VisionEncoder
from infoprune_export.tokens.reference import replay
from infoprune_export.tokens.select import consolidate, keep_count, weighting
from infoprune_export.tokens.selector import Candidates


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
    min_cosine: float = 0.0

    @property
    def passed(self) -> bool:
        kept = self.kept_suboptimality is None or self.kept_suboptimality <= (self.replay_tolerance or 0)
        return bool(self.relative_error <= self.tolerance and self.cosine >= self.min_cosine and kept)

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
    linear FFN, a factored projection and a bypass become the dense product of their factors. The tower is changed for
    good (give it a copy); only the masks end with the block.
    """
    handles = []
    for i, block in enumerate(tower.blocks):
        width = block.head_dim
        channels = torch.tensor([h * width + c for h in heads.kept[i] for c in range(width)], dtype=torch.long)
        handles.append(_mask(block.attention_out, channels))
        _place(block.attention_out, channels, weights, f"{i}.{ATTENTION_OUT}")
        choice = ffn.choices[i]
        if choice.kind == "factored":
            _place_products(block, choice, weights, i)
            handles.append(_mask(block.ffn_out, torch.tensor(choice.neurons, dtype=torch.long)))
        elif choice.kind != "linear":
            neurons = torch.tensor(choice.neurons, dtype=torch.long)
            handles.append(_mask(block.ffn_out, neurons))
            out = {name: value for name, value in weights.items() if name.startswith(f"{i}.{FFN_OUT}.")}
            if choice.kind == "bypass":
                both = out[f"{i}.{FFN_OUT}.weight"]
                out[f"{i}.{FFN_OUT}.weight"] = both[:, : choice.size]
                dense = both[:, choice.size :] @ weights[f"{i}.{FFN_BYPASS}.weight"]
                handles.append(_add_linear(block.ffn, dense))
            _place(block.ffn_out, neurons, out, f"{i}.{FFN_OUT}")
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


@torch.no_grad()
def _place_products(block: Block, choice: FfnChoice, weights: Mapping[str, Tensor], number: int) -> None:
    """Dense products of the factors, into the kept neurons' rows and columns of the full-size projections."""
    kept = torch.tensor(choice.neurons, dtype=torch.long)
    for role, projection in block.ffn_projections.items():
        product = weights[f"{number}.{role}.weight"] @ weights[f"{number}.{role}_factor.weight"]
        if role == FFN_OUT:
            projection.weight[:, kept] = product
            projection.bias.copy_(weights[f"{number}.{role}.bias"])
        else:
            projection.weight[kept] = product
            projection.bias[kept] = weights[f"{number}.{role}.bias"]


def _add_linear(ffn: nn.Module, weight: Tensor) -> Any:
    return ffn.register_forward_hook(lambda _, arguments, output: output + F.linear(arguments[0], weight))


# ── PyTorch against an engine ────────────────────────────────────────────────

# Largest error over scale, and smallest cosine, by `ExportSpec.numerics`.
LIMITS = {"fp32": (1e-4, 0.999999), "fp16": (3e-2, 0.9995), "bf16": (0.2, 0.99), "int8": (0.5, 0.99)}


def limits_of(recipe: Recipe) -> tuple[float, float]:
    """Tolerance and smallest cosine that a recipe's export is held to."""
    tolerance, cosine = LIMITS[recipe.export.numerics]
    spec = recipe.validate_
    return (
        tolerance if spec.onnx_tolerance is None else spec.onnx_tolerance,
        cosine if spec.min_cosine is None else spec.min_cosine,
    )


def through(engine: Engine) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """An engine as `encode` calls it: planned tensors in, named outputs out, in fp32."""
    types = engine.input_types()

    def run(planned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arrays = {
            name: value.cpu().numpy().astype(types.get(name, value.numpy().dtype)) for name, value in planned.items()
        }
        outputs = {name: torch.from_numpy(value) for name, value in engine.run(**arrays).items()}
        return {name: value.float() if value.is_floating_point() else value for name, value in outputs.items()}

    return run


def encoder_parity(
    step: str,
    tower: VisionTower,
    tokens: TokensSpec,
    engine: Engine,
    inputs: Mapping[str, Tensor],
    *,
    case: str,
    tolerance: float,
    min_cosine: float,
    replay_tolerance: float | None,
    several: bool | None = None,
) -> Parity:
    """Compare an engine with the tower in PyTorch, fp32, on a processor's outputs, in as many calls as its form needs.

    With selection, kept indices are judged by replay (unless `replay_tolerance` is None), and features against what
    PyTorch makes of the engine's own choice. Left out are kept tokens that a dropped one is merged into by a hair's
    breadth: in another precision it may go to its neighbour, which is as right.
    """
    encoder, run = VisionEncoder(tower, tokens, several), through(engine)
    expected, actual, worst = [], [], None
    with torch.inference_mode():
        for planned in tower.calls(inputs, encoder.form):
            theirs = run(planned)
            if not encoder.form.selecting:
                expected.append(encoder.run(planned)[FEATURES].flatten(0, -2))
                actual.append(theirs[FEATURES].flatten(0, -2))
                continue
            candidates = encoder.candidates(planned)
            chosen = _places(candidates, theirs[KEPT])
            if replay_tolerance is not None:
                seen = candidates.compared, candidates.prior(tokens.prior), candidates.counts
                worst = max(worst or 0.0, suboptimality(*seen, tokens, chosen))
            if chosen is None:
                expected.append(torch.zeros(1))
                actual.append(torch.empty(0))
                continue
            certain = certain_merges(candidates.tokens, candidates.counts, tokens, chosen, min(tolerance, MARGIN))
            expected.append(tower.project(consolidate(candidates, tokens, chosen).tokens)[certain])
            actual.append(theirs[FEATURES][certain] if theirs[FEATURES].shape[:2] == chosen.shape else torch.empty(0))
    labels: dict[str, Any] = {"step": step, "case": case, "tolerance": tolerance, "min_cosine": min_cosine}
    if worst is not None:
        labels |= {"kept_suboptimality": worst, "replay_tolerance": replay_tolerance}
    if not sum(map(len, expected)):
        return Parity(relative_error=np.inf, cosine=0.0, norm_ratio=0.0, **labels)
    shapes_agree = all(a.shape == b.shape for a, b in zip(expected, actual, strict=True))
    candidate = torch.cat(actual).numpy() if shapes_agree else np.full(1, np.nan)
    return compare(torch.cat(expected).numpy(), candidate, **labels)


MARGIN = 1e-2
"""Lead in cosine similarity, at most, by which a merge counts as certain."""


def _places(candidates: Candidates, kept: Tensor) -> Tensor | None:
    """An engine's kept positions [B, T] as indices of candidates, -1 as it was; None if some are no candidates."""
    counts = candidates.counts
    everything = torch.arange(candidates.tokens.shape[1]).expand(len(counts), -1)
    positions = candidates.tower.kept_positions(everything, candidates.planned)
    positions = positions.masked_fill(everything >= counts[:, None], torch.iinfo(torch.int64).max)
    places = torch.searchsorted(positions, kept.clamp_min(0).contiguous()).clamp_max(positions.shape[1] - 1)
    if len(kept) != len(counts) or not torch.equal(positions.gather(1, places), kept.clamp_min(0)):
        return None
    return torch.where(kept < 0, kept, places)


def suboptimality(
    compared: Tensor, received: Tensor, counts: Tensor, tokens: TokensSpec, chosen: Tensor | None
) -> float:
    """Worst replay over the images of one call; the worst there is for tokens that are none, or of a wrong number.

    compared fp32 [B, N, D], the prior received fp32 [B, N] and counts int64 [B] are what selection sees (`Candidates`);
    chosen int64 [B, T] is what it kept.
    """
    if chosen is None or len(chosen) != len(counts):
        return 1.0
    features = (F.normalize(compared, dim=-1) if tokens.normalize else compared).numpy()
    weights, temperature = weighting(received, tokens)
    prior, ratio, worst = weights.numpy(), tokens.keep_ratio, 0.0
    for i, count in enumerate(counts.tolist()):
        kept = chosen[i][chosen[i] >= 0].numpy()
        if len(kept) != keep_count(count, ratio.numerator, ratio.denominator):
            return 1.0
        settings = (tokens.pool_factor, temperature, tokens.exponent)
        worst = max(worst, replay(features[i, :count], prior[i, :count], kept, *settings))
    return worst


def certain_merges(visual: Tensor, counts: Tensor, tokens: TokensSpec, chosen: Tensor, margin: float) -> Tensor:
    """Kept tokens, bool [B, T], for which it is clear by a margin of every dropped token whether it is merged into.

    Of `visual` tokens [B, N, E], the first `counts` [B] of each image are its own; chosen as in `suboptimality`.
    """
    if not tokens.merge:
        return chosen >= 0
    unit = F.normalize(visual, dim=-1)
    anchors = unit.gather(1, chosen.clamp_min(0)[..., None].expand(-1, -1, unit.shape[2]))
    similar = (unit @ anchors.transpose(1, 2)).masked_fill((chosen < 0)[:, None, :], -torch.inf)
    best = similar.amax(2, keepdim=True)
    rivals = similar > best - margin
    own = torch.arange(unit.shape[1]) < counts[:, None]
    dropped = own & (chosen[:, None, :] != torch.arange(unit.shape[1])[:, None]).all(2)
    near = best[..., 0] - tokens.merge_above
    undecided = dropped & (near > -margin) & ((rivals.sum(2) > 1) | (near < margin))
    return (chosen >= 0) & ~(rivals & undecided[..., None]).any(1)
