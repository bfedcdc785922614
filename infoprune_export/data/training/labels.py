"""What an image shows, as classes per visual token, classes per image, and a caption."""

from __future__ import annotations

import numpy as np

from infoprune_export.data import scenes

# Pixels that one visual token covers in each direction, in either testbed.
CELL = 14
_LONGEST = max(side for size in scenes.MIXED_SIZES for side in size) // CELL
# Classes per label of a visual token; the last class of the first five means "nothing of this kind here".
PATCH_LABELS = {"shape": 7, "color": 8, "word": 13, "tens": 11, "ones": 11, "column": _LONGEST, "row": _LONGEST}
# The first five labels of a background token.
NOTHING = np.array([6, 7, 12, 10, 10])
_PAIRS = [(color, shape) for color in scenes.COLORS for shape in scenes.SHAPES]
IMAGE_LABELS = len(_PAIRS) + len(scenes.WORDS) + 20


def grid_of(scene: scenes.Scene) -> tuple[int, int]:
    """Rows and columns of visual tokens."""
    return scene.height // CELL, scene.width // CELL


def patch_labels(scene: scenes.Scene) -> np.ndarray:
    """int64 [rows * columns, 7]: for each token the classes of `PATCH_LABELS`, from the object that covers it most."""
    rows, columns = grid_of(scene)
    cells = np.arange(rows * columns)
    x, y = (cells % columns + 0.5) * CELL, (cells // columns + 0.5) * CELL
    labels = np.tile(NOTHING, (len(cells), 1))
    best = np.full(len(cells), 2.0)
    for item in scene.items:
        overlap = item.radius + CELL / 2 - np.maximum(abs(x - item.x), abs(y - item.y))
        hit = overlap > best
        labels[hit, 0] = scenes.SHAPES.index(item.shape)
        labels[hit, 1] = list(scenes.COLORS).index(item.color)
        best[hit] = overlap[hit]
    if (sign := scene.sign) is not None:
        hit = (abs(x - sign.x) < (sign.width + CELL) / 2 - 2) & (abs(y - sign.y) < (sign.height + CELL) / 2 - 2)
        if sign.is_number:
            labels[hit, 3], labels[hit, 4] = int(sign.text[0]), int(sign.text[1])
        else:
            labels[hit, 2] = scenes.WORDS.index(sign.text)
    return np.concatenate([labels, (cells % columns)[:, None], (cells // columns)[:, None]], 1)


def image_labels(scene: scenes.Scene) -> np.ndarray:
    """float32 [IMAGE_LABELS]: which colour-shape pairs, words and digits are in the image."""
    labels = np.zeros(IMAGE_LABELS, np.float32)
    for item in scene.items:
        labels[_PAIRS.index((item.color, item.shape))] = 1
    if (sign := scene.sign) is not None:
        offset = len(_PAIRS)
        if sign.is_number:
            offset += len(scenes.WORDS)
            labels[offset + int(sign.text[0])] = labels[offset + 10 + int(sign.text[1])] = 1
        else:
            labels[offset + scenes.WORDS.index(sign.text)] = 1
    return labels


def caption(scene: scenes.Scene) -> str:
    """The objects from left to right."""
    return " , ".join(f"{item.color} {item.shape}" for item in sorted(scene.items, key=lambda item: item.x))
