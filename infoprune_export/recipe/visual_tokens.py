"""Sections about visual tokens: Stage 1 in front of the language model and Stage 2 inside it (paper B)."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from infoprune_export.recipe.base import Ratio, Spec


class TokensSpec(Spec):
    """Stage 1 visual-token selection (paper B, section 3.1 and Algorithm 1).

    The paper's own setting is ``prior: cls, quality: softmax, exponent: 0.5, normalize: false, merge_above: -1,
    positions: contiguous``; the defaults differ where it was measured to lose accuracy on the testbeds.
    """

    method: Literal[
        "infoprune",
        "none",
        "random",
        "stride",
        "pool",
        "downsample",
        "fastervlm",
        "visionzip",
        "divprune",
        "cdpruner",
        "vscan",
    ] = "infoprune"
    """``infoprune`` alone can be exported. The others are to compare with, in PyTorch, and take from here `keep_ratio`
    and `positions` only: the controls ``random``, ``stride`` (uniform over the raster), ``pool`` (means over the grid)
    and ``downsample`` (a smaller image); ``fastervlm`` and ``visionzip`` (the tower's attention), ``vscan`` (attention
    of a shallow block and the last), ``divprune`` and ``cdpruner`` (diversity; the latter without text relevance)."""
    keep_ratio: Ratio = Fraction(1, 2)
    """T = ceil(N * keep_ratio)."""
    prior: Literal["cls", "received", "value"] = "value"
    """Attention that ranks tokens: the [CLS] row, what each token receives from all others on average, or that times
    the norm of its value: what it contributes to the others."""
    pool_factor: float = Field(8.0, ge=1)
    """alpha: the greedy step chooses among the ceil(alpha T) tokens with the highest prior; 2 or 3 in the paper. With a
    quality that is not constant the prior has its say in the greedy step, and a small pool loses accuracy at 1/9."""
    quality: Literal["power", "softmax"] = "power"
    """q in Z = sqrt(q) x, from the prior a: (a / max a)^exponent, or the paper's softmax(a / temperature)^exponent,
    which is as good as constant, because attention to one of hundreds of tokens is far smaller than the temperature."""
    exponent: float = Field(1.0, ge=0)
    """gamma_q; 0.5 in the paper."""
    temperature: float = Field(0.7, gt=0)
    """tau of ``softmax``."""
    normalize: bool = True
    """Select on unit-length features, so that novelty counts and length does not."""
    merge: bool = True
    """Fold dropped tokens into the kept token each is most similar to."""
    merge_above: float = Field(0.8, ge=-1, le=1)
    """Only those with at least this cosine similarity; the paper merges all, which costs accuracy at small budgets."""
    inertia: float = Field(1.0, gt=0)
    """Weight of the kept token in its merge; the paper leaves it open."""
    positions: Literal["original", "contiguous"] = "original"
    """Position ids of kept tokens in the language model: where they were, or 0..T-1. The paper leaves it open."""


def _as_layer(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 0):
        return value
    raise ValueError("expected auto or the number of a layer, counted from 0")


class DecoderSpec(Spec):
    """Stage 2: visual tokens dropped between two layers of the language model (paper B, section 3.2).

    ``random`` is its control; ``fastv``, ``pyramiddrop`` and ``sparsevlm`` are published methods to compare with.
    """

    method: Literal["none", "infoprune", "random", "fastv", "pyramiddrop", "sparsevlm"] = "none"
    """See above; ``none`` keeps all tokens in all layers."""
    layer: Annotated[Annotated[int, Field(ge=0)] | Literal["auto"], BeforeValidator(_as_layer)] = "auto"
    """K, from 0: attention in this layer ranks the tokens, and the layers behind it see the kept ones. The paper has 15
    of 32 for LLaVA-7B and 13 of 28 for Qwen2.5-VL-7B. Auto: where the paper's saturation signals settle on the
    calibration images; the published methods take their own layers, scaled to the model's depth."""
    keep_ratio: Ratio = Fraction(1, 3)
    """R2, of the visual tokens that enter the language model."""

    @property
    def finds_layer(self) -> bool:
        """Whether K has to be found; the published methods have layers of their own."""
        return self.layer == "auto" and self.method in ("infoprune", "random")
