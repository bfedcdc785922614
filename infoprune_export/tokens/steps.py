"""What a decoder-side method asks for: behind which layers, how many visual tokens go on, and whose attention ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor
from torch.nn import functional as F

from infoprune_export.errors import InfopruneError
from infoprune_export.tokens.select import keep_count


@dataclass(frozen=True)
class Asked:
    """A prefill as those see it who choose the text tokens that ask."""

    embeds: Tensor
    """Input of the first layer, [B, L, D]."""
    visual: Tensor
    """bool [B, L]."""
    text: Tensor
    """Prompt tokens that are not visual, without padding and without what follows `last`, bool [B, L]."""
    last: Tensor
    """Where each prompt ends, int64 [B]."""


Queries = Callable[[Asked], Tensor]
"""Text tokens whose attention ranks, bool [B, L], at least one in every row."""


def last_token(asked: Asked) -> Tensor:
    """The last token of each prompt alone."""
    return F.one_hot(asked.last, asked.visual.shape[1]).bool()


@dataclass(frozen=True)
class Recycling:
    """Dropped tokens that come back as means of a few clusters."""

    count: Callable[[int], int]
    """Clusters made of so many dropped tokens; at most as many."""
    merge: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Hidden states [M, D] and scores [M] of dropped tokens to means [C, D] and the tokens they replace, int64 [C]."""


@dataclass(frozen=True)
class Step:
    """Behind `layer` (from 0), every row goes on with ceil(keep * N) of the N visual tokens that it began with."""

    layer: int
    keep: Fraction
    queries: Queries | None = last_token
    """Scores are attention in `layer`, mean over its heads and over these tokens (eq. 9); None ranks at random."""
    recycling: Recycling | None = None

    def survivors(self, began: int, present: int) -> tuple[int, int]:
        """How many of a row's `present` tokens are kept, and how many more come back."""
        kept = min(present, keep_count(began, self.keep.numerator, self.keep.denominator))
        return kept, self.recycling.count(present - kept) if self.recycling and kept < present else 0


def check_steps(steps: Sequence[Step], depth: int) -> None:
    """Refuse steps that a language model of `depth` layers cannot take."""
    layers = [step.layer for step in steps]
    if layers != sorted(set(layers)):
        raise InfopruneError(f"steps behind layers {layers}: give each layer at most one step, in ascending order")
    for step in steps:
        if not 0 <= step.layer < depth - 1:
            fix = f"use 0 to {depth - 2}" if depth > 1 else "use decoder.method: none"
            raise InfopruneError(
                f"decoder layer {step.layer}: of this language model's layers, {depth} in all, one must follow; {fix}"
            )
        if not 0 < step.keep <= 1:
            raise InfopruneError(f"keep ratio {step.keep} is outside (0, 1]: keep at least one token and at most all")


def tokens_per_layer(steps: Sequence[Step], depth: int, tokens: int) -> list[int]:
    """Visual tokens that each of `depth` layers sees of `tokens`; their mean and maximum compare methods fairly."""
    counts, present = [], tokens
    behind = {step.layer: step for step in steps}
    for layer in range(depth):
        counts.append(present)
        if layer in behind:
            present = sum(behind[layer].survivors(tokens, present))
    return counts
