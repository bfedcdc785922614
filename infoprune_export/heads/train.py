"""Training the gates, interruptible after any epoch, and reading a head plan off them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from infoprune_export.data.vqa import Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.heads.gates import SpectralTerms, gated, head_grams
from infoprune_export.heads.plan import HeadPlan
from infoprune_export.models.calibration import TaskLoss
from infoprune_export.models.vlm import VLM
from infoprune_export.recipe import HeadsSpec

Epoch = dict[str, float]
_STATE = "training.safetensors"


def train_gates(
    vlm: VLM,
    samples: Sequence[Sample],
    spec: HeadsSpec,
    loss: TaskLoss,
    *,
    seed: int,
    scratch: Path,
    on_epoch: Callable[[int, Epoch], None] = lambda epoch, terms: None,
) -> tuple[Tensor, list[Epoch]]:
    """Train zeta [L, H] with the weights frozen; returns it with the mean of every loss term per epoch.

    ``paper``: L = task + alpha |zeta|_1 + beta eRank + gamma KS (paper A, equation 7). ``budgeted``: the penalty is
    alpha times the sum of gates, and KS is replaced by the Wasserstein distance of spectra.

    State is written to `scratch` after every epoch. A later call with the same arguments continues there and ends with
    the same bits, because the order of the data depends on seed and epoch alone.
    """
    counts = vlm.tower.head_counts()
    if len(set(counts)) != 1:
        raise InfopruneError(f"gates are trained on an unpruned tower; this one has {counts} heads per block")
    paper = spec.method == "paper"
    terms = SpectralTerms(
        head_grams(vlm, samples),
        [block.head_dim for block in vlm.tower.blocks],
        "ks" if paper else "wasserstein",
    )
    zeta = torch.full((len(counts), counts[0]), spec.initial_zeta, requires_grad=True)
    optimizer = torch.optim.AdamW([zeta], lr=spec.learning_rate, weight_decay=0.0)
    first, history = _restore(scratch, zeta, optimizer)
    steps = math.ceil(len(samples) / spec.batch_size)
    for epoch in range(first, spec.epochs):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(samples))
        sums: dict[str, float] = {}
        for step in range(steps):
            batch = [samples[i] for i in order[step * spec.batch_size : (step + 1) * spec.batch_size]]
            progress = (epoch * steps + step) / (spec.epochs * steps)
            optimizer.param_groups[0]["lr"] = spec.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
            gates = torch.sigmoid(zeta)
            with gated(vlm.tower, list(gates.to(vlm.device))):
                task = loss(vlm, batch, rng).cpu()
            rank, distance = terms(list(gates))
            sparsity = zeta.abs().sum() if paper else gates.sum()
            total = task + spec.alpha * sparsity + spec.beta * rank + spec.gamma * distance
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            for name, value in (("task", task), ("sparsity", sparsity), ("erank", rank), ("distance", distance)):
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / steps
        history.append({**sums, "mean_gate": float(torch.sigmoid(zeta.detach()).mean())})
        _store(scratch, zeta, optimizer, history)
        on_epoch(epoch, history[-1])
    return zeta.detach(), history


def plan_heads(zeta: Tensor, spec: HeadsSpec) -> HeadPlan:
    """Which heads trained gates [L, H] keep.

    ``paper``: gates of at least `threshold` (Algorithm 1). ``budgeted``: the largest, over all blocks, until `remove`
    of them are gone. The last block always keeps its best head, because the token prior is read from its attention.
    """
    blocks, heads = zeta.shape
    if spec.method == "paper":
        kept = torch.sigmoid(zeta) >= spec.threshold
    else:
        count = blocks * heads - math.floor(spec.remove * blocks * heads + 0.5)
        kept = torch.zeros(blocks * heads, dtype=torch.bool)
        # Stable, so that ties fall to the lowest index on every machine.
        kept[zeta.flatten().argsort(descending=True, stable=True)[:count]] = True
        kept = kept.view(blocks, heads)
    if not kept[-1].any():
        kept[-1, int(zeta[-1].argmax())] = True
        if spec.method == "budgeted" and kept.sum() > 1:
            ranked = zeta.flatten().argsort(descending=True, stable=True).tolist()
            last_kept = next(i for i in reversed(ranked) if kept.view(-1)[i] and i < (blocks - 1) * heads)
            kept.view(-1)[last_kept] = False
    return HeadPlan((heads,) * blocks, tuple(tuple(row.nonzero().flatten().tolist()) for row in kept))


def _store(scratch: Path, zeta: Tensor, optimizer: torch.optim.Optimizer, history: list[Epoch]) -> None:
    state: dict[str, Any] = optimizer.state[zeta]
    tensors = {"zeta": zeta.detach(), **{f"adamw.{name}": value for name, value in state.items()}}
    partial = scratch / f".{_STATE}"
    save_file(tensors, partial, metadata={"history": json.dumps(history)})
    os.replace(partial, scratch / _STATE)


def _restore(scratch: Path, zeta: Tensor, optimizer: torch.optim.Optimizer) -> tuple[int, list[Epoch]]:
    """Load what an interrupted training left, if anything; returns the next epoch and the history."""
    path = scratch / _STATE
    if not path.is_file():
        return 0, []
    with safe_open(path, "pt") as file:
        history: list[Epoch] = json.loads(file.metadata()["history"])
        with torch.no_grad():
            zeta.copy_(file.get_tensor("zeta"))
        names: list[str] = list(file.keys())
        optimizer.state[zeta] = {
            name.removeprefix("adamw."): file.get_tensor(name) for name in names if name.startswith("adamw.")
        }
    return len(history), history


def discard_state(scratch: Path) -> None:
    """Remove the training state; called when the trained gates themselves are written."""
    (scratch / _STATE).unlink(missing_ok=True)
