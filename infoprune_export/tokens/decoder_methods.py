"""Stage 2 of the paper and the published decoder-side methods, each as the steps that `decoder.pruned_decoder` takes.

What all of them get from it and may not have had: tokens are dropped behind the layer whose attention ranks them, keep
their position ids, and batches may be padded.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor, nn

from infoprune_export.errors import InfopruneError
from infoprune_export.models.vlm import Decoding
from infoprune_export.recipe import DecoderSpec
from infoprune_export.tokens.decoder import Trace, decoding
from infoprune_export.tokens.steps import Asked, Recycling, Step, check_steps, last_token
from infoprune_export.tokens.watch import text_model

_PUBLISHED_DEPTH = 32
"""Decoder layers of LLaVA-1.5-7B, for which the published methods name theirs."""


def steps_of(spec: DecoderSpec, depth: int, layer: int | None = None) -> list[Step]:
    """A recipe's decoder section for a language model of `depth` layers; `layer` is K where the section says auto.

    Raises:
        InfopruneError: K is missing, not this model's, or given to a method that has layers of its own; or a budget
            cannot be reached.
    """
    if spec.method == "none":
        return []
    if spec.method in ("pyramiddrop", "sparsevlm") and spec.layer != "auto":
        raise InfopruneError(
            f"decoder.layer = {spec.layer} with method {spec.method}: it drops behind several layers of its own; use "
            "auto"
        )
    steps = _METHODS[spec.method](spec.keep_ratio, depth, layer if spec.layer == "auto" else spec.layer)
    check_steps(steps, depth)
    return steps


def decoding_of(
    spec: DecoderSpec,
    model: nn.Module,
    layer: int | None = None,
    *,
    seed: int = 0,
    on_trace: Callable[[Trace], None] = lambda trace: None,
) -> Decoding | None:
    """`steps_of` for a model, as `models.vlm.answer` takes them; None if the section asks for nothing.

    Batches answered one after the other draw from one generator, begun with `seed`.
    """
    if spec.method == "none":
        return None
    steps = steps_of(spec, len(text_model(model).layers), layer)
    return decoding(steps, torch.Generator().manual_seed(seed), on_trace)


# ── One layer ────────────────────────────────────────────────────────────────


def _infoprune(keep: Fraction, depth: int, layer: int | None) -> list[Step]:
    """The paper's Stage 2: behind K, the ceil(R2 * T1) tokens that the last text token attends to most (eq. 9)."""
    return [Step(_required(layer), keep)]


def _random(keep: Fraction, depth: int, layer: int | None) -> list[Step]:
    """Its control: as many tokens behind the same layer, drawn at random."""
    return [Step(_required(layer), keep, queries=None)]


def _fastv(keep: Fraction, depth: int, layer: int | None) -> list[Step]:
    """FastV (Chen et al., ECCV 2024) with its K = 2: attention of the second of 32 layers, last query, heads' mean."""
    return [Step(_scaled(1, depth) if layer is None else layer, keep)]


def _required(layer: int | None) -> int:
    if layer is None:
        raise InfopruneError(
            "decoder.layer = 'auto', but no layer was determined; give a number, or `layer` from saturation.find_layer"
        )
    return layer


def _scaled(layer: int, depth: int) -> int:
    """A published layer in a model of `depth`, with one layer behind it."""
    return max(0, min(round(layer * depth / _PUBLISHED_DEPTH), depth - 2))


# ── Several layers ───────────────────────────────────────────────────────────


