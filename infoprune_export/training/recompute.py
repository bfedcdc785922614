"""Gradient checkpointing of a tower's blocks and of the language model's layers.

Transformers' own switch works in training mode only, which also turns dropout on; this one leaves the mode alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch.utils.checkpoint import checkpoint

from infoprune_export.models.vlm import VLM


@contextlib.contextmanager
def recomputed(vlm: VLM, enabled: bool = True) -> Iterator[None]:
    """Within, a block or layer keeps its input only, and runs again in the backward pass, which belongs within too."""
    places: list[tuple[Any, str]] = []
    if enabled:
        language_model = getattr(getattr(vlm.model, "model", None), "language_model", None)
        places = [(block, "run") for block in vlm.tower.blocks]
        places += [(layer, "forward") for layer in getattr(language_model, "layers", ())]
    for owner, name in places:
        # On the instance, where it hides the class's own.
        setattr(owner, name, functools.partial(checkpoint, getattr(owner, name), use_reentrant=False))
    try:
        yield
    finally:
        for owner, name in places:
            delattr(owner, name)
