"""Every FFN method by its recipe name; all are called alike and end in one kind of plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.bypass import compress_bypass
from infoprune_export.ffn.job import Compressed, FfnJob
from infoprune_export.ffn.obs import compress_obs
from infoprune_export.ffn.prunenet import compress_prunenet
from infoprune_export.ffn.rrr import compress_rrr
from infoprune_export.ffn.scores import compress_activation, compress_magnitude, compress_random
from infoprune_export.ffn.svd import compress_paper
from infoprune_export.ffn.taylor import compress_taylor
from infoprune_export.ffn.whitened import compress_whitened

METHODS: dict[str, Callable[[FfnJob], Compressed]] = {
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


def compress_ffn(job: FfnJob, widths: Sequence[int] | None = None) -> Compressed:
    """Compress the FFNs of the job's tower in place.

    Unless `job.ridge` is None every method but ``paper`` and ``taylor`` fits what it leaves. `widths` are given where
    ``obs`` keeps so many neurons per block instead of choosing by `keep_macs`.

    Raises:
        InfopruneError: an FFN is compressed already, or the budget is too small for the method.
    """
    for i, block in enumerate(job.pruned.tower.blocks):
        if block.ffn_shape.kind != "mlp":
            raise InfopruneError(f"block {i}: the FFN is {block.ffn_shape.kind} already; compress the original model")
    return METHODS[job.spec.method](job) if widths is None else compress_obs(job, widths)
