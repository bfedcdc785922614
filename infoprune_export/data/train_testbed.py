"""Train the shipped testbed checkpoint from nothing: ``python -m infoprune_export.data.train_testbed OUTPUT``.

Four stages, because a VLM of this size does not learn to see from answers alone:

1. The vision tower learns what every patch shows (shape, colour, word, digits, position) and, at [CLS], what the
   image holds. The label heads are thrown away afterwards.
2. The whole model learns to answer. All questions of an image share its visual tokens in one packed sequence: each
   question attends to the image and to itself, never to another question.
3. The same on new scenes with the tower frozen: reading numbers and relations is learned late, and by the decoder.
4. The same once more with a random part of the background tokens left out (never a token of an object or a sign). A
   decoder that has only ever seen 64 visual tokens counts objects by their share of all tokens, which no large model
   trained on text of every length does; without this stage any selection, good or bad, loses four points on counting.

About 70 minutes on one CPU core. What a stage ends with is kept beside the output, in fp16 like the result (4.3 MB), so
an interrupted run starts again at the stage it was in.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from infoprune_export.data import scenes, testbed

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

GRID = scenes.IMAGE_SIZE // 14
_PAIRS = [(color, shape) for color in scenes.COLORS for shape in scenes.SHAPES]
# Classes per patch label; the last class of the first five means "nothing of this kind here".
_PATCH_LABELS = {"shape": 7, "color": 8, "word": 13, "tens": 11, "ones": 11, "column": GRID, "row": GRID}
_IMAGE_LABELS = len(_PAIRS) + len(scenes.WORDS) + 20
_CAPTION = "Describe the image."
_CAPTION_WEIGHT = 0.35


# ── Labels ───────────────────────────────────────────────────────────────────


def patch_labels(scene: scenes.Scene) -> np.ndarray:
    """int64 [GRID * GRID, 7]: for each patch the classes of `_PATCH_LABELS`, from the object that covers it most."""
    patch = scenes.IMAGE_SIZE / GRID
    cells = np.arange(GRID * GRID)
    x, y = (cells % GRID + 0.5) * patch, (cells // GRID + 0.5) * patch
    labels = np.tile(np.array([6, 7, 12, 10, 10]), (len(cells), 1))
    best = np.full(len(cells), 2.0)
    for item in scene.items:
        overlap = item.radius + patch / 2 - np.maximum(abs(x - item.x), abs(y - item.y))
        hit = overlap > best
        labels[hit, 0] = scenes.SHAPES.index(item.shape)
        labels[hit, 1] = list(scenes.COLORS).index(item.color)
        best[hit] = overlap[hit]
    if (sign := scene.sign) is not None:
        hit = (abs(x - sign.x) < (sign.width + patch) / 2 - 2) & (abs(y - sign.y) < (sign.height + patch) / 2 - 2)
        if sign.is_number:
            labels[hit, 3], labels[hit, 4] = int(sign.text[0]), int(sign.text[1])
        else:
            labels[hit, 2] = scenes.WORDS.index(sign.text)
    return np.concatenate([labels, (cells % GRID)[:, None], (cells // GRID)[:, None]], 1)


def image_labels(scene: scenes.Scene) -> np.ndarray:
    """float32 [_IMAGE_LABELS]: which colour-shape pairs, words and digits are in the image."""
    labels = np.zeros(_IMAGE_LABELS, np.float32)
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


# ── Batches ──────────────────────────────────────────────────────────────────


class SceneStream:
    """A fixed pool of scenes, rendered once, served in shuffled batches."""

    def __init__(self, processor: LlavaProcessor, count: int, seed: int) -> None:
        from rich.progress import track

        self.scenes: list[scenes.Scene] = []
        self._pixels = np.empty((count, scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3), np.uint8)
        for i in track(range(count), f"drawing {count} scenes"):
            scene, image = scenes.scene_at(seed, i)
            self.scenes.append(scene)
            self._pixels[i] = np.asarray(image)
        self._rng = np.random.default_rng([seed, count])
        self._order: list[int] = []
        self._mean = np.array(processor.image_processor.image_mean, np.float32)
        self._std = np.array(processor.image_processor.image_std, np.float32)

    def batch(self, size: int) -> tuple[list[scenes.Scene], Tensor]:
        """`size` scenes and their normalised pixels, float32 [size, 3, S, S]."""
        import torch

        if len(self._order) < size:
            self._order = self._rng.permutation(len(self.scenes)).tolist()
        chosen = [self._order.pop() for _ in range(size)]
        pixels = (self._pixels[chosen].astype(np.float32) / 255 - self._mean) / self._std
        return [self.scenes[i] for i in chosen], torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def pack_questions(
    processor: LlavaProcessor, questions: list[list[tuple[str, str, float]]], visual_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pack (question, answer, weight) lists, one list per image, behind each image's visual tokens.

    Returns input_ids [B, L], labels [B, L] (-100 outside answers), weights [B, L], an additive attention mask
    [B, 1, L, L] and position_ids [B, L] in which every question follows the image directly.
    """
    import torch

    tokenizer = processor.tokenizer
    user, assistant = tokenizer.convert_tokens_to_ids(["<user>", "<assistant>"])
    prefix = [tokenizer.bos_token_id] + [processor.image_token_id] * visual_tokens
    rows = []
    for asked in questions:
        ids, labels, weights = list(prefix), [-100] * len(prefix), [0.0] * len(prefix)
        segments, positions = [0] * len(prefix), list(range(len(prefix)))
        for number, (question, answer, weight) in enumerate(asked, start=1):
            prompt = [user, *tokenizer(question).input_ids, assistant]
            reply = [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
            ids += prompt + reply
            labels += [-100] * len(prompt) + reply
            weights += [weight] * (len(prompt) + len(reply))
            segments += [number] * (len(prompt) + len(reply))
            positions += range(len(prefix), len(prefix) + len(prompt) + len(reply))
        rows.append((ids, labels, weights, segments, positions))
    length = max(len(row[0]) for row in rows)
    fills = (tokenizer.pad_token_id, -100, 0.0, -1, 0)
    columns = [torch.tensor([row[k] + [fills[k]] * (length - len(row[k])) for row in rows]) for k in range(5)]
    input_ids, labels_, weights_, segments_, positions_ = columns
    same = segments_[:, :, None] == segments_[:, None, :]
    visible = (same | (segments_[:, None, :] == 0)) & torch.ones(length, length).tril().bool()
    visible |= torch.eye(length, dtype=torch.bool)
    mask = torch.zeros(len(rows), 1, length, length).masked_fill(~visible[:, None], -1e9)
    return input_ids, labels_, weights_, mask, positions_


# ── Training ─────────────────────────────────────────────────────────────────


def vision_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """``hidden_states[-2]`` [B, 1 + N, D] with [CLS], without running the unused last block."""
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[: model.config.vision_feature_layer + 1]:
        hidden = layer(hidden, attention_mask=None)
    return hidden


def _optimizers(modules: list[tuple[torch.nn.Module, float]], lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for the rest. Each module comes with a factor on its rates."""
    import torch

    muon, adam = [], []
    for module, factor in modules:
        named = list(module.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and "layers." in name]
        rest = [p for name, p in named if not (p.ndim == 2 and "layers." in name)]
        if matrices:
            muon.append({"params": matrices, "lr": muon_lr * factor})
        adam.append({"params": rest, "lr": lr * factor})
    return [
        torch.optim.Muon(muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adam, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def _run(name: str, steps: int, optimizers: list[torch.optim.Optimizer], loss_of_step: Any) -> None:
    """Cosine schedule with warm-up, gradient clipping, a progress line with the running loss."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    average = None
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
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            progress.update(task, advance=1, loss=f"{average:.3f}")
            if (step + 1) % 250 == 0:
                progress.console.print(f"{name}: step {step + 1}, loss {average:.4f}")


def train_tower(
    model: LlavaForConditionalGeneration, stream: SceneStream, steps: int, batch_size: int, lr: float, muon_lr: float
) -> None:
    """Stage 1: cross-entropy on patch labels plus binary cross-entropy on image labels, in place."""
    import torch
    from torch.nn import functional as F

    width = model.config.vision_config.hidden_size
    patch_head = torch.nn.Linear(width, sum(_PATCH_LABELS.values()))
    image_head = torch.nn.Linear(width, _IMAGE_LABELS)

    def loss_of_step() -> Tensor:
        batch, pixels = stream.batch(batch_size)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = vision_features(model, pixels)
            patches, image = patch_head(hidden[:, 1:]).float(), image_head(hidden[:, 0]).float()
        targets = torch.from_numpy(np.stack([patch_labels(scene) for scene in batch]))
        loss = torch.zeros(())
        for column, (logits, classes) in enumerate(
            zip(patches.split(list(_PATCH_LABELS.values()), dim=-1), _PATCH_LABELS.values(), strict=True)
        ):
            target = targets[..., column].flatten()
            # Most patches are background: without the discount "nothing here" would drown the rest.
            weight = torch.where(target == classes - 1, 0.15, 1.0) if column < 5 else torch.ones(len(target))
            each = F.cross_entropy(logits.flatten(0, 1), target, reduction="none")
            loss = loss + (each * weight).sum() / weight.sum() / len(_PATCH_LABELS)
        present = torch.from_numpy(np.stack([image_labels(scene) for scene in batch]))
        return loss + 1.5 * F.binary_cross_entropy_with_logits(image, present)

    modules = [(model.model.vision_tower, 1.0), (patch_head, 1.0), (image_head, 1.0)]
    _run("stage 1, tower", steps, _optimizers(modules, lr, muon_lr), loss_of_step)


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


def background_left_out(batch: list[scenes.Scene], rng: np.random.Generator) -> Tensor:
    """Indices of the visual tokens that stay, ascending [B, T]: all objects and signs, a random part of the rest.

    T is the same for the whole batch; every fourth batch keeps everything.
    """
    import torch

    nothing = np.array([6, 7, 12, 10, 10])
    background = [np.flatnonzero((patch_labels(scene)[:, :5] == nothing).all(1)) for scene in batch]
    count = 0 if rng.random() < 0.25 else int(rng.integers(0, min(map(len, background)) + 1))
    everything = np.arange(GRID * GRID)
    kept = [np.setdiff1d(everything, rng.choice(places, count, replace=False)) for places in background]
    return torch.from_numpy(np.stack(kept))


def train_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    stream: SceneStream,
    steps: int,
    batch_size: int,
    stage: AnswerStage,
) -> None:
    """Stages 2 to 4: next-token loss on the answers of seven questions and a caption per image, in place."""
    import torch
    from torch.nn import functional as F

    rng = np.random.default_rng(stage.seed)
    model.model.vision_tower.requires_grad_(stage.tower_factor > 0)

    def loss_of_step() -> Tensor:
        batch, pixels = stream.batch(batch_size)
        asked = [
            [(q.text, q.answer, 1.0) for q in scenes.ask(scene, rng, 7)] + [(_CAPTION, caption(scene), _CAPTION_WEIGHT)]
            for scene in batch
        ]
        ids, labels, weights, mask, positions = pack_questions(processor, asked, GRID * GRID)
        with torch.autocast("cpu", torch.bfloat16):
            visual = model.model.multi_modal_projector(vision_features(model, pixels)[:, 1:])
            embeds = model.get_input_embeddings()(ids)
            embeds = torch.cat([embeds[:, :1], visual.to(embeds.dtype), embeds[:, 1 + visual.shape[1] :]], dim=1)
            if stage.drop_background:
                text = torch.arange(1 + GRID * GRID, ids.shape[1]).expand(len(batch), -1)
                kept = torch.cat(
                    [torch.zeros(len(batch), 1, dtype=torch.long), 1 + background_left_out(batch, rng), text], dim=1
                )
                rows = torch.arange(len(batch))[:, None]
                embeds, labels, weights, positions = (t[rows, kept] for t in (embeds, labels, weights, positions))
                mask = mask[rows[..., None], 0, kept[:, :, None], kept[:, None, :]][:, None]
            hidden = model.model.language_model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
            answered = labels[:, 1:] != -100
            logits = model.lm_head(hidden[:, :-1][answered]).float()
        weight = weights[:, :-1][answered]
        return (F.cross_entropy(logits, labels[:, 1:][answered], reduction="none") * weight).sum() / weight.sum()

    modules: list[tuple[torch.nn.Module, float]] = [
        (model.model.multi_modal_projector, 1.0),
        (model.model.language_model, 1.0),
    ]
    if stage.tower_factor > 0:
        modules.append((model.model.vision_tower, stage.tower_factor))
    _run(stage.name, steps, _optimizers(modules, stage.lr, stage.muon_lr), loss_of_step)


@click.command(help=__doc__)
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--tower-steps", default=3000, show_default=True)
@click.option("--answer-steps", default=2400, show_default=True)
@click.option("--decoder-steps", default=2400, show_default=True)
@click.option("--sparse-steps", default=1200, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--pool", default=16000, show_default=True, help="Training images of a stage; drawn once, reshuffled.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
@click.option("--seed", default=1, show_default=True)
def main(
    output: Path,
    tower_steps: int,
    answer_steps: int,
    decoder_steps: int,
    sparse_steps: int,
    batch_size: int,
    pool: int,
    threads: int,
    seed: int,
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from safetensors.torch import load_model, save_model

    torch.set_num_threads(threads)
    processor, model = testbed.build_processor(), testbed.build_model(seed=seed)
    model.set_attn_implementation("eager")  # packed masks have no fast SDPA kernel on the CPU
    model.train()
    output.parent.mkdir(parents=True, exist_ok=True)

    def answers(steps: int, stage: AnswerStage) -> Callable[[SceneStream], None]:
        return lambda stream: train_answers(model, processor, stream, steps, batch_size, stage)

    stages: tuple[tuple[int, int, Callable[[SceneStream], None]], ...] = (
        (tower_steps, seed, lambda stream: train_tower(model, stream, tower_steps, batch_size, 2e-3, 3e-3)),
        (answer_steps, seed, answers(answer_steps, ANSWERS)),
        (decoder_steps, seed + 1, answers(decoder_steps, DECODER)),
        (sparse_steps, seed + 2, answers(sparse_steps, SPARSE)),
    )
    for number, (steps, stream_seed, train) in enumerate(stages, start=1):
        finished = output.with_name(f"{output.name}.stage{number}-{steps}-{seed}.safetensors")
        if not finished.exists():
            train(SceneStream(processor, pool, stream_seed))
            save_model(model.half(), str(finished))
            model.float()
        load_model(model, str(finished))
        model.float()
    model.half().save_pretrained(output)
    processor.save_pretrained(output)


if __name__ == "__main__":
    main()
