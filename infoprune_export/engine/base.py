"""What every backend offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infoprune_export.recipe import Recipe, Target

if TYPE_CHECKING:
    from rich.progress import Progress

    from infoprune_export.engine.tensorrt.profiles import Profile

Compatibility = dict[str, str]


class Engine(ABC):
    """A loaded vision encoder. Not thread-safe."""

    @abstractmethod
    def run(self, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Planned tensors (`VisionTower.plan`) to outputs by name.

        image_features [B, T, D_llm] and, with selection, kept_indices int64 [B, T].

        Raises:
            InfopruneError: an input is missing, unknown, or of the wrong shape or dtype.
        """

    @abstractmethod
    def input_types(self) -> dict[str, np.dtype[Any]]:
        """Name and dtype of every input, in order."""

    def covers(self, inputs: Mapping[str, tuple[int, ...]]) -> str | None:
        """Why inputs of these shapes are more or other than the engine was built for, in one line; None if not."""
        return None

    @abstractmethod
    def describe(self) -> Compatibility:
        """Everything that must match for the engine to run elsewhere."""


class Backend(ABC):
    """Builds and opens engines."""

    @abstractmethod
    def check(self, target: Target) -> None:
        """Raise `InfopruneError` when this machine cannot build for or run the target."""

    def check_recipe(self, recipe: Recipe, target: Target) -> None:  # noqa: B027  (most backends take every recipe)
        """Raise `InfopruneError` when what a recipe exports could not be built for the target."""

    @abstractmethod
    def build(
        self,
        onnx_model: Path,
        folder: Path,
        target: Target,
        *,
        profile: Profile | None = None,
        progress: Progress | None = None,
    ) -> Engine:
        """Write an engine for `onnx_model` into an existing folder and open it.

        `profile` says which shapes it will be given, where the backend builds for shapes.
        """

    @abstractmethod
    def open(self, folder: Path) -> Engine:
        """Open a built engine; refuses one that does not fit this machine."""


def check_array(name: str, value: NDArray[Any], shape: tuple[int | None, ...], dtype: np.dtype[Any]) -> str | None:
    """Why an input does not fit, or None; None in `shape` fits any extent."""
    if value.dtype != dtype:
        return f"{name} is {value.dtype}, the engine takes {dtype}"
    if value.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
        return f"{name} is {list(value.shape)}, the engine takes [{wanted}]"
    return None
