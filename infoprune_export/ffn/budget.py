"""What `keep_macs` pays for, per block: neurons, or ranks."""

from __future__ import annotations

from infoprune_export.errors import InfopruneError
from infoprune_export.models.block import Block
from infoprune_export.recipe import FfnSpec


def uniform_width(width: int, spec: FfnSpec) -> int:
    """Neurons of a block of `width` that the budget keeps, a multiple of `round_to`; all of them without a budget.

    Raises:
        InfopruneError: fewer than `round_to` are left.
    """
    if spec.keep_macs == 1:
        return width
    kept = int(spec.keep_macs * width) // spec.round_to * spec.round_to
    if not kept:
        raise InfopruneError(
            f"ffn.keep_macs = {spec.keep_macs:g} leaves {int(spec.keep_macs * width)} of a block's {width} neurons, "
            f"fewer than ffn.round_to = {spec.round_to}; raise the one or lower the other"
        )
    return kept


def linear_rank(block: Block, spec: FfnSpec) -> int:
    """Rank k of a linear map D -> k -> D within the budget: 2 D k of 2 D m multiply-accumulates, 3 D m with a gate.

    At most D. Above D / 2 one dense matrix would be cheaper than the two factors.
    """
    features, width = block.ffn_out.out_features, block.ffn_shape.size
    return _rounded(min(spec.keep_macs * len(block.ffn_projections) * width / 2, features), features, spec)


def factor_rank(block: Block, spec: FfnSpec) -> int:
    """Rank k of each projection within the budget: k (D + m) of its D m multiply-accumulates."""
    features, width = block.ffn_out.out_features, block.ffn_shape.size
    return _rounded(spec.keep_macs * features * width / (features + width), min(features, width) - 1, spec)


def _rounded(rank: float, most: int, spec: FfnSpec) -> int:
    """Down to a multiple of `rank_round_to`, or the largest there is."""
    whole = int(rank)
    kept = whole if whole == most else whole // spec.rank_round_to * spec.rank_round_to
    if not kept:
        raise InfopruneError(
            f"ffn.keep_macs = {spec.keep_macs:g} pays for rank {whole}, less than ffn.rank_round_to = "
            f"{spec.rank_round_to}; raise the one or lower the other"
        )
    return kept
