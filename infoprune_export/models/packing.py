"""Host-side planning of packed images: which patch attends to which, as index arrays (NumPy only).

Vision towers of the Qwen family take images of any size as one packed sequence of P patches, in blocks of m x m patches
that become one visual token. Attention is confined to segments of it: a frame, or a window of a frame. A traced graph
cannot derive segments from a grid, because that is control flow on data; so they are planned here and given to the
graph as *padded gathers*: ``index`` [S, L] says which patch stands at each place of each segment, P where there is
none, and ``inverse`` [P] where each patch went. Patches keep their order everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from infoprune_export.errors import InfopruneError

Index = NDArray[np.int64]
Grid = tuple[int, int, int]
"""Frames, patch rows, patch columns of an image or video."""


def check_grids(grids: Sequence[Grid], merge: int, patches: int) -> None:
    """Raise `InfopruneError` unless the grids are positive, divisible by `merge`, and add up to `patches`."""
    for number, (frames, rows, columns) in enumerate(grids):
        if min(frames, rows, columns) < 1 or rows % merge or columns % merge:
            raise InfopruneError(
                f"image {number} has a grid of {frames} x {rows} x {columns} patches; rows and columns must be "
                f"positive multiples of {merge}; let the model's own processor resize the images"
            )
    total = sum(frames * rows * columns for frames, rows, columns in grids)
    if total != patches:
        raise InfopruneError(
            f"pixel_values has {patches} patches, image_grid_thw stands for {total}; "
            "pass both as the processor made them"
        )


def patch_positions(grids: Sequence[Grid], merge: int) -> Index:
    """Row and column of every patch in its frame, int64 [P, 2]."""
    return np.concatenate(
        [np.tile(_frame_positions(rows, columns, merge), (frames, 1)) for frames, rows, columns in grids]
    )


def _frame_positions(rows: int, columns: int, merge: int) -> Index:
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    blocks = (rows // merge, merge, columns // merge, merge)
    return np.stack([axis.reshape(blocks).swapaxes(1, 2).ravel() for axis in (y, x)], axis=1)


def bilinear_places(grids: Sequence[Grid], merge: int, side: int) -> tuple[Index, NDArray[np.float32]]:
    """A learned `side` x `side` table of positions stretched over each grid, corners on corners.

    The four entries around every patch, int64 [P, 4] into the flattened table, and their weights, float32 [P, 4].
    """
    indices, weights = [], []
    for frames, rows, columns in grids:
        position = _frame_positions(rows, columns, merge)
        place = np.stack(
            [np.linspace(0, side - 1, n, dtype=np.float32)[position[:, axis]] for axis, n in enumerate((rows, columns))]
        )
        low = place.astype(np.int64)
        high, part = np.minimum(low + 1, side - 1), place - low
        corners = [(low[0], low[1]), (low[0], high[1]), (high[0], low[1]), (high[0], high[1])]
        shares = [(1 - part[0]) * (1 - part[1]), (1 - part[0]) * part[1], part[0] * (1 - part[1]), part[0] * part[1]]
        indices.append(np.tile(np.stack([y * side + x for y, x in corners], axis=1), (frames, 1)))
        weights.append(np.tile(np.stack(shares, axis=1).astype(np.float32), (frames, 1)))
    return np.concatenate(indices), np.concatenate(weights)


def image_tokens(grids: Sequence[Grid], merge: int) -> tuple[Index, Index]:
    """Which of all visual tokens belong to each image, int64 [B, N] of the largest image, and how many do, int64 [B].

    Behind an image's own tokens its last one is repeated.
    """
    counts = np.array([frames * rows * columns // merge**2 for frames, rows, columns in grids])
    places = np.minimum(np.arange(counts.max()), counts[:, None] - 1)
    return places + (counts.cumsum() - counts)[:, None], counts


def frame_segments(grids: Sequence[Grid]) -> Iterator[Index]:
    """The patches of every frame of every image: what full attention is confined to."""
    start = 0
    for frames, rows, columns in grids:
        for _ in range(frames):
            yield np.arange(start, start + rows * columns)
            start += rows * columns


def window_segments(grids: Sequence[Grid], merge: int, window: int) -> Iterator[Index]:
    """The patches of every attention window; `window` is its side in visual tokens. Windows at the edge are smaller."""
    unit = merge * merge
    start = 0
    for frames, rows, columns in grids:
        tokens = np.arange(rows // merge * (columns // merge)).reshape(rows // merge, columns // merge)
        for _ in range(frames):
            for top in range(0, tokens.shape[0], window):
                for left in range(0, tokens.shape[1], window):
                    inside = tokens[top : top + window, left : left + window].ravel()
                    yield start + (inside[:, None] * unit + np.arange(unit)).ravel()
            start += rows * columns


def padded_gather(segments: Sequence[Index], length: int | None = None) -> tuple[Index, Index]:
    """``index`` [S, L] and ``inverse`` [P] of segments that cover 0..P-1; L is `length`, or the longest segment."""
    sizes = [len(segment) for segment in segments]
    total, length = sum(sizes), length or max(sizes)
    index = np.full((len(segments), length), total, np.int64)
    inverse = np.empty(total, np.int64)
    for number, segment in enumerate(segments):
        index[number, : len(segment)] = segment
        inverse[segment] = number * length + np.arange(len(segment))
    return index, inverse
