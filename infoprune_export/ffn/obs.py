"""Width pruning by optimal brain surgeon, in the metric of the output gradient, under one budget for all blocks.

1. One pass over the calibration data gives each block's moments (`models.moments`).
2. Backward elimination gives each block a cost curve over its width (`models.elimination`).
3. Exact dynamic programming picks the widths with the least total cost under the budget.
4. Block by block, the neurons are removed and the block refitted to the original model's residual stream (`widths`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from infoprune_export.data.samples import Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.job import Compressed, FfnJob
from infoprune_export.ffn.widths import remove_neurons
from infoprune_export.models.allocation import choose
from infoprune_export.models.calibration import TaskLoss
from infoprune_export.models.elimination import Elimination, eliminate
from infoprune_export.models.moments import collect_moments
from infoprune_export.models.vlm import VLM


def width_options(full: int, round_to: int) -> list[int]:
    """Widths a block of `full` neurons can have: multiples of `round_to`, and its own."""
    return sorted({*range(0, full, round_to), full})


def allocate(costs: Sequence[Tensor], budget: int, round_to: int) -> list[int]:
    """Widths, one per block, with sum at most `budget` and least summed cost; exact.

    ``costs[l][k]`` is block l's cost of removing k neurons. A width is a multiple of `round_to`, or the full width.

    Raises:
        InfopruneError: the budget is too small for any choice with at least `round_to` neurons in total.
    """
    if budget < round_to:
        raise InfopruneError(
            f"ffn.keep_macs leaves {budget} neurons for all blocks, fewer than ffn.round_to = {round_to}; "
            "raise the one or lower the other"
        )
    widths = [width_options(len(cost) - 1, round_to) for cost in costs]
    unit = math.gcd(*(width for options in widths for width in options))
    chosen = choose(
        [[width // unit for width in options] for options in widths],
        [
            [float(cost[len(cost) - 1 - width]) for width in options]
            for cost, options in zip(costs, widths, strict=True)
        ],
        budget // unit,
    )
    assert chosen is not None  # no neuron at all always fits
    return [options[number] for options, number in zip(widths, chosen, strict=True)]


def eliminate_neurons(
    vlm: VLM,
    samples: Sequence[Sample],
    loss: TaskLoss,
    seed: int,
    on_block: Callable[[int], None] = lambda block: None,
) -> list[Elimination]:
    """Every block's elimination of neurons, of a tower that may have lost heads already."""
    moments = collect_moments(vlm, samples, loss, ("ffn",), seed=seed)["ffn"]
    eliminations = []
    for i, block in enumerate(vlm.tower.blocks):
        of_block = moments.pop(0)  # all of them are gigabytes in a large tower
        eliminations.append(eliminate(block.ffn_out.weight, of_block.covariance, of_block.metric))
        on_block(i)
    return eliminations


def compress_obs(job: FfnJob, widths: Sequence[int] | None = None) -> Compressed:
    """Shrink the FFNs of `pruned` in place, to `widths` if they are settled already; see `FfnJob`."""
    eliminations = eliminate_neurons(job.pruned, job.samples, job.loss, job.seed, job.on_block)
    full = [block.ffn_shape.size for block in job.pruned.tower.blocks]
    if widths is None:
        widths = allocate([e.cost for e in eliminations], int(job.spec.keep_macs * sum(full)), job.spec.round_to)
    kept = [sorted(e.order[size - width :].tolist()) for e, size, width in zip(eliminations, full, widths, strict=True)]
    return remove_neurons(job, kept)
