"""Width pruning by optimal brain surgeon, in the metric of the output gradient, under one budget for all blocks.

1. One pass over the calibration data gives each block the covariance C of its neurons and the second moment G of the
   loss gradient at its FFN output.
2. Neurons leave one by one: removing j and letting the rest compensate costs w_j^T G w_j / [C^-1]_jj, w_j being its
   (already compensated) column of W2. The cheapest goes first; the running sum is the block's cost curve.
3. Exact dynamic programming picks the widths with the least total cost under the budget.
4. Block by block, the neurons are removed and W2 and its bias refitted to the original model's residual stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from infoprune_export.data.vqa import Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.plan import FfnPlan
from infoprune_export.ffn.widths import remove_neurons
from infoprune_export.models.calibration import AffineFit, TaskLoss, batches, captured_input
from infoprune_export.models.vlm import VLM
from infoprune_export.recipe import FfnSpec

_DAMPING = 1e-4


@dataclass(frozen=True)
class Elimination:
    """``order[i]`` is the i-th neuron to go; ``cost[k]`` the summed cost of removing the first k, cost[0] = 0."""

    order: Tensor
    cost: Tensor


def collect_moments(
    vlm: VLM, samples: Sequence[Sample], loss: TaskLoss, seed: int, batch_size: int = 32
) -> tuple[list[Tensor], list[Tensor]]:
    """Per block: covariance of the neurons [m, m] and E[g g^T] of the loss gradient at the FFN output [D, D]."""
    blocks = vlm.tower.blocks
    neurons = [AffineFit(block.ffn_out.in_features, 0) for block in blocks]
    gradients = [
        torch.zeros(block.ffn_out.out_features, block.ffn_out.out_features, dtype=torch.float64) for block in blocks
    ]
    outputs: dict[int, Tensor] = {}
    rng = np.random.default_rng([seed, 0])

    def watch(index: int) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
            # The weights are frozen: the graph starts where it is first asked to.
            output = output if output.requires_grad else output.requires_grad_()
            output.retain_grad()
            outputs[index] = output
            return output

        return keep

    tokens = 0
    with contextlib.ExitStack() as stack:
        inputs = [stack.enter_context(captured_input(block.ffn_out)) for block in blocks]
        for index, block in enumerate(blocks):
            stack.callback(block.ffn_out.register_forward_hook(watch(index)).remove)
        for batch in batches(samples, batch_size):
            loss.probe(vlm, batch, rng).backward()
            for index, last_input in enumerate(inputs):
                hidden = last_input().detach().flatten(0, -2)
                neurons[index].update(hidden, hidden.new_zeros(len(hidden), 0))
                gradient = outputs[index].grad
                assert gradient is not None
                flat = gradient.flatten(0, -2).double().cpu()
                gradients[index] += flat.T @ flat
            tokens += len(flat)
    return [fit.covariance() for fit in neurons], [gradient / tokens for gradient in gradients]


def eliminate(weight: Tensor, covariance: Tensor, metric: Tensor, damping: float = _DAMPING) -> Elimination:
    """Backward elimination of the columns of `weight` [D, m] with input `covariance` [m, m] and output `metric` [D, D].

    Each step removes the column of least cost and lets the others compensate, by rank-one updates of the inverse
    covariance and of the weight; O(m^3) in all. Ties go to the lowest index. float64.
    """
    size = len(covariance)
    # The floor keeps neurons that never vary invertible: they are free.
    loading = (damping * covariance.double().diagonal().mean()).clamp_min(1e-30)
    regular = covariance.double() + loading * torch.eye(size, dtype=torch.float64)
    inverse = torch.linalg.inv(regular)
    # |G^1/2 w|^2 = w^T G w, so the columns can live in G's square root
    values, vectors = torch.linalg.eigh(metric.double())
    columns = (values.clamp_min(0).sqrt()[:, None] * vectors.T) @ weight.double().cpu()
    active = torch.ones(size, dtype=torch.bool)
    order, cost = torch.empty(size, dtype=torch.long), torch.zeros(size + 1, dtype=torch.float64)
    for step in range(size):
        price = columns.square().sum(0) / inverse.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
        price[~active] = torch.inf
        j = int(price.argmin())
        order[step], cost[step + 1] = j, cost[step] + price[j]
        pivot = inverse[j, j].clone()
        columns -= torch.outer(columns[:, j], inverse[j]) / pivot
        inverse -= torch.outer(inverse[:, j], inverse[j]) / pivot
        active[j] = False
        columns[:, j] = 0
    return Elimination(order, cost)


def allocate(costs: Sequence[Tensor], budget: int, round_to: int) -> list[int]:
    """Widths, one per block, with sum at most `budget` and least summed cost; exact.

    ``costs[l][k]`` is block l's cost of removing k neurons. A width is a multiple of `round_to`, or the full width.

    Raises:
        InfopruneError: the budget is too small for any choice with at least `round_to` neurons in total.
    """
    options = []
    for cost in costs:
        full = len(cost) - 1
        widths = sorted({*range(0, full, round_to), full})
        options.append([(width, float(cost[full - width])) for width in widths])
    if budget < round_to:
        raise InfopruneError(
            f"ffn.keep_macs leaves {budget} neurons for all blocks, fewer than ffn.round_to = {round_to}; "
            "raise the one or lower the other"
        )
    # best[b] = (cost, widths) of the blocks so far with at most b neurons
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for choice in options:
        grown: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (total, widths_so_far) in best.items():
            for width, price in choice:
                key, candidate = used + width, (total + price, (*widths_so_far, width))
                if key <= budget and (key not in grown or candidate < grown[key]):
                    grown[key] = candidate
        best = grown
    # equal costs: prefer the smaller network
    _, _, chosen = min((total, used, widths) for used, (total, widths) in best.items())
    return list(chosen)


def compress_obs(
    original: VLM,
    pruned: VLM,
    samples: Sequence[Sample],
    loss: TaskLoss,
    spec: FfnSpec,
    *,
    ridge: float | None,
    seed: int,
    on_block: Callable[[int], None] = lambda block: None,
) -> tuple[FfnPlan, dict[str, Tensor]]:
    """Shrink the FFNs of `pruned` in place, which may have lost heads already; `original` is what it is fitted to.

    Returns the plan and, unless `ridge` is None, the refitted down projections under `surgery`'s names.
    """
    blocks = pruned.tower.blocks
    for i, block in enumerate(blocks):
        if block.ffn_shape.kind != "mlp":
            raise InfopruneError(f"block {i}: the FFN is {block.ffn_shape.kind} already; compress the original model")
    covariances, metrics = collect_moments(pruned, samples, loss, seed)
    eliminations = []
    for i, (block, covariance, metric) in enumerate(zip(blocks, covariances, metrics, strict=True)):
        eliminations.append(eliminate(block.ffn_out.weight, covariance, metric))
        on_block(i)
    full = [block.ffn_shape.size for block in blocks]
    widths = allocate([e.cost for e in eliminations], int(spec.keep_macs * sum(full)), spec.round_to)
    kept = [sorted(e.order[size - width :].tolist()) for e, size, width in zip(eliminations, full, widths, strict=True)]
    return remove_neurons(original, pruned, kept, samples, ridge=ridge, on_block=on_block)