def _pyramiddrop(keep: Fraction, depth: int, layer: int | None) -> list[Step]:
    """PyramidDrop (Xing et al., CVPR 2025): three drops, each to `keep` of the present tokens, last instruction token.

    The layers at 1/4, 1/2 and 3/4 of the depth are the first to see fewer tokens, as published. There they rank with
    their own queries and keys before they run; here the layer before each does, whose attention is computed anyway.
    Published positions are numbered anew; here they stay.
    """
    stages = {max(0, depth * stage // 4 - 1): Step(max(0, depth * stage // 4 - 1), keep**stage) for stage in (1, 2, 3)}
    return list(stages.values())


_SPARSE_LAYERS = (2, 6, 15)
_SPARSE_BUDGETS = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
"""Tokens of 576 kept behind each of these layers, by what the method calls the retained number."""


def _sparsevlm(keep: Fraction, depth: int, layer: int | None) -> list[Step]:
    """SparseVLM v1 (Zhang et al., ICML 2025): text raters, three drops, the best of the dropped recycled.

    `keep` is what its tables call the retained share, the mean over layers. The proportions of the nearest published
    budget are scaled until that mean, recycled tokens and full layers included, is `keep` (the published lists miss
    their own name by 7 to 28%). Recycled tokens stand where their cluster's centre stood, not behind the kept ones.

    Raises:
        InfopruneError: `keep` is less than what the layers cost that see all tokens.
    """
    layers = [_scaled(number, depth) for number in _SPARSE_LAYERS]
    proportions = _SPARSE_BUDGETS[min(_SPARSE_BUDGETS, key=lambda budget: abs(budget / 576 - keep))]

    def mean(scale: float) -> float:
        total, present, seen = 0.0, 1.0, 0
        for number, share in zip(layers, proportions, strict=True):
            kept = min(present, scale * share)
            total += present * (number + 1 - seen)
            present, seen = kept + _RECYCLED_SHARE * (present - kept), number + 1
        return total + present * (depth - seen)

    low, high = 0.0, 1 / min(proportions)
    if mean(low) > keep * depth:
        raise InfopruneError(
            f"decoder.keep_ratio = {keep} with sparsevlm: the first {layers[0] + 1} of {depth} layers see all tokens, "
            f"so the mean over layers cannot be below {mean(low) / depth:.3f}; give a larger ratio"
        )
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < keep * depth else (low, middle)
    shares = [
        max(Fraction(1, 10_000), min(Fraction(1), Fraction(high * share).limit_denominator(10_000)))
        for share in proportions
    ]
    recycling = Recycling(_clusters, recycle)
    return list({n: Step(n, share, text_raters, recycling) for n, share in zip(layers, shares, strict=True)}.values())


def text_raters(asked: Asked) -> Tensor:
    """SparseVLM's raters: text behind the image that visual embeddings resemble more than the average, bool [B, L].

    softmax over the text of V T^T, mean over the visual tokens, above its own mean. The last token where there is none.
    """
    raters = torch.zeros_like(asked.visual)
    behind = asked.text & (asked.visual.cumsum(1) > 0)
    for row, (embeds, visual, text) in enumerate(zip(asked.embeds.float(), asked.visual, behind, strict=True)):
        if text.any():
            relevance = (embeds[visual] @ embeds[text].T).softmax(-1).mean(0)
            raters[row, text] = relevance > relevance.mean()
    return raters | (last_token(asked) & ~raters.any(1, keepdim=True))


_RECYCLED_SHARE = 0.03


def _candidates(dropped: int) -> int:
    return dropped * 3 // 10 + 1


def _clusters(dropped: int) -> int:
    return _candidates(dropped) // 10 + 1


def recycle(tokens: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """SparseVLM's recycling: the best 30% of the dropped tokens as means of density-peak clusters, ten tokens in each.

    Density is exp(-mean squared distance to the C nearest, itself included); a centre has much of it and is far from
    all that have more. Equal densities go to the first token where the published code adds noise.

    Args:
        tokens: [M, D] with M > 0, any floating dtype.
        scores: [M]; higher is better.

    Returns:
        Means [C, D] in the dtype of `tokens`, and which tokens the centres are, int64 [C].
    """
    count = _clusters(len(tokens))
    best = scores.argsort(descending=True, stable=True)[: _candidates(len(tokens))]
    x = tokens[best].float()
    distances = torch.cdist(x, x) / x.shape[1] ** 0.5
    density = (-distances.topk(count, largest=False).values.square().mean(1)).exp()
    rank = density.argsort(descending=True, stable=True).argsort()
    denser = rank[None] < rank[:, None]
    isolation = distances.masked_fill(~denser, torch.inf).amin(1).clamp_max(distances.max())
    centres = (density * isolation).argsort(descending=True, stable=True)[:count]
    nearest = distances[:, centres].argmin(1)
    nearest[centres] = torch.arange(count, device=centres.device)
    members = nn.functional.one_hot(nearest, count).to(x).T
    return (members @ x / members.sum(1, keepdim=True)).to(tokens.dtype), best[centres]


_METHODS: dict[str, Callable[[Fraction, int, int | None], list[Step]]] = {
    "infoprune": _infoprune,
    "random": _random,
    "fastv": _fastv,
    "pyramiddrop": _pyramiddrop,
    "sparsevlm": _sparsevlm,
}
