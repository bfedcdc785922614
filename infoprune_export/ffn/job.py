"""What every FFN method is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from infoprune_export.data.samples import Sample
from infoprune_export.ffn.plan import FfnPlan
from infoprune_export.models.calibration import TaskLoss
from infoprune_export.models.vlm import VLM
from infoprune_export.recipe import FfnSpec

Compressed = tuple[FfnPlan, dict[str, Tensor]]
"""The plan, and the weights that `surgery.apply_ffn` needs to do the same to another copy of the tower."""


@dataclass(frozen=True)
class FfnJob:
    """One tower whose FFNs are to be compressed."""

    original: VLM
    """What the result is fitted to."""
    pruned: VLM
    """Compressed in place; may have lost heads already."""
    samples: Sequence[Sample]
    """Calibration images; they need no labels unless `loss` does."""
    loss: TaskLoss
    spec: FfnSpec
    ridge: float | None
    """Of the refit to the original's residual stream, block by block behind its already fitted predecessors. None:
    kept neurons stay exactly what they were, and maps that stand for removed ones are fitted to the block's own FFN."""
    seed: int
    on_block: Callable[[int], None] = lambda block: None
    """Called once or twice for every block."""
