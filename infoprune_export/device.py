"""Where tensors are computed."""

from __future__ import annotations

from infoprune_export.errors import InfopruneError


def resolve_device(name: str) -> str:
    """``auto`` to ``cuda`` where there is one, else ``cpu``.

    Raises:
        InfopruneError: CUDA is asked for and torch finds none.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InfopruneError(
            "device 'cuda': torch finds no CUDA device; use --device cpu or see infoprune-export doctor"
        )
    return name
