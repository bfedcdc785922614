"""Training the gates: one or several processes, any step resumable.

Only the gates train, so several processes share out each batch and sum one gradient of a few hundred numbers. The order
of the data depends on seed and epoch, questions and noise on seed, epoch and step: whoever continues at a step sees
what an undisturbed training sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from infoprune_export.data.samples import Question, Sample
from infoprune_export.errors import InfopruneError
from infoprune_export.heads.gates import gated, head_grams
from infoprune_export.heads.hard_concrete import HardConcreteGates
from infoprune_export.heads.objective import Gates, Place, SigmoidGates
from infoprune_export.heads.spectral import RollingSpectra, SpectralTerms
from infoprune_export.models.calibration import TaskLoss
from infoprune_export.models.tower import VisionTower
from infoprune_export.models.vlm import VLM
from infoprune_export.recipe import HeadsSpec
from infoprune_export.training.accelerator import check_precision
from infoprune_export.training.accelerator import start_accelerator as start
from infoprune_export.training.recompute import recomputed
from infoprune_export.training.state import Epoch, restore, store

TERMS = ("task", "sparsity", "erank", "distance")


@dataclass(frozen=True)
class Trained:
    """What training ends with, on the CPU."""

    scores: Tensor
    """[L, H], larger = keep; zeta of sigmoid gates, log alpha of hard-concrete ones."""
    gates: Tensor
    """[L, H] in [0, 1]."""
    history: list[Epoch]
    """Per epoch: means of `TERMS` (0 where switched off), and at its end ``learning_rate``, ``mean_gate`` and
    ``below_half``, the share of gates below .5, the paper's threshold."""


@dataclass(frozen=True)
class Progress:
    """A finished step of `steps`, and its loss terms."""

    step: int
    steps: int
    terms: dict[str, float]


def check_training(spec: HeadsSpec, device: str) -> None:
    """Refuse what this device cannot train.

    Raises:
        InfopruneError: fp16 without a GPU, or more processes than GPUs.
    """
    check_precision("heads", spec.mixed_precision, device)
    if device != "cpu" and spec.processes > (gpus := torch.cuda.device_count()):
        raise InfopruneError(f"heads.processes = {spec.processes}: this machine has {gpus} GPUs; use at most {gpus}")


def start_accelerator(spec: HeadsSpec, device: str) -> Accelerator:
    """An Accelerator for this device type, in this process or as one of several started by `launch`."""
    check_training(spec, device)
    return start(spec.mixed_precision, device)


def train_gates(
    vlm: VLM,
    original: VisionTower,
    samples: Sequence[Sample],
    spec: HeadsSpec,
    *,
    labelled: bool,
    seed: int,
    scratch: Path,
    on_step: Callable[[Progress], None] = lambda progress: None,
    accelerator: Accelerator | None = None,
) -> Trained:
    """Train the gates of `vlm`'s unpruned tower with all weights frozen; the module docstring says how.

    AdamW without weight decay, learning rate by half a cosine from its start to 0. Without labels the task loss is the
    distance to the features of `original`, a tower that shares no block with `vlm`'s.

    State is written to `scratch` every `checkpoint_steps` steps and after every epoch. A later call with the same
    arguments continues there and ends with the same bits.

    Raises:
        InfopruneError: a pruned tower, a device that cannot train so, a loss that is not finite, damaged state.
    """
    spec = spec.resolved()
    counts = vlm.tower.head_counts()
    if len(set(counts)) != 1:
        raise InfopruneError(f"gates are trained on an unpruned tower; this one has {counts} heads per block")
    accelerator = accelerator or start_accelerator(spec, vlm.device.type)
    share = (accelerator.process_index, accelerator.num_processes)
    gates = _gates_of(vlm, samples, spec, share, accelerator)
    optimizer: Any = accelerator.prepare(torch.optim.AdamW(gates.groups(), lr=spec.learning_rate, weight_decay=0.0))
    loss = TaskLoss(labelled, original, spec.questions_per_image)
    sums = torch.zeros(len(TERMS), dtype=torch.float64)
    per_epoch = math.ceil(len(samples) / spec.batch_size)
    steps = spec.epochs * per_epoch
    first, history = restore(scratch, gates.trained, optimizer, accelerator.scaler, sums, gates.restore)
    for step in range(first, steps):
        epoch, place = step // per_epoch, Place(step, steps, share, lambda tensor: accelerator.reduce(tensor, "sum"))
        rate = spec.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        batch = _draw_batch(samples, spec, seed, epoch, step % per_epoch)
        terms = _step(vlm, gates, optimizer, loss, batch, spec, place, accelerator, (seed, step), labelled)
        if not all(map(math.isfinite, terms.values())):
            raise InfopruneError(
                f"gate training: the loss is not finite at step {step + 1} of {steps} ({terms}); lower "
                f"heads.learning_rate = {spec.learning_rate} or use heads.mixed_precision = 'no'"
            )
        sums += torch.tensor([terms[name] for name in TERMS], dtype=torch.float64)
        ended = (step + 1) % per_epoch == 0
        if ended:
            history.append(_summary(sums / per_epoch, gates, rate))
            sums.zero_()
        if accelerator.is_main_process:
            if ended or (step + 1) % spec.checkpoint_steps == 0:
                store(
                    scratch,
                    gates.trained,
                    optimizer,
                    accelerator.scaler,
                    step=step + 1,
                    sums=sums,
                    history=history,
                    buffers=gates.buffers(),
                )
            on_step(Progress(step + 1, steps, terms))
    return Trained(gates.scores().cpu(), gates.gates().cpu(), history)


