"""The structural paper's linearisation taken at its word (section 4.2, equation 7): the FFN's Jacobian at one point.

    y = J (x - x0) + FFN(x0),  J = W2 diag(phi'(W1 x0 + b1)) W1

with x0 the mean of the FFN's input on calibration data. Of a gated FFN, W2 (phi(g) * u) with g = Wg x + bg and
u = Wu x + bu, it is J = W2 (diag(phi'(g0) u0) Wg + diag(phi(g0)) Wu). J is truncated like the product in `svd`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from infoprune_export.ffn.job import Compressed, FfnJob
from infoprune_export.ffn.observe import mean_over_tokens
from infoprune_export.ffn.plan import FfnChoice, FfnPlan
from infoprune_export.ffn.svd import factors
from infoprune_export.models.block import Block
from infoprune_export.rewrite.surgery import FFN_IN, FFN_OUT, apply_ffn


@torch.no_grad()
def linearise(block: Block, point: Tensor) -> tuple[Tensor, Tensor]:
    """Jacobian [D, D] and value [D] of an mlp FFN at `point` [D], float64."""
    layers = {role: (layer.weight.double(), layer.bias.double()) for role, layer in block.ffn_projections.items()}
    (w_up, b_up), (w_out, b_out) = layers["ffn_in"], layers["ffn_out"]
    x0 = point.double().to(w_up.device)
    up = w_up @ x0 + b_up
    if "ffn_gate" in layers:
        w_gate, b_gate = layers["ffn_gate"]
        value, slope = _with_slope(block.activation, w_gate @ x0 + b_gate)
        hidden, inner = value * up, (slope * up)[:, None] * w_gate + value[:, None] * w_up
    else:
        hidden, slope = _with_slope(block.activation, up)
        inner = slope[:, None] * w_up
    return w_out @ inner, w_out @ hidden + b_out


def _with_slope(activation: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """phi(z) and phi'(z), elementwise."""
    value, slope = torch.func.jvp(activation, (z,), (torch.ones_like(z),))[:2]
    return value, slope


def compress_taylor(job: FfnJob) -> Compressed:
    """Every FFN by its truncated Jacobian, in place. Nothing is fitted; see `FfnJob`.

    All points are means of `pruned` as it comes in, so that one pass over the samples is enough.
    """
    blocks = job.pruned.tower.blocks
    choices, weights = [], {}
    means = mean_over_tokens(job.pruned, job.samples, lambda block: block.ffn)
    for i, (block, point) in enumerate(zip(blocks, means, strict=True)):
        jacobian, value = linearise(block, point)
        down, up = factors(block, jacobian, job.spec)
        bias = value - down @ (up @ point.to(up.device))
        choices.append(FfnChoice("linear", rank=len(up)))
        dtype = block.ffn_out.weight.dtype
        weights[f"{i}.{FFN_IN}.weight"], weights[f"{i}.{FFN_OUT}.weight"] = up.to(dtype), down.to(dtype)
        weights[f"{i}.{FFN_OUT}.bias"] = bias.to(dtype)
        job.on_block(i)
    plan = FfnPlan.for_blocks(blocks, choices)
    apply_ffn(job.pruned.tower, plan, weights)
    return plan, weights
