"""Recovery: what is left of the blocks learns to give the language model what the original tower gave it.

With ``d(f, t) = mean (f - t)^2 / var t``, the variance that of a channel over the batch, the loss is ``d`` of the
visual tokens as the language model takes them, plus `stream_weight` times the mean of ``d`` over the residual streams
behind all blocks; t is the original tower's. Only the blocks' parameters train, by AdamW without weight decay; the
learning rate rises linearly, then falls by half a cosine. The order of the data depends on seed and epoch alone:
whoever continues at a step sees what an undisturbed training sees.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from infoprune_export.data.samples import Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.models.calibration import inputs_of
from infoprune_export.models.tower import Form, VisionTower
from infoprune_export.models.vlm import VLM
from infoprune_export.recipe import RecoverySpec
from infoprune_export.recovery.weights import block_parameters
from infoprune_export.training.accelerator import check_precision, start_accelerator
from infoprune_export.training.recompute import recomputed
from infoprune_export.training.state import Epoch, restore, store

TERMS = ("distance", "stream")


@dataclass(frozen=True)
class Recovered:
    """What training ends with, on the CPU."""

    weights: dict[str, Tensor]
    """Every parameter of the blocks, as `recovery.weights` names them, fp32."""
    history: list[Epoch]
    """Per epoch: means of `TERMS`, of visual tokens and of streams (0 where switched off), unweighted; and at its end
    ``learning_rate``."""


@dataclass(frozen=True)
class Progress:
    """A finished step of `steps`, and its `TERMS`."""

    step: int
    steps: int
    terms: dict[str, float]


def check_recovery(spec: RecoverySpec, device: str) -> None:
    """Refuse what this device cannot train; nothing, where nothing is trained.

    Raises:
        InfopruneError: fp16 without a GPU.
    """
    if spec.method != "none":
        check_precision("recovery", spec.mixed_precision, device)


def recover(
    vlm: VLM,
    original: VisionTower,
    samples: Sequence[Sample],
    spec: RecoverySpec,
    *,
    seed: int,
    scratch: Path,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Recovered:
    """Train `vlm`'s compressed tower, in place, to give the visual tokens of `original`; see the module.

    `original` may share everything with it but the blocks. State is written to `scratch` every `checkpoint_steps` steps
    and after every epoch. A later call with the same arguments continues there and ends, on a CPU, with the same bits.

    Raises:
        InfopruneError: a tower that nothing was taken from, a device that cannot train so, a loss that is not finite,
            damaged state.
    """
    _check_compressed(vlm.tower, original)
    check_recovery(spec, vlm.device.type)
    accelerator = start_accelerator(spec.mixed_precision, vlm.device.type)
    parameters = block_parameters(vlm.tower)
    optimizer: Any = accelerator.prepare(
        torch.optim.AdamW(parameters.values(), lr=spec.learning_rate, weight_decay=0.0)
    )
    per_epoch = math.ceil(len(samples) / spec.batch_size)
    steps = spec.epochs * per_epoch
    sums = torch.zeros(len(TERMS), dtype=torch.float64)
    first, history = restore(scratch, parameters, optimizer, accelerator.scaler, sums)
    with _training(parameters.values()), recomputed(vlm, spec.gradient_checkpointing):
        for step in range(first, steps):
            epoch, place = divmod(step, per_epoch)
            rate = spec.learning_rate * schedule(step, steps, spec.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            order = np.random.default_rng([seed, epoch]).permutation(len(samples))
            chosen = order[place * spec.batch_size : (place + 1) * spec.batch_size]
            with accelerator.autocast():
                distance, stream = _distances(vlm, original, [samples[int(i)] for i in chosen], spec.stream_weight > 0)
            loss = distance + spec.stream_weight * stream
            if not math.isfinite(float(loss.detach())):
                raise InfopruneError(
                    f"recovery: the loss is not finite at step {step + 1} of {steps}; lower recovery.learning_rate = "
                    f"{spec.learning_rate} or use recovery.mixed_precision = 'no'"
                )
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            terms = {"distance": float(distance.detach()), "stream": float(stream.detach())}
            sums += torch.tensor([terms[name] for name in TERMS], dtype=torch.float64)
            ended = place + 1 == per_epoch
            if ended:
                means = (sums / per_epoch).tolist()
                history.append({**dict(zip(TERMS, means, strict=True)), "learning_rate": rate})
                sums.zero_()
            if ended or (step + 1) % spec.checkpoint_steps == 0:
                store(scratch, parameters, optimizer, accelerator.scaler, step + 1, sums, history)
            on_step(Progress(step + 1, steps, terms))
    return Recovered({name: value.detach().cpu().clone() for name, value in parameters.items()}, history)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate in step 0..steps - 1: up in a `warmup` share of them, then half a cosine to 0."""
    rising = math.floor(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def _check_compressed(tower: VisionTower, original: VisionTower) -> None:
    if tower.head_counts() == original.head_counts() and tower.ffn_shapes() == original.ffn_shapes():
        raise InfopruneError(
            "recovery: nothing was taken from this tower, so there is nothing to recover; remove heads or FFN neurons, "
            "or use recovery.method none"
        )


@contextlib.contextmanager
def _training(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters within; the model stays in evaluation mode, without dropout."""
    chosen = list(parameters)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(False)
            parameter.grad = None


def _distances(vlm: VLM, original: VisionTower, batch: Sequence[Sample], streams: bool) -> tuple[Tensor, Tensor]:
    """Both terms of the module's loss, scalars; the second is 0 where no `streams` are asked for."""
    planned = vlm.tower.plan(inputs_of(vlm, batch), Form())
    observed = range(len(original.blocks)) if streams else ()
    with torch.no_grad():
        # The embedding of pixels is the original's own.
        stream, context = original.embed(planned)
        wanted = original.run_blocks(stream, context, observed)
        target = original.assemble(wanted, planned)
    given = vlm.tower.run_blocks(stream, context, observed)
    distance = _relative(vlm.tower.assemble(given, planned), target)
    behind = [_relative(given.taps[block], wanted.taps[block]) for block in observed]
    return distance, torch.stack(behind).mean() if behind else torch.zeros_like(distance)


def _relative(actual: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance over the variance of a channel; [..., D] each, to a scalar in fp32."""
    actual, target = actual.float(), target.float()
    return (actual - target).square().mean() / target.flatten(0, -2).var(dim=0).mean()
