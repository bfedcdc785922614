"""One budget over many choices: exact, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def choose(prices: Sequence[Sequence[int]], damages: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """One option of every item, with summed price at most `budget` and least summed damage; None if nothing fits.

    ``prices[i][o]`` and ``damages[i][o]`` are of item i's option o. Among equal damages the cheapest total wins, then
    the lowest option of the last item. Time O(budget * options), memory O(budget * items).
    """
    best: NDArray[np.float64] = np.full(budget + 1, np.inf)
    best[0] = 0.0  # best[b]: least damage of the items so far at a summed price of exactly b
    taken: list[NDArray[np.int32]] = []
    for price, damage in zip(prices, damages, strict=True):
        grown = np.full(budget + 1, np.inf)
        option = np.full(budget + 1, -1, dtype=np.int32)
        for number, (cost, harm) in enumerate(zip(price, damage, strict=True)):
            if cost > budget:
                continue
            reached = best[: budget + 1 - cost] + harm
            better = reached < grown[cost:]
            grown[cost:][better] = reached[better]
            option[cost:][better] = number
        best = grown
        taken.append(option)
    place = int(best.argmin())
    if not np.isfinite(best[place]):
        return None
    chosen = []
    for price, option in zip(reversed(prices), reversed(taken), strict=True):
        number = int(option[place])
        chosen.append(number)
        place -= price[number]
    return chosen[::-1]
