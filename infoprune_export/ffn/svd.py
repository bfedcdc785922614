"""The structural paper's FFN compression (section 4.2, Algorithm 2): a truncated SVD of the two weights' product.

The activation is dropped, as the algorithm does, although the derivation above it keeps its derivative (see `taylor`);
both biases are folded into one, b = b2 + W2 b1, which the algorithm leaves out. Measured worse than deleting the FFN;
it is here to be compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.budget import linear_rank
from infoprune_export.ffn.job import Compressed, FfnJob
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.models.block import Block
from infoprune_export.models.tower import VisionTower
from infoprune_export.recipe import FfnSpec
from infoprune_export.rewrite.surgery import FFN_IN, FFN_OUT, apply_ffn


def smallest_rank(sigma: Tensor, epsilon: float) -> int:
    """Smallest k whose leading squares reach (1 - epsilon^2) of all (Theorem 3, equation 9); `sigma` descending."""
    energy = sigma.double().square().cumsum(0)
    target = (1 - epsilon**2) * energy[-1]
    return int(torch.searchsorted(energy, target).clamp_max(len(sigma) - 1)) + 1


def factors(block: Block, matrix: Tensor, spec: FfnSpec) -> tuple[Tensor, Tensor]:
    """Down = U S^1/2 [D, k] and up = S^1/2 V^T [k, D] of a block's linear map U S V^T [D, D], truncated.

    k is Theorem 3's, or with ``rank_by: keep_macs`` what the budget pays for.
    """
    u, sigma, vt = torch.linalg.svd(matrix)
    rank = smallest_rank(sigma, spec.epsilon) if spec.rank_by == "epsilon" else linear_rank(block, spec)
    root = sigma[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def truncated_products(tower: VisionTower, spec: FfnSpec) -> tuple[FfnPlan, dict[str, Tensor]]:
    """Algorithm 2 on every block; returns the plan and the factors, in the weights' dtype. The tower is not changed.

    In `torch.nn.Linear` layout (weights [out, in]) the product is W2 W1 [D, D]; of a gated FFN W1 is the projection
    that the gate multiplies.

    Raises:
        InfopruneError: an FFN is compressed already.
    """
    choices, weights = [], {}
    for i, block in enumerate(tower.blocks):
        if block.ffn_shape.kind != "mlp":
            raise InfopruneError(f"block {i}: the FFN is {block.ffn_shape.kind} already; compress the original model")
        first, second = block.ffn_in, block.ffn_out
        down, up = factors(block, second.weight.double() @ first.weight.double(), spec)
        bias = second.bias.double() + second.weight.double() @ first.bias.double()
        choices.append(FfnChoice("linear", rank=len(up)))
        weights[f"{i}.{FFN_IN}.weight"] = up.to(first.weight.dtype)
        weights[f"{i}.{FFN_OUT}.weight"] = down.to(second.weight.dtype)
        weights[f"{i}.{FFN_OUT}.bias"] = bias.to(second.bias.dtype)
    return FfnPlan.for_blocks(tower.blocks, choices), weights


def compress_paper(job: FfnJob) -> Compressed:
    """`truncated_products`, carried out on `pruned`. Nothing is fitted; see `FfnJob`."""
    plan, weights = truncated_products(job.pruned.tower, job.spec)
    apply_ffn(job.pruned.tower, plan, weights)
    return plan, weights
