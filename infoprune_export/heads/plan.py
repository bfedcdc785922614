"""Which attention heads each block keeps, and how scores become that choice."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from infoprune_export.errors import InfopruneError
from infoprune_export.recipe import HeadsSpec


@dataclass(frozen=True)
class HeadPlan:
    """``kept[l]`` are the heads block l keeps, ascending; ``total[l]`` is how many it has."""

    total: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.total) != len(self.kept):
            raise InfopruneError(f"head plan has {len(self.kept)} blocks of heads for {len(self.total)} blocks")
        for block, (count, heads) in enumerate(zip(self.total, self.kept, strict=True)):
            if list(heads) != sorted(set(heads)) or (heads and not 0 <= heads[0] <= heads[-1] < count):
                raise InfopruneError(
                    f"head plan, block {block}: {list(heads)} is no ascending choice of 0..{count - 1}"
                )

    @property
    def removed_fraction(self) -> float:
        return 1 - sum(map(len, self.kept)) / sum(self.total)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> HeadPlan:
        return cls(tuple(value["total"]), tuple(tuple(heads) for heads in value["kept"]))

    @classmethod
    def full(cls, counts: list[int]) -> HeadPlan:
        """Keep every head."""
        return cls(tuple(counts), tuple(tuple(range(count)) for count in counts))


def plan_heads(scores: Tensor, spec: HeadsSpec) -> HeadPlan:
    """Which heads scores [L, H], larger = keep, leave in place.

    By threshold (Algorithm 1): heads whose gate, the score's sigmoid, is at least `threshold`. By budget: the largest
    over all blocks, until `remove` of them are gone. The last block always keeps its best head, because the token prior
    is read from its attention.

    Raises:
        InfopruneError: a score is not finite.
    """
    if not torch.isfinite(scores).all():
        raise InfopruneError(
            f"{int((~torch.isfinite(scores)).sum())} of {scores.numel()} head scores are not finite numbers; look for "
            "them in the model's weights, or lower heads.learning_rate"
        )
    blocks, heads = scores.shape
    by_threshold = spec.resolved().choose == "threshold"
    # Stable, so that ties fall to the lowest index on every machine.
    ranked = scores.flatten().argsort(descending=True, stable=True)
    if by_threshold:
        kept = torch.sigmoid(scores) >= spec.threshold
    else:
        count = blocks * heads - math.floor(spec.remove * blocks * heads + 0.5)
        kept = torch.zeros(blocks * heads, dtype=torch.bool)
        kept[ranked[:count]] = True
        kept = kept.view(blocks, heads)
    if not kept[-1].any():
        kept[-1, int(scores[-1].argmax())] = True
        if not by_threshold and kept.sum() > 1:
            last_kept = next(i for i in reversed(ranked.tolist()) if kept.view(-1)[i] and i < (blocks - 1) * heads)
            kept.view(-1)[last_kept] = False
    return HeadPlan((heads,) * blocks, tuple(tuple(row.nonzero().flatten().tolist()) for row in kept))
