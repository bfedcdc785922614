"""The structural paper's FFN compression (section 4.2, Algorithm 2): a truncated SVD of the two weights' product.

The activation is dropped, as the algorithm does, although the derivation above it keeps its derivative; both biases
are folded into one, b = b2 + W2 b1, which the algorithm leaves out. Measured worse than deleting the FFN; it is here
to be compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.models.tower import VisionTower
from infoprune_export.rewrite.surgery import FFN_IN, FFN_OUT


def smallest_rank(sigma: Tensor, epsilon: float) -> int:
    """Smallest k whose leading squares reach (1 - epsilon^2) of all (Theorem 3, equation 9); `sigma` descending."""
    energy = sigma.double().square().cumsum(0)
    target = (1 - epsilon**2) * energy[-1]
    return int(torch.searchsorted(energy, target).clamp_max(len(sigma) - 1)) + 1


def compress_paper(tower: VisionTower, epsilon: float) -> tuple[FfnPlan, dict[str, Tensor]]:
    """Algorithm 2 on every block; returns the plan and the factors. The tower is not changed.

    In `torch.nn.Linear` layout (weights [out, in]) with W = W2 W1 = U S V^T [D, D]: up = S^1/2 V^T [k, D],
    down = U S^1/2 [D, k].
    """
    choices, weights = [], {}
    for i, block in enumerate(tower.blocks):
        if block.ffn_shape.kind != "mlp":
            raise InfopruneError(f"block {i}: the FFN is {block.ffn_shape.kind} already; compress the original model")
        first, second = block.ffn_in, block.ffn_out
        product = second.weight.double() @ first.weight.double()
        u, sigma, vt = torch.linalg.svd(product)
        rank = smallest_rank(sigma, epsilon)
        root = sigma[:rank].sqrt()
        bias = second.bias.double() + second.weight.double() @ first.bias.double()
        choices.append(FfnChoice("linear", rank=rank))
        weights[f"{i}.{FFN_IN}.weight"] = (root[:, None] * vt[:rank]).to(first.weight.dtype)
        weights[f"{i}.{FFN_OUT}.weight"] = (u[:, :rank] * root).to(second.weight.dtype)
        weights[f"{i}.{FFN_OUT}.bias"] = bias.to(second.bias.dtype)
    widths = tuple(block.ffn_shape.size for block in tower.blocks)
    return FfnPlan(widths, tuple(choices)), weights
