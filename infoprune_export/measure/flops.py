"""Floating-point operations, counted while the module runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from infoprune_export.models import attention  # noqa: F401  (defines its operator)
from infoprune_export.tokens.select import BLOCK, LIKELY, keep_count, pool_count


def count_flops(module: nn.Module, planned: Mapping[str, Tensor]) -> int:
    """FLOPs (two per multiply-accumulate) of matrix products, convolutions and attention in one forward pass.

    Counted by torch's dispatcher on the module as it stands, so a mask saves nothing and a removed head does. Norms,
    activations and softmax are not counted.
    """
    # torch has no FLOP formula for the CPU's fused attention and would count nothing; as plain products it counts.
    with (
        torch.inference_mode(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=_OWN) as counter,
    ):
        module(planned)
    return int(counter.get_total_flops())


def _received_attention(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """The scores, and their sum over rows."""
    batch, rows, heads, head_dim = query
    return 2 * batch * heads * rows * key[1] * (head_dim + 1)


def _token_select(
    features: Sequence[int],
    prior: Sequence[int],
    counts: Sequence[int],
    numerator: int,
    denominator: int,
    pool_factor: float = 2.0,
    *_: Any,
    **__: Any,
) -> int:
    """By blocks of pivots (see `greedy_pivots`): likely rows of the Gram matrix, their elimination, and that of z."""
    batch, tokens, width = features
    keep = keep_count(tokens, numerator, denominator)
    pool = pool_count(tokens, keep, pool_factor)
    steps, total = min(keep, width), 0
    for start in range(0, steps, BLOCK):
        block = min(BLOCK, steps - start)
        total += 2 * min(pool, LIKELY) * pool * width + block * (block - 1) * (pool + width)
        total += 2 * block * pool * width if start + BLOCK < steps else 0
    return batch * total


# To the dispatcher, a custom operator is one call of unknown content.
_OWN = {
    torch.ops.infoprune.received_attention: _received_attention,
    torch.ops.infoprune.token_select: _token_select,
}
