"""Training state on disk: safetensors and JSON, never pickle; replaced in one step, so a kill leaves a whole one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from infoprune_export.errors import InfopruneError

Epoch = dict[str, float]
Tensors = Mapping[str, Tensor]
STATE = "training.safetensors"
_SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


def store(
    scratch: Path,
    trained: Tensors,
    optimizer: Any,
    scaler: Any,
    step: int,
    sums: Tensor,
    history: list[Epoch],
    buffers: Tensors | None = None,
) -> None:
    """Write everything that the next step depends on.

    Args:
        scratch: folder of the state.
        trained: the leaves that the optimizer moves, by name.
        optimizer: AdamW over them.
        scaler: of fp16 training, or None.
        step: number of the next step; learning rate and data order follow from it.
        sums: of the loss terms since the epoch began, float64.
        history: of the finished epochs.
        buffers: what else training must remember.
    """
    tensors = {f"trained.{name}": value.detach() for name, value in trained.items()}
    tensors |= {f"buffer.{name}": value for name, value in (buffers or {}).items()}
    for name, value in trained.items():
        moments: Tensors = optimizer.state.get(value, {})
        tensors |= {f"adamw.{name}.{key}": moment for key, moment in moments.items()}
    if scaler is not None:
        numbers = scaler.state_dict()
        tensors["scaler"] = torch.tensor([float(numbers[key]) for key in _SCALER], dtype=torch.float64)
    tensors |= {"step": torch.tensor(step), "sums": sums}
    partial = scratch / f".{STATE}"
    save_file(
        {name: value.cpu().contiguous() for name, value in tensors.items()},
        partial,
        metadata={"history": json.dumps(history)},
    )
    os.replace(partial, scratch / STATE)


def restore(
    scratch: Path,
    trained: Tensors,
    optimizer: Any,
    scaler: Any,
    sums: Tensor,
    take_buffers: Callable[[dict[str, Tensor]], None] = lambda buffers: None,
) -> tuple[int, list[Epoch]]:
    """Take back what an interrupted training left, if anything; returns the next step and the history.

    Raises:
        InfopruneError: the file is damaged or belongs to another training.
    """
    path = scratch / STATE
    if not path.is_file():
        return 0, []
    try:
        with safe_open(path, "pt") as file:
            history: list[Epoch] = json.loads(file.metadata()["history"])
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        with torch.no_grad():
            for name, value in trained.items():
                stored = tensors[f"trained.{name}"]
                if stored.shape != value.shape:
                    raise ValueError(f"{name} is {list(stored.shape)}, the tower needs {list(value.shape)}")
                value.copy_(stored)
                moments = {key: t for key, t in tensors.items() if key.rpartition(".")[0] == f"adamw.{name}"}
                optimizer.state[value] = {
                    # AdamW counts its steps on the CPU.
                    key.rpartition(".")[2]: moment if moment.ndim == 0 else moment.to(value.device)
                    for key, moment in moments.items()
                }
        take_buffers({key.removeprefix("buffer."): v for key, v in tensors.items() if key.startswith("buffer.")})
        if scaler is not None:
            scale, growth, backoff, interval, tracker = tensors["scaler"].tolist()
            scaler.load_state_dict(
                dict(zip(_SCALER, (scale, growth, backoff, int(interval), int(tracker)), strict=True))
            )
        sums.copy_(tensors["sums"])
        return int(tensors["step"]), history
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InfopruneError(
            f"{path}: not the state of this training ({reason[:200]}); delete it to train from the start"
        ) from error


def discard_state(scratch: Path) -> None:
    """Remove the training state; called when what was trained is itself written."""
    (scratch / STATE).unlink(missing_ok=True)
