"""Heads and widths per block from one budget: least damage within a cost, exact.

Damage is the optimal-brain-surgeon cost of what goes (`models.elimination`), in one metric for heads and neurons of all
blocks; cost is `cost.CostTable`'s. The sum of damages is the second-order estimate that treats parts as independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from infoprune_export.budget.cost import CostTable
from infoprune_export.errors import InfopruneError
from infoprune_export.ffn.obs import width_options
from infoprune_export.models.allocation import choose
from infoprune_export.models.elimination import Elimination

# Costs are rounded up to this many parts of the whole tower, so that a budget is never exceeded.
_PARTS = 20_000


@dataclass(frozen=True)
class Allocation:
    """What each block keeps."""

    heads: tuple[tuple[int, ...], ...]
    """Heads kept, ascending."""
    widths: tuple[int, ...]
    speed_up: float
    """Cost of the tower as it was over its cost now, by the table."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def allocate_jointly(
    heads: Sequence[Elimination],
    neurons: Sequence[Elimination],
    table: CostTable,
    speed_up: float,
    round_to: int,
    of: Literal["both", "heads", "ffn"] = "both",
) -> Allocation:
    """The choice with the least summed damage that is at least `speed_up` times as cheap.

    Widths are multiples of `round_to`, or the full width. The last block keeps a head, from which the token prior is
    read. With `of` one part alone may be made smaller.

    Raises:
        InfopruneError: what cannot be removed costs more than the budget; the message names the largest speed-up.
    """
    unit = table.total / _PARTS
    prices: list[list[int]] = []
    damages: list[list[float]] = []
    counts = [
        list(range(block == len(heads) - 1, len(elimination.order) + 1)) for block, elimination in enumerate(heads)
    ]
    widths = [width_options(len(elimination.order), round_to) for elimination in neurons]
    if of == "ffn":
        counts = [options[-1:] for options in counts]
    if of == "heads":
        widths = [options[-1:] for options in widths]
    for costs, elimination, options in zip(table.attention, heads, counts, strict=True):
        prices.append([math.ceil(costs[count] / unit) for count in options])
        damages.append([float(elimination.cost[len(elimination.order) - count]) for count in options])
    for block, (elimination, options) in enumerate(zip(neurons, widths, strict=True)):
        prices.append([math.ceil(table.ffn_cost(block, width) / unit) for width in options])
        damages.append([float(elimination.cost[len(elimination.order) - width]) for width in options])
    least = table.rest / unit + sum(min(price) for price in prices)
    budget = math.floor(_PARTS / speed_up - table.rest / unit)
    chosen = choose(prices, damages, budget) if budget >= 0 else None
    if chosen is None:
        raise InfopruneError(
            f"budget.speed_up = {speed_up:g}: without all that budget.of = {of!r} lets go, this tower would be "
            f"{_PARTS / least:.2f} times as fast; ask for less"
        )
    kept = [options[number] for options, number in zip(counts, chosen, strict=False)]
    width = [options[number] for options, number in zip(widths, chosen[len(counts) :], strict=True)]
    return Allocation(
        tuple(tuple(sorted(e.order[len(e.order) - count :].tolist())) for e, count in zip(heads, kept, strict=True)),
        tuple(width),
        table.total / table.cost_of(kept, width),
    )
