"""Shapes an engine is built for: the least, usual and largest extents of every input.

TensorRT checks the three corners of a profile as if they were calls, so extents that one symbol of the graph ties
together must be equal in each corner. They are, because every corner is made of the tower's own planned tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from infoprune_export.errors import InfopruneError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from infoprune_export.models.tower import Form, VisionTower
    from infoprune_export.recipe import EngineSpec

Shape = tuple[int, ...]
CORNERS = ("min", "opt", "max")
_EXAMPLES = 3
"""The tower's example inputs are of so many sizes."""
_STEPS = 6
"""Heights and widths between the smallest and the largest image that are planned where tokens do not grow with them."""


@dataclass(frozen=True)
class Profile:
    """What one optimisation profile of TensorRT says."""

    shapes: Mapping[str, tuple[Shape, Shape, Shape]]
    """ONNX input to its least, usual and largest shape."""

    def __post_init__(self) -> None:
        for name, corners in self.shapes.items():
            ranks = {len(shape) for shape in corners}
            if len(corners) != 3 or len(ranks) != 1 or any(extent < 1 for shape in corners for extent in shape):
                raise ValueError(f"profile of {name}: {corners} are no three shapes of one rank and positive extents")
            if any(sorted(extents) != list(extents) for extents in zip(*corners, strict=True)):
                raise ValueError(f"profile of {name}: an extent falls from {corners[0]} to {corners[2]}")

    def to_dict(self) -> dict[str, Any]:
        return {
            name: {corner: list(shape) for corner, shape in zip(CORNERS, corners, strict=True)}
            for name, corners in self.shapes.items()
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Profile:
        """What `to_dict` gave.

        Raises:
            ValueError: it did not give this.
        """
        shapes = {}
        for name, corners in tree.items():
            if not isinstance(corners, Mapping) or corners.keys() != set(CORNERS):
                raise ValueError(f"profile of {name}: expected {', '.join(CORNERS)}")
            read = [corners[corner] for corner in CORNERS]
            if not all(isinstance(shape, list) and all(type(extent) is int for extent in shape) for shape in read):
                raise ValueError(f"profile of {name}: a shape is a list of whole numbers")
            low, usual, high = (tuple(shape) for shape in read)
            shapes[name] = (low, usual, high)
        return cls(shapes)

    def covers(self, inputs: Mapping[str, Shape]) -> str | None:
        """Why inputs of these shapes do not fit, in one line; None if they do."""
        if inputs.keys() != self.shapes.keys():
            return f"inputs are {', '.join(sorted(self.shapes))}, got {', '.join(sorted(inputs)) or 'none'}"
        for name, shape in inputs.items():
            low, _, high = self.shapes[name]
            if len(shape) != len(low) or not all(
                least <= extent <= most for least, extent, most in zip(low, shape, high, strict=True)
            ):
                return f"{name} is {list(shape)}, the engine takes {list(low)} to {list(high)}"
        return None

    def shrunk(self) -> Profile | None:
        """Half way back from the largest to the least shapes, for want of memory; None if there is nothing to halve."""
        shapes = {}
        for name, corners in self.shapes.items():
            triples = [_halved(*extents) for extents in zip(*corners, strict=True)]
            low, usual, high = zip(*triples, strict=True) if triples else ((), (), ())
            shapes[name] = (tuple(low), tuple(usual), tuple(high))
        smaller = Profile(shapes)
        return None if smaller == self else smaller


def _halved(low: int, usual: int, high: int) -> tuple[int, int, int]:
    # An extent that counts groups of patches must stay a multiple of the group.
    step = math.gcd(low, usual, high)
    half = low + (high - low) // step // 2 * step
    return low, min(usual, half), half


# ── From a recipe ────────────────────────────────────────────────────────────


def profile_of(tower: VisionTower, form: Form, spec: EngineSpec) -> Profile:
    """The shapes that a tower's plan gives for the images and sizes of a recipe's engine section.

    Where images may be of any size, the tower's own example inputs, with which engines are checked, are covered too.

    Raises:
        InfopruneError: images of these sizes cannot be planned.
    """
    from infoprune_export.models.qwen import QwenTower

    pixels = _examples(tower, form, 1)[0]["pixel_values"][1:]
    if not tower.ragged:
        low, usual, high = ((count, *pixels) for count in spec.images)
        return Profile({"pixel_values": (low, usual, high)})
    counts = spec.images if form.several else (1, 1, 1)
    sizes = spec.image_sizes if isinstance(tower, QwenTower) else _between(spec)

    def corner(choose: Callable[..., int], count: int) -> dict[str, Shape]:
        plans = [_planned(tower, form, pixels, count, size) for size in sizes]
        return _extreme(choose, [*plans, *_examples(tower, form, count if form.several else _EXAMPLES)])

    least, most = corner(min, counts[0]), corner(max, counts[2])
    usually = _planned(tower, form, pixels, counts[1], spec.image_sizes[1])
    return Profile({name: (least[name], shape, most[name]) for name, shape in usually.items()})


def _examples(tower: VisionTower, form: Form, images: int) -> list[dict[str, Shape]]:
    import torch

    inputs = tower.example_inputs(images, torch.Generator().manual_seed(0))
    return [{name: tuple(value.shape) for name, value in call.items()} for call in tower.calls(inputs, form)]


def _between(spec: EngineSpec) -> Sequence[tuple[int, int]]:
    """Sizes for anyres tiling, where a larger image may have fewer tokens: less of its tiles is padding."""
    (low_height, low_width), usual, (high_height, high_width) = spec.image_sizes

    def steps(low: int, high: int) -> list[int]:
        return sorted({low + (high - low) * i // _STEPS for i in range(_STEPS + 1)})

    return [usual, *((h, w) for h in steps(low_height, high_height) for w in steps(low_width, high_width))]


def _extreme(choose: Callable[..., int], plans: Iterable[dict[str, Shape]]) -> dict[str, Shape]:
    """The least or largest of each extent."""
    first, *rest = plans
    return {
        name: tuple(choose(extents) for extents in zip(shape, *(plan[name] for plan in rest), strict=True))
        for name, shape in first.items()
    }


def _planned(tower: VisionTower, form: Form, pixels: Shape, images: int, size: tuple[int, int]) -> dict[str, Shape]:
    """Shapes of the planned tensors for equal images of height x width pixels; no pixel is stored.

    `pixels` are the extents of the processor's pixel_values behind the first.
    """
    import torch

    from infoprune_export.models.qwen import QwenTower

    if isinstance(tower, QwenTower):
        unit = tower.patch_size * tower.merge
        rows, columns = (max(1, round(side / unit)) * tower.merge for side in size)
        inputs = {
            "pixel_values": torch.empty(images * rows * columns, *pixels, device="meta"),
            "image_grid_thw": torch.tensor([[1, rows, columns]] * images),
        }
    else:
        config: Any = tower.model.config
        side = pixels[-1]
        tiles = 1 + max(height // side * (width // side) for height, width in config.image_grid_pinpoints)
        inputs = {
            "pixel_values": torch.empty(images, tiles, *pixels[-3:], device="meta"),
            "image_sizes": torch.tensor([list(size)] * images),
        }
    try:
        planned = tower.plan(inputs, form)
    except (RuntimeError, IndexError) as error:
        raise InfopruneError(
            f"engine.image_sizes: an image of {size[0]} x {size[1]} pixels cannot be planned "
            f"({' '.join(str(error).split())[:120]}); give larger sizes"
        ) from None
    return {name: tuple(value.shape) for name, value in planned.items()}
