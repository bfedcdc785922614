"""Every FFN method by its recipe name; all are called alike and end in one kind of plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from infoprune_export.data.vqa import Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.bypass import compress_bypass
from infoprune_export.ffn.obs import compress_obs
from infoprune_export.ffn.plan import FfnPlan
from infoprune_export.ffn.prunenet import compress_prunenet
from infoprune_export.ffn.rrr import compress_rrr
from infoprune_export.ffn.scores import compress_activation, compress_magnitude, compress_random
from infoprune_export.ffn.svd import compress_paper
from infoprune_export.ffn.taylor import compress_taylor
from infoprune_export.ffn.whitened import compress_whitened
from infoprune_export.models.calibration import TaskLoss
from infoprune_export.models.vlm import VLM
from infoprune_export.recipe import FfnSpec


class Method(Protocol):
    """`compress_ffn` for one method."""

    def __call__(
        self,
        original: VLM,
        pruned: VLM,
        samples: Sequence[Sample],
        loss: TaskLoss,
        spec: FfnSpec,
        *,
        ridge: float | None,
        seed: int,
        on_block: Callable[[int], None] = ...,
    ) -> tuple[FfnPlan, dict[str, Tensor]]: ...


METHODS: dict[str, Method] = {
    "obs": compress_obs,
    "bypass": compress_bypass,
    "whitened_svd": compress_whitened,
    "rrr": compress_rrr,
    "taylor": compress_taylor,
    "paper": compress_paper,
    "prunenet": compress_prunenet,
    "activation": compress_activation,
    "magnitude": compress_magnitude,
    "random": compress_random,
}
"""What ``ffn.method`` can be besides ``none``."""


def compress_ffn(
    original: VLM,
    pruned: VLM,
    samples: Sequence[Sample],
    loss: TaskLoss,
    spec: FfnSpec,
    *,
    ridge: float | None,
    seed: int,
    on_block: Callable[[int], None] = lambda block: None,
    widths: Sequence[int] | None = None,
) -> tuple[FfnPlan, dict[str, Tensor]]:
    """Compress the FFNs of `pruned` in place, which may have lost heads already; `original` is what it is fitted to.

    Unless `ridge` is None every method but ``paper`` and ``taylor`` fits what it leaves to the original's residual
    stream, block by block behind its already fitted predecessors. Otherwise kept neurons stay exactly what they were,
    and maps that stand for removed ones are fitted to the block's own FFN. `samples` need no labels unless `loss` does.
    `on_block` is called once or twice for every block. `widths` are given where ``obs`` keeps so many neurons per block
    instead of choosing by `keep_macs`.

    Returns the plan, and the weights that `surgery.apply_ffn` needs to do the same to another copy of the tower.

    Raises:
        InfopruneError: an FFN is compressed already, or the budget is too small for the method.
    """
    for i, block in enumerate(pruned.tower.blocks):
        if block.ffn_shape.kind != "mlp":
            raise InfopruneError(f"block {i}: the FFN is {block.ffn_shape.kind} already; compress the original model")
    if widths is not None:
        return compress_obs(
            original, pruned, samples, loss, spec, ridge=ridge, seed=seed, on_block=on_block, widths=widths
        )
    return METHODS[spec.method](original, pruned, samples, loss, spec, ridge=ridge, seed=seed, on_block=on_block)