def _gates_of(
    vlm: VLM, samples: Sequence[Sample], spec: HeadsSpec, share: tuple[int, int], accelerator: Accelerator
) -> Gates:
    blocks = vlm.tower.blocks
    shape = (len(blocks), blocks[0].num_heads)
    if spec.method == "hard_concrete":
        return HardConcreteGates(shape, spec.remove, vlm.device)
    spectra = None
    if spec.beta or spec.gamma:
        distance = spec.distance if spec.gamma and spec.distance != "auto" else None
        grams = head_grams(vlm, samples, share=share, reduce=lambda tensor: accelerator.reduce(tensor, "sum"))
        terms = SpectralTerms(grams, [block.head_dim for block in blocks], distance, rank=spec.beta > 0)
        spectra = RollingSpectra(terms, shape, spec.spectral_blocks, spec.beta, spec.gamma)
    return SigmoidGates(spec, shape, spectra, vlm.device)


def _draw_batch(samples: Sequence[Sample], spec: HeadsSpec, seed: int, epoch: int, step: int) -> list[Sample]:
    """A step's images, each with the questions that are asked about it this time."""
    order = np.random.default_rng([seed, epoch]).permutation(len(samples))
    rng = np.random.default_rng([seed, epoch, step])
    batch = []
    for index in order[step * spec.batch_size : (step + 1) * spec.batch_size]:
        sample = samples[index]
        asked = rng.choice(len(sample.questions), min(spec.questions_per_image, len(sample.questions)), replace=False)
        batch.append(replace(sample, questions=tuple(sample.questions[int(i)] for i in asked)))
    return batch


def _step(
    vlm: VLM,
    gates: Gates,
    optimizer: Any,
    loss: TaskLoss,
    batch: Sequence[Sample],
    spec: HeadsSpec,
    place: Place,
    accelerator: Accelerator,
    seed: tuple[int, int],
    labelled: bool,
) -> dict[str, float]:
    """One step of the optimizer; the terms of the whole batch."""
    # A third number tells the noise from the questions, which are drawn from two and an epoch's step.
    opened = gates.draw(np.random.default_rng([*seed, 0, 1]))
    total, terms = gates.regularise(opened, place)
    # The scaler of fp16 wants a gradient of every process, one without images too.
    total = total + 0.0 * opened.sum()
    task = torch.zeros((), device=opened.device)
    index, count = place.share
    own = list(batch)[index::count]
    with gated(vlm.tower, list(opened)), recomputed(vlm, spec.gradient_checkpointing):
        if own and spec.task_weight:
            part = _weight(vlm, own, labelled) / _weight(vlm, batch, labelled)
            with accelerator.autocast():
                task = part * loss(vlm, own, np.random.default_rng(0)).float()
            total = total + spec.task_weight * task
        optimizer.zero_grad()
        accelerator.backward(total)
    for tensor in gates.trained.values():
        if tensor.grad is not None:
            tensor.grad = place.reduce(tensor.grad)
    optimizer.step()
    return {"task": float(place.reduce(task.detach())), **terms}


def _weight(vlm: VLM, samples: Sequence[Sample], labelled: bool) -> float:
    """What a share's mean loss counts in the batch's: tokens of its answers, or images without labels.

    Without labels this is exact only up to the features' variance, which each share takes over its own images.
    """
    if not labelled:
        return len(samples)
    tokenizer = vlm.processor.tokenizer

    def length(question: Question) -> int:
        answer = max(question.answers, key=question.answers.count)
        return len(tokenizer(answer, add_special_tokens=False).input_ids) + 1

    return sum(length(question) for sample in samples for question in sample.questions)


def _summary(means: Tensor, gates: Gates, rate: float) -> Epoch:
    opened = gates.gates()
    return {
        **dict(zip(TERMS, means.tolist(), strict=True)),
        "learning_rate": rate,
        "mean_gate": float(opened.mean()),
        "below_half": float((opened < 0.5).float().mean()),
    }
