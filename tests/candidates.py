"""Images as a token selector sees them, made of numbers instead of pixels."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infoprune_export.models.tower import Activations, Context
from infoprune_export.recipe import TokensSpec
from infoprune_export.tokens.selector import METHODS, Candidates, Selection

SELECTORS = tuple(name for name, method in METHODS.items() if not method.before and name != "infoprune")
BLOCKS = 12
SHALLOW = 2
"""VScan's block in a tower of twelve."""


def spec(method: str, keep: str | int | Fraction = "1/3", **options: Any) -> TokensSpec:
    return TokensSpec(method=method, keep_ratio=keep, **options)


def given(
    tokens: Tensor,
    *,
    counts: list[int] | None = None,
    last: Tensor | None = None,
    shallow: Tensor | None = None,
    keys: Tensor | None = None,
    embeddings: Tensor | None = None,
    grids: list[tuple[int, int]] | None = None,
    priors: tuple[str, ...] = ("received", "cls"),
) -> Candidates:
    """Tokens [B, N, E] with attention [B, N] of the last and the shallow block; by default all attention is equal.

    The kind of prior that is not wanted is refused, so that a selector cannot take it by mistake.
    """
    counts = counts or [tokens.shape[1]] * len(tokens)
    even = torch.zeros(tokens.shape[:2])
    table = {-1: even if last is None else last, SHALLOW: even if shallow is None else shallow}

    def attention_prior(activations: Any, context: Any, planned: Any, kind: str, block: int = -1) -> Tensor:
        assert kind == ("cls" if "cls" in priors else "received")
        return table[block]

    tower = SimpleNamespace(
        priors=priors,
        selection_width=None,
        blocks=[SimpleNamespace(num_heads=4, windowed=False)] * BLOCKS,
        attention_prior=attention_prior,
    )
    candidates = Candidates(tower, Activations(even, even), Context(), {})  # type: ignore[arg-type]
    candidates.__dict__.update(
        tokens=tokens,
        counts=torch.tensor(counts),
        keys=tokens[..., : max(1, tokens.shape[2] // 2)] if keys is None else keys,
        embeddings=tokens if embeddings is None else embeddings,
        grids=grids or [(1, count) for count in counts],
    )
    return candidates


def select(candidates: Candidates, wanted: TokensSpec) -> Selection:
    return METHODS[wanted.method].load()(candidates, wanted)


def kept(selection: Selection, row: int = 0) -> list[int]:
    """What one image keeps, without padding."""
    return [index for index in selection.kept[row].tolist() if index >= 0]


def draw(seed: int, grids: list[tuple[int, int]], width: int = 8) -> dict[str, Any]:
    """Arguments of `given` for images of these grids, different in everything; there is rubbish behind each image."""
    rng = np.random.default_rng(seed)
    counts = [rows * columns for rows, columns in grids]
    size = (len(grids), max(counts))

    def normal(*shape: int) -> Tensor:
        values = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
        for row, count in enumerate(counts):
            for place in range(count, size[1]):
                values[row, place] = (1e30, np.nan, np.inf)[(place - count) % 3]
        return values

    return {
        "tokens": normal(*size, width),
        "keys": normal(*size, 5),
        "embeddings": normal(*size, 11),
        "last": normal(*size),
        "shallow": normal(*size),
        "counts": counts,
        "grids": grids,
    }


def alone(images: dict[str, Any], row: int) -> dict[str, Any]:
    """One of the images of `draw` by itself."""
    count = images["counts"][row]
    cut = {name: value[row : row + 1, :count] for name, value in images.items() if isinstance(value, Tensor)}
    return {**cut, "counts": [count], "grids": [images["grids"][row]]}
