"""Sections about the tower's structure: heads, feed-forward networks and what is fitted behind them (paper A)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from infoprune_export.recipe.base import Spec


class HeadsSpec(Spec):
    """Attention-head pruning (paper A, section 4.1).

    ``paper`` is its objective to the letter: ``task + alpha |zeta|_1 + beta eRank + gamma KS`` and a threshold.
    ``budgeted`` repairs what was measured to be wrong with it: the penalty is on the gates' sum instead of |zeta|
    (whose minimum is the threshold itself), KS becomes a sorted Wasserstein-1 distance (KS has no gradient), heads are
    chosen by budget, survivors get gate 1, and the output projection is refitted.
    """

    method: Literal["budgeted", "paper", "none"] = "budgeted"
    remove: float = Field(0.5, ge=0, lt=1)
    """Fraction of all heads that ``budgeted`` removes."""
    threshold: float = Field(0.5, gt=0, lt=1)
    """``paper`` keeps a head whose gate is at least this (z)."""
    alpha: float = Field(0.01, ge=0)
    beta: float = Field(0.01, ge=0)
    gamma: float = Field(0.1, ge=0)
    learning_rate: float = Field(1e-2, gt=0)
    epochs: int = Field(7, ge=1)
    batch_size: int = Field(32, ge=1)
    """Images per step."""
    questions_per_image: int = Field(1, ge=1)
    """Drawn anew from the image's questions at every epoch."""
    initial_zeta: float = 3.0
    """The paper says only "a large value"; sigmoid(3) = .95."""


class FfnSpec(Spec):
    """Feed-forward compression (paper A, section 4.2).

    ``paper`` replaces the network by the truncated SVD of W2 W1 (Algorithm 2): linear, chosen by `epsilon`. ``obs``
    removes neurons: optimal-brain-surgeon cost in the output-gradient metric, widths from one budget over all blocks.
    """

    method: Literal["obs", "paper", "none"] = "obs"
    keep_macs: float = Field(0.5, gt=0, le=1)
    """Fraction of all FFN multiply-accumulates that ``obs`` keeps."""
    round_to: int = Field(64, ge=1)
    """Widths are multiples of this; GEMM kernels waste the rest of a tile."""
    epsilon: float = Field(0.05, gt=0, lt=1)
    """``paper``: keep the fewest singular values with at least (1 - epsilon^2) of the squared sum."""


class RefitSpec(Spec):
    """Ridge least squares that fits output projections (heads) and down projections (FFN) to the original model."""

    enabled: bool = True
    ridge: float = Field(0.1, gt=0)
    """Added to the normal matrix's diagonal, relative to its mean. On the testbed .001 to .1 are equal at 448 images;
    with few images the larger one is safer."""
