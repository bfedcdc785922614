"""From scores of heads to a tower without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from infoprune_export.data.samples import Sample
from infoprune_export.heads.gates import fold_gates, output_projections
from infoprune_export.heads.plan import HeadPlan, plan_heads
from infoprune_export.heads.refit import refit_heads
from infoprune_export.models.vlm import VLM, writable_copy
from infoprune_export.recipe import HeadsSpec
from infoprune_export.rewrite.surgery import apply_heads


def prune_heads(
    original: VLM,
    scored: Mapping[str, Tensor],
    spec: HeadsSpec,
    samples: Sequence[Sample],
    ridge: float | None,
    heads: Sequence[Sequence[int]] | None = None,
) -> tuple[VLM, HeadPlan, dict[str, Tensor]]:
    """A copy of `original` with the heads gone, the plan, and the weights that changed, under `surgery`'s names.

    `scored` has ``scores`` [L, H] and of trained gates their values ``gates`` [L, H]. `heads` are kept where they are
    settled already; else the section chooses. Refitted unless `ridge` is None; ``paper`` is never refitted.
    """
    plan = plan_heads(scored["scores"], spec)
    if heads is not None:
        plan = HeadPlan(plan.total, tuple(map(tuple, heads)))
    pruned = writable_copy(original)
    weights: dict[str, Tensor] = {}
    if spec.survivors == "gate":
        fold_gates(pruned.tower, scored["gates"])
    if spec.method != "paper" and ridge is not None:
        weights = refit_heads(original, pruned, plan, samples, ridge)
    else:
        apply_heads(pruned.tower, plan, {})
        if spec.survivors == "gate":
            weights = output_projections(pruned.tower)
    return pruned, plan, weights
