"""The training loops: the tower on labels, the whole model on answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from infoprune_export.data import scenes
from infoprune_export.data.training.batches import SceneStream, background_left_out, pack_questions
from infoprune_export.data.training.labels import (
    IMAGE_LABELS,
    PATCH_LABELS,
    caption,
    grid_of,
    image_labels,
    patch_labels,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from infoprune_export.data.training.families import Family

_CAPTION = "Describe the image."
_CAPTION_WEIGHT = 0.35
# Muon trains the matrices of modules with one of these in their names.
_MATRICES = ("layers.", "blocks.", "merger.")


@dataclass(frozen=True)
class AnswerStage:
    """What tells stages 2 to 4 apart; rates are AdamW's and Muon's."""

    name: str
    seed: int
    lr: float
    muon_lr: float
    tower_factor: float
    """On both rates, for the vision tower; 0 freezes it."""
    drop_background: bool = False


ANSWERS = AnswerStage("stage 2, answers", seed=7, lr=1.5e-3, muon_lr=6e-3, tower_factor=0.3)
DECODER = AnswerStage("stage 3, decoder", seed=8, lr=1.5e-3, muon_lr=6e-3, tower_factor=0)
SPARSE = AnswerStage("stage 4, fewer tokens", seed=9, lr=8e-4, muon_lr=3e-3, tower_factor=0, drop_background=True)


def normalise(family: Family, pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to float32, as the family's image processor does it."""
    import torch

    images = family.processor.image_processor
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.image_mean, images.image_std))
    return (pixels.float() / 255 - mean) / std


def _optimizers(modules: list[tuple[torch.nn.Module, float]], lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for the rest. Each module comes with a factor on its rates."""
    import torch

    muon, adam = [], []
    for module, factor in modules:
        named = list(module.named_parameters())
        matrices = {name for name, p in named if p.ndim == 2 and any(part in name for part in _MATRICES)}
        if matrices:
            muon.append({"params": [p for name, p in named if name in matrices], "lr": muon_lr * factor})
        adam.append({"params": [p for name, p in named if name not in matrices], "lr": lr * factor})
    return [
        torch.optim.Muon(muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adam, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def _run(name: str, steps: int, optimizers: list[torch.optim.Optimizer], loss_of_step: Callable[[], Tensor]) -> float:
    """Cosine schedule with warm-up, gradient clipping, a progress line. Returns the running loss, as all loops do."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    average = math.nan
    with Progress(
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
    ) as progress:
        task = progress.add_task(name, total=steps, loss="")
        for step in range(steps):
            scale = min(1.0, (step + 1) / 60) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            for optimizer, rates in zip(optimizers, base, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * scale
            loss = loss_of_step()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
            progress.update(task, advance=1, loss=f"{average:.3f}")
            if (step + 1) % 100 == 0:
                progress.console.print(f"{name}: step {step + 1}, loss {average:.4f}")
    return average


def train_tower(
    family: Family, stream: SceneStream, steps: int, batch_size: int, lr: float = 2e-3, muon_lr: float = 3e-3
) -> float:
    """Stage 1: cross-entropy on patch labels plus binary cross-entropy on image labels, in place."""
    import torch
    from torch.nn import functional as F

    patch_head = torch.nn.Linear(family.feature_size, sum(PATCH_LABELS.values()))
    image_head = torch.nn.Linear(family.feature_size, IMAGE_LABELS)

    def loss_of_step() -> Tensor:
        batch, pixels = stream.batch(batch_size)
        with torch.autocast("cpu", torch.bfloat16):
            tokens, images = family.features(normalise(family, pixels))
            patches, image = patch_head(tokens).float(), image_head(images).float()
        targets = torch.from_numpy(np.stack([patch_labels(scene) for scene in batch]))
        loss = torch.zeros(())
        for column, (logits, classes) in enumerate(
            zip(patches.split(list(PATCH_LABELS.values()), dim=-1), PATCH_LABELS.values(), strict=True)
        ):
            target = targets[..., column].flatten()
            # Most patches are background: without the discount "nothing here" would drown the rest.
            weight = torch.where(target == classes - 1, 0.15, 1.0) if column < 5 else torch.ones(len(target))
            each = F.cross_entropy(logits.flatten(0, 1), target, reduction="none")
            loss = loss + (each * weight).sum() / weight.sum() / len(PATCH_LABELS)
        present = torch.from_numpy(np.stack([image_labels(scene) for scene in batch]))
        return loss + 1.5 * F.binary_cross_entropy_with_logits(image, present)

    modules = [(family.tower, 1.0), (patch_head, 1.0), (image_head, 1.0)]
    return _run("stage 1, tower", steps, _optimizers(modules, lr, muon_lr), loss_of_step)


def train_answers(family: Family, stream: SceneStream, steps: int, batch_size: int, stage: AnswerStage) -> float:
    """Stages 2 to 4: next-token loss on the answers of seven questions and a caption per image, in place."""
    import torch
    from torch.nn import functional as F

    rng = np.random.default_rng(stage.seed)
    model = family.model
    family.tower.requires_grad_(stage.tower_factor > 0)

    def loss_of_step() -> Tensor:
        batch, pixels = stream.batch(batch_size)
        asked = [
            [(q.text, q.answer, 1.0) for q in scenes.ask(scene, rng, 7)] + [(_CAPTION, caption(scene), _CAPTION_WEIGHT)]
            for scene in batch
        ]
        prefix = family.prefix(*grid_of(batch[0]))
        start, end = prefix.image_start, prefix.image_start + prefix.visual_tokens
        packed = pack_questions(family.processor.tokenizer, asked, prefix)
        with torch.autocast("cpu", torch.bfloat16):
            visual = family.visual_tokens(normalise(family, pixels))
            embeds = model.get_input_embeddings()(packed.ids)
            embeds = torch.cat([embeds[:, :start], visual.to(embeds.dtype), embeds[:, end:]], dim=1)
            if stage.drop_background:
                before, after = (
                    torch.arange(*span).expand(len(batch), -1) for span in ((0, start), (end, packed.ids.shape[1]))
                )
                kept = torch.cat([before, start + background_left_out(batch, rng), after], dim=1)
                embeds, packed = embeds[torch.arange(len(batch))[:, None], kept], packed.select(kept)
            positions = packed.positions if len(packed.positions) > 1 else packed.positions[0]
            hidden = model.model.language_model(
                inputs_embeds=embeds, attention_mask=packed.mask, position_ids=positions, use_cache=False
            ).last_hidden_state
            answered = packed.labels[:, 1:] != -100
            logits = model.lm_head(hidden[:, :-1][answered]).float()
        weight = packed.weights[:, :-1][answered]
        losses = F.cross_entropy(logits, packed.labels[:, 1:][answered], reduction="none")
        return (losses * weight).sum() / weight.sum()

    modules: list[tuple[torch.nn.Module, float]] = [(model.model.language_model, 1.0)]
    if family.projector is not None:
        modules.insert(0, (family.projector, 1.0))
    if stage.tower_factor > 0:
        modules.append((family.tower, stage.tower_factor))
    return _run(stage.name, steps, _optimizers(modules, stage.lr, stage.muon_lr), loss_of_step)
