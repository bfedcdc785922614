"""Batches: scenes of one size, and all questions of an image packed into one sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from infoprune_export.data import scenes
from infoprune_export.data.training.labels import NOTHING, patch_labels

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast


class SceneStream:
    """A fixed pool of scenes, rendered once, served in shuffled batches of one image size each."""

    def __init__(self, count: int, seed: int, sizes: Literal["square", "mixed"]) -> None:
        from rich.progress import track

        self._scenes: dict[tuple[int, int], list[scenes.Scene]] = {}
        self._pixels: dict[tuple[int, int], list[np.ndarray]] = {}
        for i in track(range(count), f"drawing {count} scenes"):
            scene, image = scenes.scene_at(seed, i, sizes)
            self._scenes.setdefault(image.size, []).append(scene)
            self._pixels.setdefault(image.size, []).append(np.asarray(image))
        self._rng = np.random.default_rng([seed, count])
        self._orders: dict[tuple[int, int], list[int]] = {size: [] for size in self._scenes}
        self._sizes = sorted(self._scenes)
        self._share = np.array([len(self._scenes[size]) for size in self._sizes]) / count

    def batch(self, count: int) -> tuple[list[scenes.Scene], Tensor]:
        """`count` scenes and their pixels, uint8 [count, 3, height, width]."""
        import torch

        size = self._sizes[int(self._rng.choice(len(self._sizes), p=self._share))]
        pool = self._scenes[size]
        if len(pool) < count:
            raise ValueError(f"{len(pool)} scenes of {size} pixels cannot fill a batch of {count}")
        if len(self._orders[size]) < count:
            self._orders[size] = self._rng.permutation(len(pool)).tolist()
        chosen = [self._orders[size].pop() for _ in range(count)]
        pixels = torch.from_numpy(np.stack([self._pixels[size][i] for i in chosen]))
        return [pool[i] for i in chosen], pixels.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Prefix:
    """What comes before the questions of an image."""

    ids: list[int]
    """Special tokens, with a placeholder for each visual token."""
    positions: np.ndarray
    """int64 [axes, len(ids)]: 1 axis of position ids, or 3 of M-RoPE."""
    image_start: int
    """Index of the first visual token."""
    visual_tokens: int

    @property
    def next_position(self) -> int:
        """Position, on every axis, of the first token behind the prefix."""
        return int(self.positions.max()) + 1


@dataclass(frozen=True)
class PackedQuestions:
    """Sequences of length L, padded on the right."""

    ids: Tensor
    """int64 [B, L]."""
    labels: Tensor
    """int64 [B, L], -100 outside answers."""
    weights: Tensor
    """float32 [B, L], of each token's loss."""
    mask: Tensor
    """Additive attention mask, float32 [B, 1, L, L]."""
    positions: Tensor
    """int64 [axes, B, L], in which every question follows the image directly."""

    def select(self, kept: Tensor) -> PackedQuestions:
        """The tokens at indices `kept`, int64 [B, T], with the positions they had."""
        import torch

        rows = torch.arange(len(kept))[:, None]
        mask = self.mask[rows[..., None], 0, kept[:, :, None], kept[:, None, :]][:, None]
        ids, labels, weights = (t[rows, kept] for t in (self.ids, self.labels, self.weights))
        return PackedQuestions(ids, labels, weights, mask, self.positions[:, rows, kept])


def pack_questions(
    tokenizer: PreTrainedTokenizerFast, questions: list[list[tuple[str, str, float]]], prefix: Prefix
) -> PackedQuestions:
    """Pack (question, answer, weight) lists, one list per image, behind each image's visual tokens.

    Each question attends to the prefix and to itself, never to another question.
    """
    import torch

    user, assistant = tokenizer.convert_tokens_to_ids(["<user>", "<assistant>"])
    axes, start = len(prefix.positions), len(prefix.ids)
    rows: list[list[list[Any]]] = []
    for asked in questions:
        ids, labels, weights, segments = list(prefix.ids), [-100] * start, [0.0] * start, [0] * start
        positions = [list(axis) for axis in prefix.positions.tolist()]
        for number, (question, answer, weight) in enumerate(asked, start=1):
            prompt = [user, *tokenizer(question).input_ids, assistant]
            reply = [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
            length = len(prompt) + len(reply)
            ids += prompt + reply
            labels += [-100] * len(prompt) + reply
            weights += [weight] * length
            segments += [number] * length
            for axis in positions:
                axis += range(prefix.next_position, prefix.next_position + length)
        rows.append([ids, labels, weights, segments, *positions])
    longest = max(len(row[0]) for row in rows)
    fills = (tokenizer.pad_token_id, -100, 0.0, -1, *[0] * axes)
    padded = [[row[k] + [fill] * (longest - len(row[k])) for row in rows] for k, fill in enumerate(fills)]
    input_ids, labels_, weights_, segments_, *positions_ = (torch.tensor(column) for column in padded)
    same = segments_[:, :, None] == segments_[:, None, :]
    visible = (same | (segments_[:, None, :] == 0)) & torch.ones(longest, longest).tril().bool()
    visible |= torch.eye(longest, dtype=torch.bool)
    mask = torch.zeros(len(rows), 1, longest, longest).masked_fill(~visible[:, None], -1e9)
    return PackedQuestions(input_ids, labels_, weights_, mask, torch.stack(positions_))


def background_left_out(batch: list[scenes.Scene], rng: np.random.Generator) -> Tensor:
    """Indices of the visual tokens that stay, ascending [B, T]: all objects and signs, a random part of the rest.

    T is the same for the whole batch, whose scenes have one size; every fourth batch keeps everything.
    """
    import torch

    labels = [patch_labels(scene) for scene in batch]
    background = [np.flatnonzero((rows[:, :5] == NOTHING).all(1)) for rows in labels]
    count = 0 if rng.random() < 0.25 else int(rng.integers(0, min(map(len, background)) + 1))
    everything = np.arange(len(labels[0]))
    kept = [np.setdiff1d(everything, rng.choice(places, count, replace=False)) for places in background]
    return torch.from_numpy(np.stack(kept))
